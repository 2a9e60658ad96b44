"""The whole of a run in one value: what `config.toml` in a run folder holds."""

from __future__ import annotations

from pydantic import NonNegativeInt

from andromeda.config.base import BaseConfig
from andromeda.config.data import DataConfig
from andromeda.config.loss import LossConfig
from andromeda.config.model import ModelConfig
from andromeda.config.parallel import ParallelConfig
from andromeda.config.train import TrainConfig


class RunConfig(BaseConfig):
    """Model, data, training and mesh, with the seed that all random numbers derive from."""

    name: str = "run"
    """Title of the run, in its folder's reports."""
    seed: NonNegativeInt = 0
    """All random numbers of a run derive from it."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
