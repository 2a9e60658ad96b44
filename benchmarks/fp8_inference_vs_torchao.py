"""Whether torchao's float8 linear layer could replace `Float8DynamicLinear` for inference: time and error of both, on one GPU.

`python benchmarks/fp8_inference_vs_torchao.py [--lengths 512,2048,8192,32768] [--seconds 2]
--out benchmarks/results/fp8-vs-torchao.json` prints the figures as JSON and writes them to the file.

Layers: one linear layer, compiled, for every matrix of preset andromeda-1b and several numbers of tokens. Prefill: the same preset with
random bfloat16 weights; in `plain` variants the layers of the blocks are replaced one by one and the blocks compiled, `fused` is what
`optimize_for_inference(fp8=True)` does. Both libraries quantize weights once and activations dynamically, to e4m3 with a scale per row.
All variants of a case are timed in turn, and the median over the rounds is reported, in milliseconds. Without a GPU, `--check` runs
tiny shapes on the CPU without torchao, which has no float8 there, to show that the script works; its times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

from andromeda.bench.models import random_model
from andromeda.bench.record import record, save
from andromeda.config.load import load
from andromeda.config.model import ModelConfig
from andromeda.generate.optimize import UNPADDED, optimize_for_inference
from andromeda.model.transformer import Transformer
from andromeda.ops.float8_inference import Float8DynamicLinear, has_aligned_shape

PRESET = "andromeda-1b"
TINY = ["model.hidden_size=64", "model.num_layers=2", "model.vocab_size=128", "model.max_seq_len=256", "model.attention.num_heads=4",
        "model.attention.num_kv_heads=1", "model.attention.head_dim=16", "model.alibi.num_heads=2"]  # fmt: skip
DTYPE = torch.bfloat16


def main() -> None:
    """Print all figures as JSON, and write them to `--out`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", default="512,2048,8192,32768", help="Tokens of the prompts, and rows of the layers' inputs.")
    parser.add_argument("--seconds", type=float, default=2.0, help="Time for the rounds of each case.")
    parser.add_argument("--check", action="store_true", help="Tiny shapes on the CPU, only to see that the script works.")
    parser.add_argument("--out", type=Path, help="JSON file of the figures, which are also printed.")
    options = parser.parse_args()
    device = torch.device("cpu" if options.check else "cuda")
    lengths = [32, 48] if options.check else [int(length) for length in options.lengths.split(",")]
    config = load(PRESET, TINY if options.check else []).model
    torch._dynamo.config.recompile_limit = 64
    with torch.no_grad():
        layers = [measure_layer(shape, tokens, device, options.seconds) for shape in layer_shapes(config) for tokens in [1, 16, *lengths]]
        prefills = measure_prefill(config, lengths, device, options.seconds)
    figures = {"torchao": version("torchao"), "layers": layers, "prefill": prefills}
    command = f"python benchmarks/fp8_inference_vs_torchao.py --lengths {options.lengths} --seconds {options.seconds}"
    result = record(command, figures)
    print(json.dumps(result, indent=2))
    if options.out is not None:
        save(options.out, result)


def layer_shapes(config: ModelConfig) -> list[tuple[int, int, bool]]:
    """Inputs, outputs and bias of the distinct linear layers of a block."""
    with torch.device("meta"):
        block = Transformer(config).decoder.blocks[0]
    layers = [layer for layer in block.modules() if isinstance(layer, nn.Linear) and has_aligned_shape(layer)]
    return sorted({(layer.in_features, layer.out_features, layer.bias is not None) for layer in layers})


def to_torchao(module: nn.Module) -> None:
    """Quantize the linear layers below `module` in place, except those of a router."""
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(module, config, lambda layer, path: isinstance(layer, nn.Linear) and has_aligned_shape(layer) and "router" not in path)


def to_ours(module: nn.Module) -> None:
    """The same with `Float8DynamicLinear`."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and has_aligned_shape(child):
            setattr(module, name, Float8DynamicLinear(child))
        elif name != "router":
            to_ours(child)


def measure_layer(shape: tuple[int, int, bool], tokens: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """One linear layer as part of a sequence with a norm before it, into which torch.compile can fuse the quantization."""
    K, N, bias = shape
    x = torch.randn(1, tokens, K, device=device, dtype=DTYPE)
    runs: dict[str, Callable[[], Tensor]] = {}
    outputs: dict[str, Tensor] = {}
    for name, convert in {"bf16": None, "ours": to_ours, "torchao": to_torchao}.items():
        if name == "torchao" and device.type == "cpu":
            continue
        torch.manual_seed(0)
        model = nn.Sequential(nn.RMSNorm(K), nn.Linear(K, N, bias=bias)).to(device, DTYPE).requires_grad_(False)
        if convert is not None:
            convert(model)
        runs[name] = partial(torch.compile(model, options=UNPADDED) if device.type == "cuda" else model, x)
        outputs[name] = runs[name]().double()
    errors = {name: error(out, outputs["bf16"]) for name, out in outputs.items() if name != "bf16"}
    torch._dynamo.reset()
    return {"inputs": K, "outputs": N, "bias": bias, "tokens": tokens, "ms": interleaved(runs, device, seconds), "error": errors}


def measure_prefill(config: ModelConfig, lengths: list[int], device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """The last position's logits of one prompt of each length."""
    names = ["bf16 fused", "fused", "plain", *(["plain torchao"] if device.type == "cuda" else [])]
    models = {name: prefill_model(config, name, device) for name in names}
    rows = []
    for tokens in lengths:
        ids = torch.randint(0, config.vocab_size, (1, tokens), device=device)
        torch._dynamo.reset()
        runs = {name: partial(last_logits, model, ids) for name, model in models.items()}
        outputs = {name: run().double() for name, run in runs.items()}
        errors = {name: error(out, outputs["bf16 fused"]) for name, out in outputs.items() if name != "bf16 fused"}
        rows.append({"tokens": tokens, "ms": interleaved(runs, device, seconds), "error": errors})
    return rows


def prefill_model(config: ModelConfig, name: str, device: torch.device) -> Transformer:
    """The same random weights for every variant."""
    torch.manual_seed(0)
    model = random_model(config, device, DTYPE)
    compile = device.type == "cuda"
    if "fused" in name:
        return optimize_for_inference(model, fp8=name == "fused", compile=compile)
    model.requires_grad_(False)
    for block in model.decoder.blocks:
        (to_torchao if "torchao" in name else to_ours)(block)
        if compile:
            block.compile(options=UNPADDED)
    gc.collect()
    return model


def last_logits(model: Transformer, ids: Tensor) -> Tensor:
    """Logits (1, V) after the prompt."""
    return model.head(model.hidden(ids)[:, -1])


def interleaved(runs: dict[str, Callable[[], Tensor]], device: torch.device, seconds: float) -> dict[str, float]:
    """Median milliseconds of each, taken in turn so that a change of the clock rate meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(3):
            run()
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times[next(iter(times))]) < 5:
        for name, run in runs.items():
            times[name].append(once_ms(run, device))
    return {name: statistics.median(values) for name, values in times.items()}


def once_ms(run: Callable[[], Tensor], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def error(out: Tensor, reference: Tensor) -> float:
    """Relative difference in the L2 norm."""
    return float((out - reference).norm() / reference.norm())


if __name__ == "__main__":
    main()
