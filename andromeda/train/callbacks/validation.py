"""Loss on held-out sequences."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from andromeda.data.loader import TokenStream
from andromeda.parallel.one_process import ALONE, Collectives
from andromeda.train.objective import MicroBatch, ObjectiveSums
from andromeda.train.precision import Precision

ROW_SELECTION = "spread"
"""How the held-out rows are chosen, recorded in checkpoints: older versions took the first rows and recorded nothing."""


class Validation:
    """Validates on rows at equal distances over the held-out stream, the same at every call.

    Not on its first rows: they could all belong to one or two long documents.
    """

    def __init__(self, stream: TokenStream, tokens: int, seq_len: int, micro_batch_size: int, document_mask: bool) -> None:
        self._stream, self._document_mask, self._micro_batch_size = stream, document_mask, micro_batch_size
        available = stream.num_sequences or 0
        count = min(max(1, tokens // seq_len), available)
        self._rows = [i * available // count for i in range(count)]

    @torch.no_grad()
    def __call__(
        self,
        model: nn.Module,
        objective: Callable[[MicroBatch, int], ObjectiveSums],
        precision: Precision,
        collectives: Collectives = ALONE,
    ) -> dict[str, float]:
        """Loss in nats per token and bits per byte of text; empty when nothing is held out. Several processes share the rows."""
        nll = torch.zeros((), dtype=torch.float64, device=precision.device)
        num_targets, num_bytes = 0, 0
        heads: dict[str, Tensor] = {}
        batches = [self._rows[start : start + self._micro_batch_size] for start in range(0, len(self._rows), self._micro_batch_size)]
        model.eval()
        for rows, counts in collectives.share(batches):
            batch = self._stream.gather(rows)
            with precision.autocast():
                found = objective(MicroBatch.from_batch(batch, self._document_mask).to(precision.device), 0)
            if counts:
                nll += found.nll
                num_targets, num_bytes = num_targets + batch.tokens, num_bytes + batch.bytes
            for name, own in found.heads.items():
                both = torch.stack([own.nll.double(), own.tokens.double()]) * counts
                heads[name] = heads[name] + both if name in heads else both
        model.train()
        collectives.after_evaluation()
        targets, text = collectives.sum_numbers(num_targets, num_bytes)
        if not targets:
            return {}
        total = float(collectives.sum_(nll))
        metrics = {"validation/loss": total / targets}
        for name, both in heads.items():
            loss, count = collectives.sum_(both).tolist()
            metrics |= {f"validation/loss/{name}": loss / count} if count else {}
        return metrics | ({"validation/bits_per_byte": total / math.log(2) / text} if text else {})
