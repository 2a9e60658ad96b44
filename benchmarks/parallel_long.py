"""Several GPUs of one host against one of them: a decoding step in tensor parallel, long prompts and long sequences in context parallel.

    torchrun --nproc-per-node 2 benchmarks/parallel_long.py --out RESULTS/parallel-long.json
    torchrun --nproc-per-node 2 benchmarks/parallel_long.py --out RESULTS/parallel-long.json decode    # this row only, measured again
    torchrun --nproc-per-node 2 benchmarks/parallel_long.py --out /tmp/tiny.json --size tiny           # on a CPU; times mean nothing

Rows are in order of importance. Each runs in processes of its own, which end at its time limit, and writes its figures as soon as it has
them, so that a row that fails costs the others nothing. What Inductor and Triton compile is kept beside the result for a second try.
Every process measures one GPU alone before (or after) all of them together, in the same minute and on the same weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from andromeda.bench.models import random_model
from andromeda.bench.record import record, save
from andromeda.config.load import load
from andromeda.config.model import ModelConfig
from andromeda.config.run import RunConfig
from andromeda.generate.decode_step import CudaGraphDecodeStep, StaticDecodeStep
from andromeda.generate.optimize import optimize_for_inference
from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.kv_cache.protocol import KVCache
from andromeda.model.transformer import Transformer
from andromeda.parallel import context, tensor
from andromeda.parallel.layout import resolve_layout
from andromeda.parallel.mesh import build_mesh
from andromeda.train.objective import MicroBatch, NextTokenObjective
from andromeda.train.state import build_train_state
from andromeda.train.step import StepBatch, TrainStep

TINY = (
    "model.hidden_size=64 model.num_layers=2 model.vocab_size=512 model.attention.num_heads=4 model.attention.head_dim=32 "
    "model.feedforward.intermediate_size=128 model.alibi.num_heads=2 train.micro_batch_size=1"
)
FAR, DEEP = "model.rotary.scale_base=65536", "model.num_layers=8"
WINDOWS = "model.attention.sliding_window={window} model.attention.full_attention_interval={interval}"


class Run(NamedTuple):
    """What a row is given."""

    tiny: bool
    device: torch.device
    mesh: DeviceMesh
    report: Callable[[dict[str, Any]], None]
    """Writes figures of the row at once."""

    def config(self, *changes: str) -> ModelConfig:
        """Preset andromeda, or its shape at a size for a CPU."""
        return self.run_config(*changes).model

    def run_config(self, *changes: str) -> RunConfig:
        """The same with its training."""
        words = [word for change in (TINY if self.tiny else "", *changes) for word in change.split()]
        return load("andromeda", words)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in inference."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def decode(run: Run) -> None:
    """A decoding step of one sequence: one GPU, and its heads, features and vocabulary over all."""
    tokens = 64 if run.tiny else 2048
    config = run.config("model.max_seq_len=" + ("128" if run.tiny else "33280"))
    ids = _random_ids(config, tokens, run)
    model = _model(config, run)
    cache = _prefilled(model, ids)
    found: dict[str, Any] = {"context": tokens}
    found["one_ms"], expected = _step(optimize_for_inference(model, compile=run.device.type == "cuda"), cache, run)
    run.report(found)
    del model
    split = tensor.parallelize(_model(config, run), run.mesh, inference=True)
    optimize_for_inference(split, compile=run.device.type == "cuda")
    found["all_ms"], logits = _step(split, cache, run)
    found["speedup"] = found["one_ms"] / found["all_ms"]
    found["logits_difference"] = _difference(logits, expected)
    total: Any = next(part.sum_of_shares for part in split.modules() if getattr(part, "sum_of_shares", None) is not None)
    found["symmetric_memory"] = total._buffer is not None
    run.report(found)
    total._buffer = None
    found["all_ms_with_all_reduce"], _ = _step(split, cache, run)
    run.report(found)


def prefill_windows(run: Run) -> None:
    """A prompt of 32,768 tokens with windows and linear layers in 8 bits."""
    length = 64 if run.tiny else 32768
    windows = WINDOWS.format(window=16 if run.tiny else 1024, interval=2 if run.tiny else 8)
    _prefill(run, run.config(f"model.max_seq_len={length}", windows), length, fp8=run.device.type == "cuda")


def prefill(run: Run) -> None:
    """A prompt of 100,352 tokens in 16 bits."""
    length = 128 if run.tiny else 100352
    changes = "model.max_seq_len=128" if run.tiny else f"model.max_seq_len=200704 {FAR}"
    _prefill(run, run.config(changes), length, fp8=False)


def _prefill(run: Run, config: ModelConfig, length: int, fp8: bool) -> None:
    """All GPUs, then one."""
    ids = _random_ids(config, length, run)
    model = _model(config, run)
    parallel = context.parallelize(model, run.mesh)
    optimize_for_inference(model, fp8=fp8, compile=run.device.type == "cuda")

    def together() -> Tensor:
        logits: Tensor = model.head(parallel.last_hidden(ids, cache=DynamicKVCache(length))[:, -1])
        return logits

    def alone() -> Tensor:
        logits: Tensor = model.head(model.hidden(ids, cache=DynamicKVCache(length))[:, -1])
        return logits

    found: dict[str, Any] = {"tokens": length, "linear_layers": "fp8" if fp8 else str(run.dtype)}
    logits: dict[str, Tensor] = {}
    for name, read in (("all", together), ("one", alone)):
        _forget(run.device)
        start = time.perf_counter()
        with torch.no_grad():
            logits[name] = read().float()
            found[f"{name}_first_seconds"] = time.perf_counter() - start
            found[f"{name}_ms"] = _timed(read, run, 3)
        found[f"{name}_memory_gib"] = _peak(run.device)
        run.report(found)
    found |= {"speedup": found["one_ms"] / found["all_ms"], "logits_difference": _difference(logits["all"], logits["one"])}
    if found["one_memory_gib"]:
        found["memory_share"] = found["all_memory_gib"] / found["one_memory_gib"]
    run.report(found)


def train(run: Run) -> None:
    """A step of one sequence of 131,072 tokens, 8 of the preset's 32 layers: split over all GPUs, with FSDP2 over them, and on one."""
    length = 128 if run.tiny else 131072
    size = "model.max_seq_len=128 train.precision=fp32" if run.tiny else f"model.max_seq_len={length} {FAR} {DEEP} train.precision=bf16"
    changes = f"{size} train.seq_len={length} train.batch_size=1 train.activation_checkpointing=full train.compile=off"
    found: dict[str, Any] = {"tokens": length, "layers": run.config(size).num_layers}
    for name, layout in (("all", f"parallel.context={run.mesh.size()} parallel.shard=1"), ("one", "")):
        for backend in ("auto", "flash"):
            _forget(run.device)
            try:
                found |= _train_steps(run, run.run_config(changes, layout, f"model.attention.backend={backend}"), name)
                break
            except Exception as error:
                if backend == "flash" or isinstance(error, torch.OutOfMemoryError):
                    raise
                found[f"{name}_without_{backend}"] = str(error)[-300:]
        run.report(found)
    found["speedup"] = found["one_ms"] / found["all_ms"]
    if found["one_memory_gib"]:
        found["memory_share"] = found["all_memory_gib"] / found["one_memory_gib"]
    run.report(found)


def _train_steps(run: Run, config: RunConfig, name: str) -> dict[str, Any]:
    """A short step to load all kernels, then one that is timed."""
    mesh = build_mesh(resolve_layout(config.parallel, run.mesh.size()), run.device) if name == "all" else None
    state = build_train_state(config, run.device, "random", mesh)
    step = TrainStep(state, NextTokenObjective(state.model, config.train.z_loss, state.collectives), config.train)
    length = config.train.seq_len
    for tokens in (length // 16, length):
        ids = _random_ids(config.model, tokens + 1, run)
        batch = StepBatch(MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None), tokens, (0, 1))
        state.optimizer.set_lr_factor(1.0, 1)
        _synchronize(run.device)
        dist.barrier()
        start = time.perf_counter()
        result = step(batch)
        loss = float(result.nll)
        _synchronize(run.device)
        seconds = time.perf_counter() - start
    return {f"{name}_ms": 1e3 * seconds, f"{name}_memory_gib": _peak(run.device), f"{name}_loss": loss}


def _model(config: ModelConfig, run: Run) -> Transformer:
    """The same random weights on every process and at every call."""
    torch.manual_seed(0)
    return random_model(config, run.device, run.dtype)


def _random_ids(config: ModelConfig, length: int, run: Run) -> Tensor:
    return torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1)).to(run.device)


@torch.no_grad()
def _prefilled(model: Transformer, ids: Tensor) -> DynamicKVCache:
    cache = DynamicKVCache(ids.shape[1])
    model.hidden(ids, cache=cache)
    return cache


@torch.no_grad()
def _step(model: Transformer, cache: DynamicKVCache, run: Run) -> tuple[float, Tensor]:
    """Milliseconds of a recorded step, and the logits of one after the cache."""

    def read(ids: Tensor, documents: Tensor | None, cache: KVCache) -> Tensor:
        logits: Tensor = model.head(model.hidden(ids, documents=documents, cache=cache)[:, -1])
        return logits

    step = (CudaGraphDecodeStep if run.device.type == "cuda" else StaticDecodeStep)(read, cache, most=256)
    logits = step(torch.zeros(1, dtype=torch.long, device=run.device)).float().clone()
    return _timed(lambda: [step._run() for _ in range(20)], run, 5) / 20, logits


def _timed(work: Callable[[], Any], run: Run, repeats: int) -> float:
    """Median milliseconds; every process does the same number of calls."""
    seconds = []
    work()
    for _ in range(repeats):
        _synchronize(run.device)
        dist.barrier()
        start = time.perf_counter()
        work()
        _synchronize(run.device)
        seconds.append(time.perf_counter() - start)
    return 1e3 * median(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


ROWS: dict[str, tuple[Callable[[Run], None], int]] = {
    "decode": (decode, 75),
    "prefill-fp8-windows": (prefill_windows, 95),
    "prefill": (prefill, 80),
    "train": (train, 95),
}
"""Rows and the seconds that each may take, the start of its processes included."""


def run_row(name: str, out: Path, tiny: bool) -> None:
    """Measure one row in this process, one of those that torchrun's environment names."""
    cuda = torch.cuda.is_available() and not tiny
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=device if cuda else None)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    def report(figures: dict[str, Any]) -> None:
        if dist.get_rank() == 0:
            print(name, json.dumps(figures), flush=True)
            note(out, name, figures)

    try:
        ROWS[name][0](Run(tiny, device, mesh, report))
    except BaseException:
        traceback.print_exc()
        if dist.get_rank() == 0:
            note(out, name, {"failed": traceback.format_exc(limit=-3)[-600:]})
        # At once, without waiting for the others.
        os._exit(1)
    dist.destroy_process_group()


def note(out: Path, name: str, figures: dict[str, Any]) -> None:
    """Add figures of a row to the result."""
    rows = json.loads(out.read_text())["rows"] if out.exists() else {}
    rows[name] = {**rows.get(name, {}), **figures}
    save(out, record(f"torchrun --nproc-per-node {os.environ['WORLD_SIZE']} benchmarks/parallel_long.py", {"rows": rows}))


def supervise(names: list[str], out: Path, tiny: bool) -> None:
    """Run each row as a process of its own beside those of the other ranks; at its limit it is ended."""
    port, main = int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
    cache = out.parent / "cache"
    kept = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
    for number, name in enumerate(names, 1):
        if main and out.exists():
            rows = json.loads(out.read_text())["rows"]
            rows.pop(name, None)
            save(out, {"rows": rows})
        command = [sys.executable, __file__, "--row", name, "--out", str(out), "--size", "tiny" if tiny else "full"]
        environment = {**os.environ, **kept, "MASTER_PORT": str(port + 17 * number)}
        # torchrun's own store listens on the first port; the rows have stores of their own.
        environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        try:
            code = subprocess.run(command, env=environment, timeout=ROWS[name][1], check=False).returncode
            failure = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            failure = f"more than {ROWS[name][1]} s"
        if failure and main:
            note(out, name, {"ended": failure})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="rows to measure; all if none is named")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the figures")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    out = given.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    if given.row:
        run_row(given.row, out, given.size == "tiny")
    else:
        supervise(given.rows or list(ROWS), out, given.size == "tiny")


if __name__ == "__main__":
    main()
