"""Stretching a trained model over a longer context: a new run from an old one's weights, measured before and after."""
