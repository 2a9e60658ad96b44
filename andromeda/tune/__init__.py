"""Adapting a trained model: chat data and templates, supervised fine-tuning."""
