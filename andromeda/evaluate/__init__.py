"""How good a model is: measures on text."""
