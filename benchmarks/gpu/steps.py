"""A recipe's training steps without its data: the loops' own `take_step`, on random images and codes.

Only the number of dead codes that restart depends on the images' content; these steps restart none.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _LPIPS

from configs.parts import PerceptualPart
from configs.schema import Recipe
from stage1_vqvae.data.variants import VARIANTS
from stage1_vqvae.features.classifier import CLASSIFIER, Classifier
from stage1_vqvae.features.networks import Layers
from stage1_vqvae.model import VQVAE
from stage1_vqvae.objectives.adversarial import Adversary
from stage1_vqvae.objectives.discriminators import PatchDiscriminator, PatchPart
from stage1_vqvae.objectives.image_terms import LossTerm, PerceptualTerm
from stage1_vqvae.objectives.perceptual import FeatureDistance, FeaturesPart, LPIPSDistance, LPIPSPart
from stage1_vqvae.steps import TokenizerState
from stage1_vqvae.steps import take_step as take_tokenizer_step
from stage2_prior.codes.loader import CodeBatch
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.conditions.classes import Classes
from stage2_prior.steps import PriorState
from stage2_prior.steps import take_step as take_prior_step
from training.devices import channels_last_on_accelerator

NUM_CLASSES = {"cifar10": 10, "imagenet256": 1000, "imagenet256_vit": 1000}
"""Number of classes of each labelled recipe; the other recipes have none."""


class Step:
    """A training step that can be taken again and again."""

    def __init__(self, model: nn.Module, take: Callable[[], None]) -> None:
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        """Parameters of the tokenizer or prior alone."""
        self.take = take


class _RandomLPIPS(nn.Module):
    """LPIPS with random weights, as fast as with trained ones."""

    def __init__(self, trunk: str) -> None:
        super().__init__()
        self.distance = _LPIPS(net=trunk, pnet_rand=True).eval().requires_grad_(False)
        # Made by torch.Tensor(..), which knows no default device.
        scaling, device = self.distance.scaling_layer, next(self.distance.parameters()).device
        scaling.shift, scaling.scale = scaling.shift.to(device), scaling.scale.to(device)

    def forward(self, images: Tensor, originals: Tensor) -> Tensor:
        """Compute the distances (B,) of images from their originals (B, 3, H, W)."""
        return self.distance(*map(channels_last_on_accelerator, (images, originals))).flatten()


def perceptual_term(part: PerceptualPart, channels: int) -> nn.Module | None:
    """Build the perceptual term with random weights; None: the recipe has none. Errors: ValueError for an unsupported network."""
    if part.kind == "none":
        return None
    if isinstance(part, LPIPSPart):
        return LPIPSDistance(_RandomLPIPS(part.trunk), part.weight)  # type: ignore[arg-type]
    if isinstance(part, FeaturesPart) and part.network == CLASSIFIER:
        network = Classifier(channels, ["0", "1"]).eval()
        return FeatureDistance(SimpleNamespace(layers=Layers(network, network.features)), part.weight)  # type: ignore[arg-type]
    raise ValueError(f"stage1.perceptual: expected none, lpips or features of {CLASSIFIER}, found {part}")


class _RandomImages:
    """Random images in place of stage 1's loader."""

    def __init__(self, size: int, shape: tuple[int, int, int], device: torch.device) -> None:
        self._images = torch.rand(size, *shape, device=device) * 2 - 1

    def images(self, step: int, micro_step: int) -> Tensor:
        """Return the images (B, C, H, W), the same for every micro-step."""
        return self._images

    def share(self, micro_step: int) -> slice:
        """Return the slice of the step's batch that the micro-step takes."""
        return slice(micro_step * len(self._images), (micro_step + 1) * len(self._images))


def tokenizer_step(accelerator: Accelerator, recipe: Recipe, adversarial: bool = True) -> Step:
    """Build a stage 1 step of the recipe's batch size. `adversarial`: with the discriminator, if the recipe has one."""
    data, config, device = recipe.data, recipe.stage1, accelerator.device
    part, terms = config.adversarial, list[LossTerm]()
    with device:
        tokenizer = VQVAE(recipe.tokenizer, data.height, data.width, data.channels)
        perceptual = perceptual_term(config.perceptual, data.channels)
        discriminator = PatchDiscriminator(data.channels, part.channels, part.layers, part.norm) if isinstance(part, PatchPart) else None
    if perceptual is not None:
        terms.append(PerceptualTerm(perceptual))
    if isinstance(part, PatchPart) and discriminator is not None and adversarial:
        terms.append(Adversary(part, discriminator))
    state = TokenizerState(accelerator, tokenizer, config, terms)
    loader = _RandomImages(config.batch_size // config.accumulation, tokenizer.image_shape, device)
    number = config.steps - 1  # after the discriminator's start, and after the last restart

    def take() -> None:
        state.model.train()
        take_tokenizer_step(accelerator, state, loader, config, number)  # type: ignore[arg-type]

    return Step(tokenizer, take)


def prior_step(accelerator: Accelerator, recipe: Recipe, num_classes: int) -> Step:
    """Build a stage 2 step of the recipe's batch size."""
    data, config, quantizer, device = recipe.data, recipe.stage2, recipe.tokenizer.quantizer, accelerator.device
    steps = recipe.tokenizer.network.downsamplings
    layout = SequenceLayout([(data.height // step, data.width // step) for step in steps], [quantizer.num_codes] * len(steps))
    variants = len(VARIANTS[recipe.extraction.augmentation])
    with device:
        prior = recipe.prior.build(layout, Classes(names=[*map(str, range(num_classes))]), variants)
    state = PriorState(accelerator, prior, config, recipe.compute)
    size = config.batch_size // config.accumulation
    codes = tuple(torch.randint(k, (size, *grid), device=device) for k, grid in zip(layout.num_codes, layout.grids, strict=True))
    labels = torch.randint(num_classes, (size,), device=device) if num_classes else None
    draws = torch.rand(size, prior.num_draws, device=device) if prior.num_draws else None
    batch = CodeBatch(codes, labels, torch.randint(variants, (size,), device=device), draws, torch.tensor(0.5, device=device))
    loader: Any = SimpleNamespace(batch=lambda step, micro_step: batch)

    def take() -> None:
        state.model.train()
        take_prior_step(accelerator, state, loader, config, config.steps // 2)

    return Step(prior, take)
