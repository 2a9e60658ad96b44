"""The page of an explanation: one section per view."""

from __future__ import annotations

import base64
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from andromeda.explain.explanation import Explanation
from andromeda.explain.integrated_gradients import TOLERANCE
from andromeda.explain.residual_decomposition import DirectAttribution, ResidualPart
from andromeda.utils.errors import ConfigError
from andromeda.utils.files import write_whole
from andromeda.utils.formatting import format_number, format_percent
from andromeda.utils.html import Bar, Markup, Section, bar_chart, details, el, grid, heat_map, join, page, table, tiles
from andromeda.utils.untrusted import MalformedFile, refuse_links_inside

NAME = "explain.html"


VISIBLE = str.maketrans({"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW TO BAR}", " ": "\N{OPEN BOX}"})


def show_whitespace(token: str, longest: int = 14) -> str:
    """The token with visible spaces and line ends, truncated to `longest` characters."""
    text = token.translate(VISIBLE)
    return text if len(text) <= longest else text[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"


def quoted(token: str, longest: int = 14) -> Markup:
    """The token as it stands in a sentence or a table: as code, so that it is told from the words around it."""
    return el("code", show_whitespace(token, longest), class_="quoted")


def shaded_tokens(tokens: Sequence[str], values: Sequence[float], tips: Sequence[str], here: int = -1) -> Markup:
    """A text whose tokens are shaded by signed values, relative to the largest."""
    full = max((abs(v) for v in values), default=0.0) or 1.0
    spans = []
    for i, (token, value, tip) in enumerate(zip(tokens, values, tips, strict=True)):
        share = abs(value) / full
        kind = ("minus" if value < 0 else "plus") + (" strong" if share > 0.6 else "") + (" here" if i == here else "")
        spans.append(el("span", show_whitespace(token, 40), class_=f"token {kind}", style=f"--s:{share:.3f}", data_tip=tip))
        if "\n" in token:
            spans.append(el("br"))
    return el("p", spans, class_="tokens")


def prediction_section(e: Explanation) -> Section:
    """The most likely next tokens."""
    probabilities = e.seen.logits[0, e.position].softmax(-1)
    top = probabilities.topk(min(10, len(probabilities)))
    rows = [Bar(quoted(e.spell(int(i))), float(p), 1) for p, i in zip(top.values, top.indices, strict=True)]
    before = shaded_tokens(
        e.tokens, [0.0] * len(e.tokens), [f"token {i}: {show_whitespace(t)}" for i, t in enumerate(e.tokens)], e.position
    )
    drawn = bar_chart("Most likely next tokens", rows, show=format_percent, full=1.0)
    return Section("prediction", "Prediction", "The model's prediction after the marked token.", join(before, grid(drawn)))


def lens_section(e: Explanation) -> Section:
    """Rows are layers, the last at the top; columns are tokens."""
    lead = (
        "The final norm and the head, applied to the residual stream after each layer: the token that the model would predict if it "
        "stopped there. Shade: its probability."
    )
    names = ["embedding", *(f"layer {i + 1}" for i in range(len(e.seen.layers)))]
    head = el("tr", el("th", "after", scope="col"), [el("th", show_whitespace(token, 9), scope="col") for token in e.tokens])
    columns, height = range(len(e.tokens)), reversed(range(len(names)))
    body = [el("tr", el("th", names[n], scope="row"), [_lens_cell(e, n, t) for t in columns]) for n in height]
    shown = el("div", el("table", el("thead", head), el("tbody", body), class_="heat lens"), class_="scroll", tabindex="0")
    chances, entropies = e.lens.target[:, e.position].tolist(), e.lens.entropy[:, e.position].tolist()
    here = [(name, format_percent(p), format_number(bits, 3)) for name, p, bits in zip(names, chances, entropies, strict=True)]
    title = join("Probability of ", quoted(e.spell(e.target)), " and entropy in bits, after each layer")
    return Section("lens", "Logit lens", lead, join(shown, details(title, table(["after", "probability", "entropy"], here))))


def _lens_cell(e: Explanation, n: int, t: int) -> Markup:
    found = [(show_whitespace(e.spell(int(i))), float(p)) for i, p in zip(e.lens.tokens[n, t], e.lens.probabilities[n, t], strict=True)]
    tip = "\n".join(f"{format_percent(p)}  {token}" for token, p in found)
    strong = " strong" if found[0][1] > 0.6 else ""
    return el("td", show_whitespace(found[0][0], 9), class_="plus" + strong, style=f"--s:{found[0][1]:.3f}", data_tip=tip)


def attention_section(e: Explanation) -> Section:
    """A small map per head; the selected one large, and on the text."""
    lead = "A row is a query token, a column a key token. Select a head; hover over a token to see its row."
    maps = e.maps
    if not maps:
        return Section("attention", "Attention", lead, el("p", e.refused.get("attention", "There are no attention maps."), class_="empty"))
    tokens = json.dumps([show_whitespace(token, 40) for token in e.tokens])
    rows = [
        el("div", el("span", f"layer {i + 1}", class_="unit"), [_thumbnail(i, h, head) for h, head in enumerate(heads)], class_="heads")
        for i, heads in maps.items()
    ]
    canvas = el("canvas", id="map-big", role="img", aria_label="the selected head's map")
    axes = [el("span", "query token →", class_="map-y"), canvas, el("span", "key token →", class_="map-x")]
    big = el("div", el("p", id="map-name"), el("div", axes, class_="map-axes"), _weight_scale(), class_="map-big")
    text = el("div", el("p", id="map-says", class_="note"), el("p", id="map-text", class_="tokens"))
    note = "Shades are the square root of the weight, so that small weights are visible; hover for values."
    parts = [el("div", rows, class_="layers"), el("div", big, text, class_="chosen")]
    shown = el("div", parts, class_="maps", data_tokens=tokens, data_position=e.position)
    figures = details("Statistics per head", _heads_table(maps))
    return Section("attention", "Attention", lead, join(shown, el("p", note, class_="note"), figures))


SCALE = (0.0, 0.01, 0.1, 0.25, 0.5, 1.0)
"""Weights that are named at the scale of the maps."""


def _weight_scale() -> Markup:
    """What the shades mean: weights at the places of their square roots."""
    marks = [el("span", format_percent(w) if w else "0", style=f"left:{100 * math.sqrt(w):.1f}%") for w in SCALE]
    return el("div", el("div", class_="ramp"), el("div", marks, class_="marks"), class_="scale", aria_label="weights by shade")


def _thumbnail(layer: int, head: int, weights: Tensor) -> Markup:
    return el(
        "button",
        el("canvas", width=72, height=72),
        f"{head + 1}",
        type="button",
        class_="map",
        data_name=f"Layer {layer + 1}, head {head + 1}",
        data_map=pack_attention(weights),
        aria_label=f"layer {layer + 1}, head {head + 1}",
    )


def pack_attention(weights: Tensor) -> str:
    """The lower triangle of weights (T, T), a byte each: 255 times the square root."""
    rows, columns = torch.tril_indices(*weights.shape)
    roots = weights[rows, columns].clamp(0, 1).sqrt().mul(255).round().to(torch.uint8)
    return base64.b64encode(bytes(roots.tolist())).decode()


def _heads_table(maps: dict[int, Tensor]) -> Markup:
    """Where each head attends on average, over all rows but the first."""
    body = []
    for layer, heads in maps.items():
        T = heads.shape[-1]
        ago = (torch.arange(T)[:, None] - torch.arange(T)[None]).to(heads)
        for h, w in enumerate(heads):
            rows = w[1:] if T > 1 else w
            entropy = -(rows * rows.clamp_min(1e-300).log2()).sum(-1).mean()
            before = w.diagonal(-1).mean() if T > 1 else torch.zeros(())
            spread = (rows * ago[-len(rows) :]).sum(-1).mean()
            figures = [format_percent(float(x)) for x in (w.diagonal().mean(), before, rows[:, 0].mean())]
            body.append([f"layer {layer + 1}, head {h + 1}", *figures, format_number(float(spread), 3), format_number(float(entropy), 3)])
    return table(["head", "on itself", "on the token before", "on the first token", "mean distance", "entropy, bits"], body)


def direct_section(e: Explanation) -> Section:
    """Bars for the parts, a map for the heads."""
    target, rival = quoted(e.spell(e.target)), quoted(e.spell(e.against))
    fixed = ", directly through the head, with the statistics of the norms fixed."
    lead = join("What each part adds to the logit of ", target, ", and to its difference from that of ", rival, fixed)
    d = e.direct
    if d is None:
        return Section("direct", "Direct logit attribution", lead, el("p", e.refused["direct"], class_="empty"))
    cap = f", soft-capped to {format_number(d.logit)}" if d.raw != d.logit and e.model.head.softcap else ""
    sides = grid(
        bar_chart(join("To the logit of ", target), _bars(d.parts, d.bias), unit=f"sum {format_number(d.raw)}{cap}"),
        bar_chart(
            join("To the difference from ", rival),
            _bars(d.lead, d.lead_bias),
            unit=f"sum {format_number(sum(d.lead.values()) + d.lead_bias)}",
        ),
    )
    return Section("direct", "Direct logit attribution", lead, join(sides, _heads_map(d, target), details("As a table", _parts_table(d))))


def _bars(parts: dict[ResidualPart, float], bias: float) -> list[Bar]:
    """One bar for the embedding, for attention and feed-forward of each layer, and for the head's bias."""
    sums: dict[str, float] = {}
    for part, value in parts.items():
        name = _group(part)
        sums[name] = sums.get(name, 0.0) + value
    if bias:
        sums["bias of the head"] = bias
    return [Bar(name, value) for name, value in sums.items()]


def _group(part: ResidualPart) -> str:
    if part.layer < 0:
        return part.kind
    return f"layer {part.layer + 1} " + ("feed-forward" if part.kind == "feed-forward" else "attention")


def _heads_map(d: DirectAttribution, target: Markup) -> Markup | None:
    heads = {(part.layer, part.head): value for part, value in d.parts.items() if part.kind == "head"}
    if not heads:
        return None
    layers, count = sorted({layer for layer, _ in heads}), 1 + max(head for _, head in heads)
    values = [[heads.get((layer, head)) for head in range(count)] for layer in layers]
    full = max(abs(v) for v in heads.values()) or 1.0
    rows, columns = [f"layer {layer + 1}" for layer in layers], [f"{head + 1}" for head in range(count)]
    drawn = heat_map(join("To the logit of ", target), rows, columns, values, corner="head", show=lambda v: format_number(v, 3), full=full)
    return join(el("h3", "By head"), grid(drawn))


def _parts_table(d: DirectAttribution) -> Markup:
    names = [_group(part) + _detail(part) for part in d.parts]
    rows = [[name, format_number(d.parts[p]), format_number(d.lead[p])] for name, p in zip(names, d.parts, strict=True)]
    rows += [["bias of the head", format_number(d.bias), format_number(d.lead_bias)]]
    rows += [["sum", format_number(sum(d.parts.values()) + d.bias), format_number(sum(d.lead.values()) + d.lead_bias)]]
    return table(["part", "to the logit", "to the difference"], rows)


def _detail(part: ResidualPart) -> str:
    return {"head": f", head {part.head + 1}", "attention bias": ", bias"}.get(part.kind, "")


def gradients_section(e: Explanation) -> Section:
    """The text shaded by the attribution of each token."""
    target = quoted(e.spell(e.target))
    compared = ", compared with a text of end-of-text tokens."
    lead = join("Integrated gradients: how much each token contributes to the logit of ", target, compared)
    g = e.gradients
    if g is None:
        return Section("gradients", "Input attribution", lead, el("p", e.refused["gradients"], class_="empty"))
    shares = [float(x) for x in g.shares]
    tips = [f"{show_whitespace(token)}: {format_number(share, 3)}" for token, share in zip(e.tokens, shares, strict=True)]
    state = "complete" if g.complete else "not complete: a piecewise linear activation needs more steps"
    note = (
        f"The logit is {format_number(g.logit)}, without the text {format_number(g.baseline)}; the attributions add up to the difference "
        f"up to {format_number(g.gap, 2)} ({state}; tolerance {format_number(g.allowed, 2)}, {format_percent(TOLERANCE)} of the sum of "
        f"their absolute values; {g.steps} steps of Gauss-Legendre quadrature in float64)."
    )
    rows = [[str(i), quoted(token), format_number(share)] for i, (token, share) in enumerate(zip(e.tokens, shares, strict=True))]
    shown = details("As a table", table(["", "token", "attribution"], rows, text=2))
    return Section(
        "gradients", "Input attribution", lead, join(shaded_tokens(e.tokens, shares, tips, e.position), el("p", note, class_="note"), shown)
    )


def checks_section(e: Explanation) -> Section:
    """The identities with their errors for this text."""
    lead = "Identities that hold if the figures above are right, computed for this text in float64."
    rows = [[c.name, format_number(c.error, 2), format_number(c.allowed, 2), "holds" if c.holds else "does not hold"] for c in e.checks]
    refused = [el("p", sentence, class_="note") for sentence in e.refused.values()]
    return Section("checks", "Checks", lead, join(table(["identity", "difference", "allowed", ""], rows), refused))


SECTIONS = (prediction_section, lens_section, attention_section, direct_section, gradients_section, checks_section)


def build_page(e: Explanation) -> str:
    """The page as HTML."""
    chance = float(e.seen.logits[0, e.position].softmax(-1)[e.target])
    top = tiles(
        [
            ("Explained token", quoted(e.spell(e.target)), join(f"after token {e.position}, ", quoted(e.tokens[e.position]))),
            ("Probability", format_percent(chance), "of all tokens"),
            ("Logit", format_number(float(e.seen.logits[0, e.position, e.target])), join("compared with ", quoted(e.spell(e.against)))),
            ("Identities", f"{sum(c.holds for c in e.checks)} of {len(e.checks)}", "hold for this text"),
        ]
    )
    step = f", step {e.step:,}" if e.step is not None else ""
    subtitle = f"Why {e.run}{step} predicts what it predicts after this text of {len(e.tokens)} tokens."
    made = [
        "Generated by ",
        el("code", f"andromeda explain {shlex.quote(str(e.run))} ..."),
        ". One file; nothing is loaded from elsewhere.",
    ]
    return page("One prediction, explained", subtitle, [view(e) for view in SECTIONS], top, made, script="attention.js")


def write_explanation(e: Explanation, out: str | Path | None = None) -> Path:
    """Write the page (by default explain.html in the run folder) and return where it is. Raises ConfigError."""
    path = Path(out) if out else e.run / NAME
    try:
        refuse_links_inside(e.run, path)
        write_whole(path, build_page(e).encode("utf-8"))
    except MalformedFile as error:
        raise ConfigError(f"{e.run} {error}: give another place with --out.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): give another place with --out.") from None
    return path
