"""What a stranger needs to make the run again."""

from __future__ import annotations

from typing import Any

from andromeda.config.keys import flatten
from andromeda.config.load import dumps
from andromeda.config.run import RunConfig
from andromeda.data.corpus import CorpusManifest
from andromeda.report.parts import command, empty
from andromeda.report.record import Record
from andromeda.utils.html import Child, Html, Section, details, el, facts, join, table


def provenance(record: Record) -> Section:
    """The section."""
    lead = "Configuration, seed, data, code, versions and machine, as the run recorded them."
    manifest, config = record.manifest, record.config
    starts = [s for s in manifest.get("starts", []) if isinstance(s, dict)]
    last: dict[str, Any] = starts[-1] if starts else {}
    missing = None if manifest else empty("The run has no manifest: it was saved from Python, or the file was lost.")
    known = facts(
        [
            ("Identity", manifest.get("identity")),
            ("Seed", str(config.seed)),
            ("Data fingerprint", command(manifest["data"]) if manifest.get("data") else None),
            ("Command", command(last["command"]) if last.get("command") else None),
            ("Code", _code(last.get("code"))),
            ("Device", last.get("device")),
            ("Machine", ", ".join(f"{key} {value}" for key, value in (last.get("machine") or {}).items())),
            ("Versions", ", ".join(f"{key} {value}" for key, value in (last.get("versions") or {}).items())),
        ]
    )
    return Section("manifest", "Manifest", lead, join(missing, known, _starts(starts), _corpora(record.corpora), _config(config)))


def _code(code: Any) -> Child:
    if not isinstance(code, dict):
        return "not a git checkout"
    return join(command(str(code.get("commit"))), " and changes that are not committed" if code.get("changed") else ", unchanged")


def _starts(starts: list[dict[str, Any]]) -> Html | None:
    if len(starts) < 2:
        return None
    rows = [[str(s.get("time", "")), f"{s.get('step', 0):,}", str(s.get("device", "")), ", ".join(s.get("changes") or [])] for s in starts]
    return details(f"{len(starts)} starts", table(["time", "at step", "device", "keys that changed"], rows, text=4))


def _corpora(corpora: dict[str, CorpusManifest]) -> list[Html]:
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


def _config(config: RunConfig) -> Html:
    """What differs from the defaults in a table, and all of it as the file that trains the same again."""
    default, own = flatten(RunConfig().model_dump()), flatten(config.model_dump())
    rows = [[key, str(own[key]), str(default.get(key, ""))] for key in own if own[key] != default.get(key)]
    return join(
        details(f"Configuration: {len(rows)} keys that are not the default", table(["key", "value", "default"], rows, text=3)),
        details("Configuration: config.toml", el("pre", dumps(config))),
    )
