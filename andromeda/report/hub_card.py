"""The model card as the README.md of a Hugging Face folder."""

from __future__ import annotations

import re
from collections.abc import Sequence

from andromeda.plan.estimate import ParameterCount
from andromeda.report.model_sections import first_command, model_card_facts
from andromeda.report.run_data import RunData


def hub_card(record: RunData, counted: ParameterCount | None, usage: str, more: Sequence[tuple[str, str]] = ()) -> str:
    """The card in Markdown. usage: code that loads the model. more: further facts with their titles, such as what was measured."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [andromeda]", "---", ""]
    lines += [f"# {literal(record.config.name)}", "", "```python", usage, "```", ""]
    for name, text in [*model_card_facts(record, counted), *more]:
        lines += [f"## {name}", "", literal(text), ""]
    if again := first_command(record):
        lines += ["## Trained by", "", "```", again.replace("```", ""), "```", ""]
    return "\n".join(lines)


def literal(text: str) -> str:
    """Text of a run as Markdown shows it character for character: no markup of its own, one line."""
    return " ".join(re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", text).split())
