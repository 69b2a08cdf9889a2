"""Pixel likelihoods over 8-bit values, checked by brute force, scipy and gradcheck."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import logistic
from torch import Tensor

from configs.data import Data
from configs.errors import UserError
from configs.parts import part_from
from configs.schema import Stage1
from stage1_vqvae.data.loader import Loader
from stage1_vqvae.data.pixels import to_model
from stage1_vqvae.data.splits import ImageSplit
from stage1_vqvae.objectives.context import CausalContext
from stage1_vqvae.objectives.contract import PixelLikelihood
from stage1_vqvae.objectives.likelihoods import Bernoulli, Categorical, LogisticMixture

KINDS = {
    "logistic": {"kind": "logistic", "components": 3},
    "one logistic": {"kind": "logistic", "components": 1},
    "categorical": {"kind": "categorical"},
    "bernoulli": {"kind": "bernoulli"},
}
# Pixels conditioned on those above and to the left.
IN_CONTEXT = {f"{kind} in context": {**fields, "context": 5} for kind, fields in KINDS.items() if kind != "one logistic"}
H, W = 2, 3

each_kind = pytest.mark.parametrize("kind", KINDS)
each_depth = pytest.mark.parametrize("channels", [1, 3])


def build_objective(kind: str, channels: int, height: int = H, width: int = W) -> PixelLikelihood:
    """Build an objective in float64, with random weights in its context network."""
    objective = part_from("tokenizer.objective", {**KINDS, **IN_CONTEXT}[kind]).build((channels, height, width))
    assert isinstance(objective, PixelLikelihood)
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return objective.double().requires_grad_(False)


def output_for(objective: PixelLikelihood, batch: int = 2, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, objective.output_channels, *objective.image_shape[1:])
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def values_for(objective: PixelLikelihood, batch: int = 2, seed: int = 0) -> Tensor:
    """Draw random values that include the smallest and the largest."""
    values = torch.randint(objective.num_values, (batch, *objective.image_shape), generator=torch.Generator().manual_seed(seed))
    values[0, :, 0, 0], values[0, :, 0, 1] = 0, objective.num_values - 1
    return values


@each_kind
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
def test_probabilities_sum_to_one(kind: str, scale: float) -> None:
    """Sums exp(-nats) over all values of a grey pixel."""
    objective = build_objective(kind, 1)
    output = output_for(objective, batch=1, scale=scale)[:, :, :1, :1]
    every = torch.arange(objective.num_values).view(-1, 1, 1, 1)
    total = (-objective.nats(output.expand(len(every), -1, -1, -1), every)).exp().sum()
    assert abs(float(total) - 1) < 1e-12


@each_kind
@each_depth
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
def test_channel_probabilities_multiply_to_the_likelihood(kind: str, channels: int, scale: float) -> None:
    """Channel probabilities sum to one, and their product over an image is its p."""
    objective = build_objective(kind, channels)
    output, values = output_for(objective, scale=scale), values_for(objective)
    logs, least = torch.zeros(len(values), dtype=torch.float64), 1.0
    for channel in range(channels):
        known = values.clone()
        known[:, channel:] = 0  # later channels must not matter
        probabilities = objective.channel_probabilities(output, known, channel)
        assert probabilities.shape == (2, 2, 3, objective.num_values)
        assert bool((probabilities >= 0).all())
        assert torch.allclose(probabilities.sum(-1), torch.ones(2, 2, 3, dtype=torch.float64), rtol=0, atol=1e-12)
        chosen = probabilities.gather(-1, values[:, channel, ..., None])[..., 0]
        logs += chosen.clamp(min=1e-300).log().flatten(1).sum(1)
        least = min(least, float(chosen.min()))
    # Probabilities below the rounding of a sum of 256 have no digits left; nats do.
    assert scale > 0.1 or least > 1e-9
    if least > 1e-9:
        assert torch.allclose(-objective.nats(output, values), logs, rtol=1e-6)


@pytest.mark.parametrize("components", [1, 4])
def test_logistic_mixture_equals_scipy(components: int) -> None:
    """Per grey pixel: the mass of scipy's logistic distributions on the value's interval."""
    objective = LogisticMixture((1, H, W), components)
    output, values = output_for(objective), values_for(objective)
    logits, means, log_scales = output.view(2, components, 3, 2, 3).unbind(2)
    total = 0.0
    for row in range(2):
        for column in range(3):
            weights = logits[0, :, row, column].softmax(0).numpy()
            value = int(values[0, 0, row, column])
            low, high = (-math.inf if value == 0 else (value - 0.5) / 127.5 - 1), (math.inf if value == 255 else (value + 0.5) / 127.5 - 1)
            p = 0.0
            for component in range(components):
                loc = float(means[0, component, row, column])
                distribution = logistic(loc, math.exp(float(log_scales[0, component, row, column]) - 2))
                # Above the mean the survival function keeps digits that the cdf loses.
                p += weights[component] * (
                    distribution.sf(low) - distribution.sf(high) if low > loc else distribution.cdf(high) - distribution.cdf(low)
                )
            total -= math.log(p)
    assert float(objective.nats(output, values)[0]) == pytest.approx(total, rel=1e-9)


def test_channel_means_depend_on_earlier_channels() -> None:
    """One narrow component with coefficients near one: green is red, and blue is red and green together, about a constant."""
    objective = LogisticMixture((3, 1, 1), 1)
    output = torch.zeros(1, objective.output_channels, 1, 1, dtype=torch.float64)
    output[:, 4:7], output[:, 7:] = -5, 20  # log scales, coefficients before tanh
    for red, green in ((128, 128), (138, 128), (128, 118), (118, 138)):
        values = torch.tensor([red, green, 0]).view(1, 3, 1, 1)
        expected = {1: red, 2: red + green - 127.5}
        for channel, value in expected.items():
            probabilities = objective.channel_probabilities(output, values, channel)[0, 0, 0]
            mean = float((probabilities * torch.arange(256)).sum())
            assert mean == pytest.approx(value, abs=0.1)


@each_kind
@each_depth
def test_gradients_match_finite_differences(kind: str, channels: int) -> None:
    objective = build_objective(kind, channels)
    # Of a categorical's 256 logits a channel, the first image's first pixel is enough.
    output, values = output_for(objective)[:1, :, :1, :1], values_for(objective)[:1, :, :1, :1]
    for value in (values, torch.full_like(values, objective.num_values - 1), torch.full_like(values, objective.num_values // 2)):
        assert torch.autograd.gradcheck(lambda x, value=value: objective.nats(x, value), (output.clone().requires_grad_(),))


@each_kind
@each_depth
def test_loss_and_gradient_stay_finite_for_wrong_predictions(kind: str, channels: int) -> None:
    """In float32, for sharp wrong distributions, as in diverging or late training."""
    objective = build_objective(kind, channels)
    for scale in (30.0, 300.0):
        output = output_for(objective, scale=scale).float().requires_grad_()
        loss = objective.nats(output, values_for(objective)).sum()
        loss.backward()
        assert bool(loss.isfinite())
        assert output.grad is not None
        assert bool(output.grad.isfinite().all())


@each_kind
@each_depth
def test_samples_follow_the_probabilities(kind: str, channels: int) -> None:
    """Evenly spaced uniforms give every value of the first channel its probability, to within one sample."""
    objective, count = build_objective(kind, channels), 4000
    output = output_for(objective, batch=1)[:, :, :1, :1]
    uniform = torch.rand(count, channels, 1, 1, generator=torch.Generator().manual_seed(0))
    uniform[:, 0, 0, 0] = (torch.arange(count) + 0.5) / count
    values = objective.values(objective.sample(output.expand(count, -1, -1, -1), uniform))
    expected = objective.channel_probabilities(output, values[:1], 0)[0, 0, 0]
    frequencies = values[:, 0].flatten().bincount(minlength=objective.num_values) / count
    assert float((frequencies - expected).abs().max()) <= 1.01 / count
    # The mean nats of samples are the entropy.
    nats = objective.nats(output.expand(count, -1, -1, -1), values)
    if channels == 1:
        entropy = float(-torch.special.xlogy(expected, expected).sum())
        assert float(nats.mean()) == pytest.approx(entropy, abs=0.02)


@each_kind
@each_depth
def test_the_mean_image_is_the_mean_of_the_distribution(kind: str, channels: int) -> None:
    """For the first channel; to half a value for mixtures, which are clipped at the range's ends."""
    objective = build_objective(kind, channels)
    output = output_for(objective, scale=0.3)
    values = values_for(objective)
    expected = (objective.channel_probabilities(output, values, 0) * objective.images(torch.arange(objective.num_values))).sum(-1)
    assert torch.allclose(objective.mean_image(output)[:, 0], expected, atol=1e-9 if not kind.endswith("logistic") else 0.06)
    assert objective.mean_image(output).shape == (2, channels, 2, 3)


def test_values_survive_conversion_to_model_input() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    for objective in (LogisticMixture((1, 16, 16), 2), Categorical((1, 16, 16))):
        assert torch.equal(objective.values(to_model(pixels)), pixels.long().movedim(-1, 1))
        assert torch.equal(objective.values_from_pixels(pixels), objective.values(to_model(pixels)))
        assert torch.equal(objective.pixels(objective.values_from_pixels(pixels)), pixels)
        assert torch.allclose(objective.images(objective.values_from_pixels(pixels)), to_model(pixels).double(), atol=1e-6)
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1)
    assert Bernoulli((1, 1, 2)).values(to_model(black_and_white)).flatten().tolist() == [0, 1]
    assert torch.equal(Bernoulli((1, 1, 2)).pixels(Bernoulli((1, 1, 2)).values_from_pixels(black_and_white)), black_and_white)


@each_kind
@each_depth
def test_the_loss_is_nats_per_dimension(kind: str, channels: int) -> None:
    objective = build_objective(kind, channels)
    output, values = output_for(objective), values_for(objective)
    losses = objective.losses(output, objective.images(values).float())
    assert losses.keys() == {"reconstruction"}
    assert float(losses["reconstruction"]) == pytest.approx(float(objective.nats(output, values).sum()) / values.numel(), rel=1e-12)


def test_bernoulli_refuses_grey_images() -> None:
    Bernoulli((1, 1, 2)).check(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1))
    with pytest.raises(UserError, match="found a value 128"):
        Bernoulli((1, 1, 2)).check(torch.tensor([0, 128], dtype=torch.uint8).view(1, 1, 2, 1))


each_context = pytest.mark.parametrize("kind", IN_CONTEXT)


@each_context
@each_depth
def test_sequential_probabilities_multiply_to_the_likelihood(kind: str, channels: int) -> None:
    """The product of sequential probabilities, each conditioned on earlier values only, is the image's p."""
    objective = build_objective(kind, channels, height=5, width=9)
    output, values = output_for(objective, scale=0.5), values_for(objective)
    known, logs = torch.zeros_like(values), torch.zeros(len(values), dtype=torch.float64)
    for index, probabilities in objective.sequential_probabilities(output, known):
        assert probabilities.shape == (2, 1, 1, objective.num_values)
        logs += probabilities.gather(-1, values[index][..., None])[..., 0].log().flatten(1).sum(1)
        known[index] = values[index]
    assert torch.equal(known, values)
    assert torch.allclose(-objective.nats(output, values), logs, rtol=1e-6)
    assert not torch.allclose(objective.independent_nats(output, values), -logs, rtol=1e-3)


def test_context_covers_earlier_neighbours_only() -> None:
    """Up to 24 pixels: three rows above and three columns to each side, never itself or later ones."""
    context = CausalContext((1, 9, 11), 2, 6).double()
    torch.nn.init.normal_(context.out.weight)
    output, images = torch.randn(1, 2, 9, 11).double(), torch.randn(1, 1, 9, 11).double().requires_grad_()
    for row, column in ((0, 0), (0, 5), (4, 0), (5, 6), (8, 10)):
        (gradient,) = torch.autograd.grad(context(output, images, slice(0, 9), slice(0, 11))[0, :, row, column].sum(), images)
        expected = {(y, x) for y in range(max(0, row - 3), row + 1) for x in range(max(0, column - 3), min(11, column + 4))}
        expected -= {(row, x) for x in range(column, 11)}
        assert {(int(y), int(x)) for y, x in gradient[0, 0].nonzero()} == expected


def test_context_probabilities_of_all_images_sum_to_one_and_samples_follow() -> None:
    """All 64 black-and-white images of 2 x 3 pixels; frequencies of 6,000 samples match p to 4 standard deviations."""
    objective = build_objective("bernoulli in context", 1)
    output = output_for(objective, batch=1)
    images = torch.tensor(list(itertools.product((0, 1), repeat=6))).view(64, 1, 2, 3)
    p = (-objective.nats(output.expand(64, -1, -1, -1), images)).exp()
    assert abs(float(p.sum()) - 1) < 1e-12
    count = 6000
    uniform = torch.rand(count, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    drawn = objective.values(objective.sample(output.expand(count, -1, -1, -1), uniform)).flatten(1)
    frequencies = (drawn @ (2 ** torch.arange(5, -1, -1))).bincount(minlength=64) / count
    assert bool(((frequencies - p).abs() <= 4 * (p * (1 - p) / count).sqrt() + 1 / count).all())


@each_context
def test_context_does_not_change_the_decoders_gradient(kind: str) -> None:
    objective = build_objective(kind, 3).requires_grad_()
    images = objective.images(values_for(objective))
    alone = build_objective(kind.removesuffix(" in context"), 3)
    gradients = []
    for likelihood in (objective, alone):
        output = output_for(likelihood).requires_grad_()
        losses = likelihood.losses(output, images, torch.tensor([0.1, 0.9]))
        sum(losses.values(), torch.zeros(())).backward()
        gradients.append(output.grad)
    assert torch.equal(gradients[0], gradients[1])  # type: ignore[arg-type]
    assert all(parameter.grad is not None for parameter in objective.parameters())
    assert torch.equal(objective.mean_image(output_for(objective)), alone.mean_image(output_for(alone)))


@each_context
def test_context_loss_over_bands_averages_to_the_likelihood(kind: str) -> None:
    """The loss uses one random band of rows per image, and all rows without random numbers."""
    for height, bands in ((8, 4), (6, 6), (5, 5), (3, 3)):
        objective = build_objective(kind, 3, height=height)
        output, values = output_for(objective), values_for(objective)
        expected = float(objective.nats(output, values).sum()) / values.numel()
        uniforms = (torch.stack([torch.arange(bands), torch.arange(bands).flip(0)], 1) + 0.999) / bands
        losses = [float(objective.losses(output, objective.images(values), uniform)["context"]) for uniform in uniforms]
        assert len(set(losses)) == bands
        assert sum(losses) / bands == pytest.approx(expected, rel=1e-9)
        assert float(objective.losses(output, objective.images(values))["context"]) == pytest.approx(expected, rel=1e-12)


@each_context
def test_context_loss_does_not_depend_on_world_size_or_micro_batches(kind: str) -> None:
    """Over ranks and micro-batches: bands depend on an image's place in the batch and on the step."""
    values = torch.arange(8 * 4 * 6 * 3).view(8, 4, 6, 3) * 7 % 256
    pixels = (values if kind != "bernoulli in context" else values // 128 * 255).to(torch.uint8)
    objective = build_objective(kind, 3, height=4, width=6)
    output = output_for(objective, batch=8)

    def loss(processes: int, parts: int, step: int) -> float:
        losses = []
        for rank in range(processes):
            accelerator: Any = SimpleNamespace(num_processes=processes, process_index=rank, device=torch.device("cpu"))
            loader = Loader(ImageSplit(pixels, None), Data(), Stage1(batch_size=8, accumulation=parts), accelerator)
            for part in range(parts):
                rows = loader.share(part)
                images = to_model(pixels[rows])
                losses.append(float(objective.losses(output[rows], images, loader.uniforms(step, part))["context"]))
        return sum(losses) / len(losses)

    expected = [loss(1, 1, step) for step in range(3)]
    assert len(set(expected)) == 3
    for processes, parts in ((2, 1), (1, 2), (2, 2), (8, 1)):
        assert [loss(processes, parts, step) for step in range(3)] == pytest.approx(expected, rel=1e-6)
