"""Every kind of mistake ends in one sentence that names the key that the user typed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from andromeda.config.keys import fields, set_path
from andromeda.config.load import from_values, load, model_from_names
from andromeda.config.rules import check_training
from andromeda.config.run import RunConfig
from andromeda.config.suggestions import ELSEWHERE, RENAMED, our_name
from andromeda.utils.errors import ConfigError

SMALL = Path(__file__).with_name("small.toml")


def assert_one_sentence(message: str, *parts: str) -> None:
    """One line, one full stop, no trace of the libraries below, and everything that the user needs to find the place."""
    assert "\n" not in message
    assert message.endswith(".")
    assert ". " not in message
    assert "pydantic" not in message
    assert "Input should" not in message
    assert len(message) < 320
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


# Overrides of small.toml (4 heads of 64, one key/value head, width 256, depth 6, context 256), and what the sentence says.
# ` | ` stands between two overrides.
OVERRIDES: list[tuple[str, tuple[str, ...]]] = [
    # Keys that do not exist
    ("modle.hidden_size=64", ("modle.hidden_size", "did you mean model.hidden_size?")),
    ("modle.x=64", ("modle", "did you mean model?")),
    # Names of nanoGPT, Hugging Face and torchtitan
    ("model.n_layer=6", ("there is no key model.n_layer; it is called model.num_layers",)),
    ("model.n_embd=64 | model.n_head=4", ("model.n_embd; it is called model.hidden_size", "model.n_head; it is called model.attention")),
    ("model.block_size=64", ("model.block_size; it is called model.max_seq_len",)),
    ("train.learning_rate=0.1", ("train.learning_rate; it is called train.optim.lr",)),
    ("learning_rate=0.1", ("learning_rate; it is called train.optim.lr",)),
    ("max_iters=5", ("max_iters; it is called train.steps",)),
    ("train.gradient_accumulation_steps=8", ("it is called train.micro_batch_size",)),
    ("training.steps=5", ("training.steps", "did you mean train.steps?")),
    ("training.local_batch_size=5", ("training.local_batch_size; it is called train.micro_batch_size",)),
    ("optimizer.name=AdamW", ("optimizer.name; it is called train.optim.kind",)),
    ("output_dir=x", ("output_dir; use the option --out",)),
    ("model.dropout=0.1", ("model.dropout", "no dropout")),
    # Tables that are empty, and settings without end
    ("model.num_layers={}", ("model.num_layers", "whole number", "a table")),
    ("model.attention={}", ("model.attention={}", "sets nothing")),
    ("model.nothing={}", ("model.nothing",)),
    ("train.optim.newton_schulz_steps=2000000000", ("train.optim.newton_schulz_steps", "at most 100")),
    ("train.probes.samples=2000000000", ("train.probes.samples", "at most 100000")),
    ("model.hiden_size=64", ("model.hiden_size", "did you mean model.hidden_size?")),
    ("model.dimm=64", ("model.dimm", "did you mean model.dim?")),
    ("model.attention.kv_head=1", ("model.attention.kv_head", "model.attention.num_kv_heads?")),
    ("model.num_kv_heads=1", ("model.num_kv_heads", "did you mean model.attention.num_kv_heads?")),
    ("dim=64", ("dim", "did you mean model.dim?")),
    ("steps=5", ("steps", "did you mean train.steps?")),
    ("lr=0.1", ("lr", "did you mean train.optim.lr?")),
    ("train.optim.learning_rate=0.1", ("train.optim.learning_rate",)),
    ("model.attention.num_heads.count=4", ("model.attention.num_heads", "whole number", "a table")),
    ("data.sources=[{path='x', wieght=1.0}]", ("data.sources[0].wieght", "data.sources[0].weight?")),
    ("zzz=1", ("zzz",)),
    # Values of the wrong type
    ("model.num_layers=six", ("model.num_layers", "whole number", "'six'")),
    ("model.num_layers=6.5", ("model.num_layers", "whole number", "6.5")),
    ("model.num_layers=true", ("model.num_layers", "whole number", "true")),
    ("model.num_layers=[6]", ("model.num_layers", "whole number", "[6]")),
    ("model.attention.bias=yes", ("model.attention.bias", "true or false", "'yes'")),
    ("model.attention.bias=1", ("model.attention.bias", "true or false")),
    ("model.rotary.theta=big", ("model.rotary.theta", "number", "'big'")),
    ("model.attention=3", ("model.attention", "table")),
    ("model=3", ("model", "table")),
    ("train.probes.tasks=recall", ("train.probes.tasks", "list")),
    ("train.optim.betas=0.9", ("train.optim.betas", "list")),
    ("train.optim.betas=[0.9]", ("train.optim.betas[1]", "missing")),
    ("train.optim.betas=[0.9, 0.95, 0.99]", ("train.optim.betas", "2 values", "3")),
    ("train.probes.tasks=[1]", ("train.probes.tasks[0]", "text")),
    ("data.sources=[{weight=1.0}]", ("data.sources[0].path", "missing")),
    ("data.sources=[{path='x', weight=0.0}]", ("data.sources[0].weight", "above 0")),
    # Values out of range
    ("model.num_layers=0", ("model.num_layers", "above 0")),
    ("model.vocab_size=-1", ("model.vocab_size", "above 0", "-1")),
    ("model.rotary.fraction=1.5", ("model.rotary.fraction", "at most 1", "1.5")),
    ("model.rotary.scaling.factor=0.5", ("model.rotary.scaling.factor", "at least 1")),
    ("seed=-1", ("seed", "at least 0")),
    ("train.optim.lr=0", ("train.optim.lr", "above 0")),
    ("train.optim.lr=nan", ("train.optim.lr", "finite")),
    ("train.optim.lr=inf", ("train.optim.lr", "finite")),
    ("train.optim.momentum=1.0", ("train.optim.momentum", "below 1")),
    ("train.optim.betas=[0.9, 1.0]", ("train.optim.betas", "below 1")),
    ("train.ema=-0.1", ("train.ema", "at least 0")),
    # Values that are not among the choices
    ("model.rotary.kind=ropes", ("model.rotary.kind", "none, rope, xpos", "did you mean rope?")),
    ("train.optim.kind=adam", ("train.optim.kind", "adamw8bit", "did you mean adamw")),
    ("train.precision=16", ("train.precision", "fp16")),
    ("model.attention.backend=flahs", ("model.attention.backend", "did you mean flash?", "eager")),
    ("model.attention.mixer=softmx", ("model.attention.mixer", "did you mean softmax?")),
    ("model.attention.mixer=a b", ("model.attention.mixer", "package.module:Class")),
    ("train.device=gpu", ("train.device", "cuda")),
    # Parts that do not fit together
    ("model.attention.num_heads=6 | model.attention.num_kv_heads=4", ("model.attention.num_heads = 6", "model.attention.num_kv_heads = 4")),
    ("model.alibi.num_heads=5", ("model.alibi.num_heads = 5", "model.attention.num_heads = 4")),
    ("model.alibi.num_heads=2 | model.alibi.fold_into_qk=true | model.attention.head_dim=8", ("model.alibi.fold_into_qk", "head_dim = 8")),
    (
        "model.alibi.num_heads=2 | model.alibi.fold_into_qk=true | model.max_seq_len=16777217",
        ("model.alibi.fold_into_qk", "model.max_seq_len = 16777217"),
    ),
    (
        "model.alibi.num_heads=2 | model.alibi.fold_into_qk=true | model.attention.softcap=30.0",
        ("model.alibi.fold_into_qk", "model.attention.softcap = 30"),
    ),
    ("model.alibi.num_heads=2 | model.alibi.fold_into_qk=true | model.attention.mixer=sigmoid", ("model.alibi.fold_into_qk", "sigmoid")),
    ("model.alibi.num_heads=2 | model.alibi.fold_into_qk=true | train.precision=fp16", ("train.precision", "model.alibi.fold_into_qk")),
    ("model.rotary.heads=non_alibi", ("model.rotary.heads", "model.alibi.num_heads")),
    ("model.alibi.num_heads=2 | model.rotary.kind=none | model.rotary.heads=non_alibi", ("model.rotary.heads", "model.rotary.kind")),
    (
        "model.alibi.num_heads=2 | model.rotary.heads=non_alibi | model.attention.num_heads=4 | model.attention.num_kv_heads=1",
        ("model.rotary.heads", "model.alibi.num_heads = 2", "multiple of the 4", "model.attention.num_kv_heads = 1"),
    ),
    ("model.attention.mixer=sigmoid | model.attention.backend=flash", ("model.attention.backend", "sigmoid")),
    ("model.head.tied=true", ("model.head.tied", "zero_projections")),
    ("model.rotary.fraction=0.52", ("model.rotary.fraction = 0.52", "pairs", "0.53125")),
    (
        "model.rotary.head_fraction=0.5 | model.attention.num_kv_heads=1",
        ("model.rotary.head_fraction = 0.5", "model.attention.num_kv_heads = 1"),
    ),
    (
        "model.rotary.head_fraction=0.5 | model.attention.num_heads=4 | model.attention.num_kv_heads=2 | model.rotary.kind=none",
        ("model.rotary.head_fraction = 0.5", "model.rotary.kind"),
    ),
    ("model.rotary.fraction=0.01", ("model.rotary.fraction = 0.01", "0.03125")),
    (
        "model.rotary.kind=none | model.rotary.scaling.kind=yarn | model.rotary.scaling.factor=4.0",
        ("model.rotary.scaling.kind", "model.rotary.kind"),
    ),
    ("model.rotary.scaling.factor=4.0", ("model.rotary.scaling.factor = 4", "linear")),
    ("model.rotary.scaling.beta_fast=1.0", ("beta_fast", "beta_slow")),
    ("model.rotary.kind=xpos | model.max_seq_len=131072", ("model.rotary.scale_base = 512", "float32", "988")),
    ("model.rotary.kind=xpos | model.max_seq_len=16384 | train.precision=fp16", ("model.rotary.scale_base = 512", "float16", "988")),
    ("model.attention.sliding_window=256", ("model.attention.sliding_window = 256", "model.max_seq_len = 256")),
    ("model.attention.full_attention_interval=3", ("model.attention.full_attention_interval", "model.attention.sliding_window")),
    (
        "model.attention.sliding_window=64 | model.attention.full_attention_interval=7",
        ("model.attention.full_attention_interval = 7", "model.num_layers = 6"),
    ),
    ("model.feedforward.kind=moe | model.experts.top_k=9", ("model.experts.top_k = 9", "model.experts.num_experts = 8")),
    ("model.feedforward.kind=moe | model.feedforward.bias=true", ("model.feedforward.bias", "moe")),
    ("model.block.residual=deepnorm", ("model.init.kind", "model.block.residual")),
    ("model.block.residual=deepnorm | model.init.kind=deepnorm | model.skips.unet=true", ("model.skips", "deepnorm")),
    ("model.init.kind=deepnorm", ("model.init.kind", "model.block.residual")),
    ("model.head.tied=true | model.embedding.kind=factorized", ("model.head.tied", "factorized")),
    ("model.embedding.kind=factorized | model.embedding.rank=256", ("model.embedding.rank = 256", "model.hidden_size = 256")),
    ("model.embedding.kind=custom", ("model.embedding.provider", "package.module:Class")),
    ("model.embedding.provider=math:pi", ("model.embedding.provider", "custom")),
    ("model.shift.kind=chunks | model.shift.tokens=256", ("model.shift.tokens = 256", "model.hidden_size = 256")),
    ("train.batch_size=10 | train.micro_batch_size=4", ("train.batch_size = 10", "train.micro_batch_size = 4")),
    ("train.seq_len=512", ("train.seq_len = 512", "model.max_seq_len = 256")),
    ("train.steps=100", ("train.schedule.cooldown = 400", "train.steps = 100", "train.schedule.cooldown=0.4")),
    ("train.schedule.warmup=1.5", ("train.schedule.warmup", "whole number of steps", "fraction", "1.5")),
    ("train.schedule.cooldown=-1", ("train.schedule.cooldown", "whole number of steps", "-1")),
    ("train.schedule.warmup=true", ("train.schedule.warmup", "true")),
    ("train.schedule.kind=cosine | train.schedule.cooldown=10", ("train.schedule.cooldown", "wsd")),
    (
        "train.schedule.kind=cosine | train.schedule.cooldown=0 | train.schedule.warmup=5000",
        ("train.schedule.warmup = 5000", "train.steps"),
    ),
    ("train.window.start=64", ("train.window", "start and end")),
    (
        "train.window.start=128 | train.window.end=64 | model.attention.sliding_window=64",
        ("train.window.start = 128", "train.window.end = 64"),
    ),
    ("train.window.start=64 | train.window.end=128", ("train.window.end = 128", "model.attention.sliding_window = 0")),
    ("train.precision=fp8 | train.device=cpu", ("train.precision", "fp8", "train.device")),
    ("train.precision=fp8 | model.hidden_size=250", ("train.precision", "multiples of 16", "250")),
    ("train.probes.every=10 | train.probes.tasks=[]", ("train.probes.every", "train.probes.tasks")),
    ("data.corpus=a | data.sources=[{path='b'}]", ("data.corpus", "data.sources")),
    # Flat names
    ("model.heads=6 | model.attention.num_heads=4", ("model.heads", "model.attention.num_heads", "6", "4")),
    ("model.dim=64 | model.hidden_size=128", ("model.dim", "model.hidden_size")),
    ("model.hidden_act=selu", ("hidden_act", "'selu'", "swiglu")),
    ("model.attn_flash=maybe", ("attn_flash", "true or false")),
    ("model.shift_tokens=-1", ("shift_tokens", "at least 0")),
    ("model.qk_norm=true | model.attn_qk_norm=false", ("qk_norm", "attn_qk_norm")),
    ("model.attn_qk_norm=false | model.attn_qk_norm_dim_scale=true", ("attn_qk_norm_dim_scale", "attn_qk_norm")),
    ("model.embedding_provider=plane", ("embedding_provider", "did you mean plain?")),
    ("model.num_attention_heads=3", ("num_attention_heads = 3", "256")),
    ("model.rope_scaling={rope_type='longrope'}", ("rope_scaling.rope_type", "yarn")),
    ("model.rope_scaling={rope_type='yarn', facto=2.0}", ("rope_scaling.facto", "factor?")),
    ("model.rope_scaling=2", ("rope_scaling", "table")),
    # Overrides that are none
    ("train.steps", ("'train.steps'", "key.path=value")),
    ("=5", ("'=5'", "key.path=value")),
    ("train..steps=5", ("'train..steps=5'", "key.path=value")),
    ("preset=andromeda", ("preset",)),
]


@pytest.mark.parametrize(("overrides", "parts"), OVERRIDES, ids=[row[0] for row in OVERRIDES])
def test_an_override_that_is_wrong(overrides: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(SMALL, overrides.split(" | "))
    assert_one_sentence(str(caught.value), *parts)


FILES: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("not TOML", b"seed = 1\nmodel = {\n", ("run.toml", "TOML", "line 2")),
    ("a key twice", b"seed = 1\nseed = 2\n", ("run.toml", "TOML", "line 2")),
    ("not text", b"\xff\xfe\x00name", ("run.toml", "UTF-8")),
    ("a preset that does not exist", b"preset = 'nono'\n", ("run.toml", "'nono'", "nano")),
    ("a preset that is no name", b"preset = 3\n", ("run.toml", "3")),
    ("a table that does not exist", b"[modle]\nwidth = 3\n", ("modle", "model?")),
    ("a date", b"name = 2024-01-01\n", ("name", "text")),
    ("a key with a line's end", b'"a\\nb" = 1\n', ("a b",)),
    ("two mistakes", b"seed = -1\n[model]\nnum_layers = 'x'\n", ("seed", "model.num_layers", ";")),
    (
        "two rules",
        b"[model.attention]\nnum_heads = 3\nnum_kv_heads = 2\n[train]\nbatch_size = 3\nmicro_batch_size = 2\n",
        ("kv_heads = 2", "micro_batch_size = 2", ";"),
    ),
]


@pytest.mark.parametrize(("content", "parts"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_a_file_that_is_wrong(tmp_path: Path, content: bytes, parts: tuple[str, ...]) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(str(path))
    assert_one_sentence(str(caught.value).replace(str(tmp_path), ""), *parts)


def test_a_source_that_is_none(tmp_path: Path) -> None:
    for source, part in (
        ("nanoo", "did you mean nano?"),
        (str(tmp_path), "config.toml"),
        ("/no/such/file.toml", "andromeda-1b"),
        ("", "nano"),
        ("x" * 5000, "too long"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(source)
        assert part in str(caught.value)


def test_a_file_without_permission_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.toml"
    path.write_text("")

    def refuse(*args: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("andromeda.config.load.read_text", refuse)
    with pytest.raises(ConfigError, match="cannot be read \\(Permission denied\\)"):
        load(str(path))


ARGUMENTS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"dimm": 512}, ("dimm", "did you mean dim?")),
    ({"hidden_size": 10**400}, ("hidden_size", "2^53")),
    ({"dim": "512"}, ("dim", "whole number", "'512'")),
    ({"dim": 512, "hidden_size": 256}, ("dim", "hidden_size", "512", "256")),
    ({"num_tokens": 100, "vocab_size": 200}, ("num_tokens", "vocab_size")),
    ({"heads": 0}, ("heads", "above 0")),
    ({"heads": "a"}, ("heads", "'a'")),
    ({"alibi_num_heads": 25}, ("alibi.num_heads = 25", "24")),
    ({"alibi_num_heads": True}, ("alibi_num_heads", "whole number")),
    ({"alibi_pos_bias": 1}, ("alibi_pos_bias", "true or false")),
    ({"attention": 3, "heads": 8}, ("attention", "table")),
    ({"attention": {"sliding_widow": 3}}, ("attention.sliding_widow", "sliding_window?")),
    ({"max_seq_len": 200_000}, ("scale_base", "200000", "1507")),
    ({"embedding_provider": 3}, ("embedding_provider", "3")),
    ({"embedding_provider": type("Local", (), {"__qualname__": "f.<locals>.Local"})}, ("embedding.provider", "function")),
    ({"hidden_size": 100, "num_attention_heads": 3}, ("hidden_size = 100", "num_attention_heads = 3")),
]


@pytest.mark.parametrize(("names", "parts"), ARGUMENTS, ids=[str(row[0])[:60] for row in ARGUMENTS])
def test_an_argument_that_is_wrong(names: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        model_from_names(**names)
    assert_one_sentence(str(caught.value), *parts)


def test_values_are_checked_like_a_file() -> None:
    with pytest.raises(ConfigError, match=r"model\.num_layers must be above 0"):
        from_values({"model": {"num_layers": 0}})


def test_a_run_without_tokens_is_refused_only_when_it_starts() -> None:
    config = load(SMALL)
    with pytest.raises(ConfigError) as caught:
        check_training(config)
    assert_one_sentence(str(caught.value), "data.corpus", "andromeda data build")
    check_training(load(SMALL, ["data.corpus=somewhere"]))


@pytest.mark.parametrize("path", sorted(RENAMED))
def test_a_key_of_the_last_version_is_refused_with_its_new_name(path: str) -> None:
    value: Any = {"patience": 3} if path == "train.guard" else 1
    values: dict[str, Any] = {}
    set_path(values, path, value)
    with pytest.raises(ConfigError) as caught:
        from_values(values)
    assert_one_sentence(str(caught.value), path, RENAMED[path])
    for new in re.findall(r"[a-z]+(?:\.[a-z_]+)+", RENAMED[path]):
        assert new in fields(), f"{new} is no key"


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_a_name_of_another_library_leads_to_a_key_that_exists(name: str) -> None:
    ours = our_name(name, [*fields()])
    assert ours == ELSEWHERE[name]
    assert ours.startswith("--") or all(key in fields() for key in re.split(r" or ", ours.partition(" (")[0]))
    assert name not in fields()


def test_an_empty_table_in_a_file_is_no_plain_value(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[model]\nnum_layers = {}\n")
    with pytest.raises(ConfigError, match=r"model\.num_layers must be a whole number, not a table"):
        load(path)
    path.write_text("[model.attention]\n")  # a table without keys says nothing, and is no mistake
    assert load(path) == RunConfig()
