"""An explanation of one prediction: four views, and the identities that relate them to the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from andromeda.api import Andromeda
from andromeda.explain.integrated_gradients import TokenAttributions, integrated_gradients
from andromeda.explain.residual_decomposition import DirectAttribution, direct_attribution
from andromeda.explain.trace import ForwardTrace, LogitLens, logit_lens, trace
from andromeda.generate.prompts import encode
from andromeda.utils.errors import RequestError
from andromeda.utils.formatting import format_percent
from andromeda.utils.untrusted import printable

MAX_TOKENS = 256
"""Longest text in tokens; an attention map has their square."""
MAX_MAP_CELLS = 6_000_000
"""Attention weights on one page, a byte each."""


@dataclass(frozen=True)
class ExplainRequest:
    """What to explain."""

    text: str
    target: str = ""
    """The token whose logit is explained, as text; empty is the most likely one."""
    against: str = ""
    """The token it is compared with; empty is the most likely other one."""
    position: int = -1
    """The token after which the prediction is made; -1 is the last, 0 the end-of-text token that begins the text."""
    layers: tuple[int, ...] = ()
    """Layers (from 1) whose attention maps are shown; empty is all."""


@dataclass(frozen=True)
class IdentityCheck:
    """An identity and its numerical error."""

    name: str
    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Explanation:
    """Everything that the page shows."""

    run: Path
    model: Andromeda
    step: int | None
    request: ExplainRequest
    tokens: list[str]
    position: int
    target: int
    against: int
    seen: ForwardTrace
    lens: LogitLens
    direct: DirectAttribution | None
    gradients: TokenAttributions | None
    checks: list[IdentityCheck]
    refused: dict[str, str] = field(default_factory=dict)
    """Views that are not available (direct, gradients, attention), with the reason as a sentence."""

    def spell(self, token: int) -> str:
        """A token as text."""
        return spell(self.model, token)

    @property
    def maps(self) -> dict[int, Tensor]:
        """Attention weights (H, T, T) of the layers shown, by index from 0."""
        shown = self.request.layers or range(1, len(self.seen.layers) + 1)
        found = {number - 1: self.seen.layers[number - 1].weights for number in shown}
        return {number: weights[0] for number, weights in found.items() if weights is not None}


def explain(run: Path, model: Andromeda, request: ExplainRequest, step: int | None = None) -> Explanation:
    """Explain what `model` (in float64, from the run folder `run`) predicts after a text. Raises RequestError, one sentence."""
    ids = torch.tensor([_ids(model, request)], device=model.head.weight.device)
    position = _position(request, ids.shape[1])
    _check_layers(model, request, ids.shape[1])
    seen = trace(model, ids)
    logits = seen.logits[0, position]
    target = _token(model, request.target, "target") if request.target else int(logits.argmax())
    others = logits.clone()
    others[target] = -torch.inf
    against = _token(model, request.against, "against") if request.against else int(others.argmax())
    if against == target:
        raise RequestError("The token given with --against is the target itself: give another one.")
    refused: dict[str, str] = {}
    try:
        shares = direct_attribution(model, seen, position, target, against)
    except RequestError as error:
        shares, refused["direct"] = None, str(error)
    try:
        gradients = _gradients(model, ids, position, target)
    except RequestError as error:
        gradients, refused["gradients"] = None, str(error)
    looked = logit_lens(model, seen, target)
    blind = [str(i + 1) for i, layer in enumerate(seen.layers) if layer.weights is None]
    if blind:
        refused["attention"] = f"There is no map of layer {', '.join(blind)}: the mixer does not average values there."
    tokens = [spell(model, int(i)) for i in ids[0]]
    checks = _checks(model, seen, looked, shares, gradients)
    return Explanation(run, model, step, request, tokens, position, target, against, seen, looked, shares, gradients, checks, refused)


def spell(model: Andromeda, token: int) -> str:
    """A token as text; a special token by its name."""
    if model.tokenizer is None:
        return str(token)
    text = model.tokenizer.decode([token]) if token < model.tokenizer.vocab_size else ""
    names = {number: name for name, number in model.tokenizer.special_tokens.items()}
    return text or names.get(token, f"<{token}>")


def _ids(model: Andromeda, request: ExplainRequest) -> list[int]:
    bos = None if model.tokenizer is None else model.tokenizer.bos
    ids = encode(request.text, model.tokenizer, bos, model.config.vocab_size)
    most = min(MAX_TOKENS, model.config.max_seq_len)
    if len(ids) > most:
        raise RequestError(f"The text has {len(ids)} tokens, and at most {most} can be explained on one page: shorten it.")
    return ids


def _position(request: ExplainRequest, length: int) -> int:
    position = length - 1 if request.position == -1 else request.position
    if not 0 <= position < length:
        raise RequestError(f"--position {request.position} is not in the text, which has tokens 0 to {length - 1}.")
    return position


def _check_layers(model: Andromeda, request: ExplainRequest, length: int) -> None:
    depth, heads = model.config.num_layers, model.config.attention.num_heads
    wrong = [number for number in request.layers if not 1 <= number <= depth]
    if wrong:
        raise RequestError(f"There is no layer {wrong[0]}: --layers takes numbers from 1 to {depth}.")
    cells = len(request.layers or range(depth)) * heads * length**2
    if cells > MAX_MAP_CELLS:
        most = max(1, MAX_MAP_CELLS // (heads * length**2))
        raise RequestError(
            f"The maps of all {depth} layers of {heads} heads over {length} tokens are too much for one page: "
            f"name at most {most} layers, such as --layers 1,{depth}, or shorten the text."
        )


def _token(model: Andromeda, text: str, option: str) -> int:
    if model.tokenizer is None:
        raise RequestError(f"--{option} needs a model with a tokenizer.")
    ids = model.tokenizer.encode(text)
    if len(ids) != 1:
        parts = ", ".join(repr(spell(model, i)) for i in ids[:5])
        raise RequestError(f"--{option} must be one token, and {text!r} is {len(ids)} ({parts}): give one of them, with its leading space.")
    return ids[0]


def _gradients(model: Andromeda, ids: Tensor, position: int, target: int) -> TokenAttributions:
    if model.tokenizer is None:
        raise RequestError("Integrated gradients start from end-of-text tokens, and this model has no tokenizer.")
    return integrated_gradients(model, ids, position, target, torch.full_like(ids, model.tokenizer.eos))


def _checks(
    model: Andromeda, seen: ForwardTrace, looked: LogitLens, shares: DirectAttribution | None, gradients: TokenAttributions | None
) -> list[IdentityCheck]:
    checks = [IdentityCheck("logit lens of the last layer = logits", looked.error, 1e-9)]
    weighed = [layer for layer in seen.layers if layer.weights is not None]
    if weighed:
        checks.append(
            IdentityCheck("values averaged by the attention maps = attention output", max(layer.weights_error for layer in weighed), 1e-9)
        )
    if weighed and model.config.attention.mixer == "softmax":
        off = max(float((layer.weights.sum(-1) - 1).abs().max()) for layer in weighed if layer.weights is not None)
        checks.append(IdentityCheck("rows of the attention maps sum to one", off, 1e-9))
    if shares:
        checks.append(IdentityCheck("direct attributions sum to the logit", shares.error, 1e-9))
    if gradients:
        checks.append(
            IdentityCheck(
                f"integrated gradients sum to the difference of logits ({gradients.steps} steps)", gradients.gap, gradients.allowed
            )
        )
    return checks


def prediction_text(e: Explanation, most: int = 5) -> str:
    """The most likely next tokens as lines for a terminal, and the explained token where it is not among them."""
    probabilities = e.seen.logits[0, e.position].softmax(-1)
    top = [int(i) for i in probabilities.topk(min(most, len(probabilities))).indices]
    shown = top if e.target in top else [*top, e.target]
    lines = [f"  {format_percent(float(probabilities[i])):>6}  {_repr(e.spell(i))}" + "  (explained)" * (i == e.target) for i in shown]
    return "\n".join([f"after token {e.position}, {_repr(e.tokens[e.position])}:", *lines])


def _repr(token: str) -> str:
    """Quoted, with control characters escaped."""
    return printable(repr(token))


def explanation_json(e: Explanation) -> dict[str, Any]:
    """The explanation as JSON values, without the attention maps."""
    probabilities = e.seen.logits[0, e.position].softmax(-1)
    top = probabilities.topk(min(10, len(probabilities)))
    return {
        "tokens": e.tokens,
        "position": e.position,
        "target": e.spell(e.target),
        "against": e.spell(e.against),
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
