"""The explanation as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from andromeda.explain.explanation import Explanation


def figures(e: Explanation) -> dict[str, Any]:
    """Everything but the maps, which the page has."""
    probabilities = e.seen.logits[0, e.position].softmax(-1)
    top = probabilities.topk(min(10, len(probabilities)))
    return {
        "tokens": e.tokens,
        "position": e.position,
        "target": e.spell(e.target),
        "against": e.spell(e.beside),
        "prediction": [{"token": e.spell(int(i)), "probability": float(p)} for p, i in zip(top.values, top.indices, strict=True)],
        "lens": {"target": e.lens.target.tolist(), "entropy": e.lens.entropy.tolist(), "first": e.lens.tokens[..., 0].tolist()},
        "direct": e.direct
        and {
            "parts": [{**part._asdict(), "logit": e.direct.parts[part], "lead": e.direct.lead[part]} for part in e.direct.parts],
            "bias": e.direct.bias,
            "raw": e.direct.raw,
            "logit": e.direct.logit,
        },
        "gradients": e.gradients
        and {
            "shares": e.gradients.shares.tolist(),
            "logit": e.gradients.logit,
            "baseline": e.gradients.baseline,
            "steps": e.gradients.steps,
            "gap": e.gradients.gap,
        },
        "checks": [asdict(check) | {"holds": check.holds} for check in e.checks],
        "refused": e.refused,
    }
