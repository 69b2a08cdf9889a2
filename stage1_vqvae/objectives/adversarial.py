"""The adversarial term: when a discriminator takes part in training, its losses, and its weight.

A discriminator that is switched on in mid-training ruins reconstructions in three ways, each prevented here. Untrained, its gradient is
noise: so first it trains alone. Its demands come all at once: so its weight rises step by step. And its gradient is unrelated in size to
that of the other loss terms: so it is scaled by the ratio of the gradients at the decoder's last layer (Esser et al. 2021, equation 7),
averaged over some hundred steps. That ratio is no guarantee, because a gradient at a layer is mostly noise once the layer is good, and
because a discriminator that is fooled has almost none. So the gradient at each image is also capped, relative to the gradient of the
image's squared error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized
from typing_extensions import override

from configs.parts import AdversarialPart, DiscriminatorPart
from stage1_vqvae.data.splits import ImageSource
from stage1_vqvae.objectives.image_terms import LossTerm, OtherTerms, TermValue, value_at
from training.devices import widest_float
from training.optimizer import OptimizerState, fused_on, trainable
from training.precision import full_precision
from training.processes import average_gradients_
from training.schedule import set_learning_rate
from training.state import Stateful

# Decay per step of the gradients' norms and of LeCam's mean logits. Norms are averaged, not their ratio: in the few steps in which the
# discriminator is fooled and has no gradient the ratio is a hundred times as large.
_DECAY = 0.99
_LEAST = 1e-30
_MOST = 1e4  # of the ratio, as in Esser et al.: far more than is ever useful, it keeps the logged loss finite
# Losses are scaled by this before their gradients at the last layer are taken: half precision would lose the smallest.
_SCALE = 2.0**10
_REAL, _FAKE, _OTHERS, _OWN = (f"adversary/{name}" for name in ("real", "fake", "others", "own"))


@dataclass(frozen=True, kw_only=True)
class NoAdversaryPart(AdversarialPart):
    """No adversarial term."""

    @override
    def build(self, channels: int, folder: Path, source: ImageSource, device: torch.device, seed: int) -> None:
        return None


class Adversary(nn.Module, LossTerm):
    """A discriminator with its optimizer, the losses of both sides, and the weight of the adversarial term.

    Its state beside the discriminator's weights stands in buffers: the step at which it started, the length of its ramp, mean norms of
    gradients, LeCam's mean logits. They change in `begin_` and `update_` alone.
    """

    name = "adversarial"

    def __init__(self, part: DiscriminatorPart, discriminator: nn.Module) -> None:
        """`part`: its fields in the recipe. `discriminator`: images (B, C, H, W) to a list of logits."""
        super().__init__()
        # The gradients at the last layer walk a part of the graph before all of it is: a compiled one must not reuse its memory.
        torch._functorch.config.donated_buffer = False
        self.part, self.discriminator = part, discriminator
        device = next(discriminator.parameters()).device
        self._optimizer = torch.optim.AdamW(trainable(discriminator), betas=(0.5, 0.9), weight_decay=0.0, fused=fused_on(device))
        # On the CPU, so that reading them never waits for the device.
        self.register_buffer("started_at", torch.tensor(-1))
        self.register_buffer("ramp", torch.tensor(0))
        wide = widest_float(device)
        self.register_buffer("norms", torch.full((2,), -1.0, dtype=wide, device=device))  # gradient norms: other loss terms, this one
        self.register_buffer("logits", torch.zeros(2, dtype=wide, device=device))  # mean logits: real images, reconstructions

    started_at: Tensor
    ramp: Tensor
    norms: Tensor
    logits: Tensor

    @override
    def first_step(self, steps: int) -> int:
        return int(self.started_at) if self.started_at >= 0 else math.ceil(self.part.start * steps)

    @override
    def begin_(self, step: int, steps: int) -> bool:
        """As the contract says; the ramp keeps the length that it has at the first step, however long the training goes on later."""
        if self.started_at < 0 and step >= self.part.start * steps:
            self.started_at.fill_(step)
            self.ramp.fill_(round(self.part.ramp * steps))
        return bool(self.started_at >= 0)

    @override
    def value(self, reconstruction: Tensor, images: Tensor, step: int, others: OtherTerms) -> TermValue:
        loss, gradient = value_at(reconstruction, self.tokenizer_loss)
        statistics = gradients_at(last_layer(others.decoder), others.loss, reconstruction, others.gradient, gradient)
        weight = self.weight(step).to(gradient)
        bounded, kept = self.bounded(weight * gradient, reconstruction.detach() - images)
        return TermValue(weight * loss, bounded, {**statistics, "logged/adversarial_kept": kept})

    @override
    def own_loss(self, images: Tensor, reconstruction: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, statistics = self.discriminator_loss(images, reconstruction)
        return loss, {**statistics, "logged/discriminator": loss.detach(), "logged/adversarial_weight": self.weight(step)}

    @override
    def step(self, accelerator: Accelerator, rate: float, statistics: Mapping[str, Tensor], micro_batches: int) -> None:
        average_gradients_(accelerator, self.discriminator)
        set_learning_rate(self._optimizer, self.part.lr_share * rate)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.update_(statistics, micro_batches)

    @override
    def stateful(self) -> dict[str, Stateful]:
        return {"model": self, "optimizer": OptimizerState(self.discriminator, self._optimizer)}

    def weight(self, step: int) -> Tensor:
        """Return the factor () of the loss, before `bounded`: 0 while the discriminator trains alone, and before the ratio is known."""
        ramp, since = int(self.ramp), step - int(self.started_at)
        ramp_share = min(1.0, max(0.0, (since - ramp) / ramp)) if ramp else 1.0
        others, own = self.norms.clamp(min=0).unbind()
        return self.part.weight * ramp_share * (others / own.clamp(min=_LEAST)).clamp(max=_MOST)

    def bounded(self, gradient: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
        """Cap the gradient at each image (B, C, H, W) at `bound` times that of the mean squared error there.

        Why this preserves reconstructions: let one output stand for many images, e^2 be its mean squared error and s its distance from
        their mean. At equilibrium both gradients cancel, so s <= bound * e, and e^2 is the least possible plus s^2. So e^2 is at most
        1 / (1 - bound^2) times the least. For a network in training, which moves many outputs at once, that is a guide and no proof.

        Args:
            gradient: of the weighted term, a mean over the batch.
            errors: differences of the reconstructions from the images (B, C, H, W).
        Returns: the capped gradient, and the share () of its length that is kept, a mean over the images.
        """
        most = self.part.bound * 2 * full_precision(errors).flatten(1).norm(dim=1) / errors.numel()
        length = full_precision(gradient).flatten(1).norm(dim=1)
        kept = (most / length.clamp(min=_LEAST)).clamp(max=1)
        return gradient * kept.to(gradient)[:, None, None, None], kept.mean()

    def tokenizer_loss(self, fake: Tensor) -> Tensor:
        """Return the tokenizer's unweighted loss (): low if reconstructions (B, C, H, W) are classified as real."""
        return _mean([-logits if self.part.loss == "hinge" else F.softplus(-logits) for logits in self._logits(fake)])

    def discriminator_loss(self, images: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the discriminator's loss () with its penalty, for images and reconstructions (B, C, H, W), and its statistics."""
        penalised = self.part.penalty == "r1"
        images = images.detach().requires_grad_(penalised)
        both = [logits.chunk(2) for logits in self._logits(torch.cat([images, fake.detach()]))]
        real, made = [logits[0] for logits in both], [logits[1] for logits in both]
        if self.part.loss == "hinge":
            loss = (_mean([F.relu(1 - logits) for logits in real]) + _mean([F.relu(1 + logits) for logits in made])) / 2
        else:
            loss = (_mean([F.softplus(-logits) for logits in real]) + _mean([F.softplus(logits) for logits in made])) / 2
        if penalised:
            image_logits = torch.stack([logits.flatten(1).mean(1) for logits in real]).mean(0).sum()
            (gradient,) = torch.autograd.grad(image_logits, images, create_graph=True)
            loss = loss + self.part.penalty_weight / 2 * gradient.square().sum((1, 2, 3)).mean()
        elif self.part.penalty == "lecam":
            mean_real, mean_fake = self.logits.to(loss).unbind()
            distances = [(logits - mean_fake).square() for logits in real], [(logits - mean_real).square() for logits in made]
            loss = loss + self.part.penalty_weight * (_mean(distances[0]) + _mean(distances[1]))
        return loss, {_REAL: _mean(real).detach().to(self.logits), _FAKE: _mean(made).detach().to(self.logits)}

    @torch.no_grad()
    def update_(self, statistics: Mapping[str, Tensor], micro_batches: int) -> None:
        """Update norms, mean logits and spectral norms after a step, from statistics summed over its micro-batches on all ranks."""
        norms = torch.stack([statistics[_OTHERS].norm(), statistics[_OWN].norm()]).to(self.norms) / micro_batches
        averaged = torch.where(self.norms < 0, norms, self.norms.lerp(norms, 1 - _DECAY))
        self.norms.copy_(torch.where(norms.isfinite(), averaged, self.norms))  # half precision may overflow
        logits = torch.stack([statistics[_REAL], statistics[_FAKE]]) / micro_batches
        self.logits.copy_(torch.where(logits.isfinite(), self.logits.lerp(logits, 1 - _DECAY), self.logits))
        for module in self.discriminator.modules():
            if is_parametrized(module, "weight"):
                # Spectral normalisation takes one power iteration whenever the weight is read in training mode.
                module.train()
                _ = module.weight
                module.eval()

    def _logits(self, images: Tensor) -> list[Tensor]:
        return [full_precision(logits) for logits in self.discriminator(images)]


def last_layer(decoder: nn.Module) -> Tensor:
    """Return the weight of the last layer with a matrix or kernels."""
    return [weight for weight in decoder.parameters() if weight.dim() >= 2][-1]


def gradients_at(layer: Tensor, others: Tensor, image: Tensor, others_at_image: Tensor, own_at_image: Tensor) -> dict[str, Tensor]:
    """Return the flat gradients at a layer of all other loss terms and of the adversarial one, whose norms give the weight.

    Args:
        layer: the weight.
        others: a loss that is no function of the image.
        image: the reconstruction (B, C, H, W), the layer's output.
        others_at_image: gradient at the image of the other terms on it, or zeros.
        own_at_image: gradient at the image of the adversarial term.
    """
    (others_gradient,) = torch.autograd.grad(
        [others, image], layer, [torch.full_like(others, _SCALE), _SCALE * others_at_image], retain_graph=True
    )
    (own_gradient,) = torch.autograd.grad(image, layer, _SCALE * own_at_image, retain_graph=True)
    return {_OTHERS: others_gradient.flatten(), _OWN: own_gradient.flatten()}


def _mean(scales: list[Tensor]) -> Tensor:
    """Return the mean over scales of each scale's mean logit."""
    return torch.stack([logits.mean() for logits in scales]).mean()
