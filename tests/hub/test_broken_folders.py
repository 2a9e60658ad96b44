"""Folders that are damaged or hostile: each one sentence, nothing run, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from andromeda.hub.import_folder import read_folder
from andromeda.utils.errors import AndromedaError
from tests.command import call

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    sizes = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 96}
    config = transformers.LlamaConfig(**sizes, intermediate_size=40, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    return folder


def config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (values | changes).items() if v != "missing"}))


def index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    change(values["weight_map"])
    path.write_text(json.dumps(values))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    kept = load_file(shard(folder))
    change(kept)
    save_file(kept, shard(folder), {"format": "pt"})


def first(kept: dict[str, torch.Tensor]) -> str:
    return min(kept)


def header(folder: Path, length: int, content: bytes = b"{}") -> None:
    shard(folder).write_bytes(struct.pack("<Q", length) + content)


def linked(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    shutil.move(folder / name, outside / name)
    (folder / name).symlink_to(outside / name)


def pickled(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")


def entry(folder: Path, about: dict[str, Any]) -> None:
    content = json.dumps({"model.norm.weight": about}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content + b"\0" * 128)


BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "is no folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "not an object"),
    "config is deep": (lambda f: (f / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000), "config.json"),
    "config is a pipe": (lambda f: [(f / "config.json").unlink(), os.mkfifo(f / "config.json")], "not a regular file"),
    "config is a link out": (lambda f: linked(f, "config.json"), "leads out of the folder"),
    "remote code": (lambda f: config(f, auto_map={"AutoModelForCausalLM": "evil.Model"}), "never run here"),
    "quantized": (lambda f: config(f, quantization_config={"quant_method": "gptq"}), "quantized weights"),
    "unknown family": (lambda f: config(f, model_type="lama"), "did you mean llama"),
    "no family": (lambda f: config(f, model_type="missing"), "has no model_type"),
    "a size of the wrong kind": (lambda f: config(f, hidden_size="many"), "hidden_size must be a whole number"),
    "a size beyond any machine": (lambda f: config(f, vocab_size=10**15), "vocab_size"),
    "sizes that do not fit": (lambda f: config(f, head_dim=None, num_attention_heads=5), "no multiple"),
    "more memory than there is": (lambda f: config(f, hidden_size=900_000, num_hidden_layers=1000), "GiB for weights"),
    "unknown rotary scaling": (lambda f: config(f, rope_parameters={"rope_type": "longrope", "factor": 2.0}), "longrope"),
    "unknown activation": (lambda f: config(f, hidden_act="xielu"), "hidden_act"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "holds no weights"),
    "pickle": (pickled, "may run code"),
    "a missing shard": (lambda f: shard(f).unlink(), "is missing"),
    "a shard cut short": (lambda f: os.truncate(shard(f), 200), "no intact safetensors file"),
    "an empty shard": (lambda f: os.truncate(shard(f), 0), "no intact safetensors file"),
    "a header of 2^62 bytes": (lambda f: header(f, 1 << 62), "no intact safetensors file"),
    "a header that is no JSON": (lambda f: header(f, 2, b"{]"), "no intact safetensors file"),
    "a header beyond its data": (lambda f: entry(f, {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}), "no intact"),
    "a tensor of 8 bits": (lambda f: entry(f, {"dtype": "F8_E4M3", "shape": [128], "data_offsets": [0, 128]}), "F8_E4M3"),
    "a shard that is a link out": (lambda f: linked(f, shard(f).name), "leads out of the folder"),
    "an index that leads out": (
        lambda f: index(f, lambda m: m.update({first(m): "../../etc/passwd"})),
        "no safetensors file of this folder",
    ),
    "an index of nothing": (lambda f: index(f, dict.clear), "no weight_map"),
    "an index that errs": (lambda f: tensors(f, lambda t: t.pop(first(t))), "which the index places there"),
    "a tensor missing": (lambda f: index(f, lambda m: m.pop("model.norm.weight")), "hold no model.norm.weight"),
    "a tensor too many": (
        lambda f: [tensors(f, lambda t: t.update(extra=torch.ones(3))), index(f, lambda m: m.update(extra=shard(f).name))],
        "no place",
    ),
    "a tensor of another shape": (lambda f: tensors(f, lambda t: t.update({first(t): torch.ones(3)})), "has the shape"),
    "numbers that are not finite": (lambda f: tensors(f, lambda t: t[first(t)].fill_(float("nan"))), "not finite"),
    "code of its own in our own format": (
        lambda f: config(f, model_type="andromeda", embedding={"kind": "custom", "provider": "os:system"}),
        "never run",
    ),
    "a QK norm of its own": (
        lambda f: config(f, model_type="andromeda", attention={"qk_norm": "os:system"}),
        "never run",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_one_sentence(name: str, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    change, words = BREAKS[name]
    change(folder)
    with pytest.raises(AndromedaError, match=words) as error:
        read_folder(folder, tokenizer=False)
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert len(text) < 400
    assert not (Path.cwd() / "ran").exists()


def test_the_command_line_writes_nothing(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    shard(folder).unlink()
    assert call("import", str(folder), "--out", str(tmp_path / "run"), "--no-tokenizer") == 2
    assert "is missing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_tokenizer(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(AndromedaError, match="--no-tokenizer"):
        read_folder(whole)


def test_links_within_the_folder_are_fine(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    (folder / "blobs").mkdir()
    name = shard(folder).name
    shutil.move(folder / name, folder / "blobs" / "x")
    (folder / name).symlink_to(Path("blobs") / "x")
    read_folder(folder, tokenizer=False)
