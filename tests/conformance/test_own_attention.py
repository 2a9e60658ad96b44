"""An attention of a user's own, as docs/techniques.md shows it: the examples there are run, and conform like the built-in ones."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from andromeda.config.rules import check_model
from andromeda.model.transformer import Transformer
from andromeda.utils.errors import ConfigError
from tests.conformance.checks import CHECKS
from tests.conformance.covering import model_config
from tests.conformance.models import T, ids, shaken

DOCS = Path(__file__).parents[2] / "docs" / "techniques.md"
CLASSES = ("mine.uniform:Uniform", "mine.average:DecayingAverage")


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allow_code: None) -> None:
    """The files that the guide shows, on the Python path."""
    for path, source in re.findall(r"```python\n# (\S+\.py)\n(.*?)```", DOCS.read_text(), re.DOTALL):
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        monkeypatch.delitem(sys.modules, name)


def model_with(mechanism: str, **choices: str) -> Transformer:
    config = model_config(choices)
    config = config.model_copy(update={"attention": config.attention.model_copy(update={"mixer": mechanism})})
    check_model(config)
    return shaken(config)


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize("mechanism", CLASSES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@torch.no_grad()
def test_the_guides_examples_conform(check: Callable[[Transformer, Tensor], None], mechanism: str) -> None:
    for choices in ({}, {"reach": "window", "shift": "chunks-4", "heads": "gqa"}, {"block": "parallel-deepnorm", "values": "embedded"}):
        model = model_with(mechanism, **choices)
        check(model, model(ids(), span=T))


@pytest.mark.usefixtures("examples")
@torch.no_grad()
def test_uniform_is_the_mean_of_what_a_token_sees() -> None:
    model = model_with("mine.uniform:Uniform", reach="window")
    part, ctx = model.decoder.blocks[0].attention, model.context(ids())
    x = torch.randn(2, T, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v = part.value(x)
    means = torch.stack([v[:, max(0, t - 3) : t + 1].mean(1) for t in range(T)], 1)
    torch.testing.assert_close(part(x, ctx.for_layer(0)), part.out(means), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("allow_code")
def test_a_class_that_cannot_be_imported_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"mixer = 'nowhere:Attention' cannot be imported"):
        model_with("nowhere:Attention")
    with pytest.raises(ConfigError, match=r"not registered \(did you mean softmax\?\)"):
        model_with("sofmax")
