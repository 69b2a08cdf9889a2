"""Terms on decoded images, beside the objective: a perceptual distance, and a discriminator's pull."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from configs.schema import PerceptualPart
from stage1_vqvae.data.splits import ImageSource
from stage1_vqvae.objectives.adversarial import Adversary, gradients_at, last_layer
from training.randomness import generator

# Layers with a stride see some pixels more than others. A term that was asked at the same place in every step would teach the decoder
# patterns of that stride: images are shifted round, by less than this, another way each step.
_SHIFTS = 8


@dataclass(frozen=True, kw_only=True)
class NoPerceptualPart(PerceptualPart):
    """No perceptual term."""

    # Not beside the others: they import what takes seconds, and this is what most recipes have.
    @override
    def build(self, folder: Path, source: ImageSource, device: torch.device, seed: int) -> None:
        return None


class Pulled(NamedTuple):
    """What the terms say of a batch of reconstructions."""

    gradient: Tensor
    """Of the weighted terms' sum at the reconstructions, (B, C, H, W), the adversary's bounded."""
    losses: dict[str, Tensor]
    """The weighted terms, without a graph: `perceptual`, `adversarial`."""
    statistics: dict[str, Tensor]
    """What `Adversary.update_` asks for; `noted/adversarial_kept`, the share of the adversary's pull that its bound left."""


def pull(
    reconstruction: Tensor,
    images: Tensor,
    losses: Mapping[str, Tensor],
    decoder: nn.Module,
    perceptual: nn.Module | None,
    adversary: Adversary | None,
    step: int,
) -> Pulled:
    """What the terms there are say of reconstructions (B, C, H, W), which stay as they are.

    Each term's gradient is taken at the image, where its own graph ends: what the loop adds to its loss is
    `(reconstruction * gradient).sum()`, which has that gradient, and no term's graph is walked twice or kept until then.

    Args:
        reconstruction: with the graph that made it.
        images: the originals.
        losses: all other terms, none of them a function of `reconstruction` itself.
        decoder: the last of what made it.
        perceptual: from images and originals to a weighted distance; None: there is no such term.
        adversary: None: there is none, or it has not begun.
        step: the number of the step, on which the adversary's weight depends.
    """
    gradient, found = torch.zeros_like(reconstruction), dict[str, Tensor]()
    statistics: dict[str, Tensor] = {}
    if perceptual is not None:
        shift = torch.randint(_SHIFTS, (2,), generator=generator(0, "shift", step)).tolist()
        originals = images.roll(shift, (2, 3))
        found["perceptual"], gradient = _at(reconstruction, lambda image: perceptual(image.roll(shift, (2, 3)), originals))
    if adversary is not None:
        value, pulling = _at(reconstruction, adversary.tokenizer_loss)
        others = torch.stack(list(losses.values())).sum()
        statistics = gradients_at(last_layer(decoder), others, reconstruction, gradient, pulling)
        weight = adversary.weight(step).to(pulling)
        bounded, kept = adversary.bounded(weight * pulling, reconstruction.detach() - images)
        found["adversarial"], gradient = weight * value, gradient + bounded
        statistics["noted/adversarial_kept"] = kept
    return Pulled(gradient, found, statistics)


def _at(image: Tensor, term: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A term's value for an image, and its gradient there, without a graph."""
    image = image.detach().requires_grad_()
    value = term(image)
    return value.detach(), torch.autograd.grad(value, image)[0]
