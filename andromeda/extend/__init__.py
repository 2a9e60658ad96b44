"""Extending the context of a trained model: a new run from an existing one's weights, evaluated before and after training."""
