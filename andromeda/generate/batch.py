"""Generation for one batch, from its prompts to its last token.

Prompts of different lengths are padded on the left, and the padding has its own document number, so that positions, token shift
and attention of the prompt never see it. Finished sequences leave the batch.

Shapes: B batch, T time, V vocabulary size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from andromeda.generate.decode_step import CudaGraphDecodeStep, DecodeStep, DynamicDecodeStep, supports_cuda_graph
from andromeda.generate.sampling import Sampler
from andromeda.generate.sequence import Completion, FinishReason, GeneratedSequence, StreamChunk
from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.kv_cache.protocol import KVCache
from andromeda.model.transformer import Transformer
from andromeda.utils.errors import CheckpointError
from andromeda.utils.log import get_logger

log = get_logger(__name__)

PADDING, CONTENT = 0, 1
"""Document numbers."""

MIN_TOKENS_FOR_CUDA_GRAPH = 16
"""From this number of new tokens on, capturing a CUDA graph pays."""


class GenerationBatch:
    """Sequences that are decoded together."""

    def __init__(
        self, model: Transformer, rows: Sequence[GeneratedSequence], sampler: Sampler, *, span: int, eos: int | None, tokens: int
    ) -> None:
        """span: sequence length for dynamic RoPE scaling. tokens: ids from this one on are never sampled."""
        self.model, self.rows, self.sampler = model, list(rows), sampler
        self.span, self.eos, self.tokens = span, eos, tokens
        self.device = model.head.weight.device
        self.longest = max(len(row.prompt) for row in rows)
        self.most = max(row.limit for row in rows)
        self.prefill_seconds = self.decode_seconds = 0.0

    # Not inference_mode: masks are cached by tensors' version counters, which inference tensors lack.
    @torch.no_grad()
    def run(self, chunk: int) -> Iterator[StreamChunk]:
        """The chunks of all sequences in the order of generation. chunk: tokens of a sequence per prefill pass."""
        start = time.perf_counter()
        documents = self._documents()
        record = self.most > MIN_TOKENS_FOR_CUDA_GRAPH and supports_cuda_graph(self.model, self.device)
        cache = DynamicKVCache(capacity=self.longest + (0 if record else self.most))
        ids, chosen = self._choose(self._prefill(documents, cache, chunk))
        self.prefill_seconds = time.perf_counter() - start
        start = time.perf_counter()
        step = self._step(documents, cache, record)
        self.decode_seconds = time.perf_counter() - start
        while True:
            yield from [self._piece(row, token, step.bytes()) for row, token in zip(self.rows, chosen, strict=True)]
            start = time.perf_counter()
            stay = [i for i, row in enumerate(self.rows) if not row.finish]
            if not stay:
                return
            if len(stay) < len(self.rows):
                ids = self._leave(stay, ids, step)
            ids, chosen = self._choose(step(ids))
            self.decode_seconds += time.perf_counter() - start

    def _prefill(self, documents: Tensor | None, cache: DynamicKVCache, chunk: int) -> Tensor:
        """Prefill: fill the cache with the prompts and return the logits (B, V) after them."""
        padded = [[0] * (self.longest - len(row.prompt)) + row.prompt for row in self.rows]
        ids = torch.tensor(padded, device=self.device)
        for start in range(0, self.longest, chunk):
            part = slice(start, start + chunk)
            logits = self._read(ids[:, part], None if documents is None else documents[:, part], cache)
        if logits.isnan().any():
            raise CheckpointError("The model's logits are not numbers: its weights are damaged, so use an earlier checkpoint.")
        return logits

    def _step(self, documents: Tensor | None, cache: DynamicKVCache, record: bool) -> DecodeStep:
        """The decoding step after the prefill: a CUDA graph, or eager (with a warning) where capturing fails."""
        if record:
            try:
                return CudaGraphDecodeStep(self._read, cache, self.most)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                log.warning("Writing without a CUDA graph, several times slower: recording a step failed (%s).", reason)
        return DynamicDecodeStep(self._read, cache, len(self.rows), None if documents is None else documents[:, -1:])

    def _documents(self) -> Tensor | None:
        """Document numbers (B, T) of the padded prompts; None without padding, because attention is faster without them."""
        missing = torch.tensor([self.longest - len(row.prompt) for row in self.rows], device=self.device)
        if not missing.any():
            return None
        padding = torch.arange(self.longest, device=self.device) < missing[:, None]
        return torch.where(padding, PADDING, CONTENT)

    def _read(self, ids: Tensor, documents: Tensor | None, cache: KVCache) -> Tensor:
        """Logits (B, V) at the last position of ids (B, T); no others are computed."""
        hidden = self.model.hidden(ids, documents=documents, cache=cache, span=self.span)
        return self.model.head(hidden[:, -1])[:, : self.tokens]

    def _choose(self, logits: Tensor) -> tuple[Tensor, list[int]]:
        """The next tokens, on the device and on the host."""
        ids = self.sampler(logits)
        return ids, ids.tolist()

    def _leave(self, stay: list[int], ids: Tensor, step: DecodeStep) -> Tensor:
        """Remove finished sequences; returns ids (B,) of those at the indices `stay`."""
        self.rows = [self.rows[i] for i in stay]
        rows = torch.tensor(stay, device=self.device)
        step.keep(rows)
        self.sampler.keep(rows)
        return ids[rows]

    def _piece(self, row: GeneratedSequence, token: int, size: int) -> StreamChunk:
        text = row.take(token, self.eos)
        return StreamChunk(row.index, token, text, self._completion(row, row.finish, size) if row.finish else None)

    def _completion(self, row: GeneratedSequence, finish: FinishReason, size: int) -> Completion:
        return Completion(
            index=row.index,
            text=row.text,
            ids=tuple(row.ids),
            finish=finish,
            prompt_tokens=len(row.prompt),
            seed=row.seed,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            cache_bytes=size,
        )
