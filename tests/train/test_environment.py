"""What `andromeda doctor` says must be what jobs really get."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from andromeda.cli.main import app
from andromeda.ops.attention import attend, backends
from andromeda.train import environment as doctor
from andromeda.train.environment import HEAD_DIM, HEADS, KV_HEADS, TOKENS, examine, patterns


def test_the_named_backend_computes_its_pattern_as_the_reference_does() -> None:
    device = torch.device("cpu")
    named = {choice.pattern: choice.backend for choice in doctor.attention(device)}
    q, k, v = (torch.randn(1, TOKENS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    for name, pattern, queries in patterns(device):
        expected = attend(q[:, -queries:].double(), k.double(), v.double(), pattern, "eager")
        actual = attend(q[:, -queries:], k, v, pattern, named[name])
        torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-4)


def test_a_refusing_backend_is_passed_over_and_its_reason_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(iter(backends().values()))
    monkeypatch.setattr(first, "unsupported_reason", lambda *_: "it is tired")
    for choice in doctor.attention(torch.device("cpu")):
        assert choice.backend != first.name
        assert choice.refusals[first.name] == "it is tired"


def test_versions_are_those_of_the_imported_libraries() -> None:
    versions = {library.name: library.version for library in examine().libraries}
    for name in ("numpy", "pydantic", "safetensors"):
        assert versions[name] == importlib.import_module(name).__version__


def test_what_is_not_installed_has_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["torch>=2.11", 'no-such-library>=1; extra == "wandb"']
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: declared)
    missing = {library.name: library.command for library in doctor.libraries() if library.version is None}
    assert missing["no-such-library"] == "pip install 'andromeda[wandb]'"
    assert "torch" not in missing


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_cpu_features_agree_with_the_kernel() -> None:
    with open("/proc/cpuinfo") as lines:
        flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    for feature, flag in {"avx2": "avx2", "avx512_vnni": "avx512_vnni", "avx512_bf16": "avx512_bf16"}.items():
        assert (feature in doctor.cpu_features()) == (flag in flags)


def test_the_command_prints_json_and_a_plain_table() -> None:
    report = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert report["machine"]["torch"] == torch.__version__
    assert report["devices"][0]["name"] == "cpu"
    text = CliRunner().invoke(app, ["doctor"]).stdout
    assert "decoding one token" in text
    assert "\x1b" not in text
