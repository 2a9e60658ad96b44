"""The moving average against its definition, written out as a weighted sum in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from andromeda.train.callbacks.ema import ExponentialMovingAverage, build_ema


@pytest.mark.parametrize(("decay", "updates"), [(0.9, 5), (0.9, 200), (0.999, 200)])
def test_closed_form(decay: float, updates: int) -> None:
    """e_n = sum_i (1 - d_i) prod_{j > i} d_j w_i + prod_j d_j w_0, with d_n = min(decay, (1 + n) / (10 + n))."""
    draw = np.random.default_rng(0)
    model = nn.Linear(3, 2, bias=False)
    weights = [model.weight.detach().numpy().astype(np.float64)]
    average = build_ema(model, decay)
    assert average is not None
    for _ in range(updates):
        with torch.no_grad():
            model.weight += torch.from_numpy(draw.normal(size=(2, 3))).float()
        average.update()
        weights.append(model.weight.detach().numpy().astype(np.float64))
    decays = np.array([min(decay, (1 + n) / (10 + n)) for n in range(1, updates + 1)])
    after = np.append(np.cumprod(decays[::-1])[::-1], 1.0)
    shares = np.append(after[0], (1 - decays) * after[1:])
    assert shares.sum() == pytest.approx(1.0)
    expected = sum(share * w for share, w in zip(shares, weights, strict=True))
    np.testing.assert_allclose(average.state_tensors()["weight"].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_figures_are_of_the_average_and_the_weights_stay() -> None:
    """Measured with the mean in place; afterwards the weights are bit by bit what they were, also when measuring fails."""
    model = nn.Linear(2, 2)
    average = ExponentialMovingAverage(model.named_parameters(), 0.5)
    own = model.weight.detach().clone()
    with torch.no_grad():
        model.weight *= 3.0
    now = model.weight.detach().clone()
    measured = average.evaluate(lambda: {"sum": float(model.weight.detach().sum())})
    assert measured == {"sum_average": pytest.approx(float(own.sum()))}
    assert torch.equal(model.weight, now)
    with pytest.raises(ZeroDivisionError):
        average.evaluate(lambda: {"sum": 1 / 0})
    assert torch.equal(model.weight, now)


def test_off_is_none() -> None:
    assert build_ema(nn.Linear(2, 2), 0.0) is None


def test_load_goes_on_where_it_was() -> None:
    model = nn.Linear(2, 2)
    average = ExponentialMovingAverage(model.named_parameters(), 0.99)
    for _ in range(3):
        average.update()
    again = ExponentialMovingAverage(model.named_parameters(), 0.99)
    again.load_state({name: tensor.clone() for name, tensor in average.state_tensors().items()}, average.updates)
    with torch.no_grad():
        model.weight.mul_(2.0)
    average.update()
    again.update()
    assert all(torch.equal(tensor, again.state_tensors()[name]) for name, tensor in average.state_tensors().items())
