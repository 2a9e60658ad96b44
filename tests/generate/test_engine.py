"""The cached, batched, chunked engine against plain forward passes over whole sequences, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from andromeda.config.data import BuildConfig
from andromeda.config.model import (
    AlibiConfig,
    AttentionConfig,
    BlockConfig,
    EmbeddingConfig,
    ExpertsConfig,
    FeedForwardConfig,
    HeadConfig,
    ModelConfig,
    RopeScalingConfig,
    RotaryConfig,
    SkipsConfig,
    TokenShiftConfig,
    ValueEmbeddingConfig,
)
from andromeda.data.tokenizer import train_tokenizer
from andromeda.generate import batch, decode_step, sampling
from andromeda.generate.engine import Engine
from andromeda.generate.sequence import Completion
from andromeda.model.transformer import Transformer
from andromeda.utils.errors import CheckpointError, RequestError

ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16)
VARIANTS: dict[str, dict[str, Any]] = {
    "rope": {"rotary": RotaryConfig(kind="rope")},
    "xpos": {},
    "alibi": {"alibi": AlibiConfig(num_heads=2)},
    "alibi folded": {"alibi": AlibiConfig(num_heads=2, fold_into_qk=True), "shift": TokenShiftConfig(kind="lerp")},
    "no positions, shift": {"rotary": RotaryConfig(kind="none"), "shift": TokenShiftConfig(kind="chunks", tokens=2)},
    "smear": {"shift": TokenShiftConfig(kind="smear")},
    "absolute": {"embedding": EmbeddingConfig(absolute=True), "rotary": RotaryConfig(kind="none")},
    "window": {"attention": ATTENTION.model_copy(update={"sliding_window": 7, "full_attention_interval": 2})},
    "dynamic": {"max_seq_len": 96, "rotary": RotaryConfig(kind="rope", scaling=RopeScalingConfig(kind="dynamic", factor=4.0))},
    "yarn": {"rotary": RotaryConfig(kind="xpos", scaling=RopeScalingConfig(kind="yarn", factor=4.0))},
    "parallel deepnorm": {
        "block": BlockConfig(kind="parallel", residual="deepnorm"),
        "attention": ATTENTION.model_copy(update={"num_kv_heads": 1}),
    },
    "speedrun": {
        "value_embedding": ValueEmbeddingConfig(kind="layered"),
        "skips": SkipsConfig(first=True, unet=True),
        "attention": ATTENTION.model_copy(update={"qk_norm": "rms", "softcap": 5.0}),
        "head": HeadConfig(softcap=15.0),
    },
    "experts": {
        "feedforward": FeedForwardConfig(kind="moe", mlp_ratio=1.0),
        "experts": ExpertsConfig(num_experts=4, top_k=2, num_shared_experts=1),
    },
    "everything": {
        "alibi": AlibiConfig(num_heads=2),
        "shift": TokenShiftConfig(kind="chunks"),
        "attention": ATTENTION.model_copy(update={"qk_norm": "l2_dim_scale", "sliding_window": 9, "num_kv_heads": 1}),
        "block": BlockConfig(kind="parallel"),
    },
}


def build(**parts: Any) -> Transformer:
    """A small model in float64 whose every parameter matters: nothing is left at zero or one."""
    config = ModelConfig(**({"vocab_size": 61, "max_seq_len": 128, "hidden_size": 32, "num_layers": 3, "attention": ATTENTION} | parts))
    model = Transformer(config).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 61, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def greedy(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """The likeliest next token of the whole sequence, without a cache, again and again."""
    ids = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([ids]), span=len(prompt) + count)[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.fixture(params=["plain", "fixed"])
def _steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both decoding paths: with a growing cache, and with the static cache of CUDA graphs, which is reallocated every few tokens."""
    if request.param == "fixed":
        monkeypatch.setattr(batch, "supports_cuda_graph", lambda config, device: True)
        monkeypatch.setattr(batch, "CudaGraphDecodeStep", decode_step.StaticDecodeStep)
        monkeypatch.setattr(decode_step, "MIN_FREE_SLOTS", 3)


@pytest.mark.usefixtures("_steps")
@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_text_is_the_argmax_of_full_passes(name: str) -> None:
    model, asked = build(**VARIANTS[name]), prompts(1, 23, 9, 40)
    answers = Engine(model, chunk=8).generate(asked, temperature=0, max_new_tokens=20)
    for prompt, answer in zip(asked, answers, strict=True):
        assert list(answer.ids) == greedy(model, prompt, 20)
        assert answer.finish == "length"


@pytest.mark.usefixtures("_steps")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_prompt_gets_in_a_batch_what_it_gets_alone(name: str) -> None:
    """Sequences of one batch end at different times, by the separator or the context; those that stay must not notice."""
    model, asked = build(**VARIANTS[name] | {"max_seq_len": 48}), prompts(5, 31, 31, 2, 12)
    engine = Engine(model, eos=3, batch=4, chunk=1000)
    wishes = {"temperature": 1.5, "top_k": 0, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 5}
    together = engine.generate(asked, **wishes)
    alone = [engine.generate([prompt], **wishes)[0] for prompt in asked]
    assert [a.ids for a in together] == [a.ids for a in alone]
    assert [a.finish for a in together] == [a.finish for a in alone]
    assert [a.index for a in together] == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("_steps")
def test_sequences_that_ended_leave_the_batch() -> None:
    """A short prompt with room for more tokens continues after a long one has filled the context of learned positions."""
    model = build(max_seq_len=48, embedding=EmbeddingConfig(absolute=True))
    long, short = Engine(model).generate(prompts(40, 4), temperature=0)
    assert (len(long.ids), len(short.ids)) == (8, 44)
    assert list(short.ids) == greedy(model, prompts(40, 4)[1], 44)


def test_only_the_last_position_of_a_prompt_reaches_the_head() -> None:
    model, rows = build(), []
    model.head.register_forward_hook(lambda module, args, output: rows.append(output.numel() // output.shape[-1]))
    Engine(model, chunk=16).generate(prompts(50, 20), temperature=0, max_new_tokens=2)
    assert max(rows) <= 2


def test_cache_bytes_are_those_of_keys_and_values() -> None:
    model = build()
    for rows in (1, 3):
        answers = Engine(model).generate(prompts(*[20] * rows), temperature=0, max_new_tokens=12)
        expected = 3 * (20 + 12) * 2 * (16 + 16) * 8  # layers x tokens x heads x (key + value) x float64
        assert [answer.cache_bytes for answer in answers] == rows * [expected]


def test_the_model_is_left_in_its_mode() -> None:
    model = build().train()
    engine = Engine(model)
    pieces = engine.stream(prompts(3), max_new_tokens=4)
    next(pieces)
    assert not model.training
    pieces.close()  # type: ignore[attr-defined]
    assert model.training
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


class Script(nn.Module):
    """A head that says given tokens one after the other, whatever the model has read."""

    def __init__(self, ids: list[int], vocab: int) -> None:
        super().__init__()
        self.weight, self.vocab, self.ids = nn.Parameter(torch.zeros(1)), vocab, iter(ids)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 50.0 * nn.functional.one_hot(torch.tensor([next(self.ids)] * hidden.shape[0]), self.vocab).float()


TEXT = "Grüße, 世界 👋🏽! end\n\nof it"
BYTES = train_tokenizer([], BuildConfig(tokenizer="bytes"))


def writer(ids: list[int], **parts: Any) -> Engine:
    model = build(vocab_size=300, max_seq_len=200, **parts)
    model.head = Script(ids, 300)
    return Engine(model, BYTES)


def pieces(engine: Engine, **wishes: Any) -> tuple[list[str], Completion]:
    found = list(engine.stream(["x"], **wishes))
    assert found[-1].completion
    assert not any(piece.completion for piece in found[:-1])
    return [piece.text for piece in found], found[-1].completion


def test_a_stream_shows_whole_characters_and_loses_none() -> None:
    ids = BYTES.encode(TEXT)
    texts, answer = pieces(writer([*ids, BYTES.eos]))
    assert "".join(texts) == answer.text == TEXT
    assert "\ufffd" not in "".join(texts)
    assert len([text for text in texts if text]) == len(TEXT)
    assert (answer.finish, answer.ids, answer.prompt_tokens) == ("eos", tuple(ids), 2)


def test_a_character_cut_by_the_limit_is_marked() -> None:
    texts, answer = pieces(writer(BYTES.encode("a世")), max_new_tokens=3)
    assert "".join(texts) == answer.text == "a\ufffd"
    assert answer.finish == "length"


@pytest.mark.parametrize(("stop", "shown"), [("\n\n", "Grüße, 世界 👋🏽! end"), (["界", "!"], "Grüße, 世"), ("👋🏽", "Grüße, 世界 ")])
def test_stop_texts_end_the_answer_across_tokens_and_never_show(stop: str | list[str], shown: str) -> None:
    texts, answer = pieces(writer([*BYTES.encode(TEXT), BYTES.eos]), stop=stop)
    assert "".join(texts) == answer.text == shown
    assert answer.finish == "stop"


def test_what_only_looked_like_a_stop_text_is_shown_in_the_end() -> None:
    texts, answer = pieces(writer([*BYTES.encode(TEXT), BYTES.eos]), stop="of it!")
    assert "".join(texts) == answer.text == TEXT
    assert answer.finish == "eos"


def test_a_text_prompt_begins_with_the_separator_and_an_empty_one_is_it() -> None:
    """Documents are packed with the separator before them; a prompt must look alike."""
    engine = Engine(build(vocab_size=300), BYTES)
    wishes = {"temperature": 0, "max_new_tokens": 8}
    text, ids, empty, separator = engine.generate(["ab", [BYTES.eos, 97, 98], "", [BYTES.eos]], **wishes)
    assert text.ids == ids.ids
    assert empty.ids == separator.ids
    assert (text.prompt_tokens, empty.prompt_tokens) == (3, 1)


def test_rows_of_a_padded_vocabulary_are_never_chosen() -> None:
    model = build(vocab_size=300)
    with torch.no_grad():
        model.head.weight[BYTES.vocab_size :] = 1e3 * model.head.weight[:1].sign()
    answers = Engine(model, BYTES).generate(["a", "bc"], temperature=5.0, top_k=0, max_new_tokens=40)
    assert all(i < BYTES.vocab_size for answer in answers for i in answer.ids)


def test_no_seed_draws_one_that_gives_the_same_text_again() -> None:
    engine, wishes = Engine(build()), {"temperature": 2.0, "max_new_tokens": 20}
    first, second = engine.generate([[1], [1]], **wishes)
    assert first.ids != second.ids
    assert engine.generate([[1]], seed=second.seed, **wishes)[0].ids == second.ids


@pytest.mark.parametrize(
    ("prompt", "wishes", "words"),
    [
        ([1] * 128, {}, "has 128 tokens.*context of 128.*at most 127.*shorten it by 1"),
        ([1] * 100, {"max_new_tokens": 40}, "100 tokens and 40 new ones.*context of 128.*at most 28"),
        ([1, 61], {}, "token 61.*0 to 60"),
        ([1, -1], {}, "token -1"),
        ([1.5], {}, "flat list of whole numbers"),
        ([[1, 2]], {}, "flat list of whole numbers"),
        (b"ab", {}, "flat list of whole numbers"),
        (None, {}, "flat list of whole numbers"),
        (torch.zeros(2, 2, dtype=torch.long), {}, "flat list of whole numbers"),
        (torch.zeros(2), {}, "flat list of whole numbers"),
        ("text", {}, "no tokenizer"),
        ([], {}, "An empty prompt needs"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens must be above 0"),
        ([1], {"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        ([1], {"temperature": -1}, "temperature must be at least 0"),
        ([1], {"temperature": math.nan}, "temperature must be a finite number"),
        ([1], {"temperature": math.inf}, "temperature must be a finite number"),
        ([1], {"top_k": -1}, "top_k must be at least 0"),
        ([1], {"top_p": 0}, "top_p must be above 0"),
        ([1], {"top_p": 1.5}, "top_p must be at most 1"),
        ([1], {"min_p": 1.5}, "min_p must be at most 1"),
        ([1], {"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ([1], {"seed": -1}, "seed must be at least 0"),
        ([1], {"stop": ""}, "empty text"),
        ([1], {"stop": [3]}, "stop.* must be text"),
        ([1], {"temprature": 1}, "no generation setting 'temprature'.*did you mean temperature"),
    ],
)
def test_bad_requests_get_one_sentence(prompt: Any, wishes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=f"^[^\n]*{words}[^\n]*$"):
        Engine(build()).stream([prompt], **wishes)


def test_the_prompt_at_fault_is_named() -> None:
    with pytest.raises(RequestError, match=r"^Prompt 2 of 3: The prompt has 128 tokens"):
        Engine(build()).stream([[1], [1] * 128, [2]])


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(RequestError, match="UTF-8"):
        Engine(build(vocab_size=300), BYTES).stream(["a\ud800b"])


def test_numpy_and_torch_prompts_are_ids() -> None:
    engine, wishes = Engine(build()), {"temperature": 0, "max_new_tokens": 3}
    lists, tensors, arrays = engine.generate([[1, 2], torch.tensor([1, 2]), np.array([1, 2])], **wishes)
    assert lists.ids == tensors.ids == arrays.ids


def test_damaged_weights_are_named() -> None:
    model = build()
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    with pytest.raises(CheckpointError, match="damaged"):
        Engine(model).generate([[1]])


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="257 entries, more than the model's 61"):
        Engine(build(), BYTES)


@pytest.mark.parametrize("penalty", [1.7, 0.4])
def test_penalty_of_ids_that_only_the_padded_model_has(penalty: float) -> None:
    """Greedy text after ids beyond the tokenizer's, by transformers' processor over the padded vocabulary and whole forward passes."""
    transformers = pytest.importorskip("transformers")
    tokenizer = train_tokenizer([], BuildConfig(tokenizer="bytes"))
    model = build(vocab_size=320)
    prompt = [5, 300, 319, 256, 7]
    processor, ids = transformers.RepetitionPenaltyLogitsProcessor(penalty), list(prompt)
    with torch.no_grad():
        for _ in range(12):
            scores = processor(torch.tensor([ids]), model(torch.tensor([ids]))[:, -1])
            ids.append(int(scores[0, : tokenizer.vocab_size].argmax()))
    (found,) = Engine(model, tokenizer).generate([prompt], temperature=0, repetition_penalty=penalty, max_new_tokens=12)
    expected = ids[len(prompt) :]
    assert list(found.ids) == expected[: expected.index(tokenizer.eos)] if tokenizer.eos in expected else expected


@pytest.mark.parametrize("penalty", [1e-310, 1e308])
def test_extreme_penalties_leave_a_distribution(penalty: float) -> None:
    """The largest penalized logit is that of the reference with infinities, and no probability is NaN."""
    logits = torch.tensor([[2.0, -3.0, 0.5, -0.1]], dtype=torch.float64)
    seen = torch.tensor([[True, True, False, False]])
    penalized = sampling.penalize_repetition(logits, seen, penalty)
    assert penalized.isfinite().all()
    assert int(penalized.argmax()) == (0 if penalty < 1 else 2)
    assert sampling.apply_temperature(penalized, 0.5).softmax(-1).sum() == pytest.approx(1.0)


def test_a_separator_that_the_model_does_not_have() -> None:
    with pytest.raises(RequestError, match="eos = 61, but this model knows tokens 0 to 60 only"):
        Engine(build(), eos=61)
