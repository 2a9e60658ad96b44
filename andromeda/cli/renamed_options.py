"""Options and commands of version 0.1 under their new names, and options that are keys of the configuration here."""

from __future__ import annotations

from typing import Any

RENAMED_OPTIONS = {
    "ablate": {"--amount": "--budget-amount", "--limit": "--time-limit", "--cost-steps": "--timing-steps", "--lean": "--drop-checkpoints"},
    "bench decode": {
        "--batch": "--batch-size",
        "--compiled": "--compile",
        "--no-compiled": "--no-compile",
        "--tuned": "--autotune",
        "--eight-bits": "--fp8",
        "--kernels": "--decode-kernels",
        "--no-kernels": "--no-decode-kernels",
    },
    "bench embedding": {"--vocabulary": "--vocab-size"},
    "bench convergence": {"--compiled": "--compile", "--no-compiled": "--no-compile"},
    "bench precision": {"--rows": "--batch-size"},
    "bench prefill": {"--eight-bits": "--fp8", "--chunks": "--chunk-sizes"},
    "bench train": {"--rows": "--batch-size"},
    "data build": {
        "--tokenizer-path": "--tokenizer",
        "--vocab": "--vocab-size",
        "--special": "--special-token",
        "--digits": "--max-digits",
        "--validation": "--validation-fraction",
        "--field": "--text-field",
        "--shortest": "--min-document-bytes",
        "--longest": "--max-document-bytes",
        "--cut": "--split-documents-at",
    },
    "eval": {
        "--file": "--questions",
        "--shots": "--num-fewshot",
        "--beyond": "--extrapolate",
        "--task": "--harness-task",
        "--include": "--include-path",
    },
    "extend": {"--rate": "--lr-scale", "--tail": "--scored-tokens", "--held-out": "--eval-corpus"},
    "generate": {
        "--file": "--prompts",
        "--max-tokens": "--max-new-tokens",
        "--compiled": "--compile",
        "--eight-bits": "--fp8",
        "--batch": "--batch-size",
    },
    "plan": {"--seq": "--seq-len", "--batch": "--batch-size"},
    "tokenizers compare": {"--sizes": "--vocab-sizes", "--validation": "--validation-fraction"},
    "verify": {"--repeat": "--retrain"},
}
"""By verb; remove after one release."""


RENAMED_COMMANDS = {"bench learn": "bench convergence"}
"""Remove after one release."""


def explain_unknown(error: Any) -> str | None:
    """The clause for an option or a command that does not exist, where it is known what was meant; else None.

    error: typer's, with the command's context.
    """
    verb = error.ctx.command_path.partition(" ")[2]
    option = getattr(error, "option_name", "") if type(error).__name__ == "NoSuchOption" else ""
    if new := RENAMED_OPTIONS.get(verb, {}).get(option):
        return f"{option} is now called {new}"
    for old, new in RENAMED_COMMANDS.items():
        if error.format_message().startswith(f"No such command {old.rpartition(' ')[2]!r}") and verb == old.rpartition(" ")[0]:
            return f"andromeda {old} is now called andromeda {new}"
    takes_keys = any("KEY=VALUE" in (parameter.metavar or "") for parameter in error.ctx.command.params)
    if option and takes_keys and (key := _key(option)):
        return f"there is no option {option}, but a key: write {key}=VALUE"
    return None


def _key(option: str) -> str | None:
    """The key of the configuration that an option is named after, here or in another library."""
    from andromeda.config.keys import fields
    from andromeda.config.keys import nested_config as nested_config
    from andromeda.config.suggestions import our_name

    name = option.lstrip("-").replace("-", "_")
    known = [path for path, field in fields().items() if not nested_config(field)]
    ours = our_name(name, known) or ""
    if ours and not ours.startswith("--"):
        return ours.partition(" ")[0]
    same = [path for path in known if path.rpartition(".")[2] == name]
    return same[0] if len(same) == 1 else None
