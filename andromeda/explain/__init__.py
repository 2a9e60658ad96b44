"""Explanation of a prediction: logit lens, attention maps, direct logit attribution, input attribution.

Every figure is part of an identity that is checked each time (docs/explain.md).
"""

from andromeda.explain.explain_page import write_explanation
from andromeda.explain.explanation import ExplainRequest, Explanation, explain

__all__ = ["ExplainRequest", "Explanation", "explain", "write_explanation"]
