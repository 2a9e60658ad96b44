"""Whether a finished training has learned anything: its loss compared with what no context is needed for."""

from __future__ import annotations

import math

import numpy as np

from andromeda.data.loader import TokenStream
from andromeda.data.packing import IGNORE

TOKENS = 1 << 16
"""Targets that the entropy is estimated from."""
MARGIN = 0.02
"""Nats per target within which two losses count as equal."""


def unigram_entropy(stream: TokenStream, seq_len: int) -> float:
    """Entropy of single targets in nats: the loss of a model that knows how often each token occurs, and nothing of what came before.

    Estimated from the first sequences of the stream, with the correction of Miller and Madow (1955) for the number of targets: the
    plain estimate is too low for a large vocabulary.
    """
    batch = stream.gather(range(max(1, TOKENS // seq_len)))
    targets = batch.targets[batch.targets != IGNORE].numpy()
    _, counts = np.unique(targets, return_counts=True)
    if not len(targets):
        return 0.0
    share = counts / len(targets)
    return float(-(share * np.log(share)).sum() + (len(counts) - 1) / (2 * len(targets)))


def explain_poor_loss(loss: float | None, entropy: float, vocab_size: int, lr: float) -> str:
    """A sentence about a training that ended no better than without context; empty for one that did.

    loss: of the last steps in nats per target, None where all were skipped. entropy: `unigram_entropy`. lr: `train.optim.lr`.
    """
    uniform = math.log(vocab_size)
    advice = f"train longer, or try another train.optim.lr than {lr:g}"
    if loss is None:
        return f"No step of the last ones was taken, all were skipped: lower train.optim.lr={lr:g}, or look at the data."
    if not math.isfinite(loss):
        return f"The loss is not finite, so the weights are of no use: lower train.optim.lr={lr:g}, and train again."
    if loss > uniform + MARGIN:
        return f"The loss of {loss:.4f} is worse than that of guessing all {vocab_size:,} tokens alike ({uniform:.4f}): {advice}."
    if loss > max(entropy, uniform - 5 * MARGIN):
        return (
            f"The loss of {loss:.4f} is that of guessing all {vocab_size:,} tokens alike ({uniform:.4f}), so nothing was learned: {advice}."
        )
    if loss > entropy - MARGIN:
        return (
            f"The loss of {loss:.4f} is no better than that of knowing how often each token occurs ({entropy:.4f}), so nothing was learned "
            f"from context: {advice}."
        )
    return ""
