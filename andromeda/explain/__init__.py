"""Why the model predicts what it predicts: what each layer would say, where each head looks, which part adds how much to a
logit, and which word of the text it rests on. Every figure is part of an identity that is checked each time (docs/explain.md)."""

from andromeda.explain.explain_page import write_explanation
from andromeda.explain.explanation import ExplainRequest, Explanation, explain

__all__ = ["ExplainRequest", "Explanation", "explain", "write_explanation"]
