"""Techniques on and off at an equal budget, over several seeds: what each is worth, how sure that is, and what it costs."""
