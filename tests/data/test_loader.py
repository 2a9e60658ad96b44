"""The stream as a pure function of (configuration, seed, row), on corpora built for the purpose."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from andromeda.config.data import BuildConfig, DataConfig, SourceConfig
from andromeda.data.build import build
from andromeda.data.corpus import CorpusManifest
from andromeda.data.loader import Batch, TokenStream, open_stream
from andromeda.data.shards import write_shard
from andromeda.data.tokenizer import Tokenizer
from andromeda.utils.errors import AndromedaError, ConfigError, DataError
from tests.data.conftest import texts, write_files

PACKINGS = ["stream", "documents"]


def same(a: Batch, b: Batch) -> bool:
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids", "targets", "documents"))
    return tensors and (a.tokens, a.bytes) == (b.tokens, b.bytes)


def joined(stream: TokenStream, start: int, counts: list[int]) -> Batch:
    parts = []
    for count in counts:
        parts.append(stream.batch(start, count))
        start += count
    columns = [torch.cat([getattr(p, name) for p in parts]) for name in ("ids", "targets", "documents")]
    return Batch(*columns, tokens=sum(p.tokens for p in parts), bytes=sum(p.bytes for p in parts))


@pytest.fixture(scope="module")
def mixture(corpus: Path, second_corpus: Path) -> DataConfig:
    return DataConfig(sources=(SourceConfig(path=str(corpus), weight=3.0), SourceConfig(path=str(second_corpus))))


def test_shapes_types_and_the_shift(corpus: Path) -> None:
    batch = open_stream(DataConfig(corpus=str(corpus), shuffle=False), 32, 0).batch(0, 4)
    assert batch.ids.shape == batch.targets.shape == batch.documents.shape == (4, 32)
    assert (batch.ids.dtype, batch.targets.dtype, batch.documents.dtype) == (torch.int64, torch.int64, torch.int32)
    assert torch.equal(batch.ids.flatten()[1:], batch.targets.flatten()[:-1])  # rows follow each other in the text
    assert batch.tokens == 4 * 32


@pytest.mark.parametrize("packing", PACKINGS)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=5), start=st.integers(0, 200))
@settings(max_examples=25, deadline=None)
def test_any_split_into_batches_gives_the_same_rows(mixture: DataConfig, packing: str, counts: list[int], start: int) -> None:
    stream = open_stream(mixture.model_copy(update={"packing": packing}), 24, 5)
    again = open_stream(mixture.model_copy(update={"packing": packing}), 24, 5)
    assert same(stream.batch(start, sum(counts)), joined(again, start, counts))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("workers", [1, 3])
def test_reading_ahead_changes_nothing(mixture: DataConfig, packing: str, workers: int) -> None:
    config = mixture.model_copy(update={"packing": packing})
    plain, ahead = open_stream(config, 24, 5), open_stream(config.model_copy(update={"workers": workers}), 24, 5)
    assert plain.fingerprint == ahead.fingerprint
    for start in [0, 4, 8, 12, 3, 7, 11, 100, 100, 108, 116, 0]:  # a run, a resume, a jump, a repeat, another stride
        assert same(plain.batch(start, 4), ahead.batch(start, 4))
    held_out = open_stream(config.model_copy(update={"workers": workers}), 24, 5, "val")
    every = [held_out.batch(r, 2) for r in range(0, held_out.num_sequences, 2)]
    assert sum(b.tokens for b in every) == open_stream(config, 24, 5, "val").batch(0, 10**9).tokens


def test_an_epoch_holds_every_training_document(corpus: Path) -> None:
    """Decoding one epoch of the stream and cutting it at separators gives the documents that the build was given."""
    total = CorpusManifest.load(corpus).splits["train"].tokens
    # One row for all, so that the documents stay whole.
    stream = open_stream(DataConfig(corpus=str(corpus)), total, 1)
    documents: list[list[int]] = []
    for token in stream.batch(0, 1).ids.flatten().tolist()[: total - 1]:
        if token == stream.tokenizer.eos:
            documents.append([])
        else:
            documents[-1].append(token)
    documents[-1].append(stream.batch(0, 1).targets[0, total - 2].item())
    read = sorted(stream.tokenizer.decode(d) for d in documents)
    held_out = (corpus / "val.txt").read_bytes().decode()
    assert read == sorted(t for t in texts(300) if t not in held_out)


def test_epochs_are_counted_and_differ(corpus: Path) -> None:
    stream = open_stream(DataConfig(corpus=str(corpus)), 16, 1)
    total = CorpusManifest.load(corpus).splits["train"].tokens
    rows = -(-(total - 1) // 16)
    assert stream.epochs(0) == (0.0,)
    assert stream.epochs(100) == (pytest.approx(100 / rows),)
    first, second = stream.batch(0, rows), stream.batch(rows, rows)
    assert not torch.equal(first.ids, second.ids)
    assert first.tokens == second.tokens == total - 1
    assert abs(first.bytes - second.bytes) <= 64  # all but the first token of each, which may differ


def test_without_shuffling_the_order_is_the_corpus(corpus: Path) -> None:
    stream = open_stream(DataConfig(corpus=str(corpus), shuffle=False), 16, 1)
    shards = sorted(corpus.glob("train-*.bin"))
    tokens = np.concatenate([np.fromfile(s, dtype="<u2")[512:] for s in shards])
    assert len(shards) > 1
    rows = -(-(len(tokens) - 1) // 16)
    for start in (0, rows):
        read = stream.batch(start, rows)
        assert read.ids.flatten().tolist()[: len(tokens) - 1] == tokens[:-1].tolist()
        assert read.targets.flatten().tolist()[: len(tokens) - 1] == tokens[1:].tolist()


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_held_out_stream_counts_every_byte_once(corpus: Path, packing: str) -> None:
    stream = open_stream(DataConfig(corpus=str(corpus), packing=packing), 37, 0, "val")
    text = (corpus / "val.txt").read_bytes()
    batches = [stream.batch(r, 3) for r in range(0, stream.num_sequences, 3)]
    report = CorpusManifest.load(corpus).splits["val"]
    assert sum(b.bytes for b in batches) == len(text) == report.bytes
    # The separator before the first document has nothing before it; `documents` also predicts the one after the last.
    assert sum(b.tokens for b in batches) == report.tokens - (packing == "stream")
    if packing == "stream":
        targets = torch.cat([b.targets.flatten() for b in batches])
        assert stream.tokenizer.decode_bytes(targets[targets >= 0].tolist()) == text


def test_bytes_are_those_of_the_counted_targets(mixture: DataConfig) -> None:
    stream = open_stream(mixture.model_copy(update={"packing": "documents"}), 40, 0)
    batch = stream.batch(0, 16)
    counted = batch.targets[batch.targets >= 0]
    assert batch.tokens == len(counted) < batch.targets.numel()
    assert batch.bytes == len(stream.tokenizer.decode_bytes(counted.tolist()))


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_seed_decides_the_order(corpus: Path, packing: str) -> None:
    config = DataConfig(corpus=str(corpus), packing=packing)
    streams = [open_stream(config, 24, seed) for seed in (0, 0, 1)]
    a, b, c = (s.batch(0, 8) for s in streams)
    assert same(a, b)
    assert not same(a, c)


def test_equal_sources_are_not_shuffled_alike(corpus: Path) -> None:
    twice = DataConfig(sources=(SourceConfig(path=str(corpus)), SourceConfig(path=str(corpus))))
    rows = open_stream(twice, 24, 0).batch(0, 200).ids
    assert not torch.equal(rows[0::2], rows[1::2])


def test_the_held_out_order_has_no_seed(mixture: DataConfig) -> None:
    a, b = (open_stream(mixture, 24, seed, "val") for seed in (0, 1))
    assert a.fingerprint == b.fingerprint
    assert same(a.batch(0, a.num_sequences), b.batch(0, b.num_sequences))


def test_a_mixture_reads_each_source_as_it_would_alone(mixture: DataConfig, second_corpus: Path) -> None:
    """Weights 3 and 1: one row in four is the second source's, and these rows are its own stream up to the seed."""
    stream = open_stream(mixture.model_copy(update={"shuffle": False}), 24, 5)
    alone = open_stream(DataConfig(corpus=str(second_corpus), shuffle=False), 24, 5)
    rows = {tuple(r) for r in stream.batch(0, 400).ids.tolist()}
    own = alone.batch(0, 100).ids.tolist()
    assert sum(tuple(r) in rows for r in own) == 100
    assert stream.epochs(400)[1] == pytest.approx(alone.epochs(100)[0])


def test_fingerprints_tell_streams_apart(corpus: Path, second_corpus: Path, mixture: DataConfig) -> None:
    base = DataConfig(corpus=str(corpus))
    streams = [
        open_stream(base, 16, 0),
        open_stream(base, 16, 1),
        open_stream(base, 32, 0),
        open_stream(base, 16, 0, "val"),
        open_stream(base.model_copy(update={"packing": "documents"}), 16, 0),
        open_stream(base.model_copy(update={"shuffle": False}), 16, 0),
        open_stream(DataConfig(corpus=str(second_corpus)), 16, 0),
        open_stream(mixture, 16, 0),
    ]
    assert len({s.fingerprint for s in streams}) == len(streams)
    assert open_stream(base, 16, 0).fingerprint == streams[0].fingerprint


def test_a_batch_moves(corpus: Path) -> None:
    batch = open_stream(DataConfig(corpus=str(corpus)), 16, 0).batch(0, 2)
    moved = batch.to("meta")
    assert moved.ids.device.type == moved.targets.device.type == moved.documents.device.type == "meta"
    assert moved.bytes == batch.bytes


def foreign(folder: Path) -> Path:
    """Shards as llm.c writes them: the separator 50256 first, a document that continues in the next shard, no tokenizer."""
    folder.mkdir()
    write_shard(folder / "x_train_000001.bin", np.array([50256, 1, 2, 50256, 3], dtype="<u2"))
    write_shard(folder / "x_train_000002.bin", np.array([4, 5, 50256, 6, 7], dtype="<u2"))
    write_shard(folder / "x_val_000000.bin", np.array([50256, 8, 9], dtype="<u2"))
    return folder


def test_shards_made_elsewhere_are_read(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "bins")
    stream = open_stream(DataConfig(corpus=str(folder), shuffle=False), 9, 0)
    batch = stream.batch(0, 1)
    assert batch.ids.tolist() == [[50256, 1, 2, 50256, 3, 4, 5, 50256, 6]]
    assert batch.targets.tolist() == [[1, 2, 50256, 3, 4, 5, 50256, 6, 7]]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2, 2]]
    assert (stream.vocab_size, stream.tokenizer, batch.bytes) == (50257, None, 0)
    assert open_stream(DataConfig(corpus=str(folder)), 10, 0, "val").batch(0, 1).tokens == 2
    single = DataConfig(corpus=str(folder / "x_train_000001.bin"), shuffle=False)
    assert open_stream(single, 4, 0).batch(0, 1).ids.tolist() == [[50256, 1, 2, 50256]]
    with pytest.raises(DataError, match="without a val split"):
        open_stream(single, 4, 0, "val")


def test_shards_made_elsewhere_use_the_tokenizer_beside_them(corpus: Path, tmp_path: Path) -> None:
    """A built corpus stripped of its manifest is the same stream."""
    shutil.copytree(corpus, tmp_path / "c")
    (tmp_path / "c" / "manifest.json").unlink()
    a, b = (open_stream(DataConfig(corpus=str(p), shuffle=False), 32, 0) for p in (corpus, tmp_path / "c"))
    assert same(a.batch(0, 50), b.batch(0, 50))
    assert b.vocab_size == a.vocab_size


def test_wide_vocabularies_use_wide_shards(tmp_path: Path, corpus: Path) -> None:
    tokenizer = Tokenizer.load(corpus)
    folder = tmp_path / "bins"
    folder.mkdir()
    write_shard(folder / "train.bin", np.array([100_000, 70_000, 1], dtype="<u4"))
    stream = open_stream(DataConfig(corpus=str(folder), shuffle=False), 2, 0)
    assert stream.batch(0, 1).targets.tolist() == [[70_000, 1]]
    assert stream.vocab_size == 100_001 > tokenizer.vocab_size


def truncate(folder: Path) -> None:
    path = folder / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])


def shorten(folder: Path) -> None:
    write_shard(folder / "train-00000.bin", np.zeros(3, dtype="<u2"))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate, "truncated"),
        (shorten, "the manifest says"),
        (lambda f: (f / "train-00000.bin").unlink(), "No such file"),
        (lambda f: (f / "train-documents.npy").write_bytes(b"x"), "offsets .* cannot be read"),
        (lambda f: np.save(f / "train-documents.npy", np.array([0, 5])), "offsets .* do not match"),
        (lambda f: (f / "manifest.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "manifest.json").write_text("{}"), "damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), "damaged"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "no tokenizer"),
    ],
)
def test_a_damaged_corpus_is_refused(corpus: Path, tmp_path: Path, damage, sentence: str) -> None:
    folder = shutil.copytree(corpus, tmp_path / "c")
    damage(folder)
    with pytest.raises(DataError, match=sentence):
        open_stream(DataConfig(corpus=str(folder)), 16, 0)


def test_mistakes_are_one_sentence(corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    build([str(write_files(tmp_path / "raw", texts(30)))], other, BuildConfig(tokenizer="bytes"))
    (tmp_path / "empty").mkdir()
    here = SourceConfig(path=str(corpus))
    cases: list[tuple[DataConfig, int, str]] = [
        (DataConfig(), 16, "neither is given"),
        (DataConfig(corpus=str(corpus), sources=(here,)), 16, "both are given"),
        (DataConfig(corpus=str(corpus)), 0, "at least one token"),
        (DataConfig(corpus=str(tmp_path / "missing")), 16, "There is no corpus"),
        (DataConfig(corpus=str(tmp_path / "empty")), 16, "is no corpus"),
        (DataConfig(sources=(here, SourceConfig(path=str(other)))), 16, "different tokenizers"),
    ]
    for config, sequence, sentence in cases:
        with pytest.raises(AndromedaError, match=sentence):
            open_stream(config, sequence, 0)
    stream = open_stream(DataConfig(corpus=str(corpus)), 16, 0, "val")
    for start, count in [(-1, 1), (stream.num_sequences, 1), (0, 0)]:
        with pytest.raises(DataError, match="sequences from number"):
            stream.batch(start, count)
    assert stream.batch(stream.num_sequences - 1, 50).ids.shape[0] == 1
    with pytest.raises(ConfigError):
        open_stream(DataConfig(), 16, 0)
