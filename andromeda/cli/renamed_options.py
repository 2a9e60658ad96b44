"""Options of version 0.1 and what they are called now; remove after one release."""

from __future__ import annotations

RENAMED_OPTIONS = {
    "data build": {
        "--vocab": "--vocab-size",
        "--tokenizer-path": "--tokenizer",
        "--special": "--special-token",
        "--digits": "--max-digits",
        "--validation": "--validation-fraction",
        "--field": "--text-field",
        "--shortest": "--min-document-bytes",
        "--longest": "--max-document-bytes",
        "--cut": "--split-documents-at",
    },
    "tokenizers compare": {"--validation": "--validation-fraction"},
}
"""By command: old option to new one."""


def renamed(command: str, option: str) -> str:
    """What an option of a command such as `andromeda data build` is called now; empty for one that never was."""
    return RENAMED_OPTIONS.get(command.removeprefix("andromeda "), {}).get(option, "")
