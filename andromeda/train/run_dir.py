"""The run folder: everything that a stranger needs to check a run, and the lock that lets one process at a time write it.

config.toml      the whole configuration
manifest.json    seed, data fingerprint, versions, machine, state of the code, and one entry for each start
metrics.jsonl    one JSON object a line (docs/training.md lists the keys)
checkpoints/     step-00000500/ and so on
samples/         texts that were generated from the run
tensorboard/     with train.log.tensorboard
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from andromeda.config.load import dumps, load
from andromeda.config.run import RunConfig
from andromeda.utils.errors import CheckpointError, ConfigError
from andromeda.utils.files import PART, write_whole
from andromeda.utils.untrusted import MalformedFile, open_for_writing, read_json_object, refuse_links

WRITTEN = ("config.toml", "manifest.json", "metrics.jsonl", ".lock", "checkpoints", "samples", "tokenizer", "evaluations", "tensorboard")
"""What commands write in a run folder."""


class RunDir:
    """Paths and small files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.toml"
        self.manifest_file = self.path / "manifest.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.lock_file = self.path / ".lock"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self._lock: IO[bytes] | None = None

    @property
    def exists(self) -> bool:
        """Whether a run has begun here."""
        return self.config_file.exists()

    def refuse_foreign_files(self) -> None:
        """Raises ConfigError where a run would write over what no run has written, such as a corpus's manifest and tokenizer."""
        if self.exists or self.lock_file.exists():
            return
        for path in (self.manifest_file, self.metrics_file, self.path / "tokenizer"):
            if path.exists():
                raise ConfigError(f"{self.path} holds no run, but a {path.name}, which one would write over: give another --out.")

    def create(self) -> None:
        """Make the folders. Raises ConfigError when that is impossible."""
        self.refuse_links()
        try:
            for folder in (self.path, self.checkpoints, self.samples):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"The run folder {self.path} cannot be made ({error.strerror}): give another one with --out.") from None

    def refuse_links(self) -> None:
        """Raises CheckpointError where a file or folder of the run that is written into is a symbolic link."""
        try:
            for name in WRITTEN:
                refuse_links(self.path, self.path / name)
        except MalformedFile as error:
            raise CheckpointError(f"{self.path} {error}: replace it by a file or folder of its own.") from None

    def lock(self) -> None:
        """Claim the folder until this process ends, however it ends, and clear up after a killed one.

        Raises CheckpointError when another process holds it.
        """
        # flock belongs to the open file, not to its name: the system drops it with the process, so that no kill leaves it behind.
        try:
            self._lock = open_for_writing(self.path, self.lock_file, append=True)
        except MalformedFile as error:
            raise CheckpointError(f"{self.lock_file} {error}: remove it.") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(self._lock.fileno(), 20, 0).decode("ascii", "replace").strip()
            owner = owner if owner.isdecimal() else "unknown"
            self._lock.close()
            self._lock = None
            raise CheckpointError(
                f"Another process (id {owner}) is training in {self.path}: wait for it, stop it, or give another folder with --out."
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()).encode())
        self._lock.flush()
        for leftover in self.path.glob(f"*{PART}"):
            with suppress(OSError):  # such as a folder of that name, which is none of ours
                leftover.unlink()

    def claim(self) -> None:
        """Make the folders and lock them. Raises ConfigError, or CheckpointError where another process writes there."""
        self.create()
        self.lock()

    def unlock(self) -> None:
        """Let another process write the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def config(self) -> RunConfig:
        """The configuration that the run was last started with. Raises ConfigError where config.toml is damaged."""
        return load(str(self.path))

    def write_config(self, config: RunConfig) -> None:
        """Write config.toml, whole or not at all; it makes the folder a run."""
        write_whole(self.config_file, dumps(config).encode())

    def manifest(self) -> dict[str, Any]:
        """The content of manifest.json, empty where there is none. Raises CheckpointError where it is no manifest of a run."""
        try:
            found = read_json_object(self.manifest_file)
        except FileNotFoundError:
            return {}
        except (MalformedFile, OSError):
            found = {}
        texts = all(isinstance(found.get(name, ""), str) for name in ("identity", "data"))
        starts = found.get("starts")
        if not (texts and isinstance(starts, list) and all(map(_is_start, starts)) and _is_parent(found.get("parent"))):
            raise CheckpointError(f"{self.manifest_file} is no manifest of a run: restore it, or remove it to have it written again.")
        return found

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Write manifest.json, whole or not at all."""
        write_whole(self.manifest_file, (json.dumps(manifest, indent=1) + "\n").encode())


def refuse_linked_folder(out: Path, folder: Path) -> None:
    """Raise ConfigError where a run folder below `out`, such as one of an ablation, is a symbolic link out of it."""
    try:
        refuse_links(out, folder)
    except MalformedFile as error:
        raise ConfigError(f"{out} {error}: remove it, or give another folder with --out.") from None


def split_step(source: str | Path) -> tuple[Path, int | None]:
    """RUN or RUN@STEP as folder and step; None is the newest checkpoint. A folder of that whole name comes first."""
    run, at, step = str(source).rpartition("@")
    if at and run and step.isdecimal() and not Path(source).exists():
        return Path(run), int(step)
    return Path(source), None


def _is_start(value: Any) -> bool:
    """Whether a manifest's entry of a start holds values of the types that are written."""
    kinds: dict[str, tuple[type, ...]] = {"step": (int,), "command": (str,), "changes": (list,), "machine": (dict,), "versions": (dict,)}
    return isinstance(value, dict) and all(type(value[name]) in kind for name, kind in kinds.items() if name in value)


def _is_parent(value: Any) -> bool:
    """Whether a manifest's entry of the run that the weights come from is as it is written, or missing."""
    kinds = {"run": str, "step": int, "weights_sha256": str, "keep_optimizer": bool}
    return value is None or (isinstance(value, dict) and all(type(value.get(name)) is kind for name, kind in kinds.items()))
