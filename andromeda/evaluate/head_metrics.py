"""Figures of merit of heads: accuracy, F1, calibration, correlation; each a pure function of predictions and truth."""

from __future__ import annotations

import numpy as np

BINS = 15
"""Bins of confidence, of equal width, of the expected calibration error (arXiv 1706.04599)."""


def classification(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """probabilities (N, K), truth (N,): accuracy, F1 averaged over the classes that occur, and calibration error."""
    predicted = probabilities.argmax(1)
    right = predicted == truth
    classes = np.union1d(predicted, truth)
    f1 = [f1_score(predicted == one, truth == one) for one in classes]
    return {
        "accuracy": float(right.mean()),
        "f1": float(np.mean(f1)),
        "calibration_error": calibration_error(probabilities.max(1), right),
        "targets": len(truth),
    }


def multi_label(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """probabilities (N, K), truth (N, K) of 0, 1 and 255 where unknown: over all labels, F1 averaged over them."""
    known = truth != 255
    predicted, there = probabilities > 0.5, truth == 1
    f1 = [f1_score(predicted[known[:, k], k], there[known[:, k], k]) for k in range(truth.shape[1])]
    right = (predicted == there)[known]
    confidence = np.maximum(probabilities, 1 - probabilities)[known]
    return {
        "accuracy": float(right.mean()),
        "f1": float(np.mean(f1)),
        "calibration_error": calibration_error(confidence, right),
        "targets": int(known.sum()),
    }


def regression(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """predicted (N,), truth (N,): Pearson's and Spearman's correlation, root mean square error, mean absolute error."""
    error = predicted - truth
    return {
        "pearson": correlation(predicted, truth),
        "spearman": correlation(ranks(predicted), ranks(truth)),
        "rmse": float(np.sqrt(np.square(error).mean())),
        "mae": float(np.abs(error).mean()),
        "targets": len(truth),
    }


def interval_coverage(predicted: np.ndarray, half_width: np.ndarray, truth: np.ndarray) -> float:
    """Share of the truth (N,) within `half_width` (N,) of the prediction (N,)."""
    return float((np.abs(predicted - truth) <= half_width).mean())


def preference(better: np.ndarray, worse: np.ndarray) -> dict[str, float]:
    """Scores of both documents of each pair (N,): how often the better one has the higher score, and calibration error."""
    right = better > worse
    probability = 1 / (1 + np.exp(-np.abs(better - worse)))
    return {"accuracy": float(right.mean()), "calibration_error": calibration_error(probability, right), "targets": len(better)}


def f1_score(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Harmonic mean of precision and recall of truth values (N,); 0 where nothing is right."""
    both = 2 * int((predicted & truth).sum())
    either = int(predicted.sum()) + int(truth.sum())
    return both / either if either else 0.0


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: mean over predictions of |accuracy - confidence| of their bin, confidence (N,) in [0, 1]."""
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(place, weights=right.astype(float) - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's; 0 where one of them does not vary."""
    one, other = one - one.mean(), other - other.mean()
    scale = float(np.sqrt(np.square(one).sum() * np.square(other).sum()))
    return float((one * other).sum()) / scale if scale else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0 of values (N,), equal ones with their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: np.ndarray = last - (counts + 1) / 2
    return mean[inverse]
