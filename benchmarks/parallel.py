"""Training on several GPUs of one host against one GPU and against transformers' Llama under FSDP2: all rows in one command.

    python benchmarks/parallel.py --nproc 2 --out benchmarks/results/parallel-2.json --seconds 470
    python benchmarks/parallel.py --nproc 2 --out /tmp/tiny.json --tiny          # the same way on CPUs; its times mean nothing
    python benchmarks/parallel.py --nproc 2 --out FILE andromeda-bf16 llama-bf16 # these rows only

Rows come in order of importance, each in processes of its own with a limit of time, and the file is written after each. Rows of one GPU
run side by side where there are several GPUs. Tokens are random; a step is that of `andromeda train`, with its exchanges of counts.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

WARMUP, STEPS = 3, 10
ANDROMEDA = "andromeda train.activation_checkpointing=none train.micro_batch_size=2"
COPIES = "parallel.replicate=-1 parallel.shard=1"
TINY = (
    "train.device=cpu train.precision=fp32 train.compile=off model.hidden_size=64 model.num_layers=2 model.vocab_size=512 "
    "model.max_seq_len=64 train.seq_len=0 model.attention.num_heads=4 model.attention.head_dim=32 "
    "model.feedforward.intermediate_size=128"
)
TINY_OF = {
    "andromeda": f"model.alibi.num_heads=2 {TINY}",
    "speedrun": f"{TINY} model.attention.num_kv_heads=4 model.attention.sliding_window=16 train.window.start=4 train.window.end=16 "
    "train.window.step=4",
}


class Row(NamedTuple):
    """One measurement: a preset with changes, on how many processes, and what it is compared with."""

    config: str
    processes: int
    rows: int
    """Sequences of a step on each process; 0 keeps the preset's batch over all of them."""
    limit: int = 110
    """Seconds that it may take."""
    distributed: bool = True
    """Started as torchrun starts it; otherwise as one plain process."""
    peer: bool = False


def table(count: int) -> list[list[tuple[str, Row]]]:
    """All rows for `count` GPUs; those of one list run side by side."""
    return [
        [("andromeda-bf16-1", Row(ANDROMEDA, 1, 2, distributed=False)), ("andromeda-fp8-1", Row(_fp8(ANDROMEDA), 1, 2, distributed=False))],
        [("andromeda-bf16", Row(ANDROMEDA, count, 2))],
        [("llama-bf16", Row(ANDROMEDA, count, 2, peer=True))],
        [("andromeda-fp8", Row(_fp8(ANDROMEDA), count, 2))],
        [
            ("speedrun-1", Row("speedrun", 1, 0, distributed=False)),
            ("andromeda-bf16-nproc1", Row(ANDROMEDA, 1, 2)),
        ],
        [("speedrun", Row(f"speedrun {COPIES}", count, 0))],
        [("llama-bf16-1", Row(ANDROMEDA, 1, 2, distributed=False, peer=True)), ("andromeda-fp8-nproc1", Row(_fp8(ANDROMEDA), 1, 2))],
        [("speedrun-shard", Row("speedrun", count, 0))],
        [("andromeda-bf16-8-micro-batches", Row(ANDROMEDA, count, 16))],
        [("andromeda-bf16-reshard", Row(f"{ANDROMEDA} parallel.reshard_after_forward=always", count, 2))],
        [("andromeda-bf16-copies", Row(f"{ANDROMEDA} {COPIES}", count, 2))],
    ]


RATIOS = (
    ("andromeda-bf16", "andromeda-bf16-1", 1.92),
    ("andromeda-bf16", "llama-bf16", 1.10),
    ("andromeda-fp8", "andromeda-fp8-1", 1.88),
    ("speedrun", "speedrun-1", 1.9),
    ("andromeda-bf16-nproc1", "andromeda-bf16-1", 0.98),
    ("andromeda-fp8-nproc1", "andromeda-fp8-1", 0.98),
)
"""Tokens/s of the first over those of the second, and what is wanted on two GPUs."""


def _fp8(config: str) -> str:
    return f"{config} train.precision=fp8"


def main() -> None:
    """Run the rows that the time allows, or one row as one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="rows to run; all by default")
    parser.add_argument("--nproc", type=int, default=2, help="GPUs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=470.0, help="no row begins that could end later")
    parser.add_argument("--tiny", action="store_true", help="small sizes on CPUs")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        work(dict(row for group in table(given.nproc) for row in group)[given.row], given.out, given.tiny)
    else:
        run_all(given)


def run_all(given: argparse.Namespace) -> None:
    """Every group of rows in turn."""
    began = time.monotonic()
    results: dict[str, Any] = {"command": sys.argv, "machine": _machine(), "rows": {}}
    for group in table(given.nproc):
        wanted = [(name, row) for name, row in group if not given.names or name in given.names]
        left = given.seconds - (time.monotonic() - began)
        # A group may begin late, with what time is left as its limit.
        if not wanted or left < 40:
            continue
        started = [(name, row, _start(name, row, given, index)) for index, (name, row) in enumerate(wanted)]
        end = time.monotonic() + min(left, max(row.limit for _, row in wanted))
        for name, _, processes in started:
            results["rows"][name] = _finish(name, processes, end, given)
            given.out.write_text(json.dumps(results, indent=1) + "\n")
            print(name, _line(results["rows"][name]), flush=True)
    results["ratios"] = _ratios(results["rows"])
    given.out.write_text(json.dumps(results, indent=1) + "\n")


def _start(name: str, row: Row, given: argparse.Namespace, index: int) -> list[subprocess.Popen[bytes]]:
    """The processes of a row; a row of one process takes the GPU number `index`."""
    port = str(29500 + os.getpid() % 2000 + index)
    processes = []
    for rank in range(row.processes):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": row.processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | ({key: str(value) for key, value in names.items()} if row.distributed else {})
        if row.processes == 1:
            environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")[index]
        command = [sys.executable, __file__, "--nproc", str(given.nproc), "--out", f"{given.out}.{name}", "--row", name]
        with open(f"{given.out}.{name}.{rank}.log", "wb") as log:
            processes.append(
                subprocess.Popen(
                    [*command, *(["--tiny"] if given.tiny else [])], env=environment, stdout=log, stderr=log, start_new_session=True
                )
            )
    return processes


def _finish(name: str, processes: list[subprocess.Popen[bytes]], end: float, given: argparse.Namespace) -> dict[str, Any]:
    """Wait until `end` at most; the result of the row, or why there is none."""
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        if any(process.poll() not in (None, 0) for process in processes):
            end = min(end, time.monotonic() + 5)
        time.sleep(0.2)
    late = [process for process in processes if process.poll() is None]
    for process in late:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    result = Path(f"{given.out}.{name}")
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text())
        result.unlink()
        return found
    failed = next((rank for rank, process in enumerate(processes) if process not in late and process.returncode), 0)
    text = Path(f"{given.out}.{name}.{failed}.log").read_text(errors="replace")
    # The first error, which a long dump may follow, and the end.
    tail = "\n".join([line[:500] for line in text.splitlines() if "Error" in line or "Exception" in line][:8]) + "\n" + text[-1500:]
    return {"failed": "took too long" if late else f"process {failed} ended with {processes[failed].returncode}", "log": tail}


def _line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"FAILED: {row['failed']}\n{row['log'][-800:]}"
    speed = f"{row['tokens_per_second']:,.0f} tokens/s, {row['seconds']:.4f} s a step"
    return f"{speed}, {row['peak_gib']:.1f} GiB, first step {row['first_seconds']:.0f} s"


def _ratios(rows: dict[str, Any]) -> dict[str, Any]:
    ratios: dict[str, Any] = {}
    for name, base, wanted in RATIOS:
        if all("tokens_per_second" in rows.get(key, {}) for key in (name, base)):
            ratio = rows[name]["tokens_per_second"] / rows[base]["tokens_per_second"]
            ratios[f"{name} / {base}"] = {"ratio": ratio, "wanted": wanted}
            print(f"{name} / {base}: {ratio:.3f} (wanted {wanted})", flush=True)
    return ratios


def _machine() -> dict[str, Any]:
    import torch

    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"torch": torch.__version__, "devices": cards or ["cpu"], "cores": os.cpu_count()}


def work(row: Row, out: Path, tiny: bool) -> None:
    """One process of a row; the first one writes the result."""
    import torch

    from andromeda.config.load import load
    from andromeda.parallel.mesh import init_mesh, is_distributed, local_device
    from andromeda.train.state import resolve_device

    torch.set_float32_matmul_precision("high")
    source, *changes = row.config.split()
    if tiny:
        changes = [*(c for c in changes if "precision" not in c), *TINY_OF[source].split()]
    if row.rows:
        changes.append(f"train.batch_size={row.rows * row.processes}")
    config = load(source, changes)
    device = resolve_device(config.train.device)
    mesh = init_mesh(config.parallel, local_device(device.type)) if is_distributed() else None
    step = _llama_step(config, mesh, device) if row.peer else _andromeda_step(config, mesh, device)
    result = _timed(step, config, mesh.device if mesh else device, row, mesh)
    if mesh is None or mesh.is_main:
        out.write_text(json.dumps({"configuration": [source, *changes], "processes": row.processes, **result}))
    if mesh:
        torch.distributed.destroy_process_group()


def _timed(step: Any, config: Any, device: Any, row: Row, mesh: Any) -> dict[str, Any]:
    """Median time of a step over STEPS after WARMUP, and the losses of all."""
    import torch

    length = config.train.seq_len or config.model.max_seq_len
    ids = torch.randint(0, config.model.vocab_size, (config.train.batch_size, length), generator=torch.Generator().manual_seed(0))
    each = len(ids) // row.processes
    first = each * (mesh.data_rank if mesh else 0)
    own = ids[first : first + each]
    seconds, losses = [], []
    for _ in range(WARMUP + STEPS):
        start = time.perf_counter()
        losses.append(step(own, ids.numel()))
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    spent = statistics.median(seconds[WARMUP:])
    return {
        "tokens_per_second": ids.numel() / spent,
        "seconds": spent,
        "all_seconds": seconds,
        "first_seconds": seconds[0],
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0,
        "losses": [float(loss) for loss in losses],
    }


def _andromeda_step(config: Any, mesh: Any, device: Any) -> Any:
    from andromeda.train.objective import MicroBatch, NextTokenObjective
    from andromeda.train.state import build_train_state
    from andromeda.train.step import StepBatch, TrainStep

    state = build_train_state(config, mesh.device if mesh else device, "bench", mesh)
    run = TrainStep(state, NextTokenObjective(state.model, config.train.z_loss), config.train)
    done = iter(range(1 << 30))

    def step(ids: Any, num_targets: int) -> Any:
        state.collectives.largest(0)
        state.collectives.sum_numbers(ids.numel(), 0)
        state.optimizer.set_lr_factor(1e-3, next(done))
        return run(StepBatch(MicroBatch(ids, ids, None), num_targets, (0, len(ids)))).nll

    return step


def _llama_step(config: Any, mesh: Any, device: Any) -> Any:
    """transformers' Llama with the same number of parameters, its layers compiled, under FSDP2 with the usual mixed precision."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    device = mesh.device if mesh else device
    m = config.model
    shape = {"vocab_size": m.vocab_size, "hidden_size": m.hidden_size, "num_hidden_layers": m.num_layers, "head_dim": m.attention.head_dim}
    shape |= {"num_attention_heads": m.hidden_size // m.attention.head_dim, "num_key_value_heads": 1}
    shape |= {"intermediate_size": round(8 / 3 * m.hidden_size / 256) * 256, "max_position_embeddings": 131072}
    with device:
        model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa", use_cache=False))
    if device.type == "cuda":
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    if mesh:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(ids: Any, num_targets: int) -> Any:
        ids = ids.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=mesh is None and device.type == "cuda"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


if __name__ == "__main__":
    main()
