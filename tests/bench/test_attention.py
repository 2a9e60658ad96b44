"""The attention benchmark counts what the masks let through, and measures on a CPU as it does on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from andromeda.bench import attention
from andromeda.bench.attention import AttentionCase
from andromeda.ops.attention import AttentionSpec

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", attention.ATTENTION_CASES, ids=lambda case: case.name)
def test_counted_pairs_are_those_that_the_mask_shows(case: AttentionCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "DOCUMENT", 30)
    q, _, _, pattern = attention.inputs(case, 1300, 2, CPU)
    T = q.shape[1]
    # The documents of one query hide keys that its kernels read all the same.
    documents = None if case.queries else pattern.documents
    shown = AttentionSpec(1.0, pattern.window, documents).mask(T, 1300, CPU).expand(2, 1, T, 1300).sum().item()
    assert attention.pairs(pattern, T, 1300, 2) == shown


def test_a_folded_work_is_alibi(monkeypatch: pytest.MonkeyPatch) -> None:
    folded, slopes = (AttentionCase("", ("sdpa",), alibi=alibi) for alibi in ("folded", "slopes"))
    q, k, _, pattern = attention.inputs(folded, 300, 1, CPU)
    heads = attention.inputs(slopes, 300, 1, CPU)[3].slopes
    assert heads is not None
    added = torch.einsum("thd,sd->hts", q[0, :, :, -4:].double(), k[0, :, 0, -4:].double()) * pattern.scale
    expected = heads[:, None, None] * torch.arange(300)
    torch.testing.assert_close(added, expected.expand_as(added), rtol=2**-8, atol=0)


def test_every_row_is_written_and_none_hides_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works = (
        AttentionCase("causal", ("sdpa", "flash")),
        AttentionCase("both", ("sdpa",), 50, documents=True, alibi="folded"),
        AttentionCase("prepared", ("sdpa",), alibi="folded", prepared=True),
        AttentionCase("one", ("sdpa",), queries=1, rows=1),
    )
    monkeypatch.setattr(attention, "ATTENTION_CASES", works)
    monkeypatch.setattr(attention, "TOTAL_TOKENS", 200)
    out = tmp_path / "figures" / "attention.json"
    attention.main(["--out", str(out), "--lengths", "200", "--rep", "1", "--device", "cpu"])
    result = json.loads(out.read_text())
    rows = {(row["case"], row["backend"]): row for row in result["rows"]}
    assert rows["causal", "flash"]["refused"] == "it runs on CUDA GPUs only"
    for key in (("causal", "sdpa"), ("both", "sdpa"), ("prepared", "sdpa")):
        assert rows[key]["forward_backward_ms"] > 0
        assert rows[key]["error"] < 2 * rows[key]["reference_error"]
    assert rows["one", "sdpa"]["forward_backward_ms"] is None
    assert "--lengths 200" in result["command"]
    assert str(torch.__version__).startswith(result["versions"]["torch"])


def test_what_the_budget_left_out_says_so(tmp_path: Path) -> None:
    out = tmp_path / "attention.json"
    attention.main(["--out", str(out), "--lengths", "64", "--budget", "0", "--device", "cpu"])
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == sum(len(case.backends) for case in attention.ATTENTION_CASES)
    assert {row["refused"] for row in rows} == {"time budget exhausted"}
