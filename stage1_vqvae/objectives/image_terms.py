"""Loss terms on decoded images, beside the objective: their contract, their sum, and the perceptual term."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from typing_extensions import override

from configs.parts import PerceptualPart
from stage1_vqvae.data.splits import ImageSource
from training.randomness import generator
from training.state import Stateful

# Layers with a stride see some pixels more than others. A term evaluated at the same offset in every step would teach the decoder
# patterns of that stride, so images are rolled by less than this, by another offset each step.
_SHIFTS = 8


@dataclass(frozen=True, kw_only=True)
class NoPerceptualPart(PerceptualPart):
    """No perceptual term."""

    # Not beside the others: they import what takes seconds, and this is what most recipes have.
    @override
    def build(self, folder: Path, source: ImageSource, device: torch.device, seed: int) -> None:
        return None


class OtherTerms(NamedTuple):
    """The loss terms before a term on images, which may balance itself against them."""

    loss: Tensor
    """Sum () of the terms that are no function of the reconstruction itself."""
    gradient: Tensor
    """(B, C, H, W) gradient of the earlier terms on images at the reconstruction."""
    decoder: nn.Module
    """Decoder that made the reconstruction."""


class TermValue(NamedTuple):
    """Weighted value of a loss term, and its gradient at the reconstruction."""

    loss: Tensor
    """(), without a graph."""
    gradient: Tensor
    """(B, C, H, W), without a graph."""
    statistics: dict[str, Tensor]
    """Tensors to sum over micro-batches and ranks: for `step`, and as `logged/NAME` for the log."""


class LossTerm(ABC):
    """A loss term on reconstructions. One that learns has parameters, an optimizer and a state of its own."""

    name: str
    """Name in the log and in checkpoints."""

    def first_step(self, steps: int) -> int:
        """Return the first of `steps` training steps that the term takes part in."""
        return 0

    def begin_(self, step: int, steps: int) -> bool:
        """Return whether the term takes part in this step of `steps`; a term that learns records its first one."""
        return True

    @abstractmethod
    def value(self, reconstruction: Tensor, images: Tensor, step: int, others: OtherTerms) -> TermValue:
        """Evaluate the term on reconstructions (B, C, H, W), which keep their graph, of images (B, C, H, W)."""

    def own_loss(self, images: Tensor, reconstruction: Tensor, step: int) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return the loss () that the term's own parameters minimise, and statistics as in `TermValue`; None: the term does not learn."""
        return None, {}

    def step(self, accelerator: Accelerator, rate: float, statistics: Mapping[str, Tensor], micro_batches: int) -> None:  # noqa: B027
        """Update the term's own parameters and state once per training step, equally on every rank.

        Args:
            accelerator: of the ranks.
            rate: the step's scheduled learning rate.
            statistics: sums over the step's micro-batches of all ranks.
            micro_batches: how many these are.
        """

    def stateful(self) -> dict[str, Stateful]:
        """Return what a checkpoint keeps of the term, by name; empty if the term does not learn."""
        return {}


class ImageLosses(NamedTuple):
    """All loss terms on a micro-batch of reconstructions."""

    gradient: Tensor | None
    """(B, C, H, W) gradient of the weighted terms' sum at the reconstructions; None: there are no terms."""
    losses: dict[str, Tensor]
    """Weighted terms () by name, without a graph."""
    statistics: dict[str, Tensor]
    """Statistics of all terms."""

    def surrogate(self, reconstruction: Tensor) -> Tensor | float:
        """Return a loss () whose gradient at the reconstruction is that of the terms: no term's graph is kept until the backward pass."""
        return 0.0 if self.gradient is None else (reconstruction * self.gradient).sum()


Autocast = Callable[[], AbstractContextManager[Any]]


class ImageTerms:
    """The loss terms on images that take part in one training step."""

    def __init__(self, terms: Sequence[LossTerm], step: int, autocast: Autocast = nullcontext) -> None:
        """Args:
        terms: in the order in which later ones see the gradients of earlier ones.
        step: number of the training step.
        autocast: context of mixed precision.
        """
        self._terms, self._step, self._autocast = terms, step, autocast

    def losses(self, reconstruction: Tensor, images: Tensor, losses: Mapping[str, Tensor], decoder: nn.Module) -> ImageLosses:
        """Evaluate the terms on reconstructions (B, C, H, W), each with its gradient at the image, where the term's own graph ends.

        Args:
            reconstruction: with the graph that made it.
            images: the originals.
            losses: all other loss terms, none of them a function of `reconstruction` itself.
            decoder: the network that made `reconstruction`.
        """
        if not self._terms:
            return ImageLosses(None, {}, {})
        gradient, weighted, statistics = torch.zeros_like(reconstruction), dict[str, Tensor](), dict[str, Tensor]()
        others = torch.stack(list(losses.values())).sum()
        for term in self._terms:
            with self._autocast():
                value = term.value(reconstruction, images, self._step, OtherTerms(others, gradient, decoder))
            gradient, weighted[term.name], statistics = gradient + value.gradient, value.loss, statistics | value.statistics
        return ImageLosses(gradient, weighted, statistics)

    def backward_own_losses(self, images: Tensor, reconstruction: Tensor, accumulation: int) -> dict[str, Tensor]:
        """Accumulate the gradients of the terms' own parameters over `accumulation` micro-batches. Returns the terms' statistics."""
        statistics: dict[str, Tensor] = {}
        for term in self._terms:
            with self._autocast():
                loss, term_statistics = term.own_loss(images, reconstruction, self._step)
            if loss is not None:
                (loss / accumulation).backward()
            statistics |= term_statistics
        return statistics

    def step(self, accelerator: Accelerator, rate: float, statistics: Mapping[str, Tensor], micro_batches: int) -> None:
        """Update each term's own parameters and state: see `LossTerm.step`."""
        for term in self._terms:
            term.step(accelerator, rate, statistics, micro_batches)


def value_at(image: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return a loss of an image and its gradient there, both without a graph."""
    image = image.detach().requires_grad_()
    value = loss(image)
    return value.detach(), torch.autograd.grad(value, image)[0]


class PerceptualTerm(LossTerm):
    """A weighted perceptual distance of reconstructions from their originals."""

    name = "perceptual"

    def __init__(self, distance: nn.Module) -> None:
        """`distance`: from images and originals (B, C, H, W) to the weighted distance ()."""
        self._distance = distance

    @override
    def value(self, reconstruction: Tensor, images: Tensor, step: int, others: OtherTerms) -> TermValue:
        shift = torch.randint(_SHIFTS, (2,), generator=generator(0, "shift", step)).tolist()
        originals = images.roll(shift, (2, 3))
        return TermValue(*value_at(reconstruction, lambda image: self._distance(image.roll(shift, (2, 3)), originals)), {})
