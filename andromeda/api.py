"""The Python face: `from andromeda import Andromeda`.

model = Andromeda(dim=512, depth=8, heads=8, dim_head=64)      # the spec's names, Hugging Face's, or the keys of ModelConfig
model = Andromeda.from_run("runs/demo")                        # trained weights with their tokenizer
model.generate("def main(", max_new_tokens=200, temperature=0.7)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from andromeda.config.load import from_values, model_from_names
from andromeda.config.model import ModelConfig
from andromeda.config.own_code import allow_code as consent
from andromeda.config.run import RunConfig
from andromeda.data.tokenizer import Tokenizer
from andromeda.generate.engine import Engine
from andromeda.generate.optimize import optimize_for_inference
from andromeda.generate.prompts import Prompt
from andromeda.generate.sequence import Completion, StreamChunk
from andromeda.hub.export_folder import convert, write_folder
from andromeda.hub.import_folder import read_folder
from andromeda.model.transformer import Transformer
from andromeda.train import checkpoint
from andromeda.train.memory_check import check_weights_fit
from andromeda.train.precision import has_fast_bf16
from andromeda.train.run_dir import RunDir
from andromeda.train.state import load_model, model_tensors, resolve_device
from andromeda.train.weights import read_weights
from andromeda.utils.errors import CheckpointError, ConfigError, RequestError, nearest
from andromeda.utils.log import get_logger

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONSTRUCTION = ("tokenizer", "device", "dtype", "seed", "allow_code")
"""Arguments of the constructor that say nothing about the model's shape."""

log = get_logger()


class Andromeda(Transformer):
    """A language model and its tokenizer: a `torch.nn.Module` that gives logits when called, writes, saves and loads.

    `Andromeda()` is preset `andromeda` with its 2.5 billion parameters, and every name changes it; docs/configuration.md
    lists the names.
    """

    def __init__(
        self,
        config: ModelConfig | None = None,
        *,
        tokenizer: Tokenizer | str | Path | None = None,
        embedding_provider: str | type[nn.Module] | nn.Module | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = "fp32",
        seed: int = 0,
        allow_code: bool = False,
        **names: Any,
    ) -> None:
        """Build a model with random weights. Raises ConfigError, one sentence.

        config or names: its shape. tokenizer: one, or where it lies. embedding_provider: a name, a class that takes the
        ModelConfig, or a module, which keeps its weights. device: also "meta", which holds no weights. dtype: of the
        weights; fp64, fp32, bf16, fp16 or auto. seed: of the weights. allow_code: import classes that are not Andromeda's and that
        config or names give by package.module:Class; a class or module that is given itself needs no consent.
        """
        module = embedding_provider if isinstance(embedding_provider, nn.Module) else None
        if embedding_provider is not None and not (module and config):
            names["embedding_provider"] = embedding_provider
        if config and names:
            raise ConfigError(f"{', '.join(names)} cannot change a ModelConfig that is given: leave one of them out.")
        meta, config = str(device) == "meta", config or model_from_names(**names)
        given = isinstance(embedding_provider, type)
        with consent(allow_code), consent([config.embedding.provider] if given else []):
            if not meta and module is None:
                check_weights_fit(config, torch.device("cpu"))
            with torch.device("meta" if meta else "cpu"):
                super().__init__(config, embedding=module, seed=seed)
        self.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer | None) else Tokenizer.load(tokenizer)
        place(self, torch.device("meta") if meta else resolve_device(str(device), "device"), dtype)

    @classmethod
    def from_preset(cls, preset: str, **rest: Any) -> Self:
        """A model of a preset's shape with random weights; `rest` as in the constructor, names changing the preset."""
        names = {name: rest.pop(name) for name in list(rest) if name not in CONSTRUCTION}
        provider = names.get("embedding_provider")
        config = from_values({"preset": preset, "model": names}).model
        with consent([config.embedding.provider] if isinstance(provider, type) else []):
            return cls(config, embedding_provider=provider if isinstance(provider, nn.Module) else None, **rest)

    @classmethod
    def from_run(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str = "auto",
        ema: bool = False,
        step: int | None = None,
        allow_code: bool = False,
    ) -> Self:
        """The trained model of a run folder, in evaluation mode, with its tokenizer.

        device: auto takes the first GPU, else the CPU. dtype: auto takes bf16 on a GPU that computes it fast, else fp32.
        ema: the moving average of the weights. step: an older checkpoint. allow_code: import the classes of a
        user's own that the run names, which runs their modules. Raises an AndromedaError, one sentence.
        """
        config, weights = read_weights(path, average=ema, step=step, warn=log.warning)
        kept = Path(path) / "tokenizer"
        model = cls(config, tokenizer=kept if kept.exists() else None, allow_code=allow_code)
        load_model(model, weights)
        place(model, resolve_device(str(device), "device"), dtype)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: torch.device | str = "auto", dtype: torch.dtype | str = "auto", tokenizer: bool = True
    ) -> Self:
        """The model of a Hugging Face folder on this machine, in evaluation mode; device and dtype as in `from_run`.

        tokenizer: read its tokenizer too. Nothing of the folder is run. Raises an AndromedaError, one sentence.
        """
        imported = read_folder(path, tokenizer=tokenizer)
        model = cls(imported.config, tokenizer=imported.tokenizer)
        load_model(model, imported.weights)
        place(model, resolve_device(str(device), "device"), dtype)
        return model.eval()

    def save(self, path: str | Path) -> None:
        """Write configuration, weights and tokenizer to a new run folder, as `from_run` and the command line read it.

        Raises CheckpointError when there is one already.
        """
        folder = RunDir(path)
        if folder.exists:
            raise CheckpointError(f"{path} already holds a run: save to another folder.")
        folder.create()
        checkpoint.save(folder.checkpoints, checkpoint.Snapshot(0, {"model": model_tensors(self)}, {"healthy": True}))
        if self.tokenizer:
            self.tokenizer.save(folder.path / "tokenizer")
        # Last, because it makes the folder a run.
        folder.write_config(RunConfig(name=folder.path.name or "model", model=self.config))

    def save_pretrained(self, path: str | Path, *, dtype: str = "fp32") -> None:
        """Write a Hugging Face folder that transformers loads, as `andromeda export` does. dtype: of the weights; fp32, bf16 or fp16.

        Raises ConfigError where a part of the model has no form there.
        """
        write_folder(Path(path), convert(self.config, model_tensors(self)), self.tokenizer, dtype=dtype)

    def generate(self, prompt: Prompt | Sequence[Prompt], *, stream: bool = False, batch: int = 8, **settings: Any) -> Any:
        """What follows a prompt: text for text, token ids (a list) for token ids, a list of answers for a list of prompts.

        stream: an iterator over the pieces of one answer instead. batch: prompts that are written at once.
        settings: max_new_tokens, stop, temperature, top_k, top_p, min_p, repetition_penalty, seed (docs/generation.md).
        For counts, speed and the reason of the end use `andromeda.generate.engine.Engine`. Raises RequestError.
        """
        engine = Engine(self, self.tokenizer, batch=batch)
        several = is_batch(prompt)
        prompts: list[Any] = list(prompt) if several else [prompt]
        if stream:
            if several:
                raise RequestError("A stream is of one prompt: give one, or use Engine.stream, whose pieces name their prompt.")
            return _shown(engine.stream(prompts, **settings), isinstance(prompt, str))
        answers = [_answer(*pair) for pair in zip(engine.generate(prompts, **settings), prompts, strict=True)]
        return answers if several else answers[0]

    def optimize_for_inference(self, *, fp8: bool = False, compile: bool = True, decode_kernels: bool = True) -> Self:
        """Make this model faster for inference, in place; it can be trained no more.

        eight_bits: linear layers of the blocks in 8 bits. compiled: torch.compile. kernels: steps of one token by
        kernels of their own. Details in `andromeda.generate.optimize`.
        """
        optimize_for_inference(self, fp8=fp8, compile=compile, decode_kernels=decode_kernels)
        return self

    def num_parameters(self) -> int:
        """Number of weights, a shared one counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def __repr__(self) -> str:
        """What the model is made of, in four lines."""
        c, a, rotary, weight = self.config, self.config.attention, self.config.rotary, self.head.weight
        dtype = str(weight.dtype).removeprefix("torch.")
        parts = [f"feed-forward {c.feedforward.kind}", f"QK norm {a.qk_norm}", f"shift {c.shift.kind}"]
        heads = f"{a.num_heads} heads of {a.head_dim}, {a.num_kv_heads} of keys and values"
        positions = [rotary.kind] * (rotary.kind != "none") + [f"ALiBi on {c.alibi.num_heads} heads"] * bool(c.alibi.num_heads)
        return "\n".join(
            [
                f"Andromeda with {_rounded(self.num_parameters())} parameters, {dtype} on {weight.device}",
                f"  {c.num_layers} layers of width {c.hidden_size}, {c.block.kind}, {heads}",
                f"  positions: {' and '.join(positions) or 'none'}; {', '.join(parts)}",
                f"  context {c.max_seq_len:,}, vocabulary {c.vocab_size:,}, {self.tokenizer.kind if self.tokenizer else 'no'} tokenizer",
            ]
        )


def is_batch(prompt: Any) -> bool:
    """Whether these are several prompts: a list of texts or of id lists, or ids (B, T)."""
    if isinstance(prompt, Tensor):
        return prompt.ndim == 2
    return (
        isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes) and any(isinstance(p, str | Sequence | Tensor) for p in prompt)
    )


def place(model: nn.Module, device: torch.device, dtype: torch.dtype | str) -> None:
    """Move a model and give its weights a type. Buffers keep theirs: those that are float32 have a reason."""
    if isinstance(dtype, str):
        if dtype == "auto":
            # On CPUs with bfloat16 matmuls decoding gains nothing and prefill loses (docs/generation.md).
            dtype = "bf16" if device.type == "cuda" and has_fast_bf16(device) else "fp32"
        if dtype not in DTYPES:
            raise ConfigError(f"There is no dtype {dtype!r}{nearest(dtype, DTYPES)}: give auto, {', '.join(DTYPES)}.")
        dtype = DTYPES[dtype]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    model.to(device)


def _shown(pieces: Iterator[StreamChunk], text: bool) -> Iterator[str | int]:
    for piece in pieces:
        if not text and not (piece.completion and piece.completion.finish == "eos"):
            yield piece.token
        elif text and piece.text:
            yield piece.text


def _answer(completion: Completion, prompt: Prompt) -> str | list[int]:
    return completion.text if isinstance(prompt, str) else list(completion.ids)


def _rounded(count: int) -> str:
    """A count in the unit that suits it: 2.45 B, 126 M, 12,345."""
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"
