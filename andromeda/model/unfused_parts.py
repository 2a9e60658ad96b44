"""Parts of a model for which there is no fused kernel: a log line names each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

from andromeda.model import add_norm_shift
from andromeda.model.attention import Attention
from andromeda.model.block import DecoderBlock
from andromeda.model.feedforward import dense
from andromeda.model.specs import spec_of


def unfused_parts(model: nn.Module) -> dict[str, int]:
    """Parts that are computed by their own forward passes on a GPU too, for want of a kernel, and how many of each there are.

    Named by class, with the setting that no kernel computes. Gated networks are not among them: their kernels are matmuls.
    """
    return dict(Counter(name for module in model.modules() for name in _of(module)))


def describe_unfused(parts: dict[str, int]) -> str:
    """One line for the log; empty where every part has a kernel."""
    named = ", ".join(f"{name} (x {count})" if count > 1 else name for name, count in parts.items())
    return f"no fused kernel for {named}: left to PyTorch, and to torch.compile where it is on" if named else ""


def _of(module: nn.Module) -> Iterator[str]:
    if isinstance(module, Attention) and module.qk_kernel is None:
        rotary = "rotary positions of this kind" if module.rotary_spec is None else ""
        yield type(module.qk_norm).__name__ if spec_of(module.qk_norm) is None else rotary
    if isinstance(module, dense.MLP) and module.compute is dense.reference:
        yield f"MLP with {module.kind}" + ("" if module.bias else " and no biases")
    if isinstance(module, DecoderBlock):
        if spec_of(module.attention) is None:
            yield type(module.attention).__name__
        for _, norm, shift in module.normalized_readers():
            if spec_of(norm) is None:
                yield type(norm).__name__
            elif not add_norm_shift.matches(spec_of(norm), spec_of(shift)):
                tokens = getattr(spec_of(shift), "tokens", 0)
                yield f"{type(shift).__name__} by {tokens} tokens" if tokens else type(shift).__name__
