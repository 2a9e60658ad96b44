"""The GPU benchmarks' arithmetic and what their sides are, on small models on a CPU; nothing is timed for its own sake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from andromeda.bench import decoding, linear_cross_entropy, models, precision_loss, prefill, training_step
from andromeda.bench.models import llama, random_model, x_transformer
from andromeda.config.load import load
from andromeda.model.transformer import Transformer
from andromeda.utils.errors import RequestError
from tools import arithmetic_table, gpu_goals, performance_page

CPU = torch.device("cpu")
SMALL = [
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.vocab_size=512",
    "model.max_seq_len=64",
    "model.attention.num_heads=4",
    "model.attention.head_dim=32",
    "model.alibi.num_heads=2",
]
TRAIN = ["train.device=cpu", "train.compile=off", "train.precision=fp32"]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call stands for many."""
    for module in (prefill, decoding, linear_cross_entropy):
        monkeypatch.setattr(module, "median_ms", lambda function, *_: (function(), 2.0)[1])


def test_training_counts_tokens_and_takes_every_side() -> None:
    result = training_step.measure("andromeda", [*SMALL, *TRAIN], rows=2, steps=1, peers=models.parse_peers("all"))
    assert list(result["implementations"]) == ["Andromeda", *models.PEERS.values()]
    assert result["tokens_per_step"] == 2 * 64
    for implementation in result["implementations"].values():
        assert implementation["tokens_per_second"] == pytest.approx(128 / implementation["seconds"])


def test_a_side_without_memory_says_so() -> None:
    def fails() -> Any:
        raise torch.OutOfMemoryError

    config = load("andromeda", [*SMALL, *TRAIN, "train.batch_size=2", "train.micro_batch_size=1"])
    implementation = training_step._side(fails, config, CPU, 1)
    assert implementation == {"failed": "out of memory"}
    assert training_step.summary({"x": implementation}, config, CPU) == {"x": implementation}


def test_llama_has_our_products() -> None:
    """Parameters of its blocks are ours to 2 %: the same projections, and three matrices of two thirds the hidden width."""
    config = load("andromeda", [*SMALL, "model.hidden_size=768", "model.feedforward.bias=false", "model.block.norm=rms"]).model
    ours, peer = random_model(config, torch.device("meta"), torch.bfloat16), llama(config, torch.device("meta"), torch.bfloat16)
    count = [sum(p.numel() for p in model.parameters() if p.ndim == 2) for model in (ours, peer)]
    assert count[1] == pytest.approx(count[0], rel=0.02)


def test_x_transformers_reads_the_same_prompt() -> None:
    config = load("andromeda", SMALL).model
    model = x_transformer(config, CPU, torch.float32)
    assert model(torch.zeros(1, 8, dtype=torch.long)).shape == (1, 8, config.vocab_size)
    assert model.attn_layers.layers[0][1].fn.kv_heads == 1


@pytest.mark.parametrize("fp8", [False, True])
def test_prefill_gives_the_last_logits_and_counts_its_operations(fp8: bool) -> None:
    """Whole or in chunks, the last logits are the plain forward pass's; operations are FlopCounterMode's, causal pairs alone."""
    config = load("andromeda", SMALL).model
    result = prefill.measure("andromeda", SMALL, [48], fp8=fp8)
    (row,) = result["rows"]
    assert row["finite"]
    model = random_model(config, CPU, torch.float32)
    ids = torch.randint(512, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = model(ids)[:, -1]
        for chunk in (0, 7):
            torch.testing.assert_close(prefill.read_prompt(model, ids, chunk), whole, rtol=1e-4, atol=1e-4)
        with FlopCounterMode(display=False) as counter:
            prefill.read_prompt(model, ids)
    # Attention, which the counter sees as batched matmuls of every pair, is counted by its causal half.
    counts = counter.get_flop_counts()["Global"]
    linear = counts[torch.ops.aten.mm] + counts[torch.ops.aten.addmm]
    pairs = 2 * 4 * 4 * 32 * (48 * 49 // 2)
    assert row["operations"] == pytest.approx(linear + pairs, rel=0.01)


def test_decode_floor_is_what_must_be_read() -> None:
    """Every weight but the embedding's rows, and the keys and values of the context."""
    changes = [*SMALL, "model.alibi.fold_into_qk=false"]  # folded, the bias has small tables besides the weights
    config = load("andromeda", changes).model
    (row,) = decoding.measure("andromeda", changes, [40])["rows"]
    parameters = random_model(config, torch.device("meta"), torch.bfloat16)
    assert row["weights"] == 2 * (sum(p.numel() for p in parameters.parameters()) - 512 * 64)
    shifts = 2 * 2 * 64
    assert row["cache"] == 2 * (2 * 40 * 2 * 32 + shifts)


def test_all_losses_agree() -> None:
    result = linear_cross_entropy.measure(CPU, tokens=300, vocabulary=97, width=16)
    assert {"Andromeda", "PyTorch, compiled"} <= set(result["implementations"])
    assert all(implementation["error"] < 0.01 for implementation in result["implementations"].values())


def test_without_flash_attention_it_is_the_same_attention() -> None:
    q, k, v = (torch.randn(1, 4, 33, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    with models.unfused_attention(), FlopCounterMode(display=False) as counter:
        unfused = attend(q, k, v, is_causal=True)
    # All T x T logits are matmuls of their own, which a fused kernel hides from the counter.
    assert counter.get_total_flops() == 2 * 2 * 4 * 33 * 33 * 16
    torch.testing.assert_close(unfused, attend(q.double(), k.double(), v.double(), is_causal=True).float())


def test_a_peer_that_does_not_exist_is_refused() -> None:
    assert models.parse_peers("") == []
    assert models.parse_peers("llama,x-transformers-alibi") == ["transformers Llama", "x-transformers"]
    with pytest.raises(RequestError, match=r"no peer 'lama'.*llama"):
        models.parse_peers("lama")


def test_both_precisions_read_the_same_text() -> None:
    """Bytes of Python sources, targets one byte ahead; a precision that the device lacks says so."""
    run = [*SMALL, "train.device=cpu", "train.compile=off", "train.schedule.warmup=1"]
    config = load("andromeda", [*run, "model.vocab_size=256", "train.batch_size=2", "train.micro_batch_size=2", "train.steps=3"])
    drawn = list(precision_loss.batches(config))
    assert len(drawn) == 3
    for ids, targets in drawn:
        assert ids.shape == (2, 64)
        assert torch.equal(ids[:, 1:], targets[:, :-1])
    assert b"def " in bytes(precision_loss.text(100_000).tolist())
    assert all(torch.equal(a[0], b[0]) for a, b in zip(drawn, precision_loss.batches(config), strict=True))
    implementations = precision_loss.measure("andromeda", run, 3, 2, ("bf16", "fp8"))["implementations"]
    ids, targets = drawn[0]
    untrained = torch.nn.functional.cross_entropy(Transformer(config.model, seed=config.seed)(ids).flatten(0, 1), targets.flatten())
    assert implementations["bf16"]["losses"][0] == pytest.approx(untrained.item(), rel=0.01)
    assert "fp8" in implementations["fp8"]["failed"]


def test_floors_of_long_prompts_are_those_of_the_closed_form() -> None:
    """andromeda-360m-long: 24 layers see 1,024 tokens and two see all; every matrix is met once by every token but the head."""
    config = load("andromeda-360m-long", []).model
    T, w = 32768, 1024
    pairs = 24 * (w * (w + 1) // 2 + (T - w) * w) + 2 * T * (T + 1) // 2
    matrices = 26 * (1024 * (1024 + 2 * 128) + 1024 * 1024 + 2 * 1024 * 4352)
    linear, attention = 2 * T * matrices + 2 * 32768 * 1024, 4 * 8 * 128 * pairs
    assert arithmetic_table.compute_bound(config, T, "bf16") == pytest.approx((linear + attention) / 735e12, rel=1e-9)
    assert arithmetic_table.compute_bound(config, T, "fp8") == pytest.approx(linear / 1311e12 + attention / 735e12, rel=1e-9)


def test_goals_are_read_from_results(tmp_path: Path) -> None:
    """A goal is met or missed by its direction; what is not there says so."""
    rows = [{"context": 2048, "of_floor": 0.8}, {"context": 32768, "of_floor": 0.6}]
    (tmp_path / "gpu-decode.json").write_text(json.dumps({"rows": rows}))
    implementations = {"Andromeda": {"peak": 2 << 30, "ms": 10.0}, "PyTorch, compiled": {"failed": "out of memory"}}
    (tmp_path / "gpu-loss.json").write_text(json.dumps({"implementations": implementations}))
    lines = {line[:62].strip(): line[62:].split() for line in gpu_goals.table(tmp_path).splitlines()}
    assert lines["decoding andromeda after 2,048 tokens, bound / time"] == ["0.8", ">=", "0.75", "met"]
    assert lines["after 32,768 tokens"] == ["0.6", ">=", "0.75", "MISSED"]
    assert lines["linear cross-entropy, peak above the inputs, GiB"] == ["2", "<=", "1", "MISSED"]
    assert lines["time over compiled PyTorch's with all logits"][:2] == ["not", "there"]
    assert lines["bitwise repeatable"][:2] == ["no", "result"]


def test_an_attention_goal_takes_each_sides_best_backend() -> None:
    def row(case: str, backend: str, ms: float | None) -> dict[str, Any]:
        return {"case": case, "backend": backend, "refused": None if ms else "not here", "forward_ms": ms}

    result = {
        "rows": [row("a", "fa4", None), row("a", "cudnn", 6.0), row("a", "flash", 9.0), row("b", "flash", 10.0), row("b", "cudnn", 5.0)]
    }
    assert gpu_goals.attention("a", "b", "forward")(result) == pytest.approx(6 / 5)


def test_the_page_is_made_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of result has a table with its command and machine; shares are floor over time."""
    introduction = tmp_path / "performance.md"
    introduction.write_text("# Performance\n")
    monkeypatch.setattr(performance_page, "INTRODUCTION", introduction)
    common = {"machine": {"gpu": "NVIDIA H100", "cpu": ""}, "versions": {"torch": "2.11"}, "date": "2026-01-01"}
    row = {"context": 2048, "ms": 4.0, "floor_ms": 1.0, "of_floor": 0.25, "cache": 1 << 20, "weights": 0, "first_seconds": 3.0}
    result = {"command": "andromeda bench decode andromeda", **common, "batch": 2, "rows": [row]}
    (tmp_path / "gpu-decode-a.json").write_text(json.dumps(result))
    text = performance_page.document(tmp_path)
    assert "## Decoding" in text
    assert "`andromeda bench decode andromeda`" in text
    assert "| 2,048 | 4 ms | 1 ms | 25% | 500 | 1.00 MiB | 3 s |" in text
    assert "## Training" not in text


def test_the_stored_results_make_the_page_in_the_documentation() -> None:
    page = Path(__file__).parents[2] / "docs" / "performance.md"
    assert page.read_text() == performance_page.document()
