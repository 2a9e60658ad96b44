"""docs/configuration.md, made from the types, the names and the presets: `python -m tools.configuration_page > docs/configuration.md`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from andromeda.config.aliases import DIRECT, HUGGING_FACE_DIRECT, HUGGING_FACE_GROUPS, SPEC_DIRECT, SPEC_GROUPS
from andromeda.config.base import BaseConfig
from andromeda.config.data import BuildConfig
from andromeda.config.keys import nested_config
from andromeda.config.load import presets
from andromeda.config.model import AttentionConfig
from andromeda.config.rules import MODEL_RULES, NOTE_RULES, RUN_RULES, TRAINING_RULES
from andromeda.config.run import RunConfig
from tools.markdown_lines import wrap

INTRODUCTION = """\
# Configuration

<!-- Made by `python -m tools.configuration_page > docs/configuration.md`; a test holds it to the types. -->

A run is one TOML file. Every command takes a preset's name, a file's path or a run folder (whose `config.toml` is the
whole configuration of that run), and any number of overrides `key.path=value` after it:

<!-- run with "andromeda train nano": data.corpus=corpus -->
<!-- before: printf 'preset = "nano"\\n[data]\\ncorpus = "corpus"\\n' > my.toml -->
```bash
andromeda train nano train.steps=500 model.attention.num_kv_heads=2
andromeda train my.toml train.optim.kind=adamw name=second-try
```

A file may start from a preset and say only what differs:

```toml
preset = "nano"
name = "mine"

[model]
num_layers = 8

[model.alibi]
num_heads = 2
```

Values are as in TOML; on the command line, text needs no quotes. A key that does not exist, a value of the wrong type
and parts that do not fit together are refused before any work is done, in one sentence that names the key.

Two values are settled when a configuration is read, and stand in the run's `config.toml` as numbers:

- `model.vocab_size`, where only a preset gives it, becomes the vocabulary size of the corpus, rounded up as the preset's
  is (to a multiple of at most 128). Set it to keep your own.
- `train.schedule.warmup` and `train.schedule.cooldown` may be fractions of `train.steps`, so that a preset can be trained
  for any number of steps.

Keys of nanoGPT, Hugging Face and torchtitan (`n_layer`, `learning_rate`, `training.local_batch_size`) are refused with the
name that they have here.
"""
NAMES = """
## Names that are understood too

In a `[model]` table and in `Andromeda(...)` the flat names below may be used together with the structured keys. Two that say
different things about one key are refused. What `Andromeda(...)` does not say comes from preset `andromeda`, or from
`andromeda-65b` when only Hugging Face's names are used.
"""
MEANINGS = {
    "alibi_pos_bias": "`alibi.num_heads`: none, or `alibi_num_heads`",
    "alibi_num_heads": "`alibi.num_heads`; unless given 12, and at most half of `num_heads`",
    "rotary_xpos": '`rotary.kind = "xpos"`; false leaves no rotation unless `rotary_pos_emb` is true',
    "rotary_pos_emb": '`rotary.kind = "rope"`, when `rotary_xpos` is false',
    "attn_flash": "`attention.backend`: `auto`, or `eager`",
    "use_flash_attention": "`attention.backend`: `auto`, or `eager`",
    "shift_tokens": '`shift.kind = "chunks"` with `shift.tokens`; 0 is off',
    "attn_one_kv_head": "`attention.num_kv_heads`: 1, or as many as `num_heads`",
    "qk_norm": "`attention.qk_norm`: `l2_dim_scale`, or `none`",
    "attn_qk_norm": "the same as `qk_norm`",
    "attn_qk_norm_dim_scale": "`attention.qk_norm`: `l2_dim_scale`, or `l2` when false",
    "embedding_provider": "`embedding.*`: `plain`, `tied`, `factorized`, `value`, or your own class (itself, or `package.module:Class`)",
    "deepnorm": "`block.residual` and `init.kind`",
    "hidden_act": "`feedforward.kind`; `silu` is read as the gate of `swiglu`",
    "rope_scaling": "`rotary.scaling.*`: a table with `rope_type` and `factor`",
    "rope_parameters": "the same with `rope_theta` inside, as newer files have it",
}
"""What a name does that is not another name for one key."""


def document() -> str:
    """The whole page."""
    return wrap("\n".join([INTRODUCTION, *_presets(), *_tables(RunConfig, ""), *_names(), *_rules(), *_build()]) + "\n")


def _presets() -> Iterator[str]:
    yield from ("## Presets\n", "| preset | what it is |", "|---|---|")
    for name, line in presets().items():
        yield f"| `{name}` | {line} |"


def _tables(part: type[BaseConfig], path: str) -> Iterator[str]:
    """A section for a part's own keys, then one for each table in it."""
    yield f"\n## {f'`[{path}]`' if path else 'The top of the file'}\n\n{_text(part.__doc__)}"
    own = {
        name: field for name, field in part.model_fields.items() if not nested_config(field) or nested_config(field) is not field.annotation
    }
    if own:
        yield from ("\n| key | default | values | meaning |", "|---|---|---|---|")
    for name, field in own.items():
        yield f"| `{name}` | {_default(field)} | {_values(field)} | {_text(field.description)} |"
    for name, field in part.model_fields.items():
        if inner := nested_config(field):
            brackets = "" if inner is field.annotation else "[]"
            yield from _tables(inner, f"{path}.{name}{brackets}" if path else name)


def _names() -> Iterator[str]:
    yield NAMES
    for title, direct, groups in (
        ("The spec's (x-transformers')", SPEC_DIRECT, SPEC_GROUPS),
        ("Hugging Face's", HUGGING_FACE_DIRECT, HUGGING_FACE_GROUPS),
    ):
        yield from (f"| {title} | key |", "|---|---|")
        for name in [*direct, *(name for group in groups for name in group)]:
            yield f"| `{name}` | {f'`{DIRECT[name]}`' if name in DIRECT else MEANINGS[name]} |"
        yield ""
    yield (
        "From `num_attention_heads` follow, unless given, `num_key_value_heads` (as many) and `head_dim` (their share of the hidden size). "
        "`vocab_size` is a key of `[model]` itself."
    )


def _rules() -> Iterator[str]:
    yield "\n## What is refused\n"
    for _, clause in (*MODEL_RULES, *RUN_RULES, *TRAINING_RULES):
        yield f"- {_blank(clause)}"
    yield "- model.rotary.scale_base = … overflows the number format at model.max_seq_len = …: set it to at least …"
    yield "\n## What is legal, and said before a run\n"
    for _, clause in NOTE_RULES:
        yield f"- {_blank(clause)}"


def _blank(clause: str) -> str:
    return _text(re.sub(r"\{[^}]*\}", "…", re.sub(r"\{\w+_hint\}", "", clause)))


def _build() -> Iterator[str]:
    yield "\n## Building a corpus\n\nWhat `andromeda data build` takes, not part of a run's file."
    yield from list(_tables(BuildConfig, "build"))[1:]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(needed)"
    default = field.get_default(call_default_factory=True)
    value = list(default) if isinstance(default, tuple) else default
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value!r}`".replace("'", '"')


def _values(field: FieldInfo) -> str:
    kind: Any = field.annotation
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        return (
            "list of tables"
            if nested_config(field)
            else f"{'list' if ... in inner else len(inner)} of {_name(inner[0])}".replace("2 of number", "2 numbers")
        )
    limits = [f"{sign} {getattr(limit, name):,.12g}" for limit in field.metadata for name, sign in SIGNS.items() if hasattr(limit, name)]
    return ", ".join([_name(kind), *limits])


SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def _name(kind: Any) -> str:
    if get_origin(kind) is dict:
        return "table"
    if kind == AttentionConfig.model_fields["qk_norm"].annotation:
        return "text, or a table"
    if kind == int | float:
        return "whole number, or fraction ≥ 0, < 1"
    return {int: "whole number", float: "number", bool: "true, false", str: "text"}[kind]


def _text(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    print(document(), end="")
