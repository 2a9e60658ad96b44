"""Reading and writing: layers, overrides, files, round trips."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from andromeda.config.base import BaseConfig
from andromeda.config.keys import nested_config
from andromeda.config.load import dumps, from_values, load, presets
from andromeda.config.model import AttentionConfig, HeadTable, PartConfig
from andromeda.config.rules import check, resolve
from andromeda.config.run import RunConfig
from andromeda.config.validation_errors import MAX_NUMBER, validate
from andromeda.utils.errors import ConfigError

SMALL = Path(__file__).with_name("small.toml")
NAMES = sorted(presets())


def values_of(field: FieldInfo) -> st.SearchStrategy[Any]:
    """Any value that the field's type allows."""
    kind = field.annotation
    if isinstance(kind, type) and issubclass(kind, BaseConfig):
        return parts_of(kind)
    if kind in (dict[str, PartConfig], dict[str, HeadTable]):
        return st.dictionaries(st.text(), named_parts(get_args(kind)[1]), max_size=2)
    if get_origin(kind) is dict:  # keys of a user's own part
        return st.dictionaries(st.text("abc", min_size=1), st.integers(0, MAX_NUMBER) | st.text() | st.booleans(), max_size=2)
    if kind == field_type(AttentionConfig, "qk_norm"):
        return st.text() | named_parts()
    if get_origin(kind) in (Union, UnionType) and type(None) in get_args(kind):
        return st.none()
    if inner := nested_config(field):
        return st.lists(parts_of(inner), max_size=2).map(tuple)
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is tuple:
        of, length = get_args(kind)[0], (0, 3) if ... in get_args(kind) else (2, 2)
        return st.lists(plain(of, {}), min_size=length[0], max_size=length[1]).map(tuple)
    return plain(
        kind, {name: getattr(limit, name) for limit in field.metadata for name in ("gt", "ge", "lt", "le") if hasattr(limit, name)}
    )


def field_type(part: type[BaseConfig], name: str) -> Any:
    return part.model_fields[name].annotation


def named_parts(table: type[PartConfig] = PartConfig) -> st.SearchStrategy[PartConfig]:
    """Tables of parts with keys of their own."""
    keys = st.text().filter(lambda name: name not in ("kind", "own") and not hasattr(PartConfig, name))
    own = st.dictionaries(keys, st.integers(-MAX_NUMBER, MAX_NUMBER) | st.booleans() | st.text(), max_size=2)
    return st.builds(lambda kind, own: table.model_validate({"kind": kind, **own}), st.text(), own)


def plain(kind: Any, limits: dict[str, Any]) -> st.SearchStrategy[Any]:
    if kind is bool:
        return st.booleans()
    if kind == int | float:  # steps, or a fraction of the run
        return st.integers(0, MAX_NUMBER) | st.floats(0.0, 1.0, exclude_max=True)
    if kind is str:
        return st.text()
    if kind is int:
        return st.integers(limits.get("ge", limits.get("gt", -MAX_NUMBER - 1) + 1), limits.get("le", MAX_NUMBER))
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    return st.floats(low, high, allow_nan=False, allow_infinity=False, exclude_min="gt" in limits, exclude_max="lt" in limits)


def parts_of(part: type[BaseConfig]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({name: values_of(field) for name, field in part.model_fields.items()}).map(lambda values: part(**values))


@settings(max_examples=60, deadline=None)
@given(parts_of(RunConfig))
def test_what_is_written_is_read_back_equal(config: RunConfig) -> None:
    assert validate(RunConfig, tomllib.loads(dumps(config))) == config


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_loads_fits_together_and_survives_a_run_folder(name: str, tmp_path: Path) -> None:
    config = load(name)
    assert config.name == name
    (tmp_path / "config.toml").write_text(dumps(config), "utf-8")
    assert load(str(tmp_path)) == load(tmp_path / "config.toml") == config
    assert from_values(config.model_dump()) == config
    resolved = resolve(config)
    check(resolved)
    assert resolve(resolved) == resolved
    assert (resolved.train.seq_len, resolved.train.micro_batch_size) == (
        config.train.seq_len or config.model.max_seq_len,
        config.train.micro_batch_size or config.train.batch_size,
    )


def test_every_preset_has_one_line_about_it() -> None:
    assert {"nano", "andromeda", "andromeda-65b", "speedrun", "andromeda-125m", "andromeda-360m", "andromeda-1b", "andromeda-7b"} <= set(
        NAMES
    )
    for line in presets().values():
        assert 20 < len(line) < 140
        assert line.endswith(".")


def test_a_file_changes_the_preset_it_names_and_overrides_change_both(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('preset = "nano"\n[model]\nnum_layers = 3\nhidden_size = 128\n[model.attention]\nnum_heads = 2\n')
    nano, mine = load("nano"), load(path, ["model.hidden_size=192", "train.optim.kind=adamw"])
    assert (mine.model.num_layers, mine.model.hidden_size, mine.model.attention.num_heads) == (3, 192, 2)
    assert mine.train.optim.kind == "adamw"
    # What neither says is the preset's.
    assert mine.model.attention.qk_norm == nano.model.attention.qk_norm
    assert mine.train.schedule == nano.train.schedule
    assert mine.model.vocab_size == nano.model.vocab_size


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")
    assert load(path) == RunConfig()


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.optim.kind=adamw", "train.optim.kind", "adamw"),
        ('train.optim.kind="adamw"', "train.optim.kind", "adamw"),
        ("train.optim.lr=3e-4", "train.optim.lr", 3e-4),
        ("train.optim.lr=.05", "train.optim.lr", 0.05),
        ("train.optim.lr=2.", "train.optim.lr", 2.0),
        ("train.optim.lr=1", "train.optim.lr", 1.0),
        ("train.batch_size = 32", "train.batch_size", 32),
        ("train.batch_size=1_024", "train.batch_size", 1024),
        ("model.attention.bias=true", "model.attention.bias", True),
        ("name=x", "name", "x"),
        ("name=12", "name", "12"),
        ("name=2024-01-01", "name", "2024-01-01"),
        ("name=true", "name", "true"),
        ("name='a = b'", "name", "a = b"),
        ("name=a = b", "name", "a = b"),
        ("name=", "name", ""),
        ("data.corpus=/a b/c", "data.corpus", "/a b/c"),
        ("train.optim.betas=[0.8, 0.9]", "train.optim.betas", (0.8, 0.9)),
        ('train.probes.tasks=["recall"]', "train.probes.tasks", ("recall",)),
        ("model.dim=192", "model.hidden_size", 192),
    ],
)
def test_an_override_says_what_it_seems_to(override: str, path: str, value: Any) -> None:
    found: Any = load(SMALL, [override])
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_of_a_key_counts_and_a_mixture_can_be_written() -> None:
    config = load(SMALL, ["seed=1", "data.sources=[{path='a', weight=2.0}, {path='b'}]", "seed=2"])
    assert config.seed == 2
    assert [(source.path, source.weight) for source in config.data.sources] == [("a", 2.0), ("b", 1.0)]


def test_a_value_with_a_line_end_cannot_smuggle_a_second_key() -> None:
    assert load(SMALL, ["name='x'\nseed = 7"]).seed == 0
    with pytest.raises(ConfigError, match=r"train\.steps must be a whole number"):
        load(SMALL, ["train.steps=500\nseed = 7"])


def test_reading_a_configuration_loads_no_torch() -> None:
    program = (
        "import sys; from andromeda.config import load, rules; load.load('nano');"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_configurations_with_tables_are_hashed_by_their_values() -> None:
    one, same, other = (load("nano", ["data.corpus=c", f"train.optim.options.a={value}"]) for value in (1, 1, 2))
    assert hash(one) == hash(same)
    assert len({one, same, other}) == 2
