"""Objectives that are likelihoods: distributions over 8-bit values, by brute force, by scipy and by gradcheck."""

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
# Pixels that see those above and to the left of them.
IN_CONTEXT = {f"{kind} in context": {**fields, "context": 5} for kind, fields in KINDS.items() if kind != "one logistic"}
H, W = 2, 3

each_kind = pytest.mark.parametrize("kind", KINDS)
each_depth = pytest.mark.parametrize("channels", [1, 3])


def objective_of(kind: str, channels: int, height: int = H, width: int = W) -> PixelLikelihood:
    """In float64; with a context, one that has learned something."""
    found = part_from("tokenizer.objective", {**KINDS, **IN_CONTEXT}[kind]).build((channels, height, width))
    assert isinstance(found, PixelLikelihood)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return found.double().requires_grad_(False)


def output_for(objective: PixelLikelihood, batch: int = 2, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, objective.output_channels, *objective.image_shape[1:])
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def values_for(objective: PixelLikelihood, batch: int = 2, seed: int = 0) -> Tensor:
    """Random ones, the least and the greatest among them."""
    found = torch.randint(objective.num_values, (batch, *objective.image_shape), generator=torch.Generator().manual_seed(seed))
    found[0, :, 0, 0], found[0, :, 0, 1] = 0, objective.num_values - 1
    return found


@each_kind
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
def test_over_all_values_it_adds_up_to_one(kind: str, scale: float) -> None:
    """-log p itself, at each of a grey pixel's values in turn."""
    objective = objective_of(kind, 1)
    output = output_for(objective, batch=1, scale=scale)[:, :, :1, :1]
    every = torch.arange(objective.num_values).view(-1, 1, 1, 1)
    total = (-objective.nats(output.expand(len(every), -1, -1, -1), every)).exp().sum()
    assert abs(float(total) - 1) < 1e-12


@each_kind
@each_depth
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
def test_channel_by_channel_it_is_the_same(kind: str, channels: int, scale: float) -> None:
    """Each channel's probabilities add up to one, and the product of those of an image's values is its p."""
    objective = objective_of(kind, channels)
    output, values = output_for(objective, scale=scale), values_for(objective)
    logs, least = torch.zeros(len(values), dtype=torch.float64), 1.0
    for channel in range(channels):
        known = values.clone()
        known[:, channel:] = 0  # of those to come nothing may be known
        found = objective.channel_probabilities(output, known, channel)
        assert found.shape == (2, 2, 3, objective.num_values)
        assert bool((found >= 0).all())
        assert torch.allclose(found.sum(-1), torch.ones(2, 2, 3, dtype=torch.float64), rtol=0, atol=1e-12)
        chosen = found.gather(-1, values[:, channel, ..., None])[..., 0]
        logs += chosen.clamp(min=1e-300).log().flatten(1).sum(1)
        least = min(least, float(chosen.min()))
    # What lies below the rounding of a sum of 256 probabilities has no digits left there; -log p has them.
    assert scale > 0.1 or least > 1e-9
    if least > 1e-9:
        assert torch.allclose(-objective.nats(output, values), logs, rtol=1e-6)


@pytest.mark.parametrize("components", [1, 4])
def test_the_mixture_is_scipys(components: int) -> None:
    """Each pixel of a grey image by itself: the mass of scipy's logistic distributions on each value's interval."""
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
                of_it = logistic(loc, math.exp(float(log_scales[0, component, row, column]) - 2))
                # Above its middle as survival: its cdf has no digits left there.
                p += weights[component] * (of_it.sf(low) - of_it.sf(high) if low > loc else of_it.cdf(high) - of_it.cdf(low))
            total -= math.log(p)
    assert float(objective.nats(output, values)[0]) == pytest.approx(total, rel=1e-9)


def test_a_channels_mean_moves_with_the_channels_before_it() -> None:
    """One narrow component with coefficients near one: green is red, and blue is red and green together, about a constant."""
    objective = LogisticMixture((3, 1, 1), 1)
    output = torch.zeros(1, objective.output_channels, 1, 1, dtype=torch.float64)
    output[:, 4:7], output[:, 7:] = -5, 20  # log scales, coefficients before tanh
    for red, green in ((128, 128), (138, 128), (128, 118), (118, 138)):
        values = torch.tensor([red, green, 0]).view(1, 3, 1, 1)
        expected = {1: red, 2: red + green - 127.5}
        for channel, value in expected.items():
            found = objective.channel_probabilities(output, values, channel)[0, 0, 0]
            mean = float((found * torch.arange(256)).sum())
            assert mean == pytest.approx(value, abs=0.1)


@each_kind
@each_depth
def test_gradients(kind: str, channels: int) -> None:
    objective = objective_of(kind, channels)
    # Of a categorical's 256 logits a channel, the first image's first pixel is enough.
    output, values = output_for(objective)[:1, :, :1, :1], values_for(objective)[:1, :, :1, :1]
    for value in (values, torch.full_like(values, objective.num_values - 1), torch.full_like(values, objective.num_values // 2)):
        assert torch.autograd.gradcheck(lambda x, value=value: objective.nats(x, value), (output.clone().requires_grad_(),))


@each_kind
@each_depth
def test_far_from_the_truth_loss_and_gradient_stay_finite(kind: str, channels: int) -> None:
    """In float32: sharp distributions that are wrong, as diverging or late training has them."""
    objective = objective_of(kind, channels)
    for scale in (30.0, 300.0):
        output = output_for(objective, scale=scale).float().requires_grad_()
        loss = objective.nats(output, values_for(objective)).sum()
        loss.backward()
        assert bool(loss.isfinite())
        assert output.grad is not None
        assert bool(output.grad.isfinite().all())


@each_kind
@each_depth
def test_samples_are_drawn_by_the_probabilities(kind: str, channels: int) -> None:
    """Uniforms in even steps give each value of the first channel as often as its probability says, to within one of them."""
    objective, count = objective_of(kind, channels), 4000
    output = output_for(objective, batch=1)[:, :, :1, :1]
    uniform = torch.rand(count, channels, 1, 1, generator=torch.Generator().manual_seed(0))
    uniform[:, 0, 0, 0] = (torch.arange(count) + 0.5) / count
    values = objective.values(objective.sample(output.expand(count, -1, -1, -1), uniform))
    expected = objective.channel_probabilities(output, values[:1], 0)[0, 0, 0]
    found = values[:, 0].flatten().bincount(minlength=objective.num_values) / count
    assert float((found - expected).abs().max()) <= 1.01 / count
    # -log p of what is drawn has the distribution's own entropy for its mean.
    nats = objective.nats(output.expand(count, -1, -1, -1), values)
    if channels == 1:
        entropy = float(-torch.special.xlogy(expected, expected).sum())
        assert float(nats.mean()) == pytest.approx(entropy, abs=0.02)


@each_kind
@each_depth
def test_the_mean_image_is_the_mean_of_the_distribution(kind: str, channels: int) -> None:
    """The first channel's; to half a value's width, where the mixture is cut at the range's ends."""
    objective = objective_of(kind, channels)
    output = output_for(objective, scale=0.3)
    values = values_for(objective)
    expected = (objective.channel_probabilities(output, values, 0) * objective.images(torch.arange(objective.num_values))).sum(-1)
    assert torch.allclose(objective.mean_image(output)[:, 0], expected, atol=1e-9 if not kind.endswith("logistic") else 0.06)
    assert objective.mean_image(output).shape == (2, channels, 2, 3)


def test_every_value_is_recognised_in_what_models_see() -> None:
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
def test_the_loss_is_nats_a_dimension(kind: str, channels: int) -> None:
    objective = objective_of(kind, channels)
    output, values = output_for(objective), values_for(objective)
    losses = objective.losses(output, objective.images(values).float())
    assert losses.keys() == {"reconstruction"}
    assert float(losses["reconstruction"]) == pytest.approx(float(objective.nats(output, values).sum()) / values.numel(), rel=1e-12)


def test_grey_is_refused_by_what_knows_black_and_white() -> None:
    Bernoulli((1, 1, 2)).check(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1))
    with pytest.raises(UserError, match="found a value 128"):
        Bernoulli((1, 1, 2)).check(torch.tensor([0, 128], dtype=torch.uint8).view(1, 1, 2, 1))


each_context = pytest.mark.parametrize("kind", IN_CONTEXT)


@each_context
@each_depth
def test_in_context_turn_by_turn_it_is_the_same(kind: str, channels: int) -> None:
    """What one value after another is drawn or decoded by, with none known that comes later, multiplies to an image's p."""
    objective = objective_of(kind, channels, height=5, width=9)
    output, values = output_for(objective, scale=0.5), values_for(objective)
    known, logs = torch.zeros_like(values), torch.zeros(len(values), dtype=torch.float64)
    for index, found in objective.sequential_probabilities(output, known):
        assert found.shape == (2, 1, 1, objective.num_values)
        logs += found.gather(-1, values[index][..., None])[..., 0].log().flatten(1).sum(1)
        known[index] = values[index]
    assert torch.equal(known, values)
    assert torch.allclose(-objective.nats(output, values), logs, rtol=1e-6)
    assert not torch.allclose(objective.independent_nats(output, values), -logs, rtol=1e-3)


def test_a_pixel_sees_those_near_it_that_come_before_it() -> None:
    """24 of them, at most three rows above and three columns to a side; itself and what follows not."""
    context = CausalContext((1, 9, 11), 2, 6).double()
    torch.nn.init.normal_(context.out.weight)
    output, images = torch.randn(1, 2, 9, 11).double(), torch.randn(1, 1, 9, 11).double().requires_grad_()
    for row, column in ((0, 0), (0, 5), (4, 0), (5, 6), (8, 10)):
        (gradient,) = torch.autograd.grad(context(output, images, slice(0, 9), slice(0, 11))[0, :, row, column].sum(), images)
        expected = {(y, x) for y in range(max(0, row - 3), row + 1) for x in range(max(0, column - 3), min(11, column + 4))}
        expected -= {(row, x) for x in range(column, 11)}
        assert {(int(y), int(x)) for y, x in gradient[0, 0].nonzero()} == expected


def test_in_context_the_p_of_all_images_is_one_and_samples_follow_it() -> None:
    """All 64 black-and-white images of 2 x 3 pixels; of 6,000 samples each is there as often as its p says, to 4 standard deviations."""
    objective = objective_of("bernoulli in context", 1)
    output = output_for(objective, batch=1)
    images = torch.tensor(list(itertools.product((0, 1), repeat=6))).view(64, 1, 2, 3)
    p = (-objective.nats(output.expand(64, -1, -1, -1), images)).exp()
    assert abs(float(p.sum()) - 1) < 1e-12
    count = 6000
    uniform = torch.rand(count, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    drawn = objective.values(objective.sample(output.expand(count, -1, -1, -1), uniform)).flatten(1)
    found = (drawn @ (2 ** torch.arange(5, -1, -1))).bincount(minlength=64) / count
    assert bool(((found - p).abs() <= 4 * (p * (1 - p) / count).sqrt() + 1 / count).all())


@each_context
def test_a_context_teaches_the_decoder_nothing(kind: str) -> None:
    objective = objective_of(kind, 3).requires_grad_()
    images = objective.images(values_for(objective))
    alone = objective_of(kind.removesuffix(" in context"), 3)
    gradients = []
    for judge in (objective, alone):
        output = output_for(judge).requires_grad_()
        losses = judge.losses(output, images, torch.tensor([0.1, 0.9]))
        sum(losses.values(), torch.zeros(())).backward()
        gradients.append(output.grad)
    assert torch.equal(gradients[0], gradients[1])  # type: ignore[arg-type]
    assert all(parameter.grad is not None for parameter in objective.parameters())
    assert torch.equal(objective.mean_image(output_for(objective)), alone.mean_image(output_for(alone)))


@each_context
def test_what_the_context_learns_from_is_right_in_the_mean(kind: str) -> None:
    """A band of rows of each image where it is drawn, as many bands as divide the height, and all rows where nothing is."""
    for height, bands in ((8, 4), (6, 6), (5, 5), (3, 3)):
        objective = objective_of(kind, 3, height=height)
        output, values = output_for(objective), values_for(objective)
        expected = float(objective.nats(output, values).sum()) / values.numel()
        uniforms = (torch.stack([torch.arange(bands), torch.arange(bands).flip(0)], 1) + 0.999) / bands
        found = [float(objective.losses(output, objective.images(values), uniform)["context"]) for uniform in uniforms]
        assert len(set(found)) == bands
        assert sum(found) / bands == pytest.approx(expected, rel=1e-9)
        assert float(objective.losses(output, objective.images(values))["context"]) == pytest.approx(expected, rel=1e-12)


@each_context
def test_what_the_context_learns_from_is_the_same_however_a_step_is_shared_out(kind: str) -> None:
    """Over processes, and in parts: rows are drawn for an image's place in the batch, and another way in each step."""
    values = torch.arange(8 * 4 * 6 * 3).view(8, 4, 6, 3) * 7 % 256
    pixels = (values if kind != "bernoulli in context" else values // 128 * 255).to(torch.uint8)
    objective = objective_of(kind, 3, height=4, width=6)
    output = output_for(objective, batch=8)

    def loss(processes: int, parts: int, step: int) -> float:
        found = []
        for rank in range(processes):
            accelerator: Any = SimpleNamespace(num_processes=processes, process_index=rank, device=torch.device("cpu"))
            loader = Loader(ImageSplit(pixels, None), Data(), Stage1(batch_size=8, accumulation=parts), accelerator)
            for part in range(parts):
                rows = loader.share(part)
                images = to_model(pixels[rows])
                found.append(float(objective.losses(output[rows], images, loader.uniforms(step, part))["context"]))
        return sum(found) / len(found)

    whole = [loss(1, 1, step) for step in range(3)]
    assert len(set(whole)) == 3
    for processes, parts in ((2, 1), (1, 2), (2, 2), (8, 1)):
        assert [loss(processes, parts, step) for step in range(3)] == pytest.approx(whole, rel=1e-6)
