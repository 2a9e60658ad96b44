"""`andromeda explain` as a user calls it: the page, the figures as JSON, and every wrong request in one sentence."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from andromeda.api import Andromeda
from andromeda.config.data import BuildConfig
from andromeda.config.model import ModelConfig
from andromeda.data.encoders import raw
from andromeda.data.tokenizer import Tokenizer
from andromeda.explain import ExplainRequest, explain, write_explanation
from andromeda.explain.explain_page import build_page, pack_attention
from andromeda.model.attention import Attention
from andromeda.ops.attention import AttentionSpec
from andromeda.utils.errors import RequestError
from andromeda.utils.untrusted import printable
from tests.command import call
from tests.html_pages import browse, parse

SECTIONS = ["prediction", "lens", "attention", "direct", "gradients", "checks"]
CONFIG = {
    "vocab_size": 257,
    "max_seq_len": 48,
    "hidden_size": 16,
    "num_layers": 2,
    "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
}
TEXT = "if x < 3:\n    <b>&"


def model(**changes: object) -> Andromeda:
    """A small model of bytes with random weights, in float64."""
    made = Andromeda(ModelConfig.model_validate(CONFIG | changes), tokenizer=Tokenizer(raw.create(BuildConfig())), dtype="fp64", seed=3)
    return made.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of that model."""
    path = tmp_path_factory.mktemp("explain") / "run"
    model().save(path)
    return path


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert call("explain", str(run), TEXT, "--target", "a", "--against", "b", "--out", str(out), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert all(check["holds"] for check in found["checks"])
    assert len(found["checks"]) == 5
    assert found["tokens"][1:] == list(TEXT)
    # The same logit by an ordinary pass.
    weights = Andromeda.from_run(run, device="cpu", dtype="fp64")
    with torch.no_grad():
        logit = float(weights(torch.tensor([[256, *TEXT.encode()]]))[0, -1, ord("a")])
    assert sum(part["logit"] for part in found["direct"]["parts"]) == pytest.approx(logit, abs=1e-9)
    assert found["gradients"]["logit"] == pytest.approx(logit, abs=1e-9)
    assert [i for i in parse(out.read_text()).ids if i in SECTIONS] == SECTIONS


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "nowhere"),
        (["--target", "ab"], "--target"),
        (["--target", "a", "--against", "a"], "--against"),
        (["--position", "99"], "--position"),
        (["--layers", "3"], "--layers"),
        (["--layers", "one"], "--layers"),
        (["--step", "7"], "7"),
        (["--device", "tpu"], "tpu"),
        (["--out", "/proc/page.html"], "--out"),
    ],
)
def test_wrong_wishes(run: Path, arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    where = str(run) if arguments else "nowhere"
    assert call("explain", where, "abc", *arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("andromeda: ")
    assert said.endswith(".")
    assert part in said


def test_a_text_too_long_is_refused_with_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("explain", str(run), "x" * 60) == 2
    assert "61" in capsys.readouterr().err


def test_too_many_maps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("andromeda.explain.explanation.MAX_MAP_CELLS", 100)
    with pytest.raises(RequestError, match="--layers"):
        explain(Path("run"), model(), ExplainRequest("some text"))
    assert len(explain(Path("run"), model(), ExplainRequest("abc", layers=(2,))).maps) == 1


def test_a_mixture_keeps_all_views_but_one() -> None:
    found = explain(Path("run"), model(feedforward={"kind": "moe"}), ExplainRequest("abc"))
    assert found.gradients is None
    assert "routing of a mixture of experts is discontinuous" in build_page(found)
    assert all(check.holds for check in found.checks)
    assert len(found.checks) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"block": {"residual": "sandwich"}, "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "qk_norm": "rms_dim_scale"}},
        {"block": {"residual": "deepnorm"}, "init": {"kind": "deepnorm"}},
        {"attention": CONFIG["attention"] | {"mixer": "sigmoid"}},
        {"head": {"softcap": 2.0, "bias": True}},
        {"skips": {"unet": True, "first": True}, "value_embedding": {"kind": "layered"}},
    ],
    ids=["sandwich", "deepnorm", "sigmoid", "softcap", "speedrun"],
)
def test_other_architectures(changes: dict) -> None:
    found = explain(Path("run"), model(**changes), ExplainRequest("abc def"))
    assert [check for check in found.checks if not check.holds] == []
    parse(build_page(found))


class Squares(Attention):
    """Attention that does not average values."""

    def core_attention(self, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionSpec) -> Tensor:
        """Of the values and their squares."""
        return super().core_attention(q, k, v.square() + v, pattern)


@pytest.mark.usefixtures("allow_code")
def test_views_that_cannot_be_are_told() -> None:
    attention = CONFIG["attention"] | {"mixer": f"{__name__}:Squares"}
    found = explain(Path("run"), model(attention=attention, feedforward={"kind": "moe"}), ExplainRequest("abc"))
    assert set(found.refused) == {"attention", "gradients"}
    assert found.maps == {}
    page = build_page(found)
    parse(page)
    assert "no map of layer 1, 2" in page
    assert "routing of a mixture of experts is discontinuous" in page
    assert all(check.holds for check in found.checks)


def test_the_prediction_is_printed_with_its_probabilities(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same figures as --json gives, the explained token named also where others are more likely."""
    assert call("explain", str(run), "the", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert call("explain", str(run), "the") == 0
    first, best, *_ = capsys.readouterr().out.splitlines()
    assert first == f"after token {found['position']}, {printable(repr(found['tokens'][-1]))}:"
    assert best.split()[0] == f"{100 * found['prediction'][0]['probability']:.2g}"
    assert printable(repr(found["prediction"][0]["token"])) in best
    assert best.endswith("(explained)")


def test_tokens_are_quoted_as_code_and_maps_have_axes_and_a_scale(run: Path) -> None:
    assert call("explain", str(run), "the", "--out", str(run / "page.html")) == 0
    page = (run / "page.html").read_text()
    for words in ("to the logit of <code", "difference from that of <code", "To the logit of <code", "query token", "key token"):
        assert words in page
    # A weight of a quarter has half of the full shade.
    assert '<span style="left:50.0%">25 %</span>' in page


def test_a_map_is_packed_as_the_page_reads_it() -> None:
    """Row by row, up to the diagonal, as 255 times the root."""
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.0, 0.04, 0.96]], dtype=torch.float64)
    read = np.frombuffer(base64.b64decode(pack_attention(weights)), np.uint8)
    assert read.tolist() == [255, 128, 221, 0, 51, 250]


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(tmp_path: Path, width: int) -> None:
    found = explain(tmp_path, model(), ExplainRequest(TEXT))
    said = browse(write_explanation(found), width, tmp_path)
    assert said["errors"] == []
    assert said["console"] == []
    assert said["sections"] == SECTIONS
    assert said["loaded"] == []
    assert said["overflow"] <= 0
    # The script has drawn the maps and shaded the text.
    assert said["says"].startswith("Where ")
