"""Andromeda as a model of lm-evaluation-harness, in this process: all of its tasks then work, scored by its own rules.

Imports lm_eval, an extra; nothing else imports this module before that is known to be installed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from lm_eval import utils
from lm_eval.api.model import TemplateLM

from andromeda.data.tokenizer import Tokenizer
from andromeda.evaluate.token_loss import TokenPair, continuation_likelihoods
from andromeda.generate.engine import Engine
from andromeda.model.transformer import Transformer
from andromeda.utils.errors import RequestError
from andromeda.utils.log import get_logger
from andromeda.utils.progress_callback import ProgressCallback, no_progress

NEW_TOKENS = 256
"""Tokens to generate where a task does not say how many."""

log = get_logger()


class ContextOverflow(RequestError):
    """A request that is longer than the model's context."""

    def __init__(self, tokens: int, context: int) -> None:
        super().__init__(f"A request has {tokens} tokens, more than this model's context of {context}.")
        self.tokens = tokens


class _Generation(NamedTuple):
    """How one request is continued."""

    max_new_tokens: int
    temperature: float
    stop: tuple[str, ...]


class AndromedaLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """The harness's interface over one of our models.

    A text is read after one document separator, as in training; with `begin=False` only where it would otherwise have nothing
    before it. Each token of a continuation is scored exactly once. A context that does not fit in front of its continuation loses its
    beginning, as with the harness's own models, which is logged; with `truncate=False` it raises ContextOverflow.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        begin: bool = True,
        truncate: bool = True,
        report: ProgressCallback = no_progress,
    ) -> None:
        super().__init__()
        self.model, self._tokenizer, self._begin, self._truncate, self._report = model, tokenizer, begin, truncate, report
        self._engine = Engine(model, tokenizer)

    @property
    def eot_token_id(self) -> int:
        """The document separator."""
        return self._tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """The token that begins a text."""
        return self._tokenizer.bos

    @property
    def max_length(self) -> int:
        """The model's context in tokens."""
        return self.model.config.max_seq_len

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text, after the token that begins one by default if the adapter was made with `begin`."""
        begin = self._begin if add_special_tokens is None else add_special_tokens
        return [self.prefix_token_id] * begin + self._tokenizer.encode_start(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and of its continuation, which spell both exactly.

        Spaces at the end of the context belong to the continuation's first token, as in TemplateLM. Where a token of the joint text
        spans the border, the two are encoded separately: no split of the joint tokens spells the continuation then.
        """
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if not continuation:
            raise RequestError("A task asks for the likelihood of an empty continuation: give every choice at least one character.")
        before, whole = self.tok_encode(context), self.tok_encode(context + continuation)
        after = whole[len(before) :] if whole[: len(before)] == before else self._tokenizer.encode(continuation)
        return before or [self.prefix_token_id], after

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each (context, continuation), and whether the continuation is the greedy one."""
        return self._loglikelihood_tokens([(one.args, *self._encode_pair(*one.args)) for one in requests])

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """The same for (_, context, continuation) as token ids."""
        pieces = [self._fit(list(context), list(continuation)) for _, context, continuation in requests]
        overflow = sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        self._warn(overflow, len(requests))
        found = iter(continuation_likelihoods(self.model, [pair for pairs in pieces for pair in pairs], self._report))
        results = []
        for pairs in pieces:
            likelihoods = [next(found) for _ in pairs]
            results.append((sum(one.log for one in likelihoods), all(one.greedy for one in likelihoods)))
        return results

    def _fit(self, context: list[int], continuation: list[int]) -> list[TokenPair]:
        """Pairs that fit into the model's context and score every token of the continuation once."""
        length = len(context) + len(continuation)
        if length <= self.max_length + 1:
            return [(context, continuation)]
        if not self._truncate:
            raise ContextOverflow(length, self.max_length)
        room = self.max_length + 1 - len(continuation)
        return [(context[-room:], continuation)] if room > 0 else self._windows(continuation, context[-1])

    def _windows(self, tokens: list[int], prefix: int) -> list[TokenPair]:
        """Disjoint windows over a text that follows the token `prefix`."""
        rolling = utils.get_rolling_token_windows(token_list=tokens, prefix_token=prefix, max_seq_len=self.max_length, context_len=1)
        return [utils.make_disjoint_window(window) for window in rolling]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text after the token that begins one, in windows that do not overlap."""
        windows = [self._windows(self._tokenizer.encode_start(one.args[0]), self.prefix_token_id) for one in requests]
        found = iter(continuation_likelihoods(self.model, [pair for pairs in windows for pair in pairs], self._report))
        return [sum(next(found).log for _ in pairs) for pairs in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop text. Equal settings are generated in batches."""
        groups: dict[_Generation, list[int]] = defaultdict(list)
        prompts, overflow = [], 0
        for index, request in enumerate(requests):
            context, settings = request.args
            prompt, count = self._fit_prompt(self.tok_encode(context) or [self.prefix_token_id], settings.get("max_gen_toks") or NEW_TOKENS)
            overflow += len(prompt) < len(self.tok_encode(context))
            prompts.append(prompt)
            groups[self._generation(settings, count)].append(index)
        self._warn(overflow, len(requests))
        texts: dict[int, str] = {}
        for how, indices in groups.items():
            settings = {"max_new_tokens": how.max_new_tokens, "temperature": how.temperature, "stop": how.stop, "top_k": 0, "seed": 0}
            # A sampled text is drawn from the seed alone, whatever else is asked.
            batches = [indices] if how.temperature == 0 else [[index] for index in indices]
            for batch in batches:
                for chunk in self._engine.stream([prompts[index] for index in batch], **settings):
                    if chunk.completion:
                        texts[batch[chunk.completion.index]] = chunk.completion.text
                        self._report("generation", len(texts), len(requests))
        return [texts[index] for index in range(len(requests))]

    def _fit_prompt(self, prompt: list[int], count: int) -> tuple[list[int], int]:
        """The prompt and the number of tokens to generate: fewer where the whole prompt leaves less room."""
        room = self.max_length - len(prompt)
        if room >= 1:
            return prompt, min(count, room)
        if not self._truncate:
            raise ContextOverflow(len(prompt) + 1, self.max_length)
        count = min(count, self.max_length - 1)
        return prompt[-(self.max_length - count) :], count

    def _generation(self, settings: dict[str, Any], count: int) -> _Generation:
        until = settings.get("until") or []
        stop = tuple(one for one in ([until] if isinstance(until, str) else until) if one)
        return _Generation(count, float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0, stop)

    def _warn(self, overflow: int, requests: int) -> None:
        if overflow:
            log.warning(
                "%d of %d requests are longer than this model's context of %d tokens: the beginning of their context was left out.",
                overflow, requests, self.max_length,
            )  # fmt: skip
