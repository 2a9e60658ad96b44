"""All GPU figures of docs/performance.md in one command: the benchmarks in order of importance, each in a process of its own, and a table.

    python benchmarks/gpu.py --out RESULTS --seconds 560            # the most important jobs that this time allows
    python benchmarks/gpu.py --out RESULTS --seconds 560            # again: what is not in RESULTS yet
    python benchmarks/gpu.py --out RESULTS loss embedding           # these only, measured again
    python benchmarks/gpu.py --out /tmp/tiny --size tiny            # the same way on a CPU, in a few minutes; its times mean nothing

A job is one `andromeda bench` command, which writes gpu-JOB.json into the folder, and its output gpu-JOB.log; a job that fails or
takes too long costs the others nothing. What Inductor and Triton compile is kept in the folder's `cache` for a job's second try.
`benchmarks/gpu.py --table RESULTS` prints the table again. To make the page: copy the files into benchmarks/results, then
`python -m tools.performance_page > docs/performance.md`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.gpu_goals import table

FOLD = "model.alibi.fold_into_qk=true"
WINDOWS = "model.attention.sliding_window=1024 model.attention.full_attention_interval=8"
LONG = f"andromeda {FOLD} model.max_seq_len=32768"
ENDLESS = f"andromeda {FOLD} model.max_seq_len=200704 model.rotary.scale_base=65536"
SMALL = (
    "model.hidden_size=64 model.num_layers=2 model.vocab_size=512 model.max_seq_len=256 "
    "model.attention.num_heads=4 model.attention.num_kv_heads=1 "
    "model.attention.head_dim=32 model.feedforward.intermediate_size=128 train.micro_batch_size=1"
)
SMALL_ALIBI = f"andromeda {SMALL} model.alibi.num_heads=2 {FOLD}"
SMALL_LONG = f"andromeda-360m-long {SMALL} model.attention.sliding_window=16 model.attention.full_attention_interval=2 train.seq_len=256"
ON_CPU = "train.device=cpu train.compile=off train.precision=fp32"
CURVE = "precision andromeda-125m train.schedule.warmup={0} train.schedule.cooldown={0}"
"""bf16 and fp8 on the same tokens, with a warm-up and a cooldown of so many steps."""


class Job(NamedTuple):
    """One benchmark: its command after `andromeda bench`, the seconds it may take, and the same at a size for a CPU."""

    command: str
    limit: int
    tiny: str


JOBS = {
    "attention": Job("attention --lengths 32768 --budget 75", 95, "attention --lengths 64 --rep 1 --budget 15"),
    "train-bf16": Job(
        f"train andromeda {FOLD} train.activation_checkpointing=none train.micro_batch_size=2 --batch-size 64 --steps 2",
        170,
        f"train {SMALL_ALIBI} {ON_CPU} train.activation_checkpointing=none --batch-size 4 --steps 1",
    ),
    "train-bf16-batch-1": Job(
        f"train andromeda {FOLD} --batch-size 1 --steps 6 --peers llama", 130, f"train {SMALL_ALIBI} {ON_CPU} --batch-size 1 --steps 1"
    ),
    "prefill-bf16": Job(f"prefill {LONG} --lengths 32768", 80, f"prefill {SMALL_ALIBI} --lengths 64"),
    "prefill-fp8-windows": Job(f"prefill {LONG} {WINDOWS} --lengths 32768 --fp8", 90, f"prefill {SMALL_ALIBI} --lengths 64 --fp8"),
    "prefill-long": Job("prefill andromeda-360m-long --lengths 32768,100352 --fp8", 80, f"prefill {SMALL_LONG} --lengths 64,128"),
    "decode": Job(f"decode andromeda {FOLD} model.max_seq_len=33280", 90, f"decode {SMALL_ALIBI} --contexts 32,64"),
    "loss": Job("loss", 60, "loss --tokens 64"),
    "embedding": Job("embedding", 60, "embedding --tokens 16 --vocab-size 64 --rep 1"),
    "train-fp8": Job(
        f"train andromeda {FOLD} train.precision=fp8 train.micro_batch_size=2 --batch-size 64 --steps 2",
        160,
        f"train {SMALL_ALIBI} {ON_CPU} --batch-size 1 --steps 1",
    ),
    "train-360m-8k": Job(
        "train andromeda-360m model.max_seq_len=8192 train.micro_batch_size=4 --batch-size 16 --steps 4",
        80,
        f"train andromeda-360m {SMALL} {ON_CPU} --batch-size 2 --steps 1",
    ),
    "train-360m-32k": Job(
        "train andromeda-360m model.max_seq_len=32768 train.micro_batch_size=1 --batch-size 4 --steps 4",
        80,
        f"train andromeda-360m {SMALL} {ON_CPU} --batch-size 2 --steps 1",
    ),
    "prefill-200k": Job(
        f"prefill {ENDLESS} --lengths 200000 --chunk-sizes 0,25000", 150, f"prefill {SMALL_ALIBI} --lengths 96 --chunk-sizes 0,24"
    ),
    "decode-tuned": Job(
        f"decode andromeda {FOLD} model.max_seq_len=33280 --autotune", 240, f"decode {SMALL_ALIBI} --contexts 32 --autotune"
    ),
    "precision": Job(
        f"{CURVE.format(100)} model.max_seq_len=2048 --steps 500 --batch-size 16",
        200,
        f"{CURVE.format(1)} {SMALL} train.device=cpu train.compile=off --steps 4 --batch-size 2",
    ),
    "train-flash": Job(
        "train andromeda-360m model.max_seq_len=8192 train.micro_batch_size=1 train.activation_checkpointing=full "
        "--batch-size 2 --steps 4 --unfused",
        100,
        f"train andromeda-360m {SMALL} {ON_CPU} --batch-size 2 --steps 1 --unfused",
    ),
    "prefill-flash": Job(
        "prefill andromeda-360m model.max_seq_len=32768 --lengths 8192,32768 --unfused",
        140,
        f"prefill andromeda-360m {SMALL} --lengths 64 --unfused",
    ),
    "prefill-long-bf16": Job("prefill andromeda-360m-long --lengths 32768,100352", 80, f"prefill {SMALL_LONG} --lengths 64"),
    "prefill-peers": Job(
        f"prefill andromeda {FOLD} --lengths 8192 --peers all", 120, f"prefill {SMALL_ALIBI} --lengths 64 --peers x-transformers"
    ),
    "train-peers": Job(
        f"train andromeda {FOLD} --batch-size 1 --steps 3 --peers x-transformers,x-transformers-alibi",
        150,
        f"train {SMALL_ALIBI} {ON_CPU} --batch-size 1 --steps 1 --peers x-transformers",
    ),
    "attention-8k": Job("attention --lengths 8192 --budget 60", 80, "attention --lengths 32 --rep 1 --budget 10"),
    "qk": Job("qk", 90, "qk --tokens 16 --rep 1"),
    "decode-fp8": Job(f"decode andromeda {FOLD} model.max_seq_len=33280 --fp8", 130, f"decode {SMALL_ALIBI} --contexts 32 --fp8"),
}
"""In order of importance. Limits are three times what a job should take, most of it compiling."""


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help="these only, measured again: " + ", ".join(JOBS))
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of all jobs together; none begins after that")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="print the table of results that are there")
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
        return
    if options.out is None or (unknown := set(options.jobs) - JOBS.keys()):
        parser.error("give --out FOLDER" if options.out is None else f"there is no job {sorted(unknown)[0]}: {', '.join(JOBS)}")
    end = time.monotonic() + options.seconds
    for name, job in JOBS.items():
        if name in options.jobs or not (options.jobs or (options.out / f"gpu-{name}.json").exists()):
            run(name, job, options.out, options.size, end - time.monotonic())
    print(table(options.out))


def run(name: str, job: Job, folder: Path, size: str, left: float) -> None:
    """One job within its limit and the time that is left, and a line on how it went."""
    if left < job.limit / 3 and size == "full":
        print(f"{name:20s} not begun: {max(0, left):.0f} s are left", flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    words = (job.tiny if size == "tiny" else job.command).split()
    command = [sys.executable, "-m", "andromeda.cli.main", "bench", *words, "--out", str(folder / f"gpu-{name}.json")]
    limit = min(job.limit, left) if size == "full" else 5 * job.limit
    start = time.monotonic()
    with (folder / f"gpu-{name}.log").open("w") as log:
        try:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, env=environment(folder))
            code: int | str = done.returncode
        except subprocess.TimeoutExpired:
            code = "too slow"
    print(f"{name:20s} {time.monotonic() - start:4.0f} s  {'' if code == 0 else f'FAILED ({code}): {last_line(log.name)}'}", flush=True)


def environment(folder: Path) -> dict[str, str]:
    """Compilers keep their work beside the results, and memory that is free can be used in any size."""
    kept = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache" / "inductor"), "TRITON_CACHE_DIR": str(folder / "cache" / "triton")}
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH", "")) if path)
    return {**os.environ, **kept, "PYTHONPATH": paths, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTHONUNBUFFERED": "1"}


def last_line(log: str) -> str:
    """What a job said last."""
    lines = [line for line in Path(log).read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


if __name__ == "__main__":
    main()
