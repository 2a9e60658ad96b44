"""What a model minimizes: tasks, and Nebula, which sums them."""

from andromeda.loss.inference import infer_likelihood
from andromeda.loss.likelihoods import Bernoulli, Numeric, SoftCategorical
from andromeda.loss.loss_task import Categorical, LossHead, LossSums, LossTask, PredictionTask, next_token
from andromeda.loss.nebula import LossResult, Nebula, build_balance
from andromeda.loss.ranking import PlackettLuce

__all__ = [
    "Bernoulli",
    "Categorical",
    "LossHead",
    "LossResult",
    "LossSums",
    "LossTask",
    "Nebula",
    "Numeric",
    "PlackettLuce",
    "PredictionTask",
    "SoftCategorical",
    "build_balance",
    "infer_likelihood",
    "next_token",
]
