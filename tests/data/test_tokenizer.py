"""Tokenizers against the libraries that made them, and the promise that no character is ever lost."""

from __future__ import annotations

import io
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from andromeda.config.data import BuildConfig
from andromeda.data.encoders import bpe, tiktoken_bpe
from andromeda.data.encoders.bpe import MAX_TRAINING_WORD
from andromeda.data.encoders.split_patterns import EXPRESSIONS
from andromeda.data.encoders.unigram import MAX_TRAINING_SENTENCE, SPACE
from andromeda.data.tokenizer import META, ROUND_TRIP_TEXT, Tokenizer, train_tokenizer
from andromeda.utils.errors import AndromedaError, ConfigError, DataError
from tests.data.conftest import texts

KINDS = ["bpe", "unigram", "bytes"]
CONFIGS = {
    "bpe": BuildConfig(tokenizer="bpe", vocab_size=320, special_tokens=("<|user|>",)),
    "unigram": BuildConfig(tokenizer="unigram", vocab_size=320, special_tokens=("<|user|>",)),
    "bytes": BuildConfig(tokenizer="bytes", special_tokens=("<|user|>",)),
}
AWKWARD = [
    "\r\n",
    "\0",
    "😀",
    "  lead",
    "<|endoftext|>",
    "<|user|>",
    "<unk>",
    "<0x41>",
    SPACE,
    "▅",
    "e\u0301",
    "\ufeff",
    "\u2028",
    "\x85",
    "Ġ",
    "\n\n\t  x",
]
any_text = st.lists(st.one_of(st.text(), st.sampled_from(AWKWARD))).map("".join)


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    return {kind: train_tokenizer(texts(200), config) for kind, config in CONFIGS.items()}


@pytest.mark.parametrize("kind", KINDS)
@given(text=any_text)
@settings(max_examples=200, deadline=None)
def test_round_trip_keeps_every_character(trained: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = trained[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.byte_lengths()[ids].sum()) == len(text.encode())
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert not set(ids) & set(tokenizer.special_tokens.values())


@pytest.mark.parametrize("kind", KINDS)
@given(text=any_text)
@settings(max_examples=100, deadline=None)
def test_stream_gives_the_text_in_whole_characters(trained: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = trained[kind]
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    assert stream.finish() == ""
    assert "".join(pieces) == text
    assert text.count("\ufffd") == "".join(pieces).count("\ufffd")


@given(ids=st.lists(st.integers(0, 257)))
@settings(max_examples=200, deadline=None)
def test_stream_of_broken_utf8_equals_pythons_decoder(trained: dict[str, Tokenizer], ids: list[int]) -> None:
    tokenizer = trained["bytes"]
    stream = tokenizer.stream()
    text = "".join(stream.push(i) for i in ids) + stream.finish()
    assert text == tokenizer.decode(ids) == bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def test_bpe_agrees_with_its_library(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    trained["bpe"].save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in texts(50, seed=3):
        ids = trained["bpe"].encode(text)
        assert ids == library.encode(text).ids
        assert trained["bpe"].decode(ids) == library.decode(ids)


@pytest.mark.parametrize(("kind", "longest"), [("bpe", MAX_TRAINING_WORD), ("unigram", MAX_TRAINING_SENTENCE)])
def test_an_unbroken_run_is_learned_from_like_its_pieces(kind: Literal["bpe", "unigram"], longest: int) -> None:
    config = BuildConfig(tokenizer=kind, vocab_size=268)
    run = "gattaca" * 100_000
    pieces = [run[i : i + longest] for i in range(0, len(run), longest)]
    whole, cut = (train_tokenizer(given, config) for given in ([run], pieces))
    assert whole.fingerprint == cut.fingerprint


def test_unigram_agrees_with_its_library(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    trained["unigram"].save(tmp_path)
    library = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    for text in texts(50, seed=3):
        ids = trained["unigram"].encode(text)
        assert ids == library.encode(text)
        assert trained["unigram"].decode(ids) == library.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same(trained: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    trained[kind].save(tmp_path / "t")
    loaded = Tokenizer.load(tmp_path / "t")
    assert loaded.fingerprint == trained[kind].fingerprint
    assert (loaded.eos, loaded.vocab_size, loaded.special_tokens) == (
        trained[kind].eos,
        trained[kind].vocab_size,
        trained[kind].special_tokens,
    )
    assert loaded.encode(ROUND_TRIP_TEXT) == trained[kind].encode(ROUND_TRIP_TEXT)
    assert loaded.byte_lengths().tolist() == trained[kind].byte_lengths().tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_exist_and_stand_for_nothing(trained: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = trained[kind]
    assert tokenizer.special_tokens["<|endoftext|>"] == tokenizer.eos
    assert tokenizer.decode([tokenizer.eos, tokenizer.special_tokens["<|user|>"]]) == ""
    assert tokenizer.byte_lengths()[[tokenizer.eos, tokenizer.special_tokens["<|user|>"]]].tolist() == [0, 0]


@pytest.mark.parametrize(("digits", "size"), [(1, 257), (2, 290), (3, 275)])
def test_no_token_holds_more_digits_than_allowed(digits: int, size: int) -> None:
    years = [" ".join(str(n) for n in range(1900 + i, 2100, 3)) for i in range(20)]
    tokenizer = train_tokenizer(years, BuildConfig(vocab_size=size, max_digits=digits))
    spelled = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    longest = max(len(run) for word in spelled for run in re.findall(r"\d+", word))
    assert longest == digits


def test_a_line_end_and_its_indentation_are_one_token() -> None:
    sources = [f"def f{i}(x):\n        return x\n" for i in range(300)]
    tokenizer = train_tokenizer(sources, BuildConfig(vocab_size=290))
    assert [tokenizer.decode([i]) for i in tokenizer.encode("(x):\n        return")] == ["(x", "):\n        ", "return"]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_twice_gives_the_same_tokenizer(kind: str) -> None:
    a, b = (train_tokenizer(texts(100), CONFIGS[kind]) for _ in range(2))
    assert a.fingerprint == b.fingerprint


def test_bpe_does_not_depend_on_the_order_of_texts() -> None:
    assert train_tokenizer(texts(100), CONFIGS["bpe"]).fingerprint == train_tokenizer(texts(100)[::-1], CONFIGS["bpe"]).fingerprint


@pytest.mark.parametrize(
    ("settings_", "sentence"),
    [
        ({"vocab_size": 100}, "at least 257"),
        ({"vocab_size": 100_000}, r"allows a bpe vocabulary of only \d+"),
        ({"tokenizer": "unigram", "vocab_size": 100}, "too small"),
        ({"tokenizer": "unigram", "vocab_size": 100_000}, r"at most \d+, not 100000"),
        ({"tokenizer": "bytes", "vocab_size": 100}, "has 257 entries, not 100"),
        ({"special_tokens": ("<|endoftext|>",)}, "must differ"),
    ],
)
def test_impossible_settings_are_refused(settings_: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        train_tokenizer(texts(20), BuildConfig(**settings_))


def test_the_refusals_limit_is_right() -> None:
    """Training at the size that the refusal names works."""
    for kind in ("bpe", "unigram"):
        with pytest.raises(ConfigError) as refusal:
            train_tokenizer(texts(20), BuildConfig(tokenizer=kind, vocab_size=100_000))
        size = int(re.search(r"(?:only|most) (\d+)", str(refusal.value))[1])
        assert train_tokenizer(texts(20), BuildConfig(tokenizer=kind, vocab_size=size)).vocab_size == size


def test_half_a_surrogate_pair_is_refused(trained: dict[str, Tokenizer]) -> None:
    for tokenizer in trained.values():
        with pytest.raises(DataError, match="character 1 is half"):
            tokenizer.encode("a\ud800")


def test_ids_outside_of_the_vocabulary_are_refused(trained: dict[str, Tokenizer]) -> None:
    for bad in (-1, trained["bpe"].vocab_size):
        with pytest.raises(DataError, match="outside of the vocabulary"):
            trained["bpe"].decode([bad])


def gpt2_like(path: Path, **parts: object) -> Path:
    """A byte-level BPE as other projects make them: without special tokens, cut by the library's own expression."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, part in parts.items():
        setattr(model, name, part)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(texts(50), trainer)
    model.save(str(path))
    return path


def test_another_projects_bpe_is_read_and_its_separator_appended(tmp_path: Path) -> None:
    path = gpt2_like(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.eos, tokenizer.vocab_size) == (300, 301)
    assert tokenizer.encode(ROUND_TRIP_TEXT) == tokenizers.Tokenizer.from_file(str(path)).encode(ROUND_TRIP_TEXT).ids
    assert Tokenizer.load(path, eos=5).eos == 5


def test_another_projects_sentencepiece_is_read_when_lossless(tmp_path: Path) -> None:
    """The usual settings (NFKC, dummy prefix) change text and are refused."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts(50)), model_writer=model, vocab_size=300, byte_fallback=True, minloglevel=2
    )
    (tmp_path / "usual.model").write_bytes(model.getvalue())
    with pytest.raises(DataError, match="changes text"):
        Tokenizer.load(tmp_path / "usual.model")
    train_tokenizer(texts(50), CONFIGS["unigram"]).save(tmp_path)
    (tmp_path / META).unlink()
    assert (
        Tokenizer.load(tmp_path / "tokenizer.model").decode(Tokenizer.load(tmp_path / "tokenizer.model").encode(ROUND_TRIP_TEXT))
        == ROUND_TRIP_TEXT
    )


def damage_meta(folder: Path) -> None:
    (folder / META).write_text("{")


def damage_model(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def swap_separator(folder: Path) -> None:
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps({**meta, "eos": 7}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [(damage_meta, "cannot be read"), (damage_model, "cannot be read"), (swap_separator, "does not match its sha256")],
)
def test_a_damaged_folder_is_refused(trained: dict[str, Tokenizer], tmp_path: Path, damage, sentence: str) -> None:
    trained["bpe"].save(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=sentence):
        Tokenizer.load(tmp_path)


def test_files_that_are_no_lossless_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no tokenizer"):
        Tokenizer.load(tmp_path / "missing")
    gpt2_like(tmp_path / "nfc.json", normalizer=tokenizers.normalizers.NFC())
    (tmp_path / "words.json").write_text(tokenizers.Tokenizer(tokenizers.models.WordLevel({"日": 0}, unk_token="日")).to_str())
    (tmp_path / "notes.yaml").write_text("a: 1")
    (tmp_path / "broken.model").write_bytes(b"junk")
    for name, sentence in {
        "nfc.json": "changes text",
        "words.json": "not byte-level",
        "notes.yaml": "no tokenizer file",
        "broken.model": "cannot be",
    }.items():
        with pytest.raises(AndromedaError, match=sentence):
            Tokenizer.load(tmp_path / name)


def by_library(tokenizer: Tokenizer, texts_: list[str]) -> list[list[int]]:
    """What the saved tokenizer.json gives by its own library."""
    library = tokenizers.Tokenizer.from_str(tokenizer._encoder.model_file.decode())
    library.encode_special_tokens = True
    return [found.ids for found in library.encode_batch(texts_, add_special_tokens=False)]


@cache
def bpe_of(pattern_: str, vocab_size: int) -> Tokenizer:
    """A BPE of the test's words, whose text is cut by the pattern; "" for our own, "gpt2" for the library's byte-level cut."""
    ours = train_tokenizer(texts(300), BuildConfig(vocab_size=vocab_size, max_digits=3))
    if not pattern_:
        return ours
    model = json.loads(ours._encoder.model_file)
    if pattern_ == "gpt2":
        model["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    else:
        model["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern_
    return Tokenizer(bpe.load(json.dumps(model).encode()))


PATTERNS = ["", "gpt2", *EXPRESSIONS]
AWKWARD_CHARACTERS = " \t\r\n'.0123sStTlLabé日😀K\u017f\ufb01\u0301\u0345\u200d\x85\u2028"
ANY_TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(AWKWARD_CHARACTERS)))


@cache
def fast_bpe(pattern_: str, vocab_size: int) -> tiktoken_bpe.TiktokenBPE:
    encoder = bpe_of(pattern_, vocab_size)._encoder
    fast = tiktoken_bpe.convert(encoder.model_file, encoder.token_bytes, bpe.OWN_PATTERN)
    assert fast is not None
    return fast


@settings(deadline=None, max_examples=400)
@given(text=ANY_TEXT, pattern_=st.sampled_from(PATTERNS), vocab_size=st.sampled_from([257, 280, 340]))
def test_tiktoken_gives_the_ids_of_the_saved_tokenizer(text: str, pattern_: str, vocab_size: int) -> None:
    assert fast_bpe(pattern_, vocab_size).encode(text) == by_library(bpe_of(pattern_, vocab_size), [text])[0]


@pytest.mark.parametrize("pattern_", PATTERNS)
def test_characters_of_all_unicode_have_the_ids_of_the_saved_tokenizer(pattern_: str) -> None:
    tokenizer = bpe_of(pattern_, 340)
    # All of the first two planes, whose scripts are many; of the others, which hold few kinds of characters, a part.
    every = [chr(c) for c in (*range(0x20000), *range(0x20000, 0x110000, 97)) if not 0xD800 <= c < 0xE000]
    found = tokenizer.encode_batch([f"a{c}1 {c}\n{c}s'{c}t" for c in every])
    assert tokenizer._encoder._tiktoken is not None
    assert found == by_library(tokenizer, [f"a{c}1 {c}\n{c}s'{c}t" for c in every])


def test_runs_that_the_fast_encoder_cannot_take_have_equal_ids() -> None:
    tokenizer = bpe_of("", 340)
    long = [" " * 300_000 + "a", "\n" * 150_000, "x" * 250_000, "ab" * 50_000, "word " * 10_000]
    assert tokenizer.encode_batch(long) == by_library(tokenizer, long)
    assert [tokenizer._encoder._tiktoken.accepts(text) for text in long] == [False, False, False, True, True]


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"added": {"id": 340, "content": "zzz", "special": False}},
        {"swap": True},
        {"pattern": r"\w+|\W"},
    ],
)
def test_what_is_not_surely_equal_is_encoded_by_its_own_library(change: dict[str, Any]) -> None:
    model = json.loads(bpe_of("", 340)._encoder.model_file)
    if "added" in change:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        model["added_tokens"].append(flags | change["added"])
    elif "swap" in change:  # the order of two merges, against that of their ids
        merges = model["model"]["merges"]
        merges[-1], merges[-2] = merges[-2], merges[-1]
    elif "pattern" in change:
        model["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = change["pattern"]
    else:
        model |= change
    tokenizer = Tokenizer(bpe.load(json.dumps(model).encode()))
    long = texts(3000)
    assert tokenizer.encode_batch(long) == by_library(tokenizer, long)
    assert tokenizer._encoder._tiktoken is None


def test_a_merge_that_only_another_order_makes_is_not_converted() -> None:
    """`abc` merged from a and bc, where ab is merged first: tiktoken would merge ab and c to it, tokenizers does not."""
    model = json.loads(bpe_of("", 257)._encoder.model_file)
    size = len(model["model"]["vocab"])
    model["model"]["vocab"] |= {"ab": size, "bc": size + 1, "abc": size + 2}
    model["model"]["merges"] = [["a", "b"], ["b", "c"], ["a", "bc"]]
    encoder = bpe.load(json.dumps(model).encode())
    assert tiktoken_bpe.convert(encoder.model_file, encoder.token_bytes, bpe.OWN_PATTERN) is None
    assert [len(ids) for ids in encoder.encode_batch(["abc" * 30_000])] == [60_000]


def test_both_engines_know_the_same_characters() -> None:
    """With the libraries that are installed; elsewhere only text in ASCII is encoded by tiktoken."""
    assert tiktoken_bpe.same_unicode_tables()
