"""Times, costs, meshes and the command, against figures worked out by hand or published."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from andromeda.cli.main import app
from andromeda.config.load import load
from andromeda.config.parallel import ParallelConfig
from andromeda.model.meta_model import meta_model
from andromeda.parallel.layout import Layout
from andromeda.plan import HardwareSetup, plan
from andromeda.plan.communication import in_layout, local_batch_sizes, parse_layout, traffic
from andromeda.plan.estimate import count_parameters
from andromeda.plan.roofline import seconds_per_step, serving_roofline
from andromeda.utils.errors import ConfigError
from andromeda.utils.hardware import HARDWARE, Hardware, find_hardware, peak_flops, recognize

pytestmark = pytest.mark.usefixtures("still_heap")

SMALL = """
[model]
vocab_size = 256
max_seq_len = 64
hidden_size = 64
num_layers = 2
attention = {num_heads = 4, num_kv_heads = 1, head_dim = 16}
rotary = {kind = "rope"}

[train]
batch_size = 8
steps = 100
compile = "off"
"""


@pytest.fixture
def small(tmp_path: Path) -> str:
    """Path of a small configuration of its own."""
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return str(path)


def test_floors_of_the_long_context_model_on_an_h200() -> None:
    """3.55e14 operations for 32,768 tokens at 735 TFLOP/s take 483 ms; 2.33 B weights at 4.27 TB/s take 1.09 ms a token."""
    config = load("andromeda", ["model.max_seq_len=32768"])
    served = serving_roofline(config.model, count_parameters(meta_model(config.model)).active, HARDWARE["h200"], "bf16")
    assert served is not None
    assert served.prefill == pytest.approx(0.483, rel=0.01)
    assert served.token == pytest.approx(1.09e-3, rel=0.01)
    assert served.token_full - served.token == pytest.approx(32768 * 16 * 1024 / 4.27e12, rel=1e-9)


def test_a_step_takes_its_operations_over_the_rate() -> None:
    config = load("andromeda", ["train.activation_checkpointing=none", "train.batch_size=1"])
    slow = Hardware("slow", 1e9, 1e9, {"bf16": 1e12}, "invented")
    parameters = count_parameters(meta_model(config.model)).active
    # 6 N T of the projections, 12 L H D (T + 1) / 2 T of attention and once more its scores.
    T, L, H, D = 8192, 32, 24, 128
    expected = (6 * parameters + 14 * L * H * D * (T + 1) / 2) * T / 1e12
    assert seconds_per_step(config, T, slow, "bf16", 1) == pytest.approx(expected, rel=1e-3)
    assert seconds_per_step(config, T, slow, "bf16", 4) == pytest.approx(expected / 4, rel=1e-3)
    assert seconds_per_step(config, T, slow, "fp8", 1) is None


def test_eight_bits_speed_up_projections_alone() -> None:
    config = load("andromeda", ["train.activation_checkpointing=none", "train.batch_size=1", "model.alibi.fold_into_qk=false"])
    twice = Hardware("twice", 1e9, 1e9, {"bf16": 1e12, "fp8": 2e12}, "invented")
    sixteen, eight = (seconds_per_step(config, 8192, twice, precision, 1) for precision in ("bf16", "fp8"))
    assert sixteen is not None
    assert eight is not None
    blocks = 524_390_400 - 32 * 25 * 128 + 1_678_131_200 - 32 * 5 * 2560  # matrices, without scales of the QK norm and biases
    assert sixteen - eight == pytest.approx(6 * blocks * 8192 / 1e12 / 2, rel=1e-6)


def test_budget_is_tokens_times_flops_over_the_assumed_rate(small: str) -> None:
    config = load(small)
    gpu = Hardware("gpu", 1e9, 1e9, {"bf16": 1e12}, "invented")
    made = plan("small", config, HardwareSetup(gpu, True, Layout(replicate=2), price=3.0, mfu=0.25), tokens=1000 * 8 * 64 + 1)
    assert made.budget.steps == 1001
    seconds = made.budget.tokens * made.flops.training / (0.25 * 1e12 * 2)
    assert made.budget.hours == pytest.approx(seconds / 3600)
    assert made.budget.cost == pytest.approx(seconds / 3600 * 3.0 * 2)
    assert plan("small", config, HardwareSetup(gpu, True, Layout())).budget.steps == 100


def test_sharding_follows_zero(small: str) -> None:
    """ZeRO-3 leaves 16 bytes a parameter over N (arXiv 1910.02054) and sends 3 P numbers where data parallelism sends 2 P."""
    config = load(small, ["train.optim.kind=adamw"])
    gpu = HARDWARE["h100"]
    made = plan("small", config, HardwareSetup(gpu, True, Layout(shard=4)))
    assert made.memory.state.total == pytest.approx(16 * made.parameters.total / 4, rel=1e-3)
    model, N = meta_model(config.model), 4
    M = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    V = sum(p.numel() for p in model.parameters() if p.ndim == 1)  # copied by every process
    # With weights freed after the forward pass, and tables and head kept.
    tables = 2 * 256 * 64
    sent = traffic(in_layout(config, Layout(shard=N)), Layout(shard=N), model, 2, memory=0)
    assert sent["all-gather"] == pytest.approx(2 * (2 * (M - tables) + tables) * (N - 1) / N)
    assert sent["reduce-scatter"] == pytest.approx(4 * M * (N - 1) / N)
    assert sent["all-reduce"] == pytest.approx(2 * 4 * V * (N - 1) / N)
    copied = traffic(in_layout(config, Layout(replicate=N)), Layout(replicate=N), model, 2, memory=0)
    assert copied == {"all-reduce": pytest.approx(2 * 4 * (M + V) * (N - 1) / N)}


def test_tensor_parallelism_divides_memory_and_sends_activations(small: str) -> None:
    config = load(small)
    whole, halved = (plan("small", config, HardwareSetup(HARDWARE["h100"], True, Layout(tensor=tensor))) for tensor in (1, 2))
    assert halved.memory.passing.saved == whole.memory.passing.saved // 2
    assert halved.memory.state.weights == whole.memory.state.weights // 2
    # Two branches of two layers, forward and backward, and the gradient of the last states, in 16 bits; the embedding in 32; the loss.
    assert halved.sent == {"all-reduce": 9 * 8 * 64 * 64 * 2 + 8 * 64 * 64 * 4 + 3 * 8 * 64 * 4}


def test_rows_of_each_gpu(small: str) -> None:
    config = load(small, ["train.batch_size=16", "train.micro_batch_size=4"])
    assert local_batch_sizes(config, Layout(replicate=2)) == (8, 4)
    assert local_batch_sizes(config, Layout(replicate=4, shard=2)) == (2, 2)
    with pytest.raises(ConfigError, match="is not a multiple of the 3 processes"):
        in_layout(config, Layout(replicate=3))
    with pytest.raises(ConfigError, match=r"parallel\.tensor = 8"):
        in_layout(config, Layout(tensor=8))
    assert in_layout(config, Layout(shard=8)).train.micro_batch_size == 2, "what a process reads"


def test_reading_a_layout() -> None:
    assert parse_layout("replicate=8, shard=4,tensor=2", ParallelConfig()) == Layout(8, 4, 1, 2)
    assert parse_layout("", ParallelConfig()) == Layout()
    assert parse_layout("", ParallelConfig(shard=4, context=2)) == Layout(1, 4, 2)
    for text, sentence in (
        ("shrad=4", "did you mean shard"),
        ("tensor=x", "tensor=x is not a number"),
        ("fsdp=4", "fsdp is now called shard"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            parse_layout(text, ParallelConfig())


def test_devices() -> None:
    assert recognize("NVIDIA H100 80GB HBM3") is HARDWARE["h100"]
    assert peak_flops("NVIDIA H200", "bf16") == 989.4e12
    assert peak_flops("Voodoo 2", "bf16") is None
    assert HARDWARE["a100"].peak["bf16"] == 312e12
    with pytest.raises(ConfigError, match="did you mean h200"):
        find_hardware("h20")
    measured = peak_flops("cpu", "fp32")
    assert measured is not None
    assert measured > 1e8


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["plan", *words])


def test_the_command_prints_what_was_computed(small: str) -> None:
    result = run(small, "llama-7b", "train.compile=off", "--parallel", "replicate=2", "--price", "2", "--json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert [p["name"] for p in made["plans"]] == [small, "llama-7b"]
    assert sum(made["plans"][0]["parameters"]["parts"].values()) == count_parameters(meta_model(load(small).model)).total
    assert made["plans"][0]["layout"][0] == 2


def test_presets_stand_side_by_side_at_any_batch_and_length() -> None:
    names = ["andromeda-65b", "speedrun"]  # one takes a step's rows at once, the other sixteen at a time
    result = run(*names, "--batch-size", "6", "--seq-len", "3000", "--json")
    assert result.exit_code == 0, result.output
    plans = json.loads(result.stdout)["plans"]
    assert [plan["name"] for plan in plans] == names
    assert {(plan["rows"], plan["sequence"]) for plan in plans} == {(6, 3000)}
    assert all(6 % plan["micro_rows"] == 0 for plan in plans)


def test_the_table_names_every_section(small: str) -> None:
    text = run(small, "--seq-len", "128", "--batch-size", "4", "--gpu", "cpu", "--details").stdout
    for words in ("Forward FLOPs per token", "KV cache per token", "4 x 128", "run at an MFU of 40%", "one this CPU"):
        assert words in text
    assert "\x1b" not in text


def test_the_short_answer_estimates_the_memory(small: str) -> None:
    text = run(small, "--seq-len", "128", "--batch-size", "4", "train.compile=on", "--gpu", "h100").stdout
    assert "fits, needs about 1% of the memory of one H100 SXM" in text
    assert "Forward FLOPs per token" not in text


def test_an_estimate_near_the_memory_of_the_device_is_made_exact(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (small, "--seq-len", "128", "--batch-size", "4", "--gpu", "h100")
    exact = json.loads(run(*words, "--json").stdout)["plans"][0]["memory"]["peak"]
    for memory, says in ((exact * 1.01, "fits, needs 99%"), (exact * 0.99, "does not fit, needs 101%"), (exact / 4, "needs about 4")):
        monkeypatch.setitem(HARDWARE, "h100", replace(HARDWARE["h100"], memory=memory))
        assert says in run(*words).stdout


ESTIMATED = [("nano", "selective", "off"), ("andromeda-125m", "none", "off"), ("andromeda-360m", "full", "off")]
ESTIMATED_SLOWLY = [
    pytest.param(name, checkpointing, "on", marks=pytest.mark.slow)
    for name in ("nano", "andromeda-125m", "andromeda-1b", "andromeda", "speedrun", "andromeda-7b")
    for checkpointing in ("none", "selective", "full")
]


@pytest.mark.parametrize(("name", "checkpointing", "compile"), [*ESTIMATED, *ESTIMATED_SLOWLY])
def test_estimated_memory_is_near_that_of_the_dry_run(name: str, checkpointing: str, compile: str) -> None:
    config = load(name, [f"train.activation_checkpointing={checkpointing}", f"train.compile={compile}"])
    place = HardwareSetup(find_hardware("h200"), True, Layout())
    estimate, exact = plan(name, config, place, quick=True), plan(name, config, place)
    assert estimate.memory_is_estimate
    assert not exact.memory_is_estimate
    assert estimate.memory.peak == pytest.approx(exact.memory.peak, rel=0.2)


def test_what_cannot_be_counted_without_consent_is_told(small: str) -> None:
    """Nothing is imported, and the countable configuration beside it is planned."""
    own = f"{small}.own.toml"
    Path(own).write_text(SMALL.replace("num_heads = 4,", 'mixer = "evil_of_a_stranger:Part", num_heads = 4,'))
    result = run(own, small)
    assert result.exit_code == 0, result.output
    assert "2 layers of hidden size 64" in result.stderr
    assert "51,200 in all" in result.stderr  # 100 steps of 8 sequences of 64 tokens
    assert "cannot be counted without importing model.attention.mixer = 'evil_of_a_stranger:Part'" in result.stderr
    assert "small: fits" in result.stdout or "small.toml: fits" in result.stdout


def test_the_short_answer_imports_neither_the_compiler_nor_sympy() -> None:
    """They take more time than all else that it does."""
    code = (
        "import sys; sys.argv = ['andromeda', 'plan', 'nano']; from andromeda.cli.main import app; app(standalone_mode=False);"
        "print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "nano: fits" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nanoo"], "did you mean nano"),
        (["nano", "model.hiden_size=3"], "did you mean model.hidden_size"),
        (["nano", "--gpu", "h1000"], "did you mean h100"),
        (["model.hidden_size=64"], "names no configuration"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], sentence: str) -> None:
    error = run(*words).exception
    assert isinstance(error, ConfigError)
    assert sentence in str(error)
