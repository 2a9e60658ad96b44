"""Sections about the model: parameters and FLOPs, manifest, model card, and its architecture in words."""

from __future__ import annotations

from typing import Any

from andromeda.config.keys import flatten
from andromeda.config.load import dumps
from andromeda.config.model import ModelConfig
from andromeda.config.run import RunConfig
from andromeda.data.corpus import CorpusManifest
from andromeda.evaluate.result import EvalResult
from andromeda.model.flops import forward_flops_per_token, training_flops_per_token
from andromeda.model.meta_model import shared_meta_model
from andromeda.plan.estimate import ParameterCount, count_parameters
from andromeda.plan.memory import cache_bytes
from andromeda.plan.plan_tables import size as byte_size
from andromeda.report.fragments import code, missing_section, shell_quote
from andromeda.report.run_data import RunData, training_status
from andromeda.train.metrics import is_number
from andromeda.utils.errors import AndromedaError
from andromeda.utils.formatting import format_duration, format_number, format_percent, format_si
from andromeda.utils.html import Bar, Child, Markup, Section, bar_chart, definition_list, details, el, grid, join, table

BLOCKS = {
    ("serial", "pre"): "pre-norm blocks",
    ("parallel", "pre"): "parallel pre-norm blocks",
    ("serial", "deepnorm"): "DeepNorm blocks",
    ("parallel", "deepnorm"): "parallel DeepNorm blocks",
}


def architecture(c: ModelConfig) -> str:
    """The architecture in one sentence."""
    layers = f"{c.num_layers} {BLOCKS[c.block.kind, c.block.residual]} of width {c.hidden_size}"
    return f"{layers}, {_heads(c)}, {_network(c)}; {', '.join(_parts(c))}"


def _heads(c: ModelConfig) -> str:
    a = c.attention
    kind = {1: "multi-query", a.num_heads: "multi-head"}.get(a.num_kv_heads, f"{a.num_kv_heads} key/value heads")
    mechanism = "" if a.mixer == "softmax" else f" {a.mixer}"
    return f"{a.num_heads} heads of {a.head_dim} ({kind}{mechanism})"


def _network(c: ModelConfig) -> str:
    e = c.experts
    return f"{e.top_k} of {e.num_experts} {e.kind} experts" if c.feedforward.kind == "moe" else f"{c.feedforward.kind} feed-forward"


def _parts(c: ModelConfig) -> list[str]:
    positions = {"none": "no rotary positions", "rope": "RoPE", "xpos": "xPos"}[c.rotary.kind]
    named = {
        positions: True,
        f"positions scaled {c.rotary.scaling.factor:g} times ({c.rotary.scaling.kind})": c.rotary.scaling.kind != "none",
        f"ALiBi on {c.alibi.num_heads} heads": c.alibi.num_heads,
        "absolute positions": c.embedding.absolute,
        f"{c.attention.qk_norm} QK norm": c.attention.qk_norm != "none",
        f"window of {c.attention.sliding_window}": c.attention.sliding_window,
        f"{c.shift.kind} token shift": c.shift.kind != "none",
        "value embeddings": c.value_embedding.kind != "none",
        "U-net skips": c.skips.unet,
        "first-embedding mix": c.skips.first,
        f"logits capped at {c.head.softcap:g}": c.head.softcap,
        "tied head": c.head.tied,
        f"context {c.max_seq_len:,}": True,
        f"vocabulary {c.vocab_size:,}": True,
    }
    return [name for name, there in named.items() if there]


def parameter_count(record: RunData) -> ParameterCount | None:
    """Counted on the model built without numbers; None where it cannot be built here (a user's own class that is not installed)."""
    try:
        return count_parameters(shared_meta_model(record.config.model))
    except AndromedaError:
        return None


def size_section(record: RunData, counted: ParameterCount | None) -> Section:
    """The section."""
    lead = "Counted on the model itself; FLOPs are those of matmuls, attention by its mask."
    if counted is None:
        return Section("size", "Parameters and FLOPs", lead, missing_section("The model uses a class that is not installed here."))
    model, train = record.config.model, record.config.train
    sequence = train.seq_len or model.max_seq_len
    forward = forward_flops_per_token(model, sequence)
    step = training_flops_per_token(model, sequence)
    tokens = record.metrics.latest("tokens")
    total = sum(counted.parts.values())
    drawn = grid(
        bar_chart("Parameters", [Bar(name, number, 1) for name, number in counted.parts.items()], unit=f"{total:,} in all", show=_whole),
        bar_chart(
            "Forward FLOPs of a token",
            [Bar(name, number, 3) for name, number in forward.items()],
            unit=format_si(sum(forward.values())),
            show=_flops,
        ),
    )
    known = definition_list(
        [
            ("Parameters", f"{total:,}, of which {counted.active:,} are used for one token"),
            ("Training FLOPs of a token", f"{_flops(step)} in sequences of {sequence:,} tokens (three times the forward pass)"),
            ("Training FLOPs so far", f"{_flops(step * tokens)} on {tokens:,.0f} tokens" if tokens else ""),
            ("Tokens per parameter", f"{tokens / total:.2f}" if tokens else ""),
            (
                "KV cache per token",
                f"{byte_size(cache_bytes(model))}, of a full context {byte_size(cache_bytes(model, model.max_seq_len))}, in bf16",
            ),
        ]
    )
    return Section("size", "Parameters and FLOPs", lead, join(drawn, known))


def _whole(value: float | None) -> str:
    return f"{value:,.0f}"


def _flops(value: float | None) -> str:
    return format_si(value).replace("B", "G")


def manifest_section(record: RunData) -> Section:
    """The section."""
    lead = "Configuration, seed, data, code, versions and machine, as recorded by the run."
    manifest, config = record.manifest, record.config
    starts = [s for s in manifest.get("starts", []) if isinstance(s, dict)]
    last: dict[str, Any] = starts[-1] if starts else {}
    missing = None if manifest else missing_section("The run has no manifest: it was saved from Python, or the file was lost.")
    known = definition_list(
        [
            ("Identity", manifest.get("identity")),
            ("Seed", str(config.seed)),
            ("Weights from", parent_text(record) or None),
            ("Training stream", code(manifest["data"]) if manifest.get("data") else None),
            ("Chat template", code(record.chat_template) if record.chat_template else None),
            ("Command", code(last["command"]) if last.get("command") else None),
            ("Code", _code(last.get("code"))),
            ("Device", last.get("device")),
            ("Mesh", _mesh(last.get("mesh"))),
            ("Machine", ", ".join(f"{key} {value}" for key, value in (last.get("machine") or {}).items())),
            ("Versions", ", ".join(f"{key} {value}" for key, value in (last.get("versions") or {}).items())),
        ]
    )
    return Section("manifest", "Manifest", lead, join(missing, known, _starts(starts), _corpora(record.corpora), _config(config)))


def _mesh(sizes: Any) -> str | None:
    """Sizes of the device mesh above one; None for one process."""
    named = [f"{name} {size}" for name, size in sizes.items() if isinstance(size, int) and size > 1] if isinstance(sizes, dict) else []
    return " x ".join(named) or None


def _code(commit: Any) -> Child:
    if not isinstance(commit, dict):
        return "not a git checkout"
    return join(code(str(commit.get("commit"))), " and changes that are not committed" if commit.get("changed") else ", unchanged")


def _starts(starts: list[dict[str, Any]]) -> Markup | None:
    if len(starts) < 2:
        return None
    rows = [[str(s.get("time", "")), f"{s.get('step', 0):,}", str(s.get("device", "")), ", ".join(s.get("changes") or [])] for s in starts]
    return details(f"{len(starts)} starts", table(["time", "at step", "device", "keys that changed"], rows, text=4))


def _corpora(corpora: dict[str, CorpusManifest]) -> list[Markup]:
    shown = []
    for path, corpus in corpora.items():
        splits = [[name, f"{s.documents:,}", f"{s.tokens:,}", f"{s.bytes:,}"] for name, s in corpus.splits.items()]
        sources = [[s.name, f"{s.read:,}", f"{s.kept:,}", f"{s.tokens:,}", f"{s.bytes:,}"] for s in corpus.sources]
        shown.append(
            details(
                f"Corpus {path}",
                table(["split", "documents", "tokens", "bytes"], splits),
                table(["source", "documents read", "kept", "tokens", "bytes"], sources),
            )
        )
    return shown


def _config(config: RunConfig) -> Markup:
    """What differs from the defaults in a table, and all of it as the file that trains the same again."""
    default, own = flatten(RunConfig().model_dump()), flatten(config.model_dump())
    rows = [[key, str(own[key]), str(default.get(key, ""))] for key in own if own[key] != default.get(key)]
    return join(
        details(f"Configuration: {len(rows)} keys that are not the default", table(["key", "value", "default"], rows, text=3)),
        details("Configuration: config.toml", el("pre", dumps(config))),
    )


INTENDED_USE = (
    "Continues text of the kind that it was trained on. It was trained to predict the next token and nothing else: it follows no "
    "instructions, knows no facts reliably, and its text must not be taken for advice."
)
LIMITATIONS = (
    "What it writes can be wrong, biased or copied from its training text; nothing was filtered after training. Whoever gives it to "
    "others should measure what their use needs, and check the rights in the training text."
)


def model_card_section(record: RunData, counted: ParameterCount | None) -> Section:
    """The section."""
    lead = "What the model is, what it was trained on, and what it can be used for."
    again = first_command(record)
    pairs: list[tuple[str, Child]] = [
        *model_card_facts(record, counted),
        ("To run it", code(f'andromeda generate {shell_quote(record.path)} "..."')),
        ("To reproduce it", code(again) if again else None),
    ]
    return Section("card", "Model card", lead, definition_list(pairs))


def model_card_facts(record: RunData, counted: ParameterCount | None) -> list[tuple[str, str]]:
    """What the card says of a model, wherever it is shown: titles and plain text."""
    size = f"{counted.total:,} parameters" if counted else "parameters of a user's own class"
    return [
        ("Model", f"{record.config.name}: {size}; {architecture(record.config.model)}"),
        ("Made with", f"Andromeda {_start(record, 'versions').get('andromeda', '')}, {training_status(record)}"),
        *([("Initialized from", parent)] if (parent := parent_text(record)) else []),
        ("Training data", _data(record)),
        ("Training", _training(record)),
        ("Measured", _measured(record)),
        ("Use", INTENDED_USE),
        ("Limits", LIMITATIONS),
    ]


def parent_text(record: RunData) -> str:
    """The run that this one began with the weights of, as its manifest names it; empty where it began with random ones."""
    parent = record.manifest.get("parent")
    if not isinstance(parent, dict):
        return ""
    optimizer = "the optimizer's state kept" if parent.get("keep_optimizer") else "a fresh optimizer"
    step = format_number(_number(parent.get("step")))
    return f"{parent.get('run')}, step {step} (sha256 of the weights {parent.get('weights_sha256')}), with {optimizer}."


def _number(value: Any) -> float | None:
    """A value of a stranger's file, if it is a number."""
    return value if is_number(value) else None


def _start(record: RunData, name: str) -> dict[str, Any]:
    starts = record.manifest.get("starts") or [{}]
    found = starts[-1].get(name) if isinstance(starts[-1], dict) else None
    return found if isinstance(found, dict) else {}


def _data(record: RunData) -> str:
    texts = []
    for path, corpus in record.corpora.items():
        train = corpus.splits.get("train")
        sources = ", ".join(source.name for source in corpus.sources)
        texts.append(f"{sources} ({path}): {train.documents:,} documents, {train.tokens:,} tokens" if train else path)
    texts = texts or [path for path in [record.config.data.corpus, *(s.path for s in record.config.data.sources)] if path]
    learned = record.metrics.latest("tokens")
    return ("; ".join(texts) or "not recorded") + (f". Learned from {learned:,.0f} tokens of it" if learned else "") + "."


def _training(record: RunData) -> str:
    train, seconds = record.config.train, record.metrics.latest("seconds")
    rows = train.seq_len or record.config.model.max_seq_len
    time = f", {format_duration(seconds)} in steps" if seconds else ""
    machine = _start(record, "machine").get("processor")
    where = f" on {machine}" if machine else ""
    batch = f"{train.steps:,} steps of {train.batch_size} sequences of {rows:,} tokens"
    return f"{train.optim.kind.rpartition(':')[2]}, {batch}, {train.schedule.kind} schedule{time}{where}."


def _measured(record: RunData) -> str:
    texts = [f"{format_number(_number(r.result.get('bits_per_byte')))} bits per byte{_of(r)}" for r in record.of_kind("bits")]
    for result in record.of_kind("reasoning"):
        scores = [f"{task} {format_percent(_number(s.get('in')))}" for task, s in result.result.items() if isinstance(s, dict)]
        texts.append("reasoning: " + ", ".join(scores))
    if not texts and (bits := record.metrics.latest("validation/bits_per_byte")):
        texts.append(f"{format_number(bits)} bits per byte on held-out text, while training")
    return ("; ".join(texts) + ".") if texts else "nothing yet."


def _of(result: EvalResult) -> str:
    """What a result was measured on, where its name says so."""
    return " of held-out text" if result.name == result.kind else f" ({result.name})"


def first_command(record: RunData) -> str:
    """The command that began the run; empty where none is recorded."""
    starts = record.manifest.get("starts") or []
    first = starts[0] if starts and isinstance(starts[0], dict) else {}
    return str(first.get("command") or "")
