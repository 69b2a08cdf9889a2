"""The moving average of weights against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from configs.schema import Stage1, Stage2
from training.averaging import WeightAverage


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.averaged, self.shared = nn.Linear(3, 2), nn.Linear(2, 2)


def test_parameters_are_averaged_and_shared_modules_are_not() -> None:
    live = Model()
    average = WeightAverage(live, 0.3, shared=("shared",))
    expected = live.averaged.weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            for parameter in live.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update_()
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * live.averaged.weight.detach()
        assert torch.allclose(average.model.averaged.weight, expected, atol=1e-6)
    assert average.model.shared is live.shared
    assert live.shared.weight.requires_grad
    assert not average.model.averaged.weight.requires_grad


def test_a_share_of_the_steps_averages_the_same_share_of_any_training() -> None:
    """The weight of the last tenth of the steps is the same, 1 - exp(-0.1 / share)."""
    for section in (Stage1, Stage2):
        for steps in (2_000, 1_000_000):
            decay = section(steps=steps, weight_average_share=0.05).average_decay
            assert 1 - decay ** (steps / 10) == pytest.approx(1 - math.exp(-2), rel=0.01)
        assert section(steps=10, weight_average_share=0.1).average_decay == 0  # a horizon of one step
        assert section(steps=10, weight_average=0.7).average_decay == 0.7


def test_the_average_resumes_from_its_state() -> None:
    torch.manual_seed(0)
    live = Model()
    average = WeightAverage(live, 0.999, shared=("shared",))
    with torch.no_grad():
        live.averaged.weight.add_(1)
    average.update_()
    other = WeightAverage(live, 0.999, shared=("shared",))
    other.load_state_dict(average.state_dict())
    for each in (average, other):
        each.update_()
    assert torch.equal(average.model.averaged.weight, other.model.averaged.weight)
    assert average.steps == other.steps == 2
