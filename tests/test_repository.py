"""The files around the package say the same: what CI runs, what a commit runs, what a container sets up, what is supported."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text("utf-8"))


def pinned(file: str) -> dict[str, str]:
    """Versions of a constraints file."""
    return dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / file).read_text("utf-8"), flags=re.MULTILINE))


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile, with its environment's folder written out."""
    lines = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    assert lines, target
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in lines[1].splitlines()]


def test_a_commit_is_checked_like_make_lint() -> None:
    hooks = [hook for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"] for hook in repo["hooks"]]
    assert [hook["entry"] for hook in hooks] == recipe("lint")


def test_ci_runs_the_oldest_and_the_pinned_torch() -> None:
    tested = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["torch"]
    floor = next(line.removeprefix("torch>=") for line in PROJECT["project"]["dependencies"] if line.startswith("torch>="))
    assert tested == [pinned("constraints-oldest.txt")["torch"], pinned("constraints.txt")["torch"]]
    assert tested[0] == f"{floor}.0"


def test_ci_runs_the_oldest_python() -> None:
    tested = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert PROJECT["project"]["requires-python"] == f">={tested[0]}"
    assert PROJECT["tool"]["mypy"]["python_version"] == tested[0]
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + tested[0].replace(".", "")


def test_make_has_what_ci_and_the_container_call() -> None:
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text("utf-8"))
    steps = [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]
    called = re.findall(r"\bmake ([\w./-]+)", " ".join([*steps, container["postCreateCommand"]]))
    assert len(called) > 3
    for target in called:
        assert f"\n{target.replace('.venv', '$(VENV)')}:" in MAKEFILE, target


@pytest.mark.parametrize("form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda path: path.stem)
def test_an_issue_form_is_what_github_takes(form: Path) -> None:
    """Keys that GitHub requires, and ids that are unique."""
    content: dict[str, Any] = yaml.safe_load(form.read_text("utf-8"))
    assert content["name"]
    assert content["description"]
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
