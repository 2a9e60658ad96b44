"""`andromeda --version`: one version, in one place."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from andromeda import __version__
from tests.command import call

ROOT = Path(__file__).parents[2]


def test_the_command_line_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr() == (f"andromeda {__version__}\n", "")


def test_the_package_takes_its_version_from_the_module() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "version" not in settings["project"]
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "andromeda.__version__"}


def test_the_citation_names_it() -> None:
    assert re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text("utf-8"), flags=re.MULTILINE) == [__version__]


def test_the_changelog_has_it() -> None:
    """Either as a release or as what is to come; the newest release is never newer than the code."""
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}$", text, flags=re.MULTILINE)
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE)[0] == "[Unreleased]"
    if released:
        assert released[0] == __version__
    else:
        assert f"What {__version__} will contain." in text
