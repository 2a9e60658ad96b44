"""The model: every technique is a part that fits a slot."""
