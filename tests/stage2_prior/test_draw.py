"""Drawing: warping against plain references, inversion, guidance."""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import UserError
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.draw import StepwiseSampling, draw, draw_position, guidance_scales, guided, uniforms, warp
from stage2_prior.priors.contract import Keep
from stage2_prior.priors.stepwise import StepwisePrior
from stage2_prior.priors.uniform import UniformPrior
from tests.stage2_prior.priors.prior_kinds import KINDS, LAYOUTS, build, random_codes


def reference_warp(logits: list[float], config: StepwiseSampling) -> list[float]:
    """Warp by the definitions, one code at a time, on Python floats."""
    order = sorted(range(len(logits)), key=lambda code: -logits[code])
    if config.temperature == 0:
        return [float(code == order[0]) for code in range(len(logits))]
    allowed = [code for code in order if not config.top_k or logits[code] >= logits[order[config.top_k - 1]]]
    weights = {code: math.exp((logits[code] - logits[order[0]]) / config.temperature) for code in allowed}
    total = sum(weights.values())
    nucleus, reached = [], 0.0
    for code in allowed:
        if reached >= config.top_p - 1e-12:
            break
        nucleus.append(code)
        reached += weights[code] / total
    nucleus = [code for code in nucleus if weights[code] >= config.min_p * weights[order[0]]]
    total = sum(weights[code] for code in nucleus)
    return [weights[code] / total if code in nucleus else 0.0 for code in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.7])
def test_warps_match_their_definitions_alone_and_combined(temperature: float) -> None:
    logits = torch.randn(20, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    logits[0], logits[1, 2:5] = 0.0, 3.0  # ties: all, and three at the top
    for top_k, top_p, min_p in itertools.product([0, 1, 3, 100], [1.0, 0.9, 0.3, 1e-6], [0.0, 0.01, 0.2, 1.0]):
        config = StepwiseSampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        within = dataclasses.replace(config, top_k=min(top_k, 7))
        expected = torch.tensor([reference_warp(row, within) for row in logits.tolist()])
        assert torch.allclose(warp(logits, config), expected.double(), atol=1e-6), config


def test_draw_inverts_the_cumulative_distribution() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    uniform = torch.tensor([0.0, 0.1, 0.2499999, 0.25, 0.74, 0.75, 0.99, 1 - 2**-53], dtype=torch.float64)
    drawn = draw(probabilities.expand(len(uniform), -1), uniform)
    assert drawn.tolist() == [1, 1, 1, 3, 3, 4, 4, 4]


def test_draws_follow_the_probabilities() -> None:
    """Chi-square of 20,000 draws, 6 degrees of freedom; 22.5 is its 99.9 % point."""
    probabilities = torch.softmax(torch.randn(7, generator=torch.Generator().manual_seed(3)).double(), 0)
    drawn = draw(probabilities.expand(20_000, -1), torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(4)))
    expected = 20_000 * probabilities
    statistic = ((torch.bincount(drawn, minlength=7) - expected).square() / expected).sum()
    assert statistic < 22.5


@pytest.mark.parametrize(
    ("scale", "schedule"),
    [(-1.5, "constant"), (0.0, "constant"), (0.5, "constant"), (3.0, "linear"), (3.0, "cosine"), (9.0, "power_cosine")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_guided_sampling_equals_two_full_passes_per_position(scale: float, schedule: str, kind: str) -> None:
    """Logits are combined by hand, in a greedy decode."""
    layout = SequenceLayout([(2, 3)], [7])
    prior = build(kind, layout, num_classes=3).double()
    labels, none = torch.tensor([0, 1, 2]), torch.full((3,), 3)
    config = StepwiseSampling(guidance=scale, guidance_schedule=schedule, temperature=0)  # type: ignore[arg-type]
    (grid,) = prior.sample(labels, uniforms(0, torch.arange(3), 6), config)
    sequences = torch.zeros(3, 6, dtype=torch.int64)
    for position in range(6):
        cosine, delayed = (0.5 - 0.5 * math.cos(math.pi * (position / 5) ** power) for power in (1, 2.75))
        progress = {"constant": 1.0, "linear": position / 5, "cosine": cosine, "power_cosine": delayed}[schedule]
        scale_here = 1 + progress * (scale - 1)
        conditional, unconditional = (prior.logits(layout.grids_of(sequences), condition)[0][:, position] for condition in (labels, none))
        sequences[:, position] = (unconditional + scale_here * (conditional - unconditional)).argmax(-1)
    assert torch.equal(grid.flatten(1), sequences)


def test_guidance_schedules_rise_from_one_to_the_full_scale() -> None:
    for schedule in ("linear", "cosine", "power_cosine"):
        settings = StepwiseSampling(guidance=4.0, guidance_schedule=schedule, guidance_power=1.0)  # type: ignore[arg-type]
        scales = guidance_scales(settings, 9)
        assert (scales[0], scales[4], scales[8]) == (1, pytest.approx(2.5), pytest.approx(4))
        assert scales == sorted(scales)
    assert guidance_scales(StepwiseSampling(guidance=4.0), 3) == [4.0] * 3
    assert guidance_scales(StepwiseSampling(guidance=4.0, guidance_schedule="linear"), 1) == [1.0]


def test_a_higher_power_delays_guidance() -> None:
    """The scale is half-way at the share t of the positions with t^power = 1/2."""
    for power, share in ((0.5, 0.25), (2.0, 0.5**0.5)):
        settings = StepwiseSampling(guidance=3.0, guidance_schedule="power_cosine", guidance_power=power)
        scales = guidance_scales(settings, 1001)
        assert scales == sorted(scales)
        assert (scales[0], scales[-1]) == (1, 3)
        assert sum(scale < 2 for scale in scales) == pytest.approx(1000 * share, abs=1)


def test_outside_the_interval_guidance_is_one() -> None:
    for schedule in ("constant", "linear", "cosine", "power_cosine"):
        everywhere = StepwiseSampling(guidance=4.0, guidance_schedule=schedule)  # type: ignore[arg-type]
        for interval, inside in (
            ([0.0, 1.0], range(11)),
            ([0.25, 0.5], range(3, 6)),
            ([0.5, 0.5], range(5, 6)),
            ([0.99, 1.0], range(10, 11)),
        ):
            scales = guidance_scales(dataclasses.replace(everywhere, guidance_interval=interval), 11)
            assert scales == [scale if position in inside else 1 for position, scale in enumerate(guidance_scales(everywhere, 11))]


def test_guidance_formula_at_its_fixed_points() -> None:
    conditional, unconditional = torch.randn(2, 5), torch.randn(2, 5)
    assert torch.equal(guided(conditional, unconditional, 0.0), unconditional)
    assert torch.allclose(guided(conditional, unconditional, 1.0), conditional, atol=1e-6)


def test_the_uniform_prior_is_uniform_within_each_level() -> None:
    layout = SequenceLayout([(2, 2), (2, 4)], [3, 5])
    top, bottom = UniformPrior(layout).sample(None, uniforms(0, torch.arange(3_000), 12), StepwiseSampling())
    assert top.shape == (3_000, 2, 2)
    assert bottom.shape == (3_000, 2, 4)
    for grid, k, limit in ((top, 3, 13.8), (bottom, 5, 18.5)):  # 99.9 % points for k - 1 degrees of freedom
        counts = torch.bincount(grid.flatten(), minlength=k)
        assert len(counts) == k
        expected = grid.numel() / k
        assert ((counts - expected).square() / expected).sum() < limit


def test_uniforms_depend_on_seed_and_number_alone() -> None:
    assert torch.equal(uniforms(1, torch.tensor([5, 2]), 6), uniforms(1, torch.arange(6), 6)[[5, 2]])
    assert uniforms(1, torch.arange(0), 6).shape == (0, 6)


@pytest.mark.parametrize("number", [0, 1, -1, 2**40, 2**80])
def test_equal_seeds_draw_equal_numbers_in_any_type(number: int) -> None:
    seeds: list[Any] = [Fraction(number), np.array(number), np.float64(number)]
    seeds += [bool(number)] if number in (0, 1) else []
    seeds += [np.int64(number), torch.tensor(number), torch.tensor(float(number), dtype=torch.float64)] if abs(number) < 2**63 else []
    expected = uniforms(number, torch.arange(2), 3)
    assert all(torch.equal(uniforms(seed, torch.arange(2), 3), expected) for seed in seeds)
    assert not torch.equal(uniforms(number + 1, torch.arange(2), 3), expected)


@pytest.mark.parametrize("seed", [1.5, "1", None, math.nan, math.inf, torch.tensor([1, 2]), [1]])
def test_seeds_that_are_not_whole_numbers_are_refused(seed: Any) -> None:
    with pytest.raises(UserError, match="seed: expected a whole number, found"):
        uniforms(seed, torch.arange(2), 3)


def complete_stepwise(prior: StepwisePrior, labels: torch.Tensor, uniform: torch.Tensor, config: StepwiseSampling, keep: Keep) -> Codes:
    """Complete codes by the definition: one step per position, keeping or drawing its code."""
    layout, conditions = prior.layout, torch.cat([labels, prior.null_condition(len(labels))])
    cache, sequences, mask = prior.new_cache(len(conditions)), layout.flat(keep.codes).clone(), layout.flat(keep.masks)[0]
    with torch.no_grad():
        for position, scale in enumerate(guidance_scales(config, layout.length)):
            logits = prior.step(sequences[:, position - 1].repeat(2) if position else None, conditions, cache)
            drawn = draw_position(logits, uniform[:, position], config, scale)[0]
            sequences[:, position] = sequences[:, position] if mask[position] else drawn
    return layout.grids_of(sequences)


@pytest.mark.parametrize("kind", [*KINDS, "levelwise"])
def test_completion_computes_logits_only_where_codes_are_drawn(kind: str) -> None:
    """The codes equal those of one step per position, for any mask."""
    layout = LAYOUTS["top and bottom"]
    prior, labels = build(kind, layout).double(), torch.tensor([1, 4, 0])
    config = StepwiseSampling(guidance=2.0, guidance_schedule="cosine")
    codes, uniform, positions = random_codes(layout, 3), uniforms(5, torch.arange(3), layout.length), torch.arange(layout.length)
    steps = count_steps(prior)
    for mask in (
        positions < 5,
        positions >= 5,
        (positions - 5).abs() > 1,
        positions % 3 == 1,
        positions < layout.lengths[0],
        positions >= 0,
    ):
        keep = Keep(codes, layout.grids_of(mask[None]))
        expected = complete_stepwise(prior, labels, uniform, config, keep)
        steps.clear()
        completed = prior.sample(labels, uniform, config, keep)
        assert len(steps) == int((~mask).sum())
        assert all(torch.equal(*pair) for pair in zip(completed, expected, strict=True))


def count_steps(prior: StepwisePrior) -> list[int]:
    """Return a list that grows with every eager step of a prior or its parts, that is with every computation of logits."""
    steps: list[int] = []
    for part in getattr(prior, "parts", [prior]):

        def counted(*arguments: Any, step: Any = part.step) -> torch.Tensor:
            steps.append(1)
            return step(*arguments)

        part.step = counted
    return steps
