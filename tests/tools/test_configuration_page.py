"""The page about the configuration is the one that the types make, and says something about every key."""

from __future__ import annotations

from pathlib import Path

from andromeda.config.aliases import DIRECT, FLAT_NAMES
from andromeda.config.data import BuildConfig
from andromeda.config.keys import fields, iter_fields, nested_config
from tools.configuration_page import MEANINGS, document

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_up_to_date() -> None:
    hint = "run `python -m tools.configuration_page > docs/configuration.md`"
    assert PAGE.read_text("utf-8") == document(), hint


def test_every_key_says_what_it_means() -> None:
    for path, field in {**fields(), **dict(iter_fields(BuildConfig))}.items():
        assert field.description or nested_config(field), f"{path} needs a docstring"


def test_every_name_is_explained() -> None:
    assert MEANINGS.keys() | DIRECT.keys() == FLAT_NAMES
    for name in FLAT_NAMES:
        assert f"| `{name}` |" in document()
