"""Augmentation: what is rearranged can be put back, what is masked is only inputs, and the stream stays a pure function."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from andromeda.config.data import AugmentationConfig, BuildConfig, DataConfig, SourceConfig
from andromeda.data.augmentation import FIM, MASK
from andromeda.data.build import build
from andromeda.data.corpus import CorpusManifest
from andromeda.data.loader import Batch, open_stream
from andromeda.data.tokenizer import Tokenizer
from andromeda.utils.errors import ConfigError
from tests.data.conftest import texts, write_files

ROW = 64
PACKINGS = ["stream", "documents"]


@pytest.fixture(scope="module")
def reserved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus whose tokenizer has the special tokens."""
    root = tmp_path_factory.mktemp("reserved")
    raw = write_files(root / "raw", texts(200))
    build([str(raw)], root / "out", BuildConfig(vocab_size=300, validation_fraction=0.1, special_tokens=(*FIM, MASK)))
    return root / "out"


def rows(path: Path, packing: str = "stream", split: str = "train", count: int = 40, **augment: object) -> Batch:
    config = DataConfig(corpus=str(path), packing=packing, augment=AugmentationConfig(**augment))  # type: ignore[arg-type]
    return open_stream(config, ROW, 5, split).batch(0, count)  # type: ignore[arg-type]


def pieces(batch: Batch, number: int) -> list[tuple[list[int], list[int]]]:
    """Ids and targets of each document of a row."""
    found = []
    for document in batch.documents[number].unique().tolist():
        own = batch.documents[number] == document
        found.append((batch.ids[number][own].tolist(), batch.targets[number][own].tolist()))
    return found


def put_back(ids: list[int], fim: list[int]) -> tuple[list[int], str]:
    """The text in its order, by the definition of the two formats, and which of them it was."""
    prefix, suffix, middle = (ids.index(token) for token in fim)
    if suffix == prefix + 1:  # suffix first: the middle token stands before prefix and middle, joined
        return ids[:prefix] + ids[middle + 1 :] + ids[suffix + 1 : middle], "spm"
    return ids[:prefix] + ids[prefix + 1 : suffix] + ids[middle + 1 :] + ids[suffix + 1 : middle], "psm"


@pytest.mark.parametrize("packing", PACKINGS)
def test_what_is_rearranged_is_the_document_less_three_tokens(reserved: Path, packing: str) -> None:
    tokenizer = Tokenizer.load(reserved)
    fim = [tokenizer.special_tokens[name] for name in FIM]
    plain, filled = rows(reserved, packing), rows(reserved, packing, fim=1.0)
    assert torch.equal(plain.documents, filled.documents)
    formats = []
    for number in range(40):
        for (before, aims), (after, new_aims) in zip(pieces(plain, number), pieces(filled, number), strict=True):
            if len(before) < 8 or set(aims) == {-100}:
                assert (before, aims) == (after, new_aims)
                continue
            text, kind = put_back(after, fim)
            assert text == before[:-3]
            assert new_aims[:-1] == after[1:]
            # The end of the middle is only told where the document ends.
            assert new_aims[-1] == (tokenizer.eos if aims[-1] == tokenizer.eos else -100)
            formats.append(kind)
    assert 0.35 < formats.count("spm") / len(formats) < 0.65
    assert filled.tokens == int((filled.targets != -100).sum())
    lengths = torch.from_numpy(tokenizer.byte_lengths())
    assert filled.bytes == int(lengths[filled.targets[filled.targets != -100]].sum())


@pytest.mark.parametrize(("fim", "spm"), [(0.3, 0.0), (0.7, 1.0)])
def test_shares_are_as_asked(reserved: Path, fim: float, spm: float) -> None:
    tokenizer = Tokenizer.load(reserved)
    filled, plain = (rows(reserved, count=400, fim=share, fim_spm=spm) for share in (fim, 0.0))
    long = sum(len(ids) >= 8 and set(aims) != {-100} for n in range(400) for ids, aims in pieces(plain, n))
    hit = int((filled.ids == tokenizer.special_tokens[FIM[0]]).sum())
    assert abs(hit / long - fim) < 4 * math.sqrt(fim * (1 - fim) / long)
    after_prefix = filled.ids.roll(-1, 1)[filled.ids == tokenizer.special_tokens[FIM[0]]]
    assert ((after_prefix == tokenizer.special_tokens[FIM[1]]).double().mean() > 0.5) == (spm > 0.5)


@pytest.mark.parametrize("instead", ["random", "special"])
def test_masking_touches_inputs_alone(reserved: Path, instead: str) -> None:
    tokenizer = Tokenizer.load(reserved)
    plain, masked = rows(reserved, count=200), rows(reserved, count=200, mask=0.2, mask_with=instead)
    assert torch.equal(plain.targets, masked.targets)
    assert (plain.tokens, plain.bytes) == (masked.tokens, masked.bytes)
    changed = plain.ids != masked.ids
    assert abs(float(changed.double().mean()) - 0.2) < 0.02
    assert not (plain.ids[changed] == tokenizer.eos).any()
    if instead == "special":
        assert set(masked.ids[changed].tolist()) == {tokenizer.special_tokens[MASK]}
    else:
        assert not set(masked.ids[changed].tolist()) & set(tokenizer.special_tokens.values())


@pytest.mark.parametrize("packing", PACKINGS)
@given(start=st.integers(0, 300), counts=st.lists(st.integers(1, 7), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_a_row_depends_on_its_number_alone(reserved: Path, packing: str, start: int, counts: list[int]) -> None:
    config = DataConfig(corpus=str(reserved), packing=packing, augment=AugmentationConfig(fim=0.5, mask=0.1))
    whole = open_stream(config, ROW, 5).batch(start, sum(counts))
    stream, at = open_stream(config.model_copy(update={"workers": 2}), ROW, 5), 0
    for count in counts:
        part = stream.batch(start + at, count)
        assert torch.equal(part.ids, whole.ids[at : at + count])
        assert torch.equal(part.targets, whole.targets[at : at + count])
        at += count


def test_held_out_rows_and_old_fingerprints_stay(reserved: Path) -> None:
    off = DataConfig(corpus=str(reserved))
    on = off.model_copy(update={"augment": AugmentationConfig(fim=0.5, mask=0.1)})
    plain, augmented = (open_stream(config, ROW, 5, "val") for config in (off, on))
    assert plain.fingerprint == augmented.fingerprint
    assert torch.equal(plain.batch(0, 5).ids, augmented.batch(0, 5).ids)
    assert open_stream(on, ROW, 5).fingerprint != open_stream(off, ROW, 5).fingerprint


def test_an_epoch_of_another_seed_is_augmented_otherwise(reserved: Path) -> None:
    config = DataConfig(corpus=str(reserved), shuffle=False, augment=AugmentationConfig(fim=1.0))
    assert not torch.equal(open_stream(config, ROW, 1).batch(0, 5).ids, open_stream(config, ROW, 2).batch(0, 5).ids)


def test_a_tokenizer_without_the_special_tokens_is_refused_with_the_fix(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"build the corpus again with --special-token '<\|fim_prefix\|>' --special-token"):
        rows(corpus, fim=0.5)
    with pytest.raises(ConfigError, match="mask"):
        rows(corpus, mask=0.1, mask_with="special")
    assert rows(corpus, mask=0.1).tokens


@pytest.mark.parametrize(("power", "share"), [(1.0, None), (0.0, 0.5), (0.5, None)])
def test_sources_are_mixed_by_their_sizes_to_a_power(corpus: Path, second_corpus: Path, power: float, share: float | None) -> None:
    paths = (str(corpus), str(second_corpus))
    tokens = [CorpusManifest.load(Path(path)).splits["train"].tokens for path in paths]
    # After 1,000 rows no share is further off than the schedule's bound, a row.
    config = DataConfig(sources=tuple(SourceConfig(path=path) for path in paths), by_size=True, upsample=power)
    stream = open_stream(config, 16, 0)
    first = tokens[0] ** power / (tokens[0] ** power + tokens[1] ** power)
    read = [stream.epochs(1000)[i] * -(-(tokens[i] - 1) // 16) for i in range(2)]
    assert read[0] / sum(read) == pytest.approx(share or first, abs=0.005)
