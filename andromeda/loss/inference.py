"""Which likelihood a target asks for, by its dtype, its shape and the number of outputs; what fits two is refused in a sentence."""

from __future__ import annotations

import torch
from torch import Tensor

from andromeda.loss.likelihoods import NOT_LABELED, Bernoulli, Numeric, SoftCategorical
from andromeda.loss.loss_task import Categorical, TargetLikelihood
from andromeda.ops.cross_entropy import IGNORE_INDEX
from andromeda.utils.errors import ConfigError


def infer_likelihood(target: Tensor, num_outputs: int, name: str = "the target") -> TargetLikelihood:
    """The likelihood of a target (B, T) or (B, T, K) for a head of `num_outputs` outputs.

    Integers (B, T) are classes, truth values or bytes (B, T, K) are labels, floats (B, T) are numbers, floats (B, T, K) are
    distributions. Raises ConfigError, one sentence, for what fits none or more than one.
    """
    if target.ndim == 3:
        return _of_vectors(target, num_outputs, name)
    if target.ndim != 2:
        raise ConfigError(f"{name} has the shape {tuple(target.shape)}: a target is (batch, tokens) or (batch, tokens, labels).")
    return _of_numbers(target, num_outputs, name) if target.is_floating_point() else _of_classes(target, num_outputs, name)


def _of_classes(target: Tensor, num_outputs: int, name: str) -> TargetLikelihood:
    counted = target[target != IGNORE_INDEX]
    if num_outputs == 1:
        raise ConfigError(
            f"{name} holds whole numbers and its head gives one output, which fits a count (Poisson) and a quantity (Gaussian): "
            "name the likelihood, or give the head one output for each class."
        )
    if len(counted) and not 0 <= int(counted.min()) <= int(counted.max()) < num_outputs:
        low, high = int(counted.min()), int(counted.max())
        raise ConfigError(f"{name} holds classes from {low} to {high}, and its head gives {num_outputs} outputs: set num_labels.")
    return Categorical()


def _of_numbers(target: Tensor, num_outputs: int, name: str) -> TargetLikelihood:
    known = target[~target.isnan()]
    if num_outputs > 2:
        raise ConfigError(
            f"{name} holds one number for a token, and its head gives {num_outputs} outputs: give it one, or two with a scale."
        )
    if len(known) and (known >= 0).all() and (known == known.round()).all():
        raise ConfigError(
            f"{name} holds whole numbers, which may be classes, counts or quantities: give classes as integers, or name the likelihood, "
            "poisson for counts and gaussian for quantities."
        )
    return Numeric("gaussian", learn_scale=num_outputs == 2)


def _of_vectors(target: Tensor, num_outputs: int, name: str) -> TargetLikelihood:
    if target.shape[-1] != num_outputs:
        raise ConfigError(f"{name} has {target.shape[-1]} values for a token, and its head gives {num_outputs} outputs: make them equal.")
    if not target.is_floating_point():
        known = target[target != NOT_LABELED] if target.dtype != torch.bool else target
        if len(known) and int(known.max()) > 1:
            raise ConfigError(f"{name} holds whole numbers above 1 for each output: labels are 0 or 1, and 255 where they are unknown.")
        return Bernoulli()
    known = target[~target.isnan().any(-1)]
    if len(known) and not ((known >= 0) & (known <= 1)).all():
        raise ConfigError(f"{name} holds several numbers for a token beyond 0 to 1: declare a regression head for each of them.")
    sums_to_one = bool((known.sum(-1) - 1).abs().max() < 1e-4) if len(known) else False
    if sums_to_one and bool(((known == 0) | (known == 1)).all()):
        raise ConfigError(
            f"{name} holds one 1 among zeros for a token, which may be a class or a label that is there: give classes as integers (B, T), "
            "or labels as truth values."
        )
    return SoftCategorical() if sums_to_one else Bernoulli()
