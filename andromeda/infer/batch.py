"""One batch from its prompts to its last token.

Prompts of different lengths are padded on the left, and the padding is a document of its own: positions, token shift and
attention of the prompt then never see it, by the model's own contract. A sequence that ends leaves the batch.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from andromeda.errors import CheckpointError
from andromeda.infer.row import Completion, Piece, Row
from andromeda.infer.sampling import Sampler
from andromeda.model.cache import Cache
from andromeda.model.transformer import Transformer

PADDING, CONTENT = 0, 1
"""Document numbers."""


class Batch:
    """Sequences that are written together."""

    def __init__(self, model: Transformer, rows: Sequence[Row], sampler: Sampler, *, span: int, eos: int | None, tokens: int) -> None:
        """span: length for dynamic frequency scaling. tokens: ids from this one on are never chosen."""
        self.model, self.rows, self.sampler = model, list(rows), sampler
        self.span, self.eos, self.tokens = span, eos, tokens
        self.device = model.head.weight.device
        longest = max(len(row.prompt) for row in rows)
        self.padded = any(len(row.prompt) < longest for row in rows)
        self.cache = Cache(capacity=longest + max(row.limit for row in rows))
        self.prefill_seconds = self.decode_seconds = 0.0

    def run(self, chunk: int) -> Iterator[Piece]:
        """Every piece of every sequence, in the order in which they come. chunk: tokens of a row that prefill reads at once."""
        start = time.perf_counter()
        ids = self._choose(self._prefill(chunk))
        chosen = ids.tolist()
        self.prefill_seconds = time.perf_counter() - start
        while True:
            yield from [self._piece(row, token) for row, token in zip(self.rows, chosen, strict=True)]
            ids = self._leave(ids)
            if not self.rows:
                return
            start = time.perf_counter()
            ids = self._choose(self._forward(ids[:, None], self._documents(len(self.rows), 1)))
            chosen = ids.tolist()
            self.decode_seconds += time.perf_counter() - start

    def _prefill(self, chunk: int) -> Tensor:
        """Logits (B, V) after the prompts."""
        longest = max(len(row.prompt) for row in self.rows)
        padded = [[0] * (longest - len(row.prompt)) + row.prompt for row in self.rows]
        ids = torch.tensor(padded, device=self.device)
        documents = self._documents(*ids.shape)
        if documents is not None:
            for numbers, row in zip(documents, self.rows, strict=True):
                numbers[: longest - len(row.prompt)] = PADDING
        for start in range(0, longest, chunk):
            part = slice(start, start + chunk)
            logits = self._forward(ids[:, part], None if documents is None else documents[:, part])
        if logits.isnan().any():
            raise CheckpointError("The model's logits are not numbers: its weights are damaged, so use an earlier checkpoint.")
        return logits

    def _documents(self, B: int, T: int) -> Tensor | None:
        """Document numbers of tokens that are not padding, None in a batch that has none (attention is faster without)."""
        return torch.full((B, T), CONTENT, device=self.device) if self.padded else None

    @torch.inference_mode()
    def _forward(self, ids: Tensor, documents: Tensor | None) -> Tensor:
        """Logits (B, V) at the last of ids (B, T); no others are computed."""
        hidden = self.model.hidden(ids, documents=documents, cache=self.cache, span=self.span)
        return self.model.head(hidden[:, -1])[:, : self.tokens]

    @torch.inference_mode()
    def _choose(self, logits: Tensor) -> Tensor:
        return self.sampler(logits)

    def _piece(self, row: Row, token: int) -> Piece:
        text = row.take(token, self.eos)
        return Piece(row.index, token, text, self._completion(row) if row.finish else None)

    def _completion(self, row: Row) -> Completion:
        assert row.finish
        return Completion(
            index=row.index,
            text=row.text,
            ids=tuple(row.ids),
            finish=row.finish,
            prompt_tokens=len(row.prompt),
            seed=row.seed,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            cache_bytes=self.cache.bytes() // len(self.rows),
        )

    @torch.inference_mode()
    def _leave(self, ids: Tensor) -> Tensor:
        """Let finished sequences go; ids (B,) of those that stay."""
        stay = [i for i, row in enumerate(self.rows) if not row.finish]
        if len(stay) < len(self.rows):
            self.rows = [self.rows[i] for i in stay]
            rows = torch.tensor(stay, dtype=torch.long, device=self.device)
            ids = ids[rows]
            if stay:
                self.cache.keep(rows)
                self.sampler.keep(rows)
        return ids
