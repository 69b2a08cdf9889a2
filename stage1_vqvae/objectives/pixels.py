"""Objectives that judge every pixel by itself: `mse`, `bce`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from configs.schema import ObjectivePart
from stage1_vqvae.objectives.contract import Objective
from stage1_vqvae.training.precision import full_precision


@dataclass(frozen=True, kw_only=True)
class MSEPart(ObjectivePart):
    """Mean squared error, for grey and colour images."""

    def build(self) -> Objective:
        """See the base class."""
        return SquaredError()


@dataclass(frozen=True, kw_only=True)
class BCEPart(ObjectivePart):
    """Binary cross-entropy, for black-and-white images."""

    def build(self) -> Objective:
        """See the base class."""
        return BinaryCrossEntropy()


class SquaredError(Objective):
    """The mean squared error on [-1, 1]: four times that on [0, 1]. The decoder puts out the image itself."""

    def loss(self, output: Tensor, images: Tensor) -> Tensor:
        """See the contract."""
        return F.mse_loss(full_precision(output), images)

    def mean_image(self, output: Tensor) -> Tensor:
        """See the contract."""
        return full_precision(output)


class BinaryCrossEntropy(Objective):
    """Mean nats a pixel of black-and-white images under Bernoulli distributions, whose logits the decoder puts out."""

    def loss(self, output: Tensor, images: Tensor) -> Tensor:
        """See the contract."""
        return F.binary_cross_entropy_with_logits(full_precision(output), (images + 1) / 2)

    def mean_image(self, output: Tensor) -> Tensor:
        """See the contract."""
        return 2 * full_precision(output).sigmoid() - 1
