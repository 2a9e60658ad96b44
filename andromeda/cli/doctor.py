"""`andromeda doctor`: what this machine can do, and what each job will run on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from andromeda.train.environment import EnvironmentReport


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False) -> None:
    """Say what this machine can do: versions, devices, precision, the attention kernel of each job and why, what is missing."""
    from andromeda.train.environment import examine

    report = examine()
    if as_json:
        import json
        from dataclasses import asdict

        print(json.dumps(asdict(report), indent=2))
        return
    _print(report)


def _print(report: EnvironmentReport) -> None:
    from andromeda.cli.tables import show

    show("Machine", ("", ""), list(report.machine.items()))
    devices = [(d.name, d.description, f"{d.memory / 2**30:.1f} GiB", d.precision, d.reason) for d in report.devices]
    show("Devices", ("device", "what", "memory", "precision auto", "because"), devices, right=(2,))
    choices = [(c.pattern, c.device, c.backend, "; ".join(f"{b}: {why}" for b, why in c.refusals.items())) for c in report.attention]
    show("Attention: what backend auto takes", ("pattern", "device", "backend", "because the faster ones refuse"), choices)
    sources = list(dict.fromkeys((c.device, c.source) for c in report.attention))
    show("How the order of the backends is known", ("device", "measured on"), sources)
    present = [(lib.name, lib.version, lib.purpose) for lib in report.libraries if lib.version]
    show("Libraries", ("library", "version", "for"), present)
    missing = [(lib.name, lib.purpose, lib.command) for lib in report.libraries if lib.version is None]
    if missing:
        show("Not installed (nothing else needs them)", ("library", "for", "install with"), missing)
