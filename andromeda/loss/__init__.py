"""What a model minimizes: tasks, and Nebula, which sums them."""

from andromeda.loss.nebula import LossResult, Nebula
from andromeda.loss.tasks import Categorical, Head, Prediction, Sums, Task, next_token

__all__ = ["Categorical", "Head", "LossResult", "Nebula", "Prediction", "Sums", "Task", "next_token"]
