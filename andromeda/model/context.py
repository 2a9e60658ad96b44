"""What a forward pass carries besides its activations. Nothing is global: a part sees x and this."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from andromeda.model.cache import Cache, Nothing
from andromeda.model.position.rotary import Rotation


@dataclass(frozen=True)
class Context:
    """One forward pass over ids (B, T), the last T of S tokens."""

    ids: Tensor
    positions: Tensor
    """(B, T) position of each token since its document began."""
    rotation: Rotation
    cache: Cache | Nothing
    documents: Tensor | None = None
    """(B, T) document numbers; None is one document a row."""
    key_documents: Tensor | None = None
    """(B, S) document numbers of all keys."""
    values: tuple[Tensor | None, ...] = ()
    """Value embeddings of each layer (B, T, G, D), None where the model has none."""
    window: int = 0
    """Narrows the layers that have a window (window warm-up); 0 leaves them as they are."""

    def narrow(self, window: int) -> int:
        """The reach of a layer whose own window is `window` tokens (0 is unlimited, and stays so)."""
        return min(window, self.window) if window and self.window else window

    def within_document(self, shifted: Tensor, distance: int) -> Tensor:
        """Zero where `shifted` (B, T, C), the vectors from `distance` tokens before, comes from another document."""
        if self.key_documents is None:
            return shifted
        T = shifted.shape[1]
        # The cache's answer before the first token is zeros already, so that those rows may compare as they like.
        before = self.key_documents.roll(distance, 1)[:, -T:]
        return shifted * (before == self.key_documents[:, -T:])[..., None]
