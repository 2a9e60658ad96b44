"""Texts that a model writes while it trains: samples/training.jsonl in the run folder, one JSON object a line.

    {"step": 500, "prompt": "def ", "text": "main(", "temperature": 0.8, "seed": 0, "finish": "length"}

`text` follows `prompt`; `finish` is `eos` where the model ended the text, `length` after `max_new_tokens`. The random numbers are those
of `seed` alone, so that a resumed run writes the same lines, and the training's own random states are not touched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from andromeda.config.run import RunConfig
from andromeda.config.train import SamplesConfig
from andromeda.data.tokenizer import Tokenizer
from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.transformer import Transformer
from andromeda.train.precision import Precision
from andromeda.utils.errors import ConfigError
from andromeda.utils.files import write_whole
from andromeda.utils.untrusted import MalformedFile, parse_json, read_regular

FILE = "training.jsonl"
MAX_BYTES = 64 << 20


class Samples:
    """Writes a continuation of each prompt at every call."""

    def __init__(self, config: SamplesConfig, tokenizer: Tokenizer, seed: int) -> None:
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        self._prompts = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in config.prompts]

    @torch.no_grad()
    def __call__(self, model: Transformer, precision: Precision) -> list[dict[str, Any]]:
        """One object for each prompt, without its step."""
        model.eval()
        # Their shapes come once in a while: not worth compiling for.
        with torch.compiler.set_stance("force_eager"), precision.autocast():
            written = [self._continue(model, ids, precision.device) for ids in self._prompts]
        model.train()
        settings = {"temperature": self._config.temperature, "seed": self._seed}
        return [{"prompt": prompt, **text, **settings} for prompt, text in zip(self._config.prompts, written, strict=True)]

    def _continue(self, model: Transformer, prompt: list[int], device: torch.device) -> dict[str, Any]:
        """A text as `andromeda generate --top-k 0` with the same seed and temperature would write it."""
        random = torch.Generator().manual_seed(self._seed)
        limit, tokenizer, ids = self._config.max_new_tokens, self._tokenizer, list(prompt)
        cache = DynamicKVCache(capacity=len(prompt) + limit)
        unread = torch.tensor([ids], device=device)
        for _ in range(limit):
            hidden = model.hidden(unread, cache=cache, span=len(prompt) + limit)
            logits = model.head(hidden[:, -1])[0, : tokenizer.vocab_size].double()
            token = self._choose(logits, float(torch.rand((), generator=random, dtype=torch.float64)))
            if token == tokenizer.eos:
                return {"text": tokenizer.decode(ids[len(prompt) :]), "finish": "eos"}
            ids.append(token)
            unread = torch.tensor([[token]], device=device)
        return {"text": tokenizer.decode(ids[len(prompt) :]), "finish": "length"}

    def _choose(self, logits: torch.Tensor, uniform: float) -> int:
        """The token of logits (V,) at which their cumulative distribution passes `uniform` in [0, 1)."""
        if self._config.temperature == 0:
            return int(logits.argmax())
        cumulative = ((logits - logits.amax()) / self._config.temperature).softmax(-1).cumsum(-1)
        return min(int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)), len(logits) - 1)


def build_samples(config: RunConfig, tokenizer: Tokenizer | None) -> Samples | None:
    """What `train.samples` asks for, or None. Raises ConfigError without a tokenizer, and for texts longer than the context."""
    wanted = config.train.samples
    if not wanted.every:
        return None
    if tokenizer is None:
        raise ConfigError("train.samples needs a corpus with a tokenizer: set train.samples.every=0.")
    samples = Samples(wanted, tokenizer, config.seed)
    longest = max(map(len, samples._prompts), default=0) + wanted.max_new_tokens
    if longest > config.model.max_seq_len:
        raise ConfigError(
            f"train.samples writes texts of {longest} tokens with their prompts, and model.max_seq_len is {config.model.max_seq_len}: "
            "lower train.samples.max_new_tokens or shorten the prompts."
        )
    return samples


def write_samples(folder: Path, step: int, samples: list[dict[str, Any]]) -> None:
    """Add the samples of a step, in place of what an earlier attempt wrote from this step on."""
    lines = [json.dumps({"step": step} | sample, ensure_ascii=False) for sample in samples]
    write_whole(folder / FILE, "".join(f"{line}\n" for line in [*_lines_before(folder / FILE, step), *lines]).encode("utf-8", "replace"))


def _lines_before(path: Path, step: int) -> list[str]:
    try:
        lines = read_regular(path, MAX_BYTES).decode("utf-8").split("\n")
    except (OSError, MalformedFile, UnicodeDecodeError):
        return []
    return [line for line in lines if _is_before(line, step)]


def _is_before(line: str, step: int) -> bool:
    try:
        written = parse_json(line)
    except MalformedFile:
        return False
    return isinstance(written, dict) and type(written.get("step")) is int and written["step"] < step
