"""SentencePiece Unigram (Kudo 2018, arXiv:1804.10959), trained so that no character is ever changed."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

from andromeda.config.data import BuildConfig
from andromeda.data.encoders import SEPARATOR, Encoder
from andromeda.utils.errors import ConfigError, DataError

SPACE = "\u2581"
"""The character that SentencePiece writes for a space; text that holds it itself is spelled in bytes."""
THREADS = 4
"""Fixed, because the trainer's sums depend on the number of threads and its result must not depend on the machine."""

MAX_TRAINING_SENTENCE = 4096
"""Characters that are trained on at once. The trainer's time grows with the square of a repetition's length, such as a run of spaces."""


class UnigramEncoder(Encoder):
    """A SentencePiece model with byte fallback; decoding goes through our own table, so it is exact."""

    kind = "unigram"
    file_name = "tokenizer.model"

    def __init__(self, blob: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self.model_file = blob
        try:
            self._model = SentencePieceProcessor(model_proto=blob)
        except RuntimeError as error:
            raise DataError("The SentencePiece model cannot be read: build or export it again.") from error
        model, ids = self._model, range(self._model.vocab_size())
        self.special_tokens = {model.id_to_piece(i): i for i in ids if model.is_control(i)}
        self.token_bytes = [self._spell(i) for i in ids]
        self._space_ids = [self.token_bytes.index(bytes([b])) for b in SPACE.encode()] if self._has_bytes() else []

    def _spell(self, i: int) -> bytes:
        if self._model.is_control(i) or self._model.is_unknown(i):
            return b""
        piece = self._model.id_to_piece(i)
        return bytes([int(piece[3:5], 16)]) if self._model.is_byte(i) else piece.replace(SPACE, " ").encode()

    def _has_bytes(self) -> bool:
        return any(self._model.is_byte(i) for i in range(self._model.vocab_size()))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._model.encode(texts, num_threads=1)
        for i, text in enumerate(texts):
            if SPACE in text:
                ids[i] = self._encode_with_marks(text)
        return ids

    def _encode_with_marks(self, text: str) -> list[int]:
        """Encode around the characters that SentencePiece would take for spaces."""
        pieces: list[list[int]] = self._model.encode(text.split(SPACE), num_threads=1)
        first, *rest = pieces
        return first + [i for part in rest for i in (*self._space_ids, *part)]


def train(texts: Iterable[str], config: BuildConfig) -> UnigramEncoder:
    """Learn `config.vocab_size` pieces: special tokens, the 256 bytes, then the pieces of the most likely segmentations."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=(
                text[i : i + MAX_TRAINING_SENTENCE].replace(SPACE, " ")
                for text in texts
                for i in range(0, len(text), MAX_TRAINING_SENTENCE)
            ),
            model_writer=model,
            model_type="unigram",
            vocab_size=config.vocab_size,
            control_symbols=[SEPARATOR, *config.special_tokens],
            normalization_rule_name="identity",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9999,
            max_sentence_length=1 << 30,
            num_threads=THREADS,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ConfigError(_explain(str(error), config)) from error
    return UnigramEncoder(model.getvalue())


def _explain(message: str, config: BuildConfig) -> str:
    """One sentence for the trainer's refusals, which name the limit inside a C++ source line."""
    if limit := re.search(r"value <= (\d+)", message):
        return f"The text allows a unigram vocabulary of at most {limit[1]}, not {config.vocab_size}: ask for that or give more text."
    if limit := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"A unigram vocabulary of {config.vocab_size} is too small: this text needs more than {limit[1]} (bytes and characters)."
    return f"The unigram tokenizer cannot be trained on this text ({message.splitlines()[0] if message else 'no text'}): give more text."


def load(blob: bytes) -> UnigramEncoder:
    return UnigramEncoder(blob)


def add_special(blob: bytes, first: int, names: Sequence[str]) -> bytes:
    """A SentencePiece model with control pieces `names` added behind its last piece."""
    from sentencepiece import sentencepiece_model_pb2 as generated  # its classes are made when it is imported

    del first
    kind: Any = vars(generated)["ModelProto"]
    model = kind.FromString(blob)
    for name in names:
        model.pieces.add(piece=name, score=0.0, type=kind.SentencePiece.CONTROL)
    model.trainer_spec.vocab_size = len(model.pieces)
    changed: bytes = model.SerializeToString(deterministic=True)
    return changed
