"""Time and memory of `andromeda data build` on JSONL of this interpreter's Python sources.

    python benchmarks/data_build.py 60000 216000000

writes benchmarks/results/data_build.json. With `--no-tiktoken` byte pairs are merged by `tokenizers`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from andromeda.bench.record import record, save
from andromeda.config.data import BuildConfig
from andromeda.data.formats import read_documents
from andromeda.data.sources import list_source

WITHOUT = "import andromeda.data.encoders.bpe as bpe; bpe.convert = lambda *_: None; "
"""Holds in the process that builds, which for this is the only one."""


def write_corpus(path: Path, documents: int, size: int) -> None:
    """Write `documents` records of equal length, of about `size` bytes in all."""
    config, texts, held = BuildConfig(), list[str](), 0
    for task in list_source(0, "python", config).tasks:
        for found in read_documents(task, config):
            if found.text and held < size:
                texts.append(found.text)
                held += len(found.text.encode())
    whole = "\n".join(texts)
    step = len(whole) // documents
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            file.write(json.dumps({"text": whole[number * step : (number + 1) * step]}, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("documents", type=int)
    parser.add_argument("size", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-tiktoken", action="store_true")
    parser.add_argument("--write", help="Only write the documents here.")
    asked = parser.parse_args()
    if asked.write:
        write_corpus(Path(asked.write), asked.documents, asked.size)
        return
    workers = 1 if asked.no_tiktoken else asked.workers
    with tempfile.TemporaryDirectory() as folder:
        source = f"{folder}/documents.jsonl"
        # In a process of its own: what is forked from a large one counts as large.
        subprocess.run([sys.executable, __file__, str(asked.documents), str(asked.size), "--write", source], check=True)
        arguments = ["data", "build", source, "--out", f"{folder}/corpus", "--vocab-size", "8192", "--workers", str(workers)]
        run = f"import sys; sys.argv = ['andromeda', *{arguments}]; from andromeda.cli.main import main; main()"
        begin = time.perf_counter()
        build = subprocess.Popen([sys.executable, "-c", (WITHOUT if asked.no_tiktoken else "") + run], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(build.pid, 0)
        result = {
            "bytes": Path(source).stat().st_size,
            "documents": asked.documents,
            "workers": workers,
            "wall_seconds": round(time.perf_counter() - begin, 1),
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
            "largest_process_mib": round(used.ru_maxrss / 1024),
            "load_average": round(os.getloadavg()[0], 1),
        }
    assert status == 0, "the build failed"
    print(json.dumps(result, indent=1))
    if not asked.no_tiktoken:
        command = f"python benchmarks/data_build.py {asked.documents} {asked.size} --workers {workers}"
        save(Path(__file__).parent / "results" / "data_build.json", record(command, result))


if __name__ == "__main__":
    main()
