"""What a training step exchanges with other processes, for one process: nothing. Each method gives back what it was given, so that the
trainer is written once.

`MeshCollectives` in `step_collectives.py` does it for several; apart from it, so that this imports none of torch.distributed's tensors,
which import the compiler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from andromeda.parallel.layout import Layout


class Collectives:
    """One process."""

    layout = Layout()
    is_main = True
    """Whether this process writes the run folder."""

    def rows(self, first: int, count: int) -> tuple[int, int]:
        """Of `count` rows from `first` on, those of this process: (first, count)."""
        return first, count

    def sum_numbers(self, *numbers: float) -> list[float]:
        """Each number summed over the processes that read different tokens (float64, in main memory)."""
        return list(numbers)

    def at(self, step: int) -> None:
        """The run has done `step` steps."""

    def largest(self, number: int) -> int:
        """The largest number of any process."""
        return number

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor in place over the processes that read different tokens."""
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest elements over all processes, in place."""
        return tensor

    def hidden(self, model: Any, ids: Tensor, documents: Tensor | None, window: int = 0) -> Tensor:
        """Last hidden states of this process's share of ids (B, T), which all that read the same sequences are given."""
        states: Tensor = model.hidden(ids, documents=documents, window=window)
        return states

    def split(self, x: Tensor) -> Tensor:
        """The share of this process in x (B, T, ...): of the tokens whose states `hidden` gives, in the same shape."""
        return x

    def gradient_sync(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Wraps the passes of a micro-batch; sharded gradients are summed over processes in the `last` one of a step."""
        return contextlib.nullcontext()

    def reduce_grads(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum those gradients over processes, after the last micro-batch, that are not summed by the backward pass."""

    def after_evaluation(self) -> None:
        """Call after forward passes that no backward pass follows: gathered weights are freed, since they would not be gathered again."""

    def share(self, chunks: Sequence[Any]) -> list[tuple[Any, bool]]:
        """Those of `chunks` that this process evaluates, with whether they count.

        Every process gets as many, as forward passes need all of them; one that is only there for the others does not count.
        """
        return [(chunk, True) for chunk in chunks]


ALONE = Collectives()
"""One process that runs alone."""
