"""DiLoCo: workers that learn by themselves and average what they learned once in many steps."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from andromeda.config.base import BaseConfig


class DiLoCoConfig(BaseConfig):
    """DiLoCo (arXiv 2311.08105): each worker takes `inner_steps` steps of its own; then the mean of their changes is one step of an outer
    SGD with Nesterov momentum, from the weights that all had before.

    A worker is one `andromeda train` with a run folder of its own, and may leave and join at any time. `train.batch_size` is that of one
    worker.
    """

    workers: NonNegativeInt = 0
    """Workers that the sequences are divided over, present or not; 0 is off."""
    worker: NonNegativeInt = 0
    """Number of this one, below `workers`."""
    min_workers: NonNegativeInt = 0
    """Workers without which there is no synchronization; 0 is more than half of `workers`, so that no two parts of them continue without
    each other. Give it to the lighthouse too (--min_replicas)."""
    inner_steps: PositiveInt = 500
    """Steps between two synchronizations."""
    outer_lr: PositiveFloat = 0.7
    """Learning rate of the outer SGD."""
    outer_momentum: float = Field(0.9, ge=0.0, lt=1.0)
    """Nesterov momentum of the outer SGD; 0 is plain SGD."""
    lighthouse: str = "http://localhost:29510"
    """Address of the process that knows who is there: `torchft_lighthouse --bind [::]:29510 --min_replicas N`."""
    address: str = "localhost"
    """Name or address of this host, as the other workers reach it."""
    timeout: PositiveInt = 600
    """Seconds that a worker waits for the others at a synchronization."""

    @property
    def least_workers(self) -> int:
        """Workers without which there is no synchronization."""
        return self.min_workers or self.workers // 2 + 1
