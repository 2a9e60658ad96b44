"""Likelihoods and long sequences against a plain pass, and the harness's adapter against its own model of transformers' Llama."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from andromeda.config.data import BuildConfig
from andromeda.config.model import AttentionConfig, BlockConfig, FeedForwardConfig, HeadConfig, ModelConfig, RotaryConfig
from andromeda.data.tokenizer import Tokenizer, train_tokenizer
from andromeda.evaluate.token_loss import PromptCache, continuation_likelihoods, token_losses
from andromeda.model.transformer import Transformer
from tests.oracles.test_llama import translated

TEXT = "the cat sat on the mat, and the bird came to see it. " * 20


def small(**changes: Any) -> Transformer:
    settings: dict[str, Any] = {"rotary": RotaryConfig(kind="rope"), "attention": AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8)}
    config = ModelConfig(vocab_size=61, max_seq_len=128, hidden_size=16, num_layers=2, **settings | changes)
    return Transformer(config, seed=1).double().eval()


def drawn(*shape: int) -> torch.Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
@torch.no_grad()
def test_chunked_losses_are_those_of_one_pass(chunk: int) -> None:
    model, ids, targets = small(), drawn(3, 50), drawn(3, 50).flip(1)
    targets[1, :20] = -100
    logs = model(ids).log_softmax(-1)
    expected = -logs.gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
    torch.testing.assert_close(token_losses(model, ids, targets, chunk=chunk), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_continuations_of_a_prompt_that_was_read_once() -> None:
    model, ids = small(), drawn(2, 40)
    prompts = PromptCache(model, ids, 10, chunk=16)
    for pair, skip in (([[5, 6, 7], [8, 9]], [0, 0]), ([[1], [2, 3, 4, 5]], [0, 2])):
        found = prompts.nats(pair, skip)
        for row in range(2):
            whole = torch.cat([ids[row], torch.tensor(pair[row])])[None]
            logs = model(whole).log_softmax(-1)[0]
            nats = [-logs[39 + i, token].item() for i, token in enumerate(pair[row])]
            assert found[row].item() == pytest.approx(sum(nats[skip[row] :]), rel=1e-10)
    written, sequence = prompts.greedy(6, 61), ids
    for _ in range(6):
        sequence = torch.cat([sequence, model(sequence)[:, -1:].argmax(-1)], 1)
    assert written == sequence[:, 40:].tolist()


@torch.no_grad()
def test_likelihoods_are_sums_over_single_tokens_whatever_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small(), drawn(9, 30).tolist()
    pairs = [(row[: 3 + i], row[3 + i : 5 + 2 * i]) for i, row in enumerate(ids)]
    found = continuation_likelihoods(model, pairs)
    monkeypatch.setattr("andromeda.evaluate.token_loss.BATCH_TOKENS", {"cpu": 1})
    alone = continuation_likelihoods(model, pairs)
    for (context, continuation), one, other in zip(pairs, found, alone, strict=True):
        logs = model(torch.tensor([[*context, *continuation]])).log_softmax(-1)[0]
        at = range(len(context) - 1, len(context) + len(continuation) - 1)
        assert one.log == pytest.approx(sum(logs[i, t].item() for i, t in zip(at, continuation, strict=True)), rel=1e-10)
        assert one.greedy == all(logs[i].argmax() == t for i, t in zip(at, continuation, strict=True))
        assert (other.log, other.greedy) == (pytest.approx(one.log, rel=1e-12), one.greedy)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Transformer, Tokenizer]:
    """transformers' Llama with its tokenizer, and ours with the same weights and vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer([TEXT], BuildConfig(vocab_size=280))
    tokenizer.save(folder)
    (file,) = folder.glob("*tokenizer*.json") if list(folder.glob("*tokenizer*.json")) else folder.glob("*.json")
    theirs_words = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    theirs_words.pad_token = "<|endoftext|>"
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
        bos_token_id=tokenizer.eos,
        eos_token_id=tokenizer.eos,
    )
    theirs = LlamaForCausalLM(config).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.mean() + torch.randn(parameter.shape, generator=draw) * 0.2)
    ours = Transformer(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            max_seq_len=64,
            hidden_size=32,
            num_layers=2,
            attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
            rotary=RotaryConfig(kind="rope"),
            feedforward=FeedForwardConfig(kind="swiglu", intermediate_size=48),
            block=BlockConfig(norm="rms", eps=1e-6),
            head=HeadConfig(tied=False),
        )
    ).eval()
    ours.load_state_dict(translated(theirs.state_dict()))
    return theirs, theirs_words, ours, tokenizer


TEXTS = [
    ("the cat", " sat on the mat"),
    ("the bird came", " to see"),
    ("", "the mat"),
    ("and then ", "one"),
    (TEXT[:700], " and it"),
]


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, {"rel": 1e-6}), (torch.float64, {"rel": 0, "abs": 1e-6})])
@pytest.mark.parametrize("begin", [False, True])
def test_the_adapter_gives_the_log_likelihoods_of_the_harness_own_model(
    pair: Any, begin: bool, dtype: torch.dtype, allowed: dict[str, float]
) -> None:
    """HFLM on transformers' Llama, and ours on the same weights: the same encodings, cuts and sums.

    In float64 to a millionth of a nat, which is what transformers' norms lose: they are computed in float32.
    """
    from lm_eval.models.huggingface import HFLM

    from andromeda.evaluate.lm_eval_adapter import AndromedaLM

    theirs, words, ours, tokenizer = pair
    theirs, ours = copy.deepcopy(theirs).to(dtype), copy.deepcopy(ours).to(dtype)
    reference = HFLM(pretrained=theirs, tokenizer=words, batch_size=1, add_bos_token=begin, max_length=64, device="cpu")
    adapter = AndromedaLM(ours, tokenizer, begin=begin)
    if begin:  # a tokenizer file of ours does not add the separator by itself
        reference.tok_encode = adapter.tok_encode  # type: ignore[method-assign]
    requests = [SimpleNamespace(args=one) for one in TEXTS]
    expected, found = reference.loglikelihood(requests, disable_tqdm=True), adapter.loglikelihood(requests, disable_tqdm=True)
    for (log, greedy), (our_log, our_greedy) in zip(expected, found, strict=True):
        assert our_log == pytest.approx(log, **allowed)
        assert our_greedy == greedy
    whole = [SimpleNamespace(args=(TEXT[:600],)), SimpleNamespace(args=("the cat",))]
    expected_sums = reference.loglikelihood_rolling(whole, disable_tqdm=True)
    # Sums of hundreds of tokens.
    assert adapter.loglikelihood_rolling(whole) == pytest.approx(expected_sums, rel=1e-6)


def test_generation_is_that_of_the_harness_own_model(pair: Any) -> None:
    from lm_eval.models.huggingface import HFLM

    from andromeda.evaluate.lm_eval_adapter import AndromedaLM

    theirs, words, ours, tokenizer = pair
    reference = HFLM(pretrained=theirs, tokenizer=words, batch_size=1, max_length=64, device="cpu")
    adapter = AndromedaLM(ours, tokenizer, begin=False)
    requests = [SimpleNamespace(args=("the cat sat", {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}))]
    assert adapter.generate_until(requests) == reference.generate_until(requests, disable_tqdm=True)


def test_a_local_task_runs_offline_with_equal_scores(pair: Any, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from andromeda.evaluate.lm_eval_adapter import AndromedaLM

    theirs, words, ours, tokenizer = pair
    rows = [{"q": f"the cat {i}", "c": ["sat on", "came to", "and then"], "a": i % 3} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "animals.yaml").write_text(
        f"""task: animals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}, cache_dir: {tmp_path / "cache"}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{c}}}}"
doc_to_target: a
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
    )
    models = (
        HFLM(pretrained=theirs, tokenizer=words, batch_size=1, max_length=64, device="cpu"),
        AndromedaLM(ours, tokenizer, begin=False),
    )
    scores = [
        simple_evaluate(
            model=m, tasks=["animals"], task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0
        )["results"]["animals"]
        for m in models
    ]
    for metric in ("acc,none", "acc_norm,none"):
        assert scores[0][metric] == scores[1][metric]
