"""Likelihoods of 8-bit values: `logistic`, `categorical`, `bernoulli`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from configs.errors import UserError, require
from configs.parts import ObjectivePart
from stage1_vqvae.data.splits import Pixels
from stage1_vqvae.objectives.contract import Objective, PixelLikelihood
from training.batching import batches
from training.precision import full_precision

# Log scales are clamped: below e^-7 of half the range a component lies within one value (Salimans et al. 2017), above e^7 it is flat.
_MAX_LOG_SCALE = 7.0
# Initial offset of log scales: components an eighth of half the range wide.
_INITIAL_LOG_SCALE = -2.0
_CHECK_BATCH = 1024


@dataclass(frozen=True, kw_only=True)
class _LikelihoodPart(ObjectivePart):
    context: int = 0
    """Channels of the context network, through which a pixel also depends on those above and to the left; 0 = on z alone."""

    def __post_init__(self) -> None:
        require(self.context >= 0, "tokenizer.objective.context", "at least 0", self.context)

    @property
    @override
    def image_is_learned(self) -> bool:
        return False  # it is the mean of the learned distribution


@dataclass(frozen=True, kw_only=True)
class LogisticPart(_LikelihoodPart):
    """A mixture of discretised logistic distributions, for grey and colour images (Salimans et al. 2017)."""

    components: int = 5
    """Mixture components; a pixel's channels share the choice of component."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.components >= 1, "tokenizer.objective.components", "at least 1", self.components)

    @override
    def build(self, image_shape: tuple[int, int, int]) -> Objective:
        return LogisticMixture(image_shape, self.components, self.context)


@dataclass(frozen=True, kw_only=True)
class CategoricalPart(_LikelihoodPart):
    """256 free probabilities per channel, for grey and colour images."""

    @override
    def build(self, image_shape: tuple[int, int, int]) -> Objective:
        return Categorical(image_shape, self.context)


@dataclass(frozen=True, kw_only=True)
class BernoulliPart(_LikelihoodPart):
    """Probability of white, for black-and-white images only."""

    @override
    def build(self, image_shape: tuple[int, int, int]) -> Objective:
        return Bernoulli(image_shape, self.context)


class LogisticMixture(PixelLikelihood):
    """p(x | z) of a pixel is a mixture of logistic distributions, integrated over each value's interval.

    Salimans et al. 2017, "PixelCNN++", section 2: the intervals of the smallest and largest value extend to infinity, and each
    component's mean of a channel is linear in the earlier channels. The decoder outputs, per component, a weight, C means, C log scales
    and C (C - 1) / 2 coefficients.
    """

    def __init__(self, image_shape: tuple[int, int, int], components: int, context: int = 0) -> None:
        channels = image_shape[0]
        super().__init__(image_shape, components * (1 + 2 * channels + channels * (channels - 1) // 2), context)
        self.components = components

    def _mixture(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Split the output into logits (B, M, H, W), means and log scales (B, M, C, H, W), coefficients (B, M, C (C - 1) / 2, H, W)."""
        # Contiguous pixels per parameter: twice as fast on a CPU.
        output = full_precision(output).contiguous().unflatten(1, (self.components, -1))
        channels = self.image_shape[0]
        logits, means, log_scales, coefficients = output.split((1, channels, channels, channels * (channels - 1) // 2), 2)
        log_scales = (log_scales + _INITIAL_LOG_SCALE).clamp(-_MAX_LOG_SCALE, _MAX_LOG_SCALE)
        return logits[:, :, 0], means, log_scales, coefficients.tanh()

    @staticmethod
    def _mean(means: Tensor, coefficients: Tensor, channel: int, before: Tensor) -> Tensor:
        """Compute each component's mean (B, M, H, W) of a channel, given the earlier channels, (B, M or 1, C, H, W)."""
        first = channel * (channel - 1) // 2
        return means[:, :, channel] + (coefficients[:, :, first : first + channel] * before[:, :, :channel]).sum(2)

    def _log_probabilities(self, output: Tensor, values: Tensor, channels: int) -> Tensor:
        """Compute, per component, log weight plus log p of the first `channels` channels' values: (B, M, H, W)."""
        logits, means, log_scales, coefficients = self._mixture(output)
        x = self.images(values).to(logits)[:, None]
        total = logits.log_softmax(1)
        half = 1 / (self.num_values - 1)
        for channel in range(channels):
            value, centred = values[:, None, channel], x[:, :, channel] - self._mean(means, coefficients, channel, x)
            sharpness = (-log_scales[:, :, channel]).exp()
            # log(sigmoid(a) - sigmoid(b)) = -softplus(-a) - softplus(b) + log(1 - exp(b - a)), without cancellation.
            above = F.softplus(-(centred + half) * sharpness)
            below = F.softplus((centred - half) * sharpness)
            inside = torch.log(-torch.expm1(-2 * half * sharpness))
            first, last = value == 0, value == self.num_values - 1
            total = total - above.masked_fill(last, 0) - below.masked_fill(first, 0) + inside.masked_fill(first | last, 0)
        return total

    @override
    def independent_nats(self, output: Tensor, values: Tensor) -> Tensor:
        return -self._log_probabilities(output, values, values.shape[1]).logsumexp(1).sum((1, 2))

    @override
    def channel_probabilities(self, output: Tensor, values: Tensor, channel: int) -> Tensor:
        weights = self._log_probabilities(output, values, channel).softmax(1)  # posterior of the components given earlier channels
        _, means, log_scales, coefficients = self._mixture(output)
        mean = self._mean(means, coefficients, channel, self.images(values).to(means)[:, None])
        sharpness = (-log_scales[:, :, channel]).exp()
        boundaries = (torch.arange(self.num_values - 1, dtype=mean.dtype, device=mean.device) + 0.5) * (2 / (self.num_values - 1)) - 1
        cumulative = mean.new_zeros(*mean[:, 0].shape, self.num_values + 1)
        cumulative[..., -1] = 1
        for weight, centre, sharp in zip(weights.unbind(1), mean.unbind(1), sharpness.unbind(1), strict=True):
            reached = ((boundaries - centre[..., None]) * sharp[..., None]).sigmoid_()
            cumulative[..., 1:-1].addcmul_(weight[..., None].expand_as(reached), reached)
        return cumulative.diff(dim=-1).clamp_(min=0)

    @override
    def mean_image(self, output: Tensor) -> Tensor:
        """See the contract. The mean of the continuous mixture, each component's clamped to [-1, 1]."""
        logits, means, _, coefficients = self._mixture(output)
        channels: list[Tensor] = []
        for channel in range(means.shape[2]):
            earlier = torch.stack(channels, 2) if channels else means[:, :, :0]
            channels.append(self._mean(means, coefficients, channel, earlier).clamp(-1, 1))
        return (logits.softmax(1)[:, :, None] * torch.stack(channels, 2)).sum(1)


class Categorical(PixelLikelihood):
    """p(x | z) of a channel is any distribution over its 256 values. The decoder outputs 256 logits per channel."""

    def __init__(self, image_shape: tuple[int, int, int], context: int = 0) -> None:
        super().__init__(image_shape, self.num_values * image_shape[0], context)

    def _logits(self, output: Tensor) -> Tensor:
        """Reshape the output to (B, H, W, C, V), a view if the output is channels last in memory."""
        return full_precision(output).movedim(1, -1).unflatten(-1, (-1, self.num_values))

    @override
    def independent_nats(self, output: Tensor, values: Tensor) -> Tensor:
        logits = self._logits(output)
        nats = F.cross_entropy(logits.flatten(0, 3), values.movedim(1, -1).flatten(), reduction="none")
        return nats.view(len(values), -1).sum(1)

    @override
    def channel_probabilities(self, output: Tensor, values: Tensor, channel: int) -> Tensor:
        return self._logits(output)[..., channel, :].softmax(-1)

    @override
    def mean_image(self, output: Tensor) -> Tensor:
        logits = self._logits(output)
        return (logits.softmax(-1) @ self.images(torch.arange(self.num_values, device=logits.device)).to(logits)).movedim(-1, 1)


class Bernoulli(PixelLikelihood):
    """p(x | z) of a channel is Bernoulli, white or black. The decoder outputs the logit of white."""

    num_values = 2

    def __init__(self, image_shape: tuple[int, int, int], context: int = 0) -> None:
        super().__init__(image_shape, image_shape[0], context)

    @override
    def independent_nats(self, output: Tensor, values: Tensor) -> Tensor:
        logits = full_precision(output)
        return F.binary_cross_entropy_with_logits(logits, values.to(logits), reduction="none").sum((1, 2, 3))

    @override
    def channel_probabilities(self, output: Tensor, values: Tensor, channel: int) -> Tensor:
        logit = full_precision(output)[:, channel]
        return torch.stack([(-logit).sigmoid(), logit.sigmoid()], -1)

    @override
    def mean_image(self, output: Tensor) -> Tensor:
        return 2 * full_precision(output).sigmoid() - 1

    @override
    def check(self, pixels: Pixels) -> None:
        for part in batches(len(pixels), _CHECK_BATCH):
            values = pixels[part]
            grey = (values != 0) & (values != 255)
            if bool(grey.any()):
                expected = "expected images of black and white alone (0 and 255)"
                raise UserError(
                    f"tokenizer.objective bernoulli: {expected}, found a value {int(values[grey][0])}; take logistic or categorical"
                )
