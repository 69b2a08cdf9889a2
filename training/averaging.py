"""Moving average of weights, which reconstructs better than the weights of any single step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from training.sharding import local_tensor

Model = TypeVar("Model", bound=nn.Module)


class WeightAverage(Generic[Model]):
    """A copy of a model in training, `model`, whose parameters are moving averages.

    Polyak & Juditsky 1992; with exponential weights as in Karras et al. 2018, "Progressive Growing of GANs", section
    4. The decay rises as min(decay, (1 + steps) / (10 + steps)), so that the first weights are soon forgotten.
    """

    def __init__(self, live: Model, decay: float, shared: Sequence[str], copied: Model | None = None) -> None:
        """Args:
        live: the model in training.
        decay: of the moving averages after many steps.
        shared: names of submodules that are not averaged but shared with the model in training.
        copied: an equal model to hold the averages; None: copy `live`.
        """
        self.decay, self.steps, self._live = decay, 0, live
        self.model = (copy.deepcopy(live) if copied is None else copied).requires_grad_(False)
        for name in shared:
            self.model.set_submodule(name, live.get_submodule(name))
        pairs = zip(self.model.parameters(), live.parameters(), strict=True)
        self._pairs = [(average, weight) for average, weight in pairs if average is not weight]

    @torch.no_grad()
    def update_(self) -> None:
        """Update the averages after an optimizer step."""
        self.steps += 1
        averages, weights = ([local_tensor(tensor) for tensor in tensors] for tensors in zip(*self._pairs, strict=True))
        torch._foreach_lerp_(averages, weights, 1 - min(self.decay, (1 + self.steps) / (10 + self.steps)))

    def restart_(self) -> None:
        """Start again from the present weights of the model in training."""
        self.steps = 0
        self.model.load_state_dict(self._live.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and their step count."""
        return {"steps": self.steps, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])
