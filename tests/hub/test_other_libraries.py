"""Exported folders under lm-evaluation-harness's own Hugging Face model and under TRL, as others would use them."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from andromeda.config.data import BuildConfig
from andromeda.data.tokenizer import Tokenizer, train_tokenizer
from andromeda.hub.export_folder import convert, write_folder
from andromeda.model.transformer import Transformer
from andromeda.train.state import model_tensors
from tests.corpora import WORDS
from tests.hub.exported import small_preset, stirred
from tests.hub.test_export import llama

transformers = pytest.importorskip("transformers")
SHAPES = {"llama": llama, "andromeda": lambda: small_preset("andromeda"), "nano": lambda: small_preset("nano")}


@pytest.fixture(scope="module", params=SHAPES)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Tokenizer, Path]:
    """A model of ours with its tokenizer, and its exported folder."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 20, BuildConfig(vocab_size=290, special_tokens=("<|end|>",)))
    model, folder = stirred(SHAPES[request.param]()), tmp_path_factory.mktemp("shared") / "model"
    write_folder(folder, convert(model.config, model_tensors(model)), tokenizer)
    return model, tokenizer, folder


def sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(1, 9))) for _ in range(count)]


def test_lm_eval_scores_both_alike(shared: tuple[Transformer, Tokenizer, Path]) -> None:
    """500 random pairs, and a task of multiple choice: log-likelihoods within 1e-5, the same accuracies."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from andromeda.evaluate.lm_eval_adapter import AndromedaLM

    model, tokenizer, folder = shared
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    harness = HFLM(
        pretrained=theirs,
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        batch_size=8,
        max_length=model.config.max_seq_len,
        add_bos_token=True,
        device="cpu",
    )
    ours = AndromedaLM(model, tokenizer)
    pairs = zip(sentences(500, 1), sentences(500, 2), strict=True)
    requests = [Instance("loglikelihood", {}, (context, " " + answer), i) for i, (context, answer) in enumerate(pairs)]
    for (a, greedy), (b, same) in zip(ours.loglikelihood(requests), harness.loglikelihood(requests, disable_tqdm=True), strict=True):
        assert math.isclose(a, b, abs_tol=1e-5, rel_tol=1e-6)
        assert greedy == same
    tasks = TaskManager(include_defaults=False)
    found = []
    for scorer in (ours, harness):
        found.append(lm_eval.simple_evaluate(scorer, tasks=[task()], task_manager=tasks, bootstrap_iters=0)["results"]["words"])
    assert found[0]["acc,none"] == found[1]["acc,none"]
    assert found[0]["acc_norm,none"] == found[1]["acc_norm,none"]


def task() -> dict[str, Any]:
    """Which of four sentences follows."""
    from datasets import Dataset

    rows = Dataset.from_list([{"question": q, "choices": sentences(4, i)} for i, q in enumerate(sentences(40, 3))])
    return {
        "task": "words",
        "custom_dataset": lambda **_: {"test": rows},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": lambda row: row["question"],
        "doc_to_choice": lambda row: row["choices"],
        "doc_to_target": lambda row: 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def test_trl_trains_it(shared: tuple[Transformer, Tokenizer, Path], tmp_path: Path) -> None:
    """SFT with packing, restarting positions and no mask: the loss falls, and what was saved loads again."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    from datasets import Dataset

    _, _, folder = shared
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=12,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        packing=True,
        packing_strategy="bfd",
        max_length=48,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        gradient_checkpointing=True,
        bf16=False,
    )
    trainer = trl.SFTTrainer(
        theirs,
        args=settings,
        train_dataset=Dataset.from_dict({"text": sentences(80, 5)}),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs.eval()(ids).logits)


def test_peft_adapts_it(shared: tuple[Transformer, Tokenizer, Path]) -> None:
    """LoRA on every linear map of the layers; merged, the logits are the same."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    _, _, folder = shared
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    ids = torch.arange(30)[None]
    with torch.no_grad():
        before = adapted(ids).logits
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(ids).logits, before, atol=1e-3)
        assert torch.allclose(adapted.merge_and_unload()(ids).logits, before, atol=1e-4)


def test_trl_prefers_and_rewards(tmp_path: Path) -> None:
    """DPO, whose reference is loaded again and whose first loss is ln 2, and GRPO, which generates."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    from datasets import Dataset

    tokenizer = train_tokenizer([" ".join(WORDS)] * 20, BuildConfig(vocab_size=290))
    model = stirred(small_preset("nano"))
    write_folder(tmp_path / "model", convert(model.config, model_tensors(model)), tokenizer)
    common = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "model_init_kwargs": {"trust_remote_code": True},
    }
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    pairs = {"prompt": sentences(8, 1), "chosen": sentences(8, 2), "rejected": sentences(8, 3)}
    settings = trl.DPOConfig(**common, per_device_train_batch_size=2)
    trainer = trl.DPOTrainer(str(tmp_path / "model"), args=settings, train_dataset=Dataset.from_dict(pairs), processing_class=reader)
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(math.log(2), abs=1e-5)
    settings = trl.GRPOConfig(**common, per_device_train_batch_size=4, num_generations=4, max_completion_length=8, beta=0.04)
    grpo = trl.GRPOTrainer(
        str(tmp_path / "model"),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": sentences(8, 1)}),
        processing_class=reader,
    )
    grpo.train()
    assert any("reward" in entry for entry in grpo.state.log_history)
