"""What a forward pass carries besides its activations. Nothing is global: a part sees x and this."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from andromeda.model.kv_cache.dynamic import NoDecodeState, NoKVCache
from andromeda.model.position.alibi import NoPositionBias
from andromeda.model.position.rotary import Rotation


@dataclass(frozen=True)
class ForwardContext:
    """One forward pass over ids (B, T), the last T of S tokens."""

    ids: Tensor
    positions: Tensor
    """Position of each token since its document began: (B, T), or (1, T) where all rows are alike."""
    rotation: Rotation
    bias: NoPositionBias
    cache: NoKVCache
    state: NoDecodeState
    """What the part that is called remembers of earlier tokens; `for_layer` sets the layer's own."""
    documents: tuple[Tensor, Tensor] | None = None
    """Document numbers of this pass's tokens (B, T) and of all keys (B, S); None is one document a row."""
    index: Tensor | None = None
    """Index of the one token of this pass among the keys, a number () on the device; None is the last."""
    values: tuple[Tensor | None, ...] = ()
    """Value embeddings of each layer (B, T, G, D), None where the model has none."""
    value: Tensor | None = None
    """The one of the layer that is called; `for_layer` sets it."""
    window: int = 0
    """Narrows the layers that have a window (window warm-up); 0 leaves them as they are."""

    def for_layer(self, layer: int) -> ForwardContext:
        """The context as layer number `layer` sees it; parts need no number of their own, so one compiled block serves all."""
        return replace(self, state=self.cache.state(layer), value=self.values[layer])

    def clamp_window(self, window: int) -> int:
        """The reach of a layer whose own window is `window` tokens (0 is unlimited, and stays so)."""
        return min(window, self.window) if window and self.window else window

    def within_document(self, shifted: Tensor, distance: int) -> Tensor:
        """Zero where `shifted` (B, T, C), the vectors from `distance` tokens before, comes from another document."""
        if self.documents is None:
            return shifted
        own, keys = self.documents
        # Before the first token there are zeros already, so that those rows may compare as they like.
        if self.index is None:
            before = keys.roll(distance, 1)[:, -own.shape[1] :]
        else:
            before = keys.index_select(1, (self.index - distance).clamp(min=0).reshape(1))
        return shifted * (before == own)[..., None]
