"""Pixel-wise objectives without a likelihood of 8-bit values: `mse`, `bce`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from configs.parts import ObjectivePart
from stage1_vqvae.objectives.contract import Objective
from training.precision import full_precision


@dataclass(frozen=True, kw_only=True)
class MSEPart(ObjectivePart):
    """Mean squared error, for grey and colour images."""

    @override
    def build(self, image_shape: tuple[int, int, int]) -> Objective:
        return SquaredError(image_shape)


@dataclass(frozen=True, kw_only=True)
class BCEPart(ObjectivePart):
    """Binary cross-entropy, for black-and-white images."""

    @override
    def build(self, image_shape: tuple[int, int, int]) -> Objective:
        return BinaryCrossEntropy(image_shape)


class SquaredError(Objective):
    """Mean squared error on [-1, 1], four times that on [0, 1]. The decoder outputs the image itself."""

    @override
    def losses(self, output: Tensor, images: Tensor) -> dict[str, Tensor]:
        return {"reconstruction": F.mse_loss(full_precision(output), images)}

    @override
    def mean_image(self, output: Tensor) -> Tensor:
        return full_precision(output)


class BinaryCrossEntropy(Objective):
    """Mean nats per pixel of black-and-white images under Bernoulli distributions. The decoder outputs their logits."""

    @override
    def losses(self, output: Tensor, images: Tensor) -> dict[str, Tensor]:
        return {"reconstruction": F.binary_cross_entropy_with_logits(full_precision(output), (images + 1) / 2)}

    @override
    def mean_image(self, output: Tensor) -> Tensor:
        return 2 * full_precision(output).sigmoid() - 1
