"""Targets of documents: read from records, kept beside the tokens, packed with the sequences."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from andromeda.config.data import BuildConfig, DataConfig, SourceConfig
from andromeda.data.build import build
from andromeda.data.corpus import CorpusManifest, open_corpus, verify_corpus
from andromeda.data.loader import Batch, open_stream
from andromeda.utils.errors import ConfigError, DataError

TARGETS = ("stars=number", "topic=label", "tags=labels", "names=spans")
WORDS = ("red", "grün", "blue", "Ada", "日本", "five")


def records(count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of a few words with a target of each kind, each now and then missing."""
    draw, found = random.Random(seed), []
    for i in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(3, 9))]
        text = f"{i}: " + " ".join(words)
        row: dict[str, Any] = {"text": text, "stars": i / 4, "topic": i % 3, "tags": sorted(set(words) & {"red", "blue"})}
        row["names"] = [[text.index(w), text.index(w) + len(w), "person" if w == "Ada" else "place"] for w in ("Ada", "日本") if w in words]
        for name in draw.sample(["stars", "topic", "tags", "names"], draw.randint(0, 2)):
            row[name] = None
        found.append(row)
    return found


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def built(folder: Path, rows: list[dict[str, Any]], targets: tuple[str, ...] = TARGETS, **keys: Any) -> Path:
    build([write(folder, rows)], folder / "corpus", BuildConfig(tokenizer="bytes", validation_fraction=0.2, targets=targets, **keys))
    return folder / "corpus"


def expected(row: dict[str, Any], manifest: CorpusManifest) -> dict[str, Any]:
    """The targets of a document, worked from its record: those of its last byte, and the class of each byte."""
    size = len(row["text"].encode())
    names = [-100, *([0] * size)] if row["names"] is not None else [-100] * (size + 1)
    for start, stop, label in row["names"] or []:
        a, b = len(row["text"][:start].encode()), len(row["text"][:stop].encode())
        names[1 + a : 1 + b] = [manifest.targets["names"].labels.index(label)] * (b - a)
    labels = manifest.targets["tags"].labels
    return {
        "stars": math.nan if row["stars"] is None else row["stars"],
        "topic": -100 if row["topic"] is None else manifest.targets["topic"].labels.index(str(row["topic"])),
        "tags": [255] * len(labels) if row["tags"] is None else [int(label in row["tags"]) for label in labels],
        "names": names,
    }


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_every_sequence_has_the_targets_of_its_documents(tmp_path: Path, packing: str) -> None:
    """Read back document by document: whatever shares a sequence, and where one is cut, the last token has the document's targets."""
    rows = records()
    corpus = built(tmp_path, rows)
    manifest, by_text = CorpusManifest.load(corpus), {row["text"]: row for row in rows}
    stream = open_stream(DataConfig(corpus=str(corpus), packing=packing), 112, 0)  # type: ignore[arg-type]
    seen: Counter[str] = Counter()
    for number in range(30):
        batch = stream.batch(number, 1)
        for text, tokens in documents_of(batch):
            last, wanted = tokens[-1], expected(by_text[text], manifest)
            found = {name: value[0, last] for name, value in batch.head_targets.items()}
            torch.testing.assert_close(float(found["stars"]), wanted["stars"], equal_nan=True)
            assert found["topic"] == wanted["topic"]
            assert found["tags"].tolist() == wanted["tags"]
            assert batch.head_targets["names"][0, tokens].tolist() == wanted["names"]
            inner = tokens[:-1]
            assert batch.head_targets["stars"][0, inner].isnan().all()
            assert (batch.head_targets["topic"][0, inner] == -100).all()
            assert (batch.head_targets["tags"][0, inner] == 255).all()
            seen[text] += 1
    assert len(seen) > 20


def documents_of(batch: Batch) -> list[tuple[str, list[int]]]:
    """The whole documents of a batch of one sequence of bytes, as text and places of their tokens."""
    ids, documents = batch.ids[0].tolist(), batch.documents[0].tolist()
    found = []
    for number in dict.fromkeys(documents):
        places = [i for i, one in enumerate(documents) if one == number]
        ends = batch.targets[0, places[-1]] == ids[places[0]]  # the separator follows: the document is whole
        if len(places) > 1 and ids[places[0]] == 256 and ends:
            found.append((bytes(ids[i] for i in places[1:]).decode(), places))
    return found


def test_any_split_into_batches_has_the_same_targets(tmp_path: Path) -> None:
    config = DataConfig(corpus=str(built(tmp_path, records())), packing="documents")
    whole, ahead = open_stream(config, 48, 0).batch(0, 8), open_stream(config.model_copy(update={"workers": 2}), 48, 0)
    for start, count in ((0, 3), (3, 1), (4, 4)):
        part = ahead.batch(start, count)
        for name, value in part.head_targets.items():
            assert torch.equal(value.nan_to_num(7.5), whole.head_targets[name][start : start + count].nan_to_num(7.5)), name


def test_padding_and_another_corpus_have_no_targets(tmp_path: Path) -> None:
    first, second = built(tmp_path / "a", records()), built(tmp_path / "b", records(seed=1), targets=())
    config = DataConfig(sources=tuple(SourceConfig(path=str(path)) for path in (first, second)), packing="documents")
    batch = open_stream(config, 64, 0).batch(0, 6)
    counted = [int((batch.head_targets["topic"][i] != -100).sum()) for i in range(6)]
    assert sum(counted[0::2]) * sum(counted[1::2]) == 0 < sum(counted)
    padding = (batch.targets == -100) & (batch.ids == 256)
    assert padding.any()
    assert (batch.head_targets["names"][padding] == -100).all()


def test_pairs_are_two_documents_of_one_sequence(tmp_path: Path) -> None:
    """Both texts begin with the prompt; each is a document of its own for attention, and its last token has group and rank."""
    rows = [{"prompt": f"q{i} ", "chosen": "good" * (i % 3 + 1), "rejected": "bad"} for i in range(20)]
    rows += [{"text": f"a text of its own {i}"} for i in range(10)]
    corpus = built(tmp_path, rows, targets=("better=pair",))
    stream, pairs = open_stream(DataConfig(corpus=str(corpus), packing="documents"), 64, 0), 0
    for number in range(12):
        batch = stream.batch(number, 1)
        target, documents = batch.head_targets["better"][0], batch.documents[0]
        for group in {int(value) // 64 for value in target if value != -100}:
            texts = []
            for rank in (0, 1):
                (place,) = (target == group * 64 + rank).nonzero()[0].tolist()
                tokens = (documents == documents[place]).nonzero()[:, 0].tolist()
                assert tokens[-1] == place
                assert batch.ids[0, tokens[0]] == 256
                texts.append(bytes(batch.ids[0, tokens[1:]].tolist()).decode())
            assert {"prompt": texts[0][: texts[0].index(" ") + 1], "chosen": texts[0].split(" ")[1], "rejected": "bad"} in rows
            assert texts[1] == texts[0].split(" ")[0] + " bad"
            pairs += 1
    assert pairs >= 16


def test_rankings_of_several_texts(tmp_path: Path) -> None:
    rows = [{"order": [f"{i} best", f"{i} middle", f"{i} worst"]} for i in range(12)]
    batch = open_stream(DataConfig(corpus=str(built(tmp_path, rows, targets=("order=ranking",))), packing="documents"), 32, 0).batch(0, 4)
    for target, ids, documents in zip(batch.head_targets["order"], batch.ids, batch.documents, strict=True):
        for value in [v for v in target.tolist() if v != -100]:
            place = target.tolist().index(value)
            text = bytes(ids[(documents == documents[place]) & (ids != 256)].tolist()).decode()
            assert text.endswith(("best", "middle", "worst")[value % 64])


def test_the_fingerprint_names_the_targets_and_verification_finds_a_changed_one(tmp_path: Path) -> None:
    rows = records()
    corpus = built(tmp_path / "a", rows)
    other = built(tmp_path / "b", [row | {"stars": 3.25} for row in rows])
    manifest = verify_corpus(corpus)
    assert manifest.fingerprint != CorpusManifest.load(other).fingerprint
    assert manifest.targets["topic"].labels == ("0", "1", "2")
    known = [row["stars"] for row in rows if row["stars"] is not None]
    assert manifest.targets["stars"].whole is False
    assert 0 < manifest.targets["stars"].documents < len(known) + 1
    path = corpus / "train-target-topic.npy"
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-target-topic\.npy does not match its sha256"):
        verify_corpus(corpus)
    np.save(path, np.full(CorpusManifest.load(corpus).splits["train"].documents, 7, dtype=np.int32))
    with pytest.raises(DataError, match="classes beyond its 3 labels"):
        open_stream(DataConfig(corpus=str(corpus)), 32, 0).batch(0, 8)
    np.save(path, np.zeros(3))
    with pytest.raises(DataError, match=r"'topic' of .* does not match its documents"):
        open_corpus(corpus, "train")


def test_workers_and_an_interrupted_build_change_nothing(tmp_path: Path) -> None:
    rows = records(60)
    first, second = built(tmp_path / "a", rows[:30] + rows[30:]), built(tmp_path / "b", rows[::-1])
    assert CorpusManifest.load(first).fingerprint == CorpusManifest.load(second).fingerprint


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stars": "four"}, "bad target: stars is no number"),
        ({"topic": ["a"]}, "bad target: topic is no label"),
        ({"tags": "red"}, "bad target: tags is no list of labels"),
        ({"names": [[0, 999, "x"]]}, "bad target: names has a span outside of its text"),
        ({"names": [[0, "x"]]}, "bad target: names has a span that is not [start, end, label]"),
    ],
)
def test_a_target_of_another_type_is_a_skipped_document(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    corpus = built(tmp_path, [*records(), {"text": "the odd one"} | change])
    assert CorpusManifest.load(corpus).sources[0].skipped == {reason: 1}


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    corpus = built(tmp_path, records())
    for targets, sentence in (
        (("stars",), "NAME=KIND"),
        (("stars=nmber",), r"did you mean number\?"),
        (("a=pair", "b=ranking"), "one pair or one ranking"),
        (("text=label",), "names of their own"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            BuildConfig(targets=targets)
    with pytest.raises(DataError, match="targets are read from records only"):
        build([str(corpus)], tmp_path / "again", BuildConfig(tokenizer="bytes"))
    with pytest.raises(DataError, match="No training document has the target 'mood'"):
        built(tmp_path / "c", records(), targets=("mood=label",))
