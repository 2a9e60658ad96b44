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
from pathlib import Path
from typing import IO, Any

from andromeda.config.load import dumps, load
from andromeda.config.run import RunConfig
from andromeda.utils.errors import CheckpointError, ConfigError
from andromeda.utils.files import PART, write_whole


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
        self._lock: IO[str] | None = None

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
        try:
            for folder in (self.path, self.checkpoints, self.samples):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"The run folder {self.path} cannot be made ({error.strerror}): give another one with --out.") from None

    def lock(self) -> None:
        """Claim the folder until this process ends, however it ends, and clear up after a killed one.

        Raises CheckpointError when another process holds it.
        """
        # flock belongs to the open file, not to its name: the system drops it with the process, so that no kill leaves it behind.
        self._lock = open(self.lock_file, "a+")  # noqa: SIM115 - stays open for the life of the run
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            self._lock = None
            raise CheckpointError(
                f"Another process (id {owner}) is training in {self.path}: wait for it, stop it, or give another folder with --out."
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        for leftover in self.path.glob(f"*{PART}"):
            leftover.unlink()

    def unlock(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def config(self) -> RunConfig:
        """The configuration that the run was last started with."""
        return load(str(self.path))

    def write_config(self, config: RunConfig) -> None:
        """Write config.toml."""
        write_whole(self.config_file, dumps(config).encode())

    def manifest(self) -> dict[str, Any]:
        """The manifest, or an empty one."""
        try:
            found = json.loads(self.manifest_file.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError, OSError):
            found = None
        if not (isinstance(found, dict) and isinstance(found.get("starts"), list)):
            raise CheckpointError(f"{self.manifest_file} is no manifest of a run: restore it, or remove it to have it written anew.")
        return found

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Write manifest.json."""
        write_whole(self.manifest_file, (json.dumps(manifest, indent=1) + "\n").encode())
