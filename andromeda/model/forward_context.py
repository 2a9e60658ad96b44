"""What a forward pass carries besides its activations. There is no global state: a part sees x and this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from andromeda.model.kv_cache.protocol import DecodeState, KVCache
from andromeda.model.position.alibi import PositionBias
from andromeda.model.position.rotary import Rotation


@dataclass(frozen=True)
class ForwardContext:
    """One forward pass over ids (B, T), the last T of S tokens."""

    ids: Tensor
    positions: Tensor
    """Position of each token since its document began: (B, T), or (1, T) where all rows are alike."""
    rotation: Rotation
    bias: PositionBias
    cache: KVCache
    state: DecodeState
    """Decode state of the layer that is called; `for_layer` sets it."""
    documents: tuple[Tensor, Tensor] | None = None
    """Document numbers of this pass's tokens (B, T) and of all keys (B, S); None is one document a row."""
    index: Tensor | None = None
    """Index of the one token of this pass among the keys, a number () on the device; None is the last."""
    values: Sequence[Tensor | None] = ()
    """Value embeddings of each layer (B, T, G, D), None where the model has none."""
    value: Tensor | None = None
    """That of the layer that is called (B, T, G, D); `for_layer` sets it."""
    window: int = 0
    """Narrows the layers that have a window (window warm-up); 0 leaves them as they are."""

    def for_layer(self, layer: int) -> ForwardContext:
        """The context of layer number `layer`; parts need no number of their own, so one compiled block serves all layers."""
        return replace(self, state=self.cache.state(layer), value=self.values[layer], values=())

    def clamp_window(self, window: int) -> int:
        """The window in this pass of a layer whose own is `window` tokens (0 is unlimited, and stays so)."""
        return min(window, self.window) if window and self.window else window

    def within_document(self, shifted: Tensor, distance: int) -> Tensor:
        """Zero where `shifted` (B, T, C), the vectors from `distance` tokens before, comes from another document."""
        if self.documents is None:
            return shifted
        own, keys = self.documents
        # Before the first token `shifted` is zero already: what is compared there does not matter.
        if self.index is None:
            before = keys.roll(distance, 1)[:, -own.shape[1] :]
        else:
            before = keys.index_select(1, (self.index - distance).clamp(min=0).reshape(1))
        return shifted * (before == own)[..., None]
