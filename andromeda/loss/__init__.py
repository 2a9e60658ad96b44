"""What a model minimizes: tasks, and Nebula, which sums them."""

from andromeda.loss.loss_task import Categorical, LossHead, LossSums, LossTask, PredictionTask, next_token
from andromeda.loss.nebula import LossResult, Nebula

__all__ = ["Categorical", "LossHead", "LossResult", "LossSums", "LossTask", "Nebula", "PredictionTask", "next_token"]
