"""Rules between parts: the bounds are where arithmetic puts them, and the notes quote the right figures."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from andromeda.config.derived import FOLDED_DIMS, content_dim, intermediate_size, rotated_dims, smallest_scale_base
from andromeda.config.load import load
from andromeda.config.model import AttentionConfig, EmbeddingConfig, ModelConfig, RopeScalingConfig, RotaryConfig
from andromeda.config.own_code import CodeNotAllowed, allow_code, find_class
from andromeda.config.parts import check_code_allowed, check_own_parts, own_classes
from andromeda.config.rules import check, check_model, notes, resolve
from andromeda.config.run import RunConfig
from andromeda.config.train import TrainConfig
from andromeda.utils.errors import ConfigError

SMALL = Path(__file__).with_name("small.toml")


@pytest.mark.parametrize("context", [8192, 65536, 131072, 1_000_000])
@pytest.mark.parametrize(("dtype", "precision"), [(np.float32, "bf16"), (np.float16, "fp16")])
def test_the_smallest_scale_base_is_safe_and_not_much_too_large(context: int, dtype: type, precision: str) -> None:
    safe = smallest_scale_base(ModelConfig(max_seq_len=context), 15 if precision == "fp16" else 120)

    def largest(base: float) -> float:
        """The factor of xPos's fastest pair at the end of the context, as the number format holds it."""
        with np.errstate(over="ignore"):
            return float(np.asarray((0.4 / 1.4) ** -(context / 2 / base)).astype(dtype))

    assert math.isfinite(largest(safe))
    assert not math.isfinite(largest(safe * 0.85))
    for base, legal in ((safe, True), (safe - 1, False)):
        config = RunConfig(
            model=ModelConfig(max_seq_len=context, rotary=RotaryConfig(scale_base=base)),
            train=TrainConfig.model_validate({"precision": precision}),
        )
        if legal:
            check(config)
        else:
            with pytest.raises(ConfigError, match=f"set it to at least {safe}"):
                check(config)


def test_stretching_stretches_the_decay_with_it() -> None:
    rotary = RotaryConfig(scaling=RopeScalingConfig(kind="linear", factor=4.0))
    check_model(ModelConfig(max_seq_len=4 * 65536, rotary=rotary))
    with pytest.raises(ConfigError, match="scale_base"):
        check_model(ModelConfig(max_seq_len=4 * 65536))


def test_interpolation_reaches_past_the_model_it_stretches() -> None:
    config = load(SMALL, ["model.max_seq_len=1024", "model.rotary.scaling.kind=yarn", "model.rotary.scaling.factor=4.0"])
    assert resolve(config).model.rotary.scaling.original_max_seq_len == 256
    config = load(
        SMALL,
        [
            "model.max_seq_len=1024",
            "model.rotary.scaling.kind=yarn",
            "model.rotary.scaling.factor=2.0",
            "model.rotary.scaling.original_max_seq_len=256",
        ],
    )
    assert resolve(config).model.rotary.scaling.original_max_seq_len == 256
    assert any("never interpolated" in note for note in notes(config))


BY_SLOPES = ["model.alibi.fold_into_qk=false"]  # all dimensions of a head hold content


def test_notes_quote_the_reach_of_alibi_under_a_qk_norm() -> None:
    # Logits within ±10 and a slope of 1/2: 20 / (1/2) tokens; slope 2^-8, of the only head: 20 * 256.
    steep = load("andromeda", [*BY_SLOPES, "model.attention.qk_norm=l2", "model.alibi.num_heads=8"])
    assert any("bounds attention logits at 10" in note and "about 40 tokens" in note for note in notes(steep))
    gentle = load("andromeda", [*BY_SLOPES, "model.attention.qk_norm=l2", "model.alibi.num_heads=1", "model.max_seq_len=65536"])
    assert any("about 5120 tokens" in note for note in notes(gentle))
    rms = load("andromeda", [*BY_SLOPES, "model.attention.qk_norm=rms"])
    assert any(f"bounds attention logits at {math.sqrt(128):.6g}," in note for note in notes(rms))


@pytest.mark.parametrize(("context", "percent"), [(8192, "7.5%"), (16384, "3.5%"), (32768, "1.5%")])
def test_notes_quote_what_xpos_leaves_over(context: int, percent: str) -> None:
    # Mean of zeta^(context / 512) over the 64 pairs of whole heads of 128.
    found = notes(load("andromeda", [*BY_SLOPES, f"model.max_seq_len={context}", "model.rotary.fraction=1.0"]))
    assert any(f"leaves {percent}" in note for note in found)


def test_a_plain_run_has_no_notes() -> None:
    assert notes(load("nano")) == []
    assert notes(load("speedrun")) == []


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["model.rotary.kind=none"], "NoPE"),
        (["model.alibi.fold_into_qk=true"], "model.alibi.fold_into_qk"),
        (["model.experts.num_experts=4"], "model.experts"),
        (["train.checkpoints.every=0"], "guard"),
        (["train.clip.kind=norm"], "Muon"),
        (["model.deepnorm=true"], "SGD"),
        (["model.deepnorm=true", "model.block.kind=parallel"], "unpublished"),
        (["model.deepnorm=true", "model.feedforward.kind=swiglu"], "swiglu"),
        (["model.block.residual=deepnorm", "model.init.kind=normal"], "bound does not hold"),
        (["model.alibi.num_heads=2", "model.rotary.kind=xpos"], "nearer"),
        (["model.alibi.num_heads=2", "model.rotary.scaling.kind=linear", "model.rotary.scaling.factor=2.0"], "model.alibi.scale = 2"),
    ],
    ids=str,
)
def test_unusual_pairs_are_legal_and_noted(overrides: list[str], part: str) -> None:
    assert any(part in note for note in notes(load(SMALL, overrides)))


def test_an_odd_depth_may_have_u_net_skips() -> None:
    assert load(SMALL, ["model.skips.unet=true", "model.num_layers=5"]).model.skips.unet


@pytest.mark.parametrize(
    ("kind", "width", "expected"),
    # Llama's own inner widths are two thirds of 4 x width, rounded to the hardware's liking.
    [("relu2", 768, 3072), ("swiglu", 768, 2048), ("swiglu", 512, 1344), ("swiglu", 4096, 10944), ("geglu", 8, 64), ("gelu", 2560, 10240)],
)
def test_the_inner_width(kind: str, width: int, expected: int) -> None:
    assert intermediate_size(ModelConfig.model_validate({"hidden_size": width, "feedforward": {"kind": kind}})) == expected


def test_a_fraction_turns_the_dimensions_that_it_says() -> None:
    def turned(fraction: float, head_dim: int) -> int:
        return rotated_dims(ModelConfig(attention=AttentionConfig(head_dim=head_dim), rotary=RotaryConfig(fraction=fraction)))

    # 0.58 x 100 is 57.99999999999999 in floating point.
    assert [turned(0.58, 100), turned(0.25, 96), turned(0.4, 80), turned(1.0, 64), turned(0.3333, 96)] == [58, 24, 32, 64, 32]
    for head_dim in range(4, 130, 2):
        for pairs in range(1, head_dim // 2 + 1):
            fraction = 2 * pairs / head_dim
            check_model(ModelConfig(attention=AttentionConfig(head_dim=head_dim), rotary=RotaryConfig(fraction=fraction)))
            assert turned(fraction, head_dim) == 2 * pairs


def test_a_folded_bias_leaves_the_rest_to_the_content() -> None:
    config = load(SMALL, ["model.alibi.num_heads=2", "model.alibi.fold_into_qk=true"]).model
    assert content_dim(config) == 64 - FOLDED_DIMS == 60
    assert content_dim(load(SMALL, ["model.alibi.num_heads=2"]).model) == 64


def test_a_class_of_ones_own_is_found_in_the_folder_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_parts_for_a_test.py").write_text("class Mine:\n    def forward(self): ...\nclass Other: ...\ndef forward(): ...\n")
    (tmp_path / "my_broken_parts_for_a_test.py").write_text("raise RuntimeError('two\\nlines')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    key = "model.embedding.provider"
    with pytest.raises(CodeNotAllowed, match=r"my_parts_for_a_test:Mine.*--allow-code"):
        find_class("my_parts_for_a_test:Mine", key)
    assert str(tmp_path) not in sys.path
    with allow_code(["another:Class"]), pytest.raises(CodeNotAllowed):
        find_class("my_parts_for_a_test:Mine", key)
    assert "my_parts_for_a_test" not in sys.modules
    with allow_code():
        assert find_class("my_parts_for_a_test:Mine", key).__name__ == "Mine"
        for name in ("Other", "forward"):
            with pytest.raises(ConfigError, match="is no class of modules"):
                check_own_parts(ModelConfig(attention=AttentionConfig(mixer=f"my_parts_for_a_test:{name}")))
        with pytest.raises(ConfigError, match=r"model\.embedding\.provider = .* cannot be imported \(two lines\)"):
            find_class("my_broken_parts_for_a_test:Mine", key)
        for path, reason in (("no_such_module:X", "No module named"), ("math:NoSuchClass", "NoSuchClass")):
            with pytest.raises(ConfigError, match=f"{key}.*{reason}"):
                find_class(path, key)
    with pytest.raises(CodeNotAllowed):
        find_class("my_parts_for_a_test:Mine", key)


def test_checking_a_configuration_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "never_imported.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_model(ModelConfig(embedding=EmbeddingConfig(kind="custom", provider="never_imported:Mine")))
    config = load(SMALL, ["model.attention.mixer=never_imported:Mine", "train.optim.kind=never_imported:Optimizer"])
    assert own_classes(config) == {"model.attention.mixer": "never_imported:Mine", "train.optim.kind": "never_imported:Optimizer"}
    with pytest.raises(CodeNotAllowed, match="Andromeda's"):
        check_code_allowed(config)
    assert "never_imported" not in sys.modules
