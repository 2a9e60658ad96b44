"""Ablations: variants of a configuration at an equal budget over several seeds, with effect size, significance and cost."""
