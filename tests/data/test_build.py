"""The build: every document accounted for, and one result whatever the container, the order, the workers."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import torch
import zstandard

from andromeda.config.data import RENAMED_BUILD_KEYS, BuildConfig, DataConfig
from andromeda.data.append import append
from andromeda.data.build import build
from andromeda.data.corpus import CorpusManifest, open_corpus, verify_corpus
from andromeda.data.encode import chunked
from andromeda.data.formats import ReadTask, _split, read_documents
from andromeda.data.loader import open_stream
from andromeda.data.shards import write_shard
from andromeda.data.sources import RANGE_BYTES, counted, list_source
from andromeda.data.tokenizer import Tokenizer
from andromeda.utils.errors import AndromedaError, ConfigError, DataError
from tests.data.conftest import texts, write_files

DOCUMENTS = texts(200)
CONFIG = BuildConfig(tokenizer="bytes", validation_fraction=0.1)


def lines(documents: list[str]) -> bytes:
    return b"".join(json.dumps({"text": d, "id": i}).encode() + b"\n" for i, d in enumerate(documents))


def as_txt(root: Path) -> str:
    return str(write_files(root / "txt", DOCUMENTS))


def as_py_in_folders(root: Path) -> str:
    for i, d in enumerate(DOCUMENTS[::-1]):
        path = root / "py" / f"{i % 7}" / f"{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(d.encode())
    return str(root / "py")


def as_jsonl(root: Path) -> str:
    (root / "a.jsonl").write_bytes(lines(DOCUMENTS))
    return str(root / "a.jsonl")


def as_gz(root: Path) -> str:
    (root / "a.jsonl.gz").write_bytes(gzip.compress(lines(DOCUMENTS)))
    return str(root / "a.jsonl.gz")


def as_zst(root: Path) -> str:
    compress = zstandard.ZstdCompressor().compress
    (root / "a.jsonl.zst").write_bytes(compress(lines(DOCUMENTS[:50])) + compress(lines(DOCUMENTS[50:])))
    return str(root / "a.jsonl.zst")


def as_parquet(root: Path) -> str:
    table = pyarrow.table({"id": list(range(200)), "text": DOCUMENTS})
    pyarrow.parquet.write_table(table, root / "a.parquet", row_group_size=33)
    return str(root / "a.parquet")


def as_dataset(root: Path) -> str:
    folder = root / "dataset"
    folder.mkdir()
    (folder / "train-0.jsonl").write_bytes(lines(DOCUMENTS[:80]))
    (folder / "train-1.jsonl").write_bytes(lines(DOCUMENTS[80:]))
    return f"hf:{folder}:train"


def as_shards(root: Path) -> str:
    """Another project's .bin shards, cut inside no document, with their tokenizer beside them."""
    folder = root / "bins"
    Tokenizer.load(_bytes_tokenizer(folder))
    for i, part in enumerate((DOCUMENTS[:120], DOCUMENTS[120:])):
        write_shard(folder / f"{i}.bin", np.array([t for d in part for t in (256, *d.encode())], dtype="<u2"))
    return str(folder)


def _bytes_tokenizer(folder: Path) -> Path:
    from andromeda.data.tokenizer import train_tokenizer

    train_tokenizer([], CONFIG).save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> CorpusManifest:
    root = tmp_path_factory.mktemp("plain")
    return build([as_txt(root)], root / "out", CONFIG)


@pytest.mark.parametrize("container", [as_py_in_folders, as_jsonl, as_gz, as_zst, as_parquet, as_dataset, as_shards])
def test_the_container_does_not_matter(
    plain: CorpusManifest, tmp_path: Path, container: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same documents give the same fingerprint from any kind of file, in any order, under any name."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    manifest = build([container(tmp_path)], tmp_path / "out", CONFIG)
    assert manifest.fingerprint == plain.fingerprint
    assert manifest.splits == plain.splits


def test_documents_are_those_given(plain: CorpusManifest, tmp_path: Path) -> None:
    """Shards decoded with numpy alone, and the split recomputed from the documents' hashes."""
    out = tmp_path / "out"
    build([as_txt(tmp_path)], out, CONFIG)
    found = {}
    for split in ("train", "val"):
        tokens = np.fromfile(out / f"{split}-00000.bin", dtype="<u2")[512:]
        starts = np.load(out / f"{split}-documents.npy")
        pieces = [tokens[a:b] for a, b in pairwise(starts)]
        assert all(p[0] == 256 for p in pieces)
        found[split] = [bytes(p[1:].astype(np.uint8)) for p in pieces]
    digest = {d.encode(): hashlib.sha256(d.encode()).digest() for d in DOCUMENTS}
    order = sorted(digest, key=lambda d: digest[d])
    held_out = [d for d in order if int.from_bytes(digest[d][:8], "big") < 0.1 * 2**64]
    assert found["val"] == held_out
    assert found["train"] == order[len(held_out) :]
    assert (out / "val.txt").read_bytes() == b"".join(held_out)


def test_adding_documents_moves_none_between_the_splits(plain: CorpusManifest, tmp_path: Path) -> None:
    folder = Path(as_txt(tmp_path))
    write_files(folder / "more", texts(100, seed=9))
    build([str(folder)], tmp_path / "out", CONFIG)
    held_out = (tmp_path / "out" / "val.txt").read_bytes().decode()
    digests = {d: hashlib.sha256(d.encode()).digest() for d in DOCUMENTS}
    for d, digest in digests.items():
        assert (d in held_out) == (int.from_bytes(digest[:8], "big") < 0.1 * 2**64)


def test_workers_and_shard_size_do_not_matter(tmp_path: Path) -> None:
    source = as_txt(tmp_path)
    config = BuildConfig(vocab_size=300, validation_fraction=0.1)
    alone = build([source], tmp_path / "a", config, workers=1)
    together = build([source], tmp_path / "b", config, workers=3)
    small = build([source], tmp_path / "c", config.model_copy(update={"shard_tokens": 700}))
    assert alone == together
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").glob("*.*")} == {p.name: p.read_bytes() for p in (tmp_path / "b").glob("*.*")}
    assert small.fingerprint == alone.fingerprint
    assert [s.tokens for s in small.splits["train"].shards[:-1]] == [700] * (len(small.splits["train"].shards) - 1)


def mess(root: Path) -> Path:
    """A folder with one of everything that can be wrong."""
    folder = write_files(root / "mess", DOCUMENTS[:40])
    (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (folder / "image.txt").write_bytes(b"\x89PNG\0\0\0\1")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "blank.md").write_bytes(b" \n\t\n")
    (folder / "copy.md").write_bytes(DOCUMENTS[3].encode())
    (folder / "other.jpg").write_bytes(b"\xff\xd8")
    (folder / "gone.py").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.txt")
    (folder / "circle").symlink_to(folder)
    (folder / ".git").mkdir()
    (folder / ".git" / "config.txt").write_text("hidden")
    rows = [
        b'{"text": "row one of the lines"}',
        b"{not json",
        b"[1, 2]",
        b'{"body": "x"}',
        b'{"text": 5}',
        b"",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
    ]
    (folder / "rows.jsonl").write_bytes(b"\n".join(rows))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(lines(texts(50, seed=4)))[:-30])
    (folder / "junk.parquet").write_bytes(b"PAR1junk")
    (folder / "weights.bin").write_bytes(bytes(5000))
    return folder


def test_every_document_is_accounted_for(tmp_path: Path) -> None:
    folder = mess(tmp_path)
    manifest = build([str(folder), str(folder / "00000.txt")], tmp_path / "out", CONFIG)
    report, again = manifest.sources
    skipped = dict(report.skipped)
    read_before_the_damage = report.kept - 40 - 1
    assert 0 < read_before_the_damage < 50
    fields = {k: skipped.pop(k) for k in list(skipped) if k.startswith("no text")}
    assert fields == {"no text in field 'text' (fields with text: body)": 1, "no text in field 'text' (fields with text: none)": 1}
    unreadable = {k: skipped.pop(k) for k in list(skipped) if k.startswith("unreadable")}
    assert sum(unreadable.values()) == 4  # the dead link, the cut .gz, the parquet and the .bin that are none
    assert skipped == {"bad JSON": 2, "binary": 1, "duplicate": 1, "empty": 2, "not UTF-8": 3}
    assert report.read == report.kept + sum(report.skipped.values())
    assert (again.read, again.kept, again.skipped) == (1, 0, {"duplicate": 1})
    assert report.not_read == {".jpg": 1, "linked folder": 1, "special file": 1}  # reading the pipe would wait for ever
    assert report.ignored_files == 3
    assert report.bytes == sum(s.bytes for s in manifest.splits.values())
    assert report.tokens == sum(s.tokens for s in manifest.splits.values()) == report.bytes + report.kept
    log = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert len(log) == sum(report.skipped.values()) + 1
    assert {"source": str(folder), "where": "copy.md", "reason": "duplicate"} in log
    assert verify_corpus(tmp_path / "out") == manifest


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_packed_file_that_was_cut_off_says_so(tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]) -> None:
    given = texts(400, seed=4)
    packed = pack(lines(given))
    path = tmp_path / f"a.jsonl{ending}"
    for keep in (1, 20, len(packed) // 2, len(packed) - 20, len(packed) - 1):
        path.write_bytes(packed[:keep])
        *found, last = read_documents(ReadTask(0, "packed", (("a", str(path)),)), BuildConfig())
        assert last.text is None
        assert last.skip_reason.startswith("unreadable")
        whole = [f.text for f in found if f.text is not None]
        assert whole == given[: len(whole)]
        assert len(found) - len(whole) <= 1  # at most one line that is no longer JSON


def test_lengths_are_bytes(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "raw", ["é" * 10, "a" * 19, "a" * 21, "b" * 20, "c" * 20])
    report = build([str(folder)], tmp_path / "out", CONFIG.model_copy(update={"min_document_bytes": 20, "max_document_bytes": 20})).sources[
        0
    ]
    assert (report.kept, report.skipped) == (3, {"too long": 1, "too short": 1})


@pytest.mark.parametrize("limit", [1, 7, 50, 300])
def test_cutting_keeps_the_text(tmp_path: Path, limit: int) -> None:
    text = "".join(DOCUMENTS[:20]) + "x" * 500 + "é" * 300
    (tmp_path / "a.txt").write_bytes(text.encode())
    pieces = list(read_documents(ReadTask(0, "text", (("a", str(tmp_path / "a.txt")),)), BuildConfig(split_documents_at=limit)))
    if limit == 50:
        assert "".join(p.text for p in pieces) == text
    assert all(p.text is None or len(p.text.encode()) <= max(limit, 4) for p in pieces)
    whole = [p.text for p in pieces if p.text]
    assert all(p in text for p in whole)


@pytest.mark.parametrize("limit", [1, 3, 100, 4096])
@pytest.mark.parametrize("text", ["x" * 9999, "é" * 5000, "日😀" * 1500, "a\u2028b\x0bc\x0cd\x85e\r" * 800, "line\r\n" * 2000, "\n" * 5000])
def test_pieces_are_as_large_as_asked_and_end_at_line_ends_alone(text: str, limit: int) -> None:
    pieces = list(_split(text, limit))
    assert "".join(pieces) == text
    sizes = [len(piece.encode()) for piece in pieces]
    assert all(size <= limit or len(piece) == 1 for size, piece in zip(sizes, pieces, strict=True))
    if "\n" in text:
        assert all(piece.endswith("\n") for piece in pieces) or limit < 6
    # A piece that does not end at a line end has no room for one more character.
    for piece, after in pairwise(pieces):
        assert piece.endswith("\n") or len(piece.encode()) + len(after[0].encode()) > limit
    assert sum(sizes) == len(text.encode())


def test_a_line_of_many_megabytes_is_split_in_linear_time() -> None:
    """20 MB: seconds at most, where each piece was copied to the line's end."""
    begin = time.process_time()
    pieces = list(_split("x" * 20_000_000, 2000))
    assert {len(piece) for piece in pieces} == {2000}
    assert time.process_time() - begin < 5


BOM = codecs.BOM_UTF8


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.txt", bytes), ("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)],
)
def test_a_byte_order_mark_belongs_to_no_document(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    """At the start of a file; anywhere else it is a character like any other."""
    given = ["first", "\ufeffsecond"]
    content = given[0].encode() if name == "a.txt" else lines(given)
    (tmp_path / name).write_bytes(pack(BOM + content))
    task = list_source(0, str(tmp_path / name), CONFIG).tasks[0]
    assert [(d.text, d.skip_reason) for d in read_documents(task, CONFIG)] == [(d, "") for d in given[: 1 if name == "a.txt" else 2]]


def test_what_a_folder_holds_besides_is_counted_by_extension(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "raw", DOCUMENTS[:5])
    for name in ("a.rst", "b.rst", "c.csv", "d.json.gz", "README", "e.JSONL"):
        (folder / name).write_bytes(lines(["a line of text"]))
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    listing = list_source(0, str(folder), CONFIG)
    assert listing.not_read == {".csv": 1, ".gz": 1, ".rst": 2, "linked folder": 1, "without extension": 1}
    assert counted(listing.not_read) == "2 .rst, 1 .csv, 1 .gz, 1 linked folder, 1 without extension"
    assert "e.JSONL" in {name for task in listing.tasks for name, _ in task.files}


def test_a_file_that_is_no_shard_is_one_short_reason(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "raw", DOCUMENTS[:5])
    (folder / "weights.bin").write_bytes(bytes(5000))
    write_shard(folder / "alone.bin", np.arange(1, 9, dtype="<u2"))
    skipped = build([str(folder)], tmp_path / "out", CONFIG).sources[0].skipped
    assert skipped == {"unreadable: no token shard": 1, "unreadable: no tokenizer beside the shard": 1}


def test_force_replaces_a_corpus_and_nothing_else(tmp_path: Path) -> None:
    source, out = as_txt(tmp_path), tmp_path / "out"
    build([source], out, CONFIG)
    (out / "notes.txt").write_text("mine")
    other = CONFIG.model_copy(update={"validation_fraction": 0.3, "shard_tokens": 1000})
    with pytest.raises(DataError, match="--force"):
        build([source], out, other)
    manifest = build([source], out, other, force=True)
    assert verify_corpus(out) == manifest
    assert manifest == build([source], tmp_path / "fresh", other)
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "fresh").iterdir()} | {"notes.txt"}
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "train-00000.bin").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        build([source], tmp_path / "home", CONFIG, force=True)
    assert (tmp_path / "home" / "train-00000.bin").read_text() == "mine"


def appended(root: Path) -> tuple[Path, list[str], BuildConfig]:
    """A corpus of half of the documents, and the others in two files, with one that the corpus holds already."""
    write_files(root / "a", DOCUMENTS[:100])
    write_files(root / "b", [*DOCUMENTS[100:150], DOCUMENTS[3]])
    (root / "c.jsonl").write_bytes(lines(DOCUMENTS[150:]))
    config = BuildConfig(vocab_size=300, validation_fraction=0.1, shard_tokens=3000)
    build([str(root / "a")], root / "out", config)
    return root / "out", [str(root / "b"), str(root / "c.jsonl")], config


def test_a_corpus_that_was_appended_to_is_that_of_all_documents(tmp_path: Path) -> None:
    """With the same tokenizer: the same tokens, splits and fingerprint, whichever documents came first."""
    out, more, _ = appended(tmp_path)
    before = CorpusManifest.load(out)
    manifest = append(more, out, BuildConfig(), workers=2)
    given = BuildConfig(tokenizer=str(out), validation_fraction=0.1, shard_tokens=3000)
    whole = build([str(tmp_path / "a"), *more], tmp_path / "whole", given)
    assert (manifest.fingerprint, manifest.splits) == (whole.fingerprint, whole.splits)
    assert verify_corpus(out) == manifest == CorpusManifest.load(out)
    assert manifest.config == before.config
    assert manifest.sources[0] == before.sources[0]
    assert [(s.name, s.kept, s.skipped) for s in manifest.sources[1:]] == [(more[0], 50, {"duplicate": 1}), (more[1], 50, {})]
    assert (out / "skipped.jsonl").read_bytes() == (tmp_path / "whole" / "skipped.jsonl").read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("function", ["andromeda.data.build._CorpusBuilder._encode", "shutil.rmtree", "pathlib.Path.rename"])
def test_an_interrupted_append_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """Whenever it stops, the corpus is the old one or the new one after the next call."""
    out, more, _ = appended(tmp_path)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(function, stop)
        with pytest.raises(KeyboardInterrupt):
            append(more, out, BuildConfig())
    manifest = append(more, out, BuildConfig())
    assert verify_corpus(out) == manifest
    assert sum(split.documents for split in manifest.splits.values()) == len(set(DOCUMENTS))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_an_append_keeps_the_settings_of_the_corpus(tmp_path: Path) -> None:
    out, more, _ = appended(tmp_path)
    with pytest.raises(ConfigError, match="leave out validation_fraction, vocab_size"):
        append(more, out, BuildConfig(vocab_size=400, validation_fraction=0.2))
    with pytest.raises(DataError, match="no finished corpus"):
        append(more, tmp_path / "none", BuildConfig())


def test_max_bytes_takes_a_sample_that_does_not_depend_on_workers(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "raw", texts(400))
    config = CONFIG.model_copy(update={"max_bytes": 20_000})
    a, b = (build([str(folder), str(folder)], tmp_path / f"{w}", config, workers=w) for w in (1, 2))
    assert a == b
    assert 15_000 < a.sources[0].bytes <= 20_000
    assert a.sources[1].skipped["duplicate"] == a.sources[0].kept  # each source has its own limit
    first = sum(len(t.encode()) for t in texts(400)[: a.sources[0].kept])
    assert a.sources[0].bytes != first  # not the first names of the alphabet


def test_ranges_of_a_large_jsonl_give_every_line_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(DOCUMENTS))
    size = path.stat().st_size
    starts = [i for i in range(size) if path.read_bytes()[i - 1 : i] == b"\n"][:5]
    for borders in (
        [0, size],
        [0, *starts, size],
        [0, *(s - 1 for s in starts), size],
        sorted([0, size, *random.Random(0).choices(range(size), k=40)]),
    ):
        units = [ReadTask(0, "jsonl", (("a", str(path)),), a, b) for a, b in pairwise(borders)]
        assert [f.text for u in units for f in read_documents(u, CONFIG)] == DOCUMENTS
    with path.open("ab") as file:
        file.truncate(3 * RANGE_BYTES + 5)  # sparse
    assert [(u.start, u.stop) for u in list_source(0, str(path), CONFIG).tasks] == [
        (0, RANGE_BYTES), (RANGE_BYTES, 2 * RANGE_BYTES), (2 * RANGE_BYTES, 3 * RANGE_BYTES), (3 * RANGE_BYTES, 3 * RANGE_BYTES + 5)
    ]  # fmt: skip


def test_chunks_of_a_long_text_have_the_tokens_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("andromeda.data.encode.CHUNK", 100)
    long = "\n".join(f"def f{i}(x):\n    return {i}\n" for i in range(200))
    write_files(tmp_path / "raw", [long, *DOCUMENTS])
    build([str(tmp_path / "raw")], tmp_path / "out", BuildConfig(vocab_size=400))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer" / "tokenizer.json"))
    parts = list(chunked(long))
    assert len(parts) > 20
    assert "".join(parts) == long
    assert [i for p in parts for i in library.encode(p).ids] == library.encode(long).ids
    assert "".join(chunked("x" * 1000)) == "x" * 1000


def test_python_source_is_this_interpreters(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_bytes": 300_000})
    manifest = build(["python"], tmp_path / "out", config)
    assert 100_000 < manifest.sources[0].bytes <= 300_000
    listed = {name: path for unit in list_source(0, "python", CONFIG).tasks for name, path in unit.files}
    assert listed["stdlib/os.py"] == str(Path(sysconfig.get_paths()["stdlib"]) / "os.py")
    assert listed["packages/numpy/__init__.py"] == np.__file__
    assert len(set(listed.values())) == len(listed)
    assert all(p.endswith(".py") for p in listed.values())


def test_a_corpus_is_tokenized_again_on_the_same_documents(corpus: Path, tmp_path: Path) -> None:
    """A finished corpus as a source of another tokenizer's: the same held-out bytes."""
    build([str(corpus)], tmp_path / "out", BuildConfig(tokenizer="bytes", validation_fraction=0.1))
    assert (tmp_path / "out" / "val.txt").read_bytes() == (corpus / "val.txt").read_bytes()


def test_a_given_tokenizer_is_used(corpus: Path, second_corpus: Path) -> None:
    assert CorpusManifest.load(second_corpus).tokenizer == CorpusManifest.load(corpus).tokenizer
    assert (second_corpus / "tokenizer" / "tokenizer.json").read_bytes() == (corpus / "tokenizer" / "tokenizer.json").read_bytes()


def test_building_again_returns_what_is_there(tmp_path: Path) -> None:
    source = as_txt(tmp_path)
    first = build([source], tmp_path / "out", CONFIG)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert build([source], tmp_path / "out", CONFIG) == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == times


def test_another_build_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    source = as_txt(tmp_path)
    out = tmp_path / "out"
    build([source], out, CONFIG)
    with pytest.raises(DataError, match=r"other settings \(validation_fraction\)"):
        build([source], out, CONFIG.model_copy(update={"validation_fraction": 0.2}))
    with pytest.raises(DataError, match=r"other settings \(sources\)"):
        build([source, source], out, CONFIG)
    (Path(source) / "00000.txt").write_text("changed since")
    with pytest.raises(DataError, match="changed since"):
        build([source], out, CONFIG)
    assert verify_corpus(out).sources[0].read == 200
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        build([source], tmp_path / "home", CONFIG)
    with pytest.raises(DataError, match="is a file"):
        build([source], tmp_path / "home" / "thesis.txt", CONFIG)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "mine"
    (tmp_path / "home" / "thesis.txt").rename(tmp_path / "home" / "film.part")
    with pytest.raises(DataError, match="not empty"):
        build([source], tmp_path / "home", CONFIG)
    assert (tmp_path / "home" / "film.part").read_text() == "mine"


@pytest.mark.parametrize(
    ("plan", "sentence"), [("{", "not JSON"), ("[]", "another version"), ("{}", "another version"), (None, "another version")]
)
def test_a_damaged_plan_is_refused(tmp_path: Path, plan: str | None, sentence: str) -> None:
    source, out = as_txt(tmp_path), tmp_path / "out"
    build([source], out, CONFIG)
    path = out / "plan.json"
    path.write_text(plan or path.read_text().replace('"layout": 1', '"layout": 0'))
    with pytest.raises(DataError, match=sentence):
        build([source], out, CONFIG)
    verify_corpus(out)


def test_a_refused_build_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(json.dumps({"body": d}).encode() + b"\n" for d in DOCUMENTS))
    out = tmp_path / "out"
    with pytest.raises(DataError, match="fields with text: body"):
        build([str(tmp_path / "a.jsonl")], out, CONFIG)
    assert not out.exists()
    fitting = CONFIG.model_copy(update={"text_field": "body"})
    assert build([str(tmp_path / "a.jsonl")], out, fitting).sources[0].kept == 200


def test_a_folder_used_again_holds_only_the_new_build(tmp_path: Path) -> None:
    """Nothing of a deleted or refused build is remembered by the process."""
    out = tmp_path / "out"
    for seed, kind in ((1, {"vocab_size": 300}), (2, {"vocab_size": 310}), (3, {"tokenizer": "bytes"})):
        config = BuildConfig(validation_fraction=0.1, **kind)
        source = str(write_files(tmp_path / f"{seed}", [t.ljust(200) for t in texts(50, seed=seed, longest=5)]))
        with pytest.raises(ConfigError):
            build([source], out, BuildConfig(vocab_size=99_999))
        manifest = build([source], out, config)
        rows = open_stream(DataConfig(corpus=str(out)), 50, 0).batch(0, 20).ids
        fresh = tmp_path / f"fresh-{seed}"
        assert build([source], fresh, config) == manifest == verify_corpus(out)
        assert torch.equal(open_stream(DataConfig(corpus=str(fresh)), 50, 0).batch(0, 20).ids, rows)
        shutil.rmtree(out)


def test_two_builds_at_once_are_refused(tmp_path: Path) -> None:
    source = as_txt(tmp_path)

    def second(*_: object) -> None:
        with pytest.raises(DataError, match="Another build"):
            build([source], tmp_path / "out", CONFIG)

    assert build([source], tmp_path / "out", CONFIG, report=second).sources[0].kept == 200


@pytest.mark.parametrize(
    ("name", "content", "changes", "sentence"),
    [
        ("a.txt", b"one text", {}, "Only one document"),
        ("a.txt", b"", {}, "No document is left .*empty 1"),
        ("a.txt", b"\0\1\2", {}, "No document is left .*binary 1"),
        ("a.jsonl", b"{\n{\n", {}, "No document is left .*bad JSON 2"),
        ("a.csv", b"a,b", {}, r"unknown extension: known are .*--include \.csv"),
        ("a.jsnl", b"a,b", {}, r"did you mean \.jsonl\?"),
        (
            "a.txt",
            b"some\ntext\none\nmore\n" * 50,
            {"tokenizer": "bpe", "vocab_size": 9999, "split_documents_at": 10},
            "allows a bpe vocabulary of only",
        ),
        ("a.txt", b"some\ntext", {"tokenizer": "/nowhere"}, "no tokenizer at /nowhere"),
    ],
)
def test_impossible_sources_are_one_sentence(tmp_path: Path, name: str, content: bytes, changes: dict, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AndromedaError, match=sentence) as error:
        build([str(tmp_path / name)], tmp_path / "out", BuildConfig(**changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_missing_sources_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    for source, sentence in {
        str(tmp_path / "missing.txt"): "no file or folder",
        "pyton": "did you mean python",
        str(tmp_path / "empty"): "holds no file that can be read",
        "hf:": "no dataset name",
        "hf:a:b:c:d": "no dataset name",
        f"hf:{tmp_path}/missing": "cannot be opened",
    }.items():
        with pytest.raises(AndromedaError, match=sentence):
            build([source], tmp_path / "out", CONFIG)
    with pytest.raises(AndromedaError, match="Nothing to build from"):
        build([], tmp_path / "out", CONFIG)
    with pytest.raises(AndromedaError, match="leave out vocab_size"):
        build(["python"], tmp_path / "out", BuildConfig(vocab_size=300, tokenizer=str(tmp_path)))
    assert not (tmp_path / "out").exists()


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["train-00000.bin", "val-00000.bin", "train-documents.npy", "val-documents.npy", "val.txt"])
def test_verification_finds_one_flipped_bit(corpus: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(corpus, tmp_path / "c")
    verify_corpus(folder)
    flip(folder / name, (folder / name).stat().st_size - 5)
    with pytest.raises(DataError):
        verify_corpus(folder)


def test_a_corpus_with_another_tokenizer_of_its_size_is_not_opened(corpus: Path, tmp_path: Path) -> None:
    """Its tokens would be other text, or none."""
    build([str(write_files(tmp_path / "raw", texts(50, seed=9)))], tmp_path / "other", BuildConfig(vocab_size=300, validation_fraction=0.1))
    folder = shutil.copytree(corpus, tmp_path / "c")
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(tmp_path / "other" / "tokenizer", folder / "tokenizer")
    assert Tokenizer.load(folder).vocab_size == Tokenizer.load(corpus).vocab_size
    for split in ("train", "val"):
        with pytest.raises(DataError, match="is not the one its tokens were made with"):
            open_corpus(folder, split)


@pytest.mark.parametrize(("name", "sentence"), [("val.txt", "is not the text of"), ("train-documents.npy", "offsets .* cannot be read")])
@pytest.mark.parametrize("empty", [True, False])
def test_a_missing_or_empty_file_is_one_sentence(corpus: Path, tmp_path: Path, name: str, sentence: str, empty: bool) -> None:
    folder = shutil.copytree(corpus, tmp_path / "c")
    (folder / name).unlink()
    if empty:
        (folder / name).touch()
    with pytest.raises(DataError, match=sentence):
        verify_corpus(folder)


def test_a_script_without_a_main_guard_gets_a_sentence(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from andromeda.config.data import BuildConfig\nfrom andromeda.data.build import build\n"
        f"build([{as_txt(tmp_path)!r}], {str(tmp_path / 'out')!r}, BuildConfig(tokenizer='bytes'), workers=2)\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "if __name__ == '__main__'" in result.stderr.splitlines()[-1]


def test_keys_of_an_older_version_are_refused_by_their_new_names_and_read_in_an_older_manifest(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shortest is now called min_document_bytes; cut is now called split_documents_at"):
        BuildConfig(**{"shortest": 5, "cut": 9})
    folder = shutil.copytree(corpus, tmp_path / "c")
    value = json.loads((folder / "manifest.json").read_text())
    config = value["config"]
    for old, new in RENAMED_BUILD_KEYS.items():
        if old != "tokenizer_path":
            config[old] = config.pop(new)
    (folder / "manifest.json").write_text(json.dumps(value | {"config": config | {"tokenizer_path": ""}}))
    assert CorpusManifest.load(folder) == CorpusManifest.load(corpus)
    (folder / "manifest.json").write_text(json.dumps(value | {"config": config | {"tokenizer_path": "/a/tokenizer.json"}}))
    assert CorpusManifest.load(folder).config.tokenizer == "/a/tokenizer.json"
