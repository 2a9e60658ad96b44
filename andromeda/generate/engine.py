"""Generation with a KV cache: prompts in, chunks of text out.

Prefill reads the prompt in chunks and computes only the logits of its last position; then all sequences of a batch are decoded one
token at a time. Every sequence has its own random numbers, so that a prompt gets the same text in a batch as alone (up to
rounding in the kernels, which may break a tie between two tokens differently in low precision).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from andromeda.config.derived import original_max_seq_len
from andromeda.data.tokenizer import Tokenizer
from andromeda.generate.batch import GenerationBatch
from andromeda.generate.generation_config import GenerationConfig, parse_generation_config
from andromeda.generate.prompts import Prompt, encode, max_completion_tokens
from andromeda.generate.sampling import Sampler
from andromeda.generate.sequence import Completion, GeneratedSequence, NullTokenDecoder, StreamChunk
from andromeda.model.transformer import Transformer
from andromeda.utils.errors import CheckpointError, RequestError


class Engine:
    """Generates text with one model."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer | None = None, *, eos: int | None = None, batch: int = 8, chunk: int = 8192
    ) -> None:
        """eos: the id that ends a text, the tokenizer's own unless given. batch: prompts that are written together.
        chunk: tokens of a prompt that are read at once. Raises CheckpointError when the tokenizer is not the model's, RequestError."""
        if min(batch, chunk) < 1:
            raise RequestError(f"batch = {batch} and chunk = {chunk} must be at least 1.")
        vocab = model.config.vocab_size
        if tokenizer and tokenizer.vocab_size > vocab:
            raise CheckpointError(
                f"The tokenizer has {tokenizer.vocab_size} entries, more than the model's {vocab}: it belongs to another model."
            )
        if eos is not None and not 0 <= eos < vocab:
            raise RequestError(f"eos = {eos}, but this model knows tokens 0 to {vocab - 1} only.")
        self.model, self.tokenizer = model, tokenizer
        own = tokenizer if eos is None else None
        self.eos, self.bos = (own.eos, own.bos) if own else (eos, eos)
        # A padded vocabulary has unused rows at its end.
        self.tokens = tokenizer.vocab_size if tokenizer else vocab
        self.batch, self.chunk = batch, chunk

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[Completion]:
        """The answer to each prompt, in their order; settings as in `Settings`. Raises RequestError."""
        done = [piece.completion for piece in self.stream(prompts, **options) if piece.completion]
        return sorted(done, key=lambda completion: completion.index)

    def stream(self, prompts: Sequence[Prompt], **options: Any) -> Iterator[StreamChunk]:
        """Pieces as they are written; those of one batch alternate. Raises RequestError at once, before any work."""
        config = parse_generation_config(**options)
        rows = []
        for index, prompt in enumerate(prompts):
            try:
                rows.append(self._row(index, prompt, config))
            except RequestError as error:
                raise error if len(prompts) == 1 else RequestError(f"Prompt {index + 1} of {len(prompts)}: {error}") from None
        return self._run(rows, config)

    def _row(self, index: int, prompt: Prompt, config: GenerationConfig) -> GeneratedSequence:
        ids = encode(prompt, self.tokenizer, self.bos, self.model.config.vocab_size)
        seed = secrets.randbits(32) if config.seed is None else config.seed
        decoder = self.tokenizer.stream() if self.tokenizer else NullTokenDecoder()
        return GeneratedSequence(index, ids, max_completion_tokens(ids, self.model.config, config.max_new_tokens), seed, decoder, config)

    def _run(self, rows: list[GeneratedSequence], config: GenerationConfig) -> Iterator[StreamChunk]:
        with eval_mode(self.model):
            for span, group in self._groups(rows):
                seeds, prompts = [row.seed for row in group], [row.prompt for row in group]
                sampler = Sampler(config, prompts, seeds, self.tokens, self.model.head.weight.device)
                try:
                    yield from GenerationBatch(self.model, group, sampler, span=span, eos=self.eos, tokens=self.tokens).run(self.chunk)
                except torch.OutOfMemoryError:
                    size = max(len(row.prompt) + row.limit for row in group)
                    raise RequestError(
                        f"The device has no room for {len(group)} x {size} tokens: write fewer prompts at once, or shorter ones."
                    ) from None

    def _groups(self, rows: list[GeneratedSequence]) -> Iterator[tuple[int, list[GeneratedSequence]]]:
        """Batches of sequences, with their span: dynamic RoPE scaling depends on the length, which must then be the same in a batch."""
        spans: dict[int, list[GeneratedSequence]] = {}
        for row in rows:
            spans.setdefault(self._span(row), []).append(row)
        for span, same in spans.items():
            for start in range(0, len(same), self.batch):
                yield span, same[start : start + self.batch]

    def _span(self, row: GeneratedSequence) -> int:
        if self.model.config.rotary.scaling.kind != "dynamic":
            return self.model.config.max_seq_len
        # Up to the trained length, the frequencies do not depend on it.
        return max(len(row.prompt) + row.limit, original_max_seq_len(self.model.config))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards as it was."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
