"""The adapter for lm-evaluation-harness against its own model of transformers' Llama, and as properties of random texts."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from andromeda.config.data import BuildConfig
from andromeda.config.model import AttentionConfig, BlockConfig, FeedForwardConfig, HeadConfig, ModelConfig, RotaryConfig
from andromeda.data.tokenizer import Tokenizer, train_tokenizer
from andromeda.evaluate.bits_per_byte import text_nats
from andromeda.evaluate.evaluator import EVALUATIONS
from andromeda.evaluate.loaded_model import load_model
from andromeda.evaluate.token_loss import continuation_likelihoods
from andromeda.generate.engine import Engine
from andromeda.model.transformer import Transformer
from andromeda.utils.errors import RequestError
from tests.oracles.test_llama import translated

TEXT = "the cat sat on the mat, and the bird came to see it. " * 20


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
    whole = [SimpleNamespace(args=(TEXT[:600],)), SimpleNamespace(args=("the cat",))]
    # A tokenizer file of ours adds no separator by itself, so that the reference reads the one that rolling windows begin with.
    expected_sums = reference.loglikelihood_rolling(whole, disable_tqdm=True)
    if begin:
        reference.tok_encode = adapter.tok_encode  # type: ignore[method-assign]
    requests = [SimpleNamespace(args=one) for one in TEXTS]
    expected, found = reference.loglikelihood(requests, disable_tqdm=True), adapter.loglikelihood(requests, disable_tqdm=True)
    for (log, greedy), (our_log, our_greedy) in zip(expected, found, strict=True):
        assert our_log == pytest.approx(log, **allowed)
        assert our_greedy == greedy
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


def test_500_random_pairs_have_the_log_likelihoods_of_the_harness_own_model(pair: Any) -> None:
    """Whole words, whose border no token spans, so that the harness's own split spells the continuation."""
    from lm_eval.models.huggingface import HFLM

    from andromeda.evaluate.lm_eval_adapter import AndromedaLM

    theirs, words, ours, tokenizer = pair
    reference = HFLM(pretrained=copy.deepcopy(theirs).double(), tokenizer=words, batch_size=16, max_length=64, device="cpu")
    adapter = AndromedaLM(copy.deepcopy(ours).double(), tokenizer, begin=False)
    draw, vocabulary = random.Random(0), [*TEXT.split()[:12], "naïve", "日本", "😀", "12345", "(a, b):", "x_1"]
    texts = []
    while len(texts) < 500:
        context, continuation = (" ".join(draw.choices(vocabulary, k=draw.randint(1, n))) for n in (20, 5))
        texts.append((context, f" {continuation}"))
    requests = [SimpleNamespace(args=one) for one in texts]
    expected, found = reference.loglikelihood(requests, disable_tqdm=True), adapter.loglikelihood(requests)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], rel=0, abs=1e-5)
    assert [one[1] for one in found] == [one[1] for one in expected]
    assert any(len(words.encode(a + b)) > 64 for a, b in texts)  # some lose the beginning of their context, as with the reference


def adapter_of_bytes(context: int = 24, **options: Any) -> Any:
    from andromeda.evaluate.lm_eval_adapter import AndromedaLM

    config = ModelConfig(
        vocab_size=257,
        max_seq_len=context,
        hidden_size=16,
        num_layers=1,
        rotary=RotaryConfig(kind="rope"),
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
    )
    return AndromedaLM(Transformer(config, seed=3).double().eval(), train_tokenizer([], BuildConfig(tokenizer="bytes")), **options)


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(deadline=None, max_examples=300)
@given(context=ANY_TEXT, continuation=ANY_TEXT.filter(bool), begin=st.booleans())
def test_a_pair_is_spelled_whole_behind_one_separator(pair: Any, context: str, continuation: str, begin: bool) -> None:
    from andromeda.evaluate.lm_eval_adapter import AndromedaLM

    _, _, ours, tokenizer = pair
    adapter = AndromedaLM(ours, tokenizer, begin=begin)
    before, after = adapter._encode_pair(context, continuation)
    assert before
    assert after
    assert tokenizer.decode_bytes(before + after) == (context + continuation).encode()
    # What is scored is the continuation, with the spaces before it.
    assert tokenizer.decode_bytes(after) == (context[len(context.rstrip()) :] + continuation).encode()
    assert (before + after).count(tokenizer.eos) == int(begin or not context.rstrip())


@settings(deadline=None, max_examples=300)
@given(context=st.integers(1, 60), continuation=st.integers(1, 60), length=st.integers(2, 24))
def test_every_token_of_a_continuation_is_scored_once(context: int, continuation: int, length: int) -> None:
    adapter = adapter_of_bytes(length)
    before, after = [256, *range(context - 1)], list(range(100, 100 + continuation))
    pairs = adapter._fit(before, after)
    assert [token for _, scored in pairs for token in scored] == after
    assert all(seen and len(seen) + len(scored) <= length + 1 for seen, scored in pairs)
    if len(before) + len(after) <= length + 1:
        assert pairs == [(before, after)]
    rolling = adapter._windows(after, 256)
    assert [token for _, scored in rolling for token in scored] == after
    assert rolling[0][0] == [256]
    assert all(256 not in [*seen, *scored] for seen, scored in rolling[1:])


def test_a_continuation_longer_than_the_context_is_the_sum_of_its_windows() -> None:
    adapter = adapter_of_bytes(8)
    (found, _), *_ = adapter.loglikelihood([SimpleNamespace(args=("ab", "c" * 30))])
    assert found == pytest.approx(
        sum(one.log for one in continuation_likelihoods(adapter.model, adapter._windows([99] * 30, 98))), rel=1e-12
    )


def test_a_token_that_spans_context_and_continuation_leaves_no_choice_unscored(tmp_path: Path) -> None:
    """The joint text of ("imp", "ort") is one token; the harness's split would score nothing as certain."""
    from andromeda.evaluate.lm_eval_adapter import AndromedaLM

    tokenizer = train_tokenizer(["import\nimpact\nimport\n" * 50], BuildConfig(vocab_size=263))
    assert len(tokenizer.encode("import")) < len(tokenizer.encode("imp")) + len(tokenizer.encode("ort"))
    config = ModelConfig(vocab_size=tokenizer.vocab_size, max_seq_len=32, hidden_size=16, num_layers=1)
    adapter = AndromedaLM(Transformer(config, seed=0).double().eval(), tokenizer)
    found = adapter.loglikelihood([SimpleNamespace(args=("imp", choice)) for choice in ("ort", "act")])
    pairs = [([tokenizer.eos, *tokenizer.encode("imp")], tokenizer.encode(choice)) for choice in ("ort", "act")]
    assert [log for log, _ in found] == pytest.approx([one.log for one in continuation_likelihoods(adapter.model, pairs)], rel=1e-12)
    with pytest.raises(RequestError, match="empty continuation"):
        adapter.loglikelihood([SimpleNamespace(args=("imp", ""))])


@settings(deadline=None, max_examples=25)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda text: len(text.encode()) <= 24))
def test_the_likelihood_of_a_text_is_that_of_its_bits(text: str) -> None:
    """One separator before it, each token once: the sum that `eval bits` gives."""
    adapter = adapter_of_bytes()
    tokens = torch.tensor([256, *text.encode()])
    nats = text_nats(adapter.model, tokens[:-1], tokens[1:], context=24, stride=24)
    assert adapter.loglikelihood_rolling([SimpleNamespace(args=(text,))])[0] == pytest.approx(-nats, rel=1e-12)


@pytest.mark.parametrize("asked", [5, 9, 23, 24, 500])
def test_a_prompt_stays_whole_whatever_is_to_be_generated(asked: int) -> None:
    adapter = adapter_of_bytes()
    request = SimpleNamespace(args=("a prompt of 19 byte", {"until": [], "max_gen_toks": asked}))
    (prompt,) = (adapter.tok_encode(request.args[0]),)
    assert len(prompt) == 20
    whole = Engine(adapter.model, adapter._tokenizer).generate([prompt], max_new_tokens=4, temperature=0.0)[0].text
    assert adapter.generate_until([request]) == [whole]


def test_what_does_not_fit_is_told(caplog: pytest.LogCaptureFixture) -> None:
    requests = [SimpleNamespace(args=(text, {"until": [], "max_gen_toks": 4})) for text in ("short", "x" * 40)]
    assert len(adapter_of_bytes().generate_until(requests)) == 2
    adapter_of_bytes().loglikelihood([SimpleNamespace(args=("x" * 40, "y"))])
    assert [message.split(" are")[0] for message in caplog.messages] == ["1 of 2 requests", "1 of 1 requests"]
    with pytest.raises(RequestError, match="has 42 tokens, more than this model's context of 24"):
        adapter_of_bytes(truncate=False).loglikelihood([SimpleNamespace(args=("x" * 40, "y"))])


@pytest.mark.parametrize("shots", [0, 2])
def test_multiple_choice_is_the_choice_of_our_own_likelihoods(place: Path, shots: int) -> None:
    """Examples are the first questions, a choice follows `Answer:` after a space."""
    draw = random.Random(1)
    rows = [
        {
            "question": f"{draw.random():.3f}?",
            "choices": [draw.choice(["so", "no ü", "perhaps it"]) + str(i) for i in range(3)],
            "answer": n % 3,
        }
        for n in range(20)
    ]
    Path("many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_model(Path("run"), device="cpu", dtype="fp64")
    evaluation = EVALUATIONS["fewshot"]
    found = evaluation.measure(loaded, evaluation.read({"file": "many.jsonl", "shots": shots, "samples": None}), lambda *_: None).result
    words, plain, normalized = loaded.tokenizer("the test"), 0, 0
    head = "".join(f"Question: {row['question']}\nAnswer: {row['choices'][row['answer']]}\n\n" for row in rows[:shots])
    for row in rows[shots:]:
        before = [words.eos, *words.encode(f"{head}Question: {row['question']}\nAnswer:")]
        logs = [one.log for one in continuation_likelihoods(loaded.model, [(before, words.encode(f" {c}")) for c in row["choices"]])]
        per_byte = [log / len(choice.encode()) for log, choice in zip(logs, row["choices"], strict=True)]
        plain += logs.index(max(logs)) == row["answer"]
        normalized += per_byte.index(max(per_byte)) == row["answer"]
    count = len(rows) - shots
    assert found == {
        "accuracy": plain / count,
        "normalized": normalized / count,
        "chance": pytest.approx(1 / 3),
        "questions": count,
        "shots": shots,
    }


def test_word_problems_are_asked_and_graded_as_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompts are the examples and the question, whole; the answers are graded by their final number."""
    prompts: list[str] = []

    def answer(self: Engine, asked: list[list[int]], **options: Any) -> Any:
        assert (options["max_new_tokens"], options["temperature"], options["stop"]) == (256 - len(asked[0]), 0.0, ("\n\nQuestion:",))
        for index, ids in enumerate(asked):
            prompts.append(Tokenizer.load("run").decode(ids))
            yield SimpleNamespace(completion=SimpleNamespace(index=index, text=(" #### 3", " 4", " #### 9")[len(prompts) - 1]))

    monkeypatch.setattr(Engine, "stream", answer)
    evaluation = EVALUATIONS["gsm8k"]
    settings = evaluation.read({"file": "solved.jsonl", "shots": 2, "samples": 3})
    found = evaluation.measure(load_model(Path("run"), device="cpu"), settings, lambda *_: None).result
    assert found == {"exact_match": 1 / 3, "answered": 2 / 3, "questions": 3, "shots": 2}
    head = "".join(f"Question: {i} + 1?\nAnswer: #### {i + 1}\n\n" for i in (0, 1))
    assert prompts == [f"{head}Question: {i} + 1?\nAnswer:" for i in (2, 3, 4)]


def test_without_the_harness_a_sentence_says_how_to_install_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.command import call

    monkeypatch.setattr("andromeda.evaluate.tasks.lm_eval_tasks.find_spec", lambda name: None)
    for task, file in (("fewshot", "choices.jsonl"), ("gsm8k", "solved.jsonl")):
        assert call("eval", "run", task, "--questions", file, "--num-fewshot", "1") == 2
        assert "needs lm-eval: run `pip install 'andromeda[harness]'`" in capsys.readouterr().err
