"""DiLoCo: one worker is plain training; several survive the death and return of one; what is sent is counted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from andromeda.config.base import BaseConfig
from andromeda.config.load import dumps, from_values
from andromeda.config.outer_optimizer import DiLoCoConfig
from andromeda.config.run import RunConfig
from andromeda.config.train import OptimizerConfig
from andromeda.model.transformer import Transformer
from andromeda.optim import OptimizerContainer, build_optimizer
from andromeda.optim.optimizer_kind import OptimizerKind
from andromeda.parallel.diloco import LighthouseNotFound, start_worker
from andromeda.train.checkpoint import latest, read
from andromeda.train.metrics import read_metrics
from andromeda.train.objective import MicroBatch, NextTokenObjective
from andromeda.utils.errors import ConfigError
from tests.corpora import short_documents

pytest.importorskip("torchft", reason="DiLoCo needs the extra torchft: pip install 'andromeda[torchft]'")

LIGHTHOUSE = """
import os, sys, time
os.environ["RUST_LOG"] = "warn"
from torchft.coordination import LighthouseServer
server = LighthouseServer(bind="127.0.0.1:0", min_replicas=int(sys.argv[1]), join_timeout_ms=60000, heartbeat_timeout_ms=5000)
print(server.address(), flush=True)
time.sleep(3600)
"""
MODEL: dict[str, Any] = {
    "vocab_size": 257,
    "max_seq_len": 32,
    "hidden_size": 32,
    "num_layers": 2,
    "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "qk_norm": "rms"},
    "rotary": {"kind": "rope"},
    "feedforward": {"kind": "relu2", "mlp_ratio": 2.0},
}


class PlainSGD(torch.optim.SGD, OptimizerKind):
    """w <- w - lr g."""

    class Config(BaseConfig):
        """No keys."""

    @classmethod
    def state_bytes(cls, parameter: Tensor, config: Any) -> int:
        return 0


@contextmanager
def lighthouse_for(workers: int) -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-c", LIGHTHOUSE, str(workers)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = process.stdout.readline().strip().rpartition(":")[2]
    yield f"http://localhost:{port}"
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def lighthouse() -> Iterator[str]:
    with lighthouse_for(1) as address:
        yield address


def double_model() -> tuple[Transformer, OptimizerContainer]:
    model = Transformer(from_values({"model": MODEL}).model, seed=1).double()
    return model, build_optimizer(model, OptimizerConfig(kind=f"{__name__}:PlainSGD", lr=0.1, weight_decay=0.0))


def steps(model: Transformer, optimizer: OptimizerContainer, count: int) -> list[float]:
    """Loss before each of some steps."""
    objective, draw, losses = NextTokenObjective(model), torch.Generator().manual_seed(5), []
    for _ in range(count):
        ids = torch.randint(0, 257, (2, 33), generator=draw)
        sums = objective(MicroBatch(ids[:, :-1], ids[:, 1:], None))
        (sums.total / 64).backward()
        losses.append(sums.total.item() / 64)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.usefixtures("allow_code")
def test_one_worker_with_one_plain_step_is_plain_training(lighthouse: str) -> None:
    """The outer step from w with rate 1 along w - (w - lr g) is the inner step."""
    plain, averaged = double_model(), double_model()
    config = DiLoCoConfig(workers=1, inner_steps=1, outer_lr=1.0, outer_momentum=0.0, lighthouse=lighthouse)
    expected = steps(*plain, 20)
    with start_worker(config, *averaged) as worker:
        worker.share(dict, lambda shared: None)
        found = steps(*averaged, 20)
        assert worker.metrics() == {"diloco/bytes_sent": 0, "diloco/synchronizations": 20, "diloco/workers": 1}
    assert found == pytest.approx(expected, rel=1e-9)
    assert expected[-1] < expected[0]
    for one, other in zip(plain[0].parameters(), averaged[0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("allow_code")
def test_state_is_restored_in_the_middle_of_the_inner_steps(lighthouse: str) -> None:
    """Seven steps, of which four synchronize twice, then five more: as twelve in one go."""
    config = DiLoCoConfig(workers=1, inner_steps=4, lighthouse=lighthouse)
    draw = torch.Generator().manual_seed(2)
    whole, first, second = double_model(), double_model(), double_model()
    grads = [[torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in whole[0].parameters()] for _ in range(12)]

    def learn(pair: tuple[Transformer, OptimizerContainer], some: list[list[Tensor]]) -> None:
        for grad in some:
            for p, g in zip(pair[0].parameters(), grad, strict=True):
                p.grad = g.clone()
            pair[1].step()

    with start_worker(config, *whole) as worker:
        worker.share(dict, lambda shared: None)
        learn(whole, grads)
    with start_worker(config, *first) as worker:
        worker.share(dict, lambda shared: None)
        learn(first, grads[:7])
        tensors = {name: tensor.clone() for name, tensor in worker.state_tensors().items()}
        metadata = json.loads(json.dumps(worker.state_metadata()))
    second[0].load_state_dict(first[0].state_dict())
    with start_worker(config, *second) as worker:
        worker.share(dict, lambda shared: None)
        worker.load_state(tensors, metadata)
        learn(second, grads[7:])
        assert worker.metrics()["diloco/synchronizations"] == 3
    for one, other in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("allow_code")
def test_the_outer_step_is_nesterovs(lighthouse: str) -> None:
    """Three synchronizations of two steps each, against the recurrence written out."""
    config = DiLoCoConfig(workers=1, inner_steps=2, outer_lr=0.7, outer_momentum=0.9, lighthouse=lighthouse)
    model, optimizer = double_model()
    reference, _ = double_model()
    draw, momentum = torch.Generator().manual_seed(2), None
    grads = [[torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in model.parameters()] for _ in range(6)]
    with start_worker(config, model, optimizer) as worker:
        worker.share(dict, lambda shared: None)
        for grad in grads:
            for p, g in zip(model.parameters(), grad, strict=True):
                p.grad = g.clone()
            optimizer.step()
    weights = [p.detach().clone() for p in reference.parameters()]
    for first, second in zip(grads[::2], grads[1::2], strict=True):
        change = [0.1 * (a + b) for a, b in zip(first, second, strict=True)]
        momentum = change if momentum is None else [0.9 * m + c for m, c in zip(momentum, change, strict=True)]
        weights = [w - 0.7 * (c + 0.9 * m) for w, c, m in zip(weights, change, momentum, strict=True)]
    for found, expected in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def run_config(corpus: Path, lighthouse: str, worker: int, workers: int, inner: int, count: int) -> RunConfig:
    diloco = {"workers": workers, "worker": worker, "inner_steps": inner, "lighthouse": lighthouse, "timeout": 60}
    return from_values(
        {
            "model": MODEL,
            "data": {"corpus": str(corpus)},
            "train": {
                "steps": count,
                "batch_size": 2,
                "precision": "fp32",
                "compile": "off",
                "device": "cpu",
                "eval_every": count,
                "eval_tokens": 2048,
                "log": {"every": inner // 4},
                "checkpoints": {"every": inner // 4},
                "optim": {"lr": 3e-3},
                "diloco": diloco,
            },
        }
    )


def spawn(config: RunConfig, out: Path, *options: str) -> subprocess.Popen[bytes]:
    """A worker in a process of its own: what has run torchft cannot be forked."""
    file = out.with_suffix(".toml")
    file.write_text(dumps(config))
    return subprocess.Popen(
        [sys.executable, "-c", "from andromeda.cli.main import main; main()", "train", str(file), "--out", str(out), *options],
        stdout=subprocess.DEVNULL,
    )


def wait_for_step(run: Path, step: int) -> None:
    """Return when a run has logged a step."""
    while read_metrics(run / "metrics.jsonl").step < step:
        time.sleep(0.2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_documents(tmp_path_factory.mktemp("corpus"), 60, validation=0.1)


def last_metrics(run: Path, name: str) -> Any:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line][-1]


def final_weights(run: Path) -> dict[str, Tensor]:
    path = latest(run / "checkpoints", pytest.fail)
    assert path is not None
    return dict(read(path).tensors["model"])


def test_two_workers_read_different_rows_and_end_with_equal_weights(corpus: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "0", tmp_path / "1"]
    with lighthouse_for(2) as lighthouse:
        processes = [spawn(run_config(corpus, lighthouse, worker, 2, 12, 48), run) for worker, run in enumerate(runs)]
        assert [process.wait() for process in processes] == [0, 0]
    one, other = map(final_weights, runs)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert last_metrics(runs[0], "rows") == last_metrics(runs[1], "rows") == 2 * 2 * 48
    assert last_metrics(runs[0], "loss") != last_metrics(runs[1], "loss")
    numbers = sum(tensor.numel() for tensor in one.values())
    # A ring all-reduce over two sends each number once; a worker that came late was sent the state once more.
    assert last_metrics(runs[0], "diloco/bytes_sent") + last_metrics(runs[1], "diloco/bytes_sent") >= 2 * 3 * 4 * numbers


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_worker_is_killed_and_comes_back(corpus: Path, tmp_path: Path) -> None:
    """Four workers, 200 steps between synchronizations; the last is killed after 250 steps and started again while the others continue."""
    count, inner, workers = 800, 200, 4
    with lighthouse_for(3) as lighthouse:
        configs = [run_config(corpus, lighthouse, worker, workers, inner, count) for worker in range(workers)]
        undisturbed = [spawn(config, tmp_path / f"whole{worker}") for worker, config in enumerate(configs)]
        assert [process.wait() for process in undisturbed] == [0] * workers
    with lighthouse_for(3) as lighthouse:
        configs = [run_config(corpus, lighthouse, worker, workers, inner, count) for worker in range(workers)]
        processes = [spawn(config, tmp_path / f"killed{worker}") for worker, config in enumerate(configs)]
        victim = tmp_path / "killed3"
        wait_for_step(victim, 250)
        processes[3].kill()
        processes[3].wait()
        processes[3] = spawn(configs[3], victim, "--resume")
        assert [process.wait() for process in processes] == [0] * workers
    first = final_weights(tmp_path / "killed0")
    for worker in range(1, workers):
        other = final_weights(tmp_path / f"killed{worker}")
        assert [name for name in first if not torch.equal(first[name], other[name])] == []
    loss, expected = (last_metrics(tmp_path / name, "validation/loss") for name in ("killed0", "whole0"))
    assert loss == pytest.approx(expected, rel=0.02)
    every_step = 2 * (workers - 1) / workers * 4 * sum(tensor.numel() for tensor in first.values()) * count
    sent = [last_metrics(tmp_path / f"killed{worker}", "diloco/bytes_sent") for worker in range(workers)]
    assert all(100 * bytes_sent <= every_step for bytes_sent in sent)
    print(f"loss {loss:.4f}, undisturbed {expected:.4f}; {every_step / max(sent):.0f} times fewer bytes than data parallel")


def test_wrong_settings_are_one_sentence(tmp_path: Path) -> None:
    def changed(**keys: Any) -> Callable[[], RunConfig]:
        return lambda: from_values({"model": MODEL, "train": {"steps": 100, "diloco": keys}})

    for make, sentence in (
        (changed(workers=2, worker=2, inner_steps=10), "train.diloco.worker = 2 is not below"),
        (changed(worker=1), "has no effect while train.diloco.workers is 0"),
        (changed(workers=2, inner_steps=30), "is not a multiple of train.diloco.inner_steps = 30"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            make()
    model, optimizer = Transformer(from_values({"model": MODEL}).model), None
    nobody = DiLoCoConfig(workers=1, lighthouse="http://localhost:9", timeout=1)
    with pytest.raises(LighthouseNotFound, match="No torchft lighthouse answers"), start_worker(nobody, model, optimizer):  # type: ignore[arg-type]
        pass
