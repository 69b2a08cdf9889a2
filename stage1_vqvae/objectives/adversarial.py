"""The adversarial term: when a discriminator takes part in training, by which losses, and how strongly it pulls at the decoder.

A discriminator that is switched on ruins reconstructions in three ways, and each is met here. It knows nothing yet, and its gradient is
noise: first it learns alone. What it asks for comes at once: its weight rises step by step. And its pull has nothing to do with the
others' in size: it is scaled to theirs by the ratio of the gradients at the decoder's last layer (Esser et al. 2021, equation 7), averaged
over some hundred steps. That ratio is no promise, since a gradient at a layer is mostly noise once the layer is good, and since a
discriminator that is fooled has next to none. So the pull at each image is bounded, by what the image's squared error pulls.
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

from configs.schema import AdversarialPart, DiscriminatorPart
from stage1_vqvae.data.splits import ImageSource
from stage1_vqvae.objectives.image_terms import LossTerm, OtherTerms, TermValue, value_at
from training.devices import widest_float
from training.optimizer import OptimizerState, fused_on, trainable
from training.precision import full_precision
from training.processes import average_gradients_
from training.schedule import set_learning_rate
from training.state import Stateful

# Decay a step of the gradients' norms and of LeCam's mean logits. Norms are averaged, not their ratio: in the few steps in which the
# discriminator is fooled and has no gradient the ratio is a hundred times as large.
_DECAY = 0.99
_LEAST = 1e-30
_MOST = 1e4  # of the ratio, as in Esser et al.: far more than is ever good, it keeps the loss finite that is noted
# Gradients at the last layer are taken of losses so many times as large: half precision would lose the least.
_SCALE = 2.0**10
_REAL, _MADE, _OTHERS, _PULL = (f"adversary/{name}" for name in ("real", "made", "others", "pull"))


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
        """What its loss is multiplied by in this step, before `bounded`: 0 while it learns alone, and before the ratio is known."""
        ramp, since = int(self.ramp), step - int(self.started_at)
        risen = min(1.0, max(0.0, (since - ramp) / ramp)) if ramp else 1.0
        others, own = self.norms.clamp(min=0).unbind()
        return self.part.weight * risen * (others / own.clamp(min=_LEAST)).clamp(max=_MOST)

    def bounded(self, pull: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
        """The pull at each image (B, C, H, W), shortened to at most `bound` times the gradient of the mean squared error there; and the
        share of its length that is kept, a mean over the images.

        Why this keeps the reconstruction: let one output stand for many images, e^2 be its mean squared error and s its distance from their
        mean. Where it comes to rest both pulls cancel, so s <= bound * e, and e^2 is the least possible plus s^2. So e^2 is at most
        1 / (1 - bound^2) times the least. Of a network in training, which moves many outputs at once, that is a guide and no proof.

        Args:
            pull: gradient of the weighted term, a mean over the batch.
            errors: the reconstructions' differences from the images (B, C, H, W).
        """
        most = self.part.bound * 2 * full_precision(errors).flatten(1).norm(dim=1) / errors.numel()
        length = full_precision(pull).flatten(1).norm(dim=1)
        kept = (most / length.clamp(min=_LEAST)).clamp(max=1)
        return pull * kept.to(pull)[:, None, None, None], kept.mean()

    def tokenizer_loss(self, made: Tensor) -> Tensor:
        """What the tokenizer lowers, unweighted: low if reconstructions (B, C, H, W) are taken for real."""
        return _mean([-logits if self.part.loss == "hinge" else F.softplus(-logits) for logits in self._judged(made)])

    def discriminator_loss(self, images: Tensor, made: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the discriminator lowers, with its penalty, for images and reconstructions (B, C, H, W); and the statistics of it."""
        penalised = self.part.penalty == "r1"
        images = images.detach().requires_grad_(penalised)
        both = [logits.chunk(2) for logits in self._judged(torch.cat([images, made.detach()]))]
        real, of_made = [logits[0] for logits in both], [logits[1] for logits in both]
        if self.part.loss == "hinge":
            loss = (_mean([F.relu(1 - logits) for logits in real]) + _mean([F.relu(1 + logits) for logits in of_made])) / 2
        else:
            loss = (_mean([F.softplus(-logits) for logits in real]) + _mean([F.softplus(logits) for logits in of_made])) / 2
        if penalised:
            of_image = torch.stack([logits.flatten(1).mean(1) for logits in real]).mean(0).sum()
            (gradient,) = torch.autograd.grad(of_image, images, create_graph=True)
            loss = loss + self.part.penalty_weight / 2 * gradient.square().sum((1, 2, 3)).mean()
        elif self.part.penalty == "lecam":
            mean_real, mean_made = self.logits.to(loss).unbind()
            away = [(logits - mean_made).square() for logits in real], [(logits - mean_real).square() for logits in of_made]
            loss = loss + self.part.penalty_weight * (_mean(away[0]) + _mean(away[1]))
        return loss, {_REAL: _mean(real).detach().to(self.logits), _MADE: _mean(of_made).detach().to(self.logits)}

    @torch.no_grad()
    def update_(self, statistics: Mapping[str, Tensor], parts: int) -> None:
        """After a step, by the statistics of `discriminator_loss` and `gradients_at`, summed over its `parts`: once for all processes."""
        norms = torch.stack([statistics[_OTHERS].norm(), statistics[_PULL].norm()]).to(self.norms) / parts
        averaged = torch.where(self.norms < 0, norms, self.norms.lerp(norms, 1 - _DECAY))
        self.norms.copy_(torch.where(norms.isfinite(), averaged, self.norms))  # half precision may overflow, and goes on
        logits = torch.stack([statistics[_REAL], statistics[_MADE]]) / parts
        self.logits.copy_(torch.where(logits.isfinite(), self.logits.lerp(logits, 1 - _DECAY), self.logits))
        for module in self.discriminator.modules():
            if is_parametrized(module, "weight"):
                # Spectral normalisation takes a step of its power iteration whenever the weight is read in training mode.
                module.train()
                _ = module.weight
                module.eval()

    def _judged(self, images: Tensor) -> list[Tensor]:
        return [full_precision(logits) for logits in self.discriminator(images)]


def last_layer(decoder: nn.Module) -> Tensor:
    """The weight of the last layer with a matrix or kernels."""
    return [weight for weight in decoder.parameters() if weight.dim() >= 2][-1]


def gradients_at(layer: Tensor, others: Tensor, image: Tensor, of_others: Tensor, pull: Tensor) -> dict[str, Tensor]:
    """The statistics from which the ratio of gradients at a layer comes, flat: of all other terms, and of the adversarial one.

    Args:
        layer: the weight.
        others: a loss that is no function of the image.
        image: the reconstruction (B, C, H, W), which the layer puts out.
        of_others: the gradient at the image of the other terms on it, or zeros.
        pull: the gradient at the image of the adversarial term.
    """
    (of_layer,) = torch.autograd.grad([others, image], layer, [torch.full_like(others, _SCALE), _SCALE * of_others], retain_graph=True)
    (pulled,) = torch.autograd.grad(image, layer, _SCALE * pull, retain_graph=True)
    return {_OTHERS: of_layer.flatten(), _PULL: pulled.flatten()}


def _mean(of_scales: list[Tensor]) -> Tensor:
    """The mean over scales of the mean over all logits of each."""
    return torch.stack([logits.mean() for logits in of_scales]).mean()
