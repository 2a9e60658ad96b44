"""Andromeda as a model of lm-evaluation-harness, in this process: all of its tasks then work, scored by its own rules.

Imports lm_eval, an extra; nothing else imports this file before that is known to be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM

from andromeda.data.tokenizer import Tokenizer
from andromeda.evaluate.token_loss import ContinuationLikelihood, continuation_likelihoods
from andromeda.generate.engine import Engine
from andromeda.model.transformer import Transformer
from andromeda.utils.progress_callback import ProgressCallback, no_progress

NEW_TOKENS = 256


class AndromedaLM(TemplateLM):
    """Contexts begin with the document separator, as every text does in training, unless `begin` is off.

    What is longer than the model's context loses its beginning, as with the harness's own models.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, begin: bool = True, report: ProgressCallback = no_progress) -> None:
        super().__init__()
        self.model, self._tokenizer, self._begin, self._report = model, tokenizer, begin, report
        self._engine = Engine(model, tokenizer)

    @property
    def eot_token_id(self) -> int:
        """The separator."""
        return self._tokenizer.eos

    @property
    def max_length(self) -> int:
        """Tokens of context."""
        return self.model.config.max_seq_len

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text."""
        begin = self._begin if add_special_tokens is None else add_special_tokens
        return [self.eot_token_id] * begin + self._tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """Log-likelihood of (_, context, continuation) each, and whether it is the greedy one."""
        pairs = []
        for _, context, continuation in requests:
            kept = [*context, *continuation][-(self.max_length + 1) :]
            cut = max(1, len(kept) - len(continuation))
            pairs.append((kept[:cut], kept[cut:]))
        found: list[ContinuationLikelihood] = continuation_likelihoods(self.model, pairs, self._report)
        return [(one.log, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, cut into windows that do not overlap."""
        found = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.eot_token_id, max_seq_len=self.max_length, context_len=1
            )
            found.append(sum(log for log, _ in self._loglikelihood_tokens([(None, *utils.make_disjoint_window(w)) for w in windows])))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to a stop text."""
        found = []
        for number, request in enumerate(requests):
            context, options = request.args
            until = options.get("until") or []
            stop = tuple(one for one in ([until] if isinstance(until, str) else until) if one)
            count = min(options.get("max_gen_toks") or NEW_TOKENS, self.max_length - 1)
            temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
            prompt = self.tok_encode(context)[-(self.max_length - count) :]
            answer = self._engine.generate([prompt], max_new_tokens=count, temperature=temperature, top_k=0, seed=0, stop=stop)
            found.append(answer[0].text)
            self._report("generation", number + 1, len(requests))
        return found
