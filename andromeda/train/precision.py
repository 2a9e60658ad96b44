"""Compute precision of a training step: one strategy object each, chosen once.

Weights, gradients and optimizer state are always float32; what varies is the compute dtype of the matmuls (autocast) and whether the
loss is scaled. fp32 does neither.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from andromeda.model import master_weight_linear
from andromeda.model.transformer import Transformer
from andromeda.ops import float8, float8_inference
from andromeda.train import convert_float8
from andromeda.utils.dtensor import local
from andromeda.utils.errors import ConfigError, MissingExtra


class Precision:
    """fp32, and the interface of all precisions: what wraps the forward pass, the backward pass and the update."""

    name: ClassVar[str] = "fp32"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._one = torch.ones((), device=device)

    gather_dtype: ClassVar[torch.dtype | None] = None
    """Dtype in which matrices that are sharded over processes are gathered; None is their own."""

    def convert_model(self, model: Transformer, *, sharded: bool = False) -> Transformer:
        """Replace the modules that this precision needs; the trained weights stay float32.

        sharded: the weights will be sharded over processes (FSDP), and cannot be cast beforehand.
        """
        return model

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Wraps the forward pass and the loss."""
        return contextlib.nullcontext()

    def accumulate_grads(self) -> contextlib.AbstractContextManager[Any]:
        """Wraps the micro-batches of a step, whose gradients are accumulated."""
        return contextlib.nullcontext()

    @property
    def loss_scale(self) -> Tensor:
        """Factor of the loss before the backward pass, shape ()."""
        return self._one

    def unscale_grads(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the loss scale, in place, before they are clipped."""

    syncs_every_step = False
    """Whether the host must read the gradient norm of every step."""

    def overflowed(self, loss: float, norm: float) -> bool:
        """Whether a step overflowed the range of this precision, which is no loss spike."""
        return False

    def update(self, norm: float) -> None:
        """After every step, taken or not."""

    def state_dict(self) -> dict[str, Any]:
        """State, for JSON."""
        return {}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class HalfPrecision(Precision):
    """16-bit matmuls. On a GPU the blocks' weights are cast once a step, and the gradients accumulate inside the matmuls."""

    dtype: ClassVar[torch.dtype]

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._layers: Sequence[master_weight_linear.MasterWeightLinear] = ()

    def convert_model(self, model: Transformer, *, sharded: bool = False) -> Transformer:
        """Replace the linear layers of the blocks on a GPU; parameters and their names stay."""
        if self.device.type == "cuda":
            self.convert_linears(model, cached=not sharded)
        return model

    def convert_linears(self, model: Transformer, cached: bool = True) -> Sequence[master_weight_linear.MasterWeightLinear]:
        """Exchange the linear layers of the blocks on any device; returns those whose weights lead a matmul."""
        layers = master_weight_linear.convert_to_master_weights(model.decoder, _is_block_linear, self.dtype, cached)
        # FSDP sums the gradients of sharded weights over the micro-batches, in float32.
        self._layers = layers if cached else ()
        return layers

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """16-bit matmuls."""
        return torch.autocast(self.device.type, dtype=self.dtype)

    def accumulate_grads(self) -> contextlib.AbstractContextManager[Any]:
        """Weight gradients accumulate inside the matmuls that compute them."""
        return master_weight_linear.accumulate_weight_grads(self._layers)


class BFloat16(HalfPrecision):
    """bfloat16 matmuls; bfloat16 has the range of float32, so that the loss is not scaled."""

    name = "bf16"
    dtype = gather_dtype = torch.bfloat16


class Float16(HalfPrecision):
    """float16 matmuls with a scaled loss (arXiv 1710.03740).

    The scale starts at 2^16, halves whenever a gradient is not finite (that step is skipped) and doubles after 2,000 good
    steps in a row: the rule and constants of torch.amp.GradScaler, as plain numbers, so that they fit the checkpoint and
    the guard's check of the norm, the only synchronization, serves for both.
    """

    name = "fp16"
    dtype = gather_dtype = torch.float16
    syncs_every_step = True
    START, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._scale, self._good = self.START, 0

    @property
    def loss_scale(self) -> Tensor:
        """The current scale."""
        return self._one * self._scale

    def unscale_grads(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide by the scale: exact, it is a power of two."""
        torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], 1.0 / self._scale)

    def overflowed(self, loss: float, norm: float) -> bool:
        """A gradient that is not finite below a loss that is, unless even a scale of one does not help."""
        return math.isfinite(loss) and not math.isfinite(norm) and self._scale > 1.0

    def update(self, norm: float) -> None:
        """Halve after an overflow, double after INTERVAL good steps."""
        if not math.isfinite(norm):
            self._scale, self._good = max(1.0, self._scale * self.BACKOFF), 0
            return
        self._good += 1
        if self._good == self.INTERVAL:
            self._scale, self._good = self._scale * self.GROWTH, 0

    def state_dict(self) -> dict[str, Any]:
        """Scale and count of good steps."""
        return {"scale": self._scale, "good": self._good}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Restore them."""
        self._scale, self._good = float(values["scale"]), int(values["good"])


class Float8(BFloat16):
    """8-bit matmuls in the blocks, the rest in bfloat16: e4m3 for weights and activations, e5m2 for gradients (arXiv
    2209.05433), one scale a tensor, from its largest value or a bound of it at every step. The weights that are trained stay float32.

    The linear layers are our own (model/float8_linear.py) or torchao's where there is no Triton. Sizes that are no multiple of 16 cannot be
    matmuls in 8 bits: such layers keep bfloat16 unless they are padded together with others.
    """

    name = "fp8"

    def convert_model(self, model: Transformer, *, sharded: bool = False) -> Transformer:
        """Replace the linear layers of the blocks; parameters and their names stay. On a CPU the rounding is emulated, for tests."""
        if self.device.type == "cuda" and float8.TRITON:
            convert_float8.convert_to_float8(model.decoder, _is_block_linear, cached=not sharded)
            return model
        try:
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        except ImportError:
            raise MissingExtra("torchao", "eightbit", "train.precision = 'fp8'") from None
        config = Float8LinearConfig(emulate=self.device.type == "cpu")
        convert_to_float8_training(model, config=config, module_filter_fn=_fits_float8)
        return model


def _is_block_linear(path: str) -> bool:
    """Not a router, by its path in the decoder: its scores decide by small differences and are kept exact."""
    return path.startswith("blocks.") and ".router." not in path


def _fits_float8(module: nn.Module, path: str) -> bool:
    """The linear layers of the blocks whose shape 8-bit matmuls support."""
    return (
        isinstance(module, nn.Linear)
        and path.startswith("decoder.")
        and _is_block_linear(path.removeprefix("decoder."))
        and float8_inference.has_aligned_shape(module)
    )


PRECISIONS: dict[str, type[Precision]] = {kind.name: kind for kind in (Precision, BFloat16, Float16, Float8)}


def build_precision(name: str, device: torch.device) -> Precision:
    """The strategy that `train.precision` names; `auto` is bf16 where the device computes it fast, else fp32.

    Raises ConfigError for fp8 on a device without it.
    """
    if name == "auto":
        name = "bf16" if has_fast_bf16(device) else "fp32"
    if name == "fp8" and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)):
        raise ConfigError(
            f"train.precision = {name!r} needs a GPU with 8-bit matmuls (compute capability 8.9 or newer), "
            f"and {device} has none: use bf16 or auto."
        )
    return PRECISIONS[name](device)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device has bfloat16 matmuls in hardware; emulated ones are slower than float32 (docs/training.md)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False
