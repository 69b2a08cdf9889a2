"""Drawing: warping against plain references, inversion, independence of the batch."""

from __future__ import annotations

import itertools

import pytest
import torch

from configs.schema import Prior, Sampling
from stage2_prior.generate import draw, generate, guided, uniform_codes, uniforms, warp
from stage2_prior.sequence import SequenceLayout
from stage2_prior.transformer import Transformer

LAYOUT = SequenceLayout([(2, 3)], [7])


def prior() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(Prior(layers=2, width=32, heads=4), LAYOUT, 3).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def reference_warp(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """By the definitions, one token at a time, on Python floats."""
    import math

    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    if temperature == 0:
        return [float(token == order[0]) for token in range(len(logits))]
    allowed = order[:top_k] if top_k else order
    weights = {token: math.exp((logits[token] - logits[order[0]]) / temperature) for token in allowed}
    total = sum(weights.values())
    kept, reached = [], 0.0
    for token in allowed:
        if reached >= top_p:
            break
        kept.append(token)
        reached += weights[token] / total
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 3, 7, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
def test_warping_alone_and_together_against_the_definitions(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(20, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    found = warp(logits, temperature, top_k, top_p)
    expected = torch.tensor([reference_warp(row, temperature, min(top_k, 7), top_p) for row in logits.tolist()])
    assert torch.allclose(found, expected.double(), atol=1e-6)


def test_draw_inverts_the_cumulative_distribution() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    uniform = torch.tensor([0.0, 0.1, 0.2499999, 0.25, 0.74, 0.75, 0.99, 1 - 2**-53], dtype=torch.float64)
    found = draw(probabilities.expand(len(uniform), -1), uniform)
    assert found.tolist() == [1, 1, 1, 3, 3, 4, 4, 4]


def test_draws_follow_the_probabilities() -> None:
    """Chi-square of 20,000 draws, 6 degrees of freedom; 22.5 is its 99.9 % point."""
    probabilities = torch.softmax(torch.randn(7, generator=torch.Generator().manual_seed(3)).double(), 0)
    found = draw(probabilities.expand(20_000, -1), torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(4)))
    expected = 20_000 * probabilities
    statistic = ((torch.bincount(found, minlength=7) - expected).square() / expected).sum()
    assert statistic < 22.5


@pytest.mark.parametrize("scale", [-1.5, 0.0, 0.5, 1.0, 3.0])
def test_every_guidance_scale_is_honoured(scale: float) -> None:
    """Against two uncached passes, logits combined by hand, at each place of a greedy decode."""
    model = prior()
    labels, none = torch.tensor([0, 1, 2]), torch.full((3,), 3)
    (grid,) = generate(model, labels, uniforms(0, torch.arange(3), 6), Sampling(guidance=scale, temperature=0))
    tokens = torch.empty(3, 0, dtype=torch.int64)
    for t in range(6):
        conditional, unconditional = model(tokens, labels)[:, t], model(tokens, none)[:, t]
        tokens = torch.cat([tokens, (unconditional + scale * (conditional - unconditional)).argmax(-1, keepdim=True)], 1)
    assert torch.equal(grid.flatten(1), tokens)


def test_guidance_formula_at_its_fixed_points() -> None:
    conditional, unconditional = torch.randn(2, 5), torch.randn(2, 5)
    assert torch.equal(guided(conditional, unconditional, 0.0), unconditional)
    assert torch.allclose(guided(conditional, unconditional, 1.0), conditional, atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_sample_is_the_same_whatever_it_is_batched_with(guidance: float) -> None:
    model = prior()
    numbers, labels = torch.arange(12), torch.arange(12) % 3
    config = Sampling(guidance=guidance, top_p=0.95)
    (together,) = generate(model, labels, uniforms(7, numbers, 6), config)
    for size in (1, 5):
        parts = [generate(model, labels[part], uniforms(7, part, 6), config)[0] for part in numbers.split(size)]
        assert torch.equal(torch.cat(parts), together)
    (other,) = generate(model, labels, uniforms(8, numbers, 6), config)
    assert not torch.equal(other, together)


def test_samples_follow_the_priors_own_probabilities() -> None:
    """Frequencies of all 2^4 grids in 8,000 samples against exp(log_prob); 15 degrees of freedom, 99.9 % point 37.7."""
    layout = SequenceLayout([(2, 2)], [2])
    torch.manual_seed(0)
    model = Transformer(Prior(layers=2, width=32, heads=4), layout, 0).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    (grids,) = generate(model, None, uniforms(0, torch.arange(8_000), 4), Sampling())
    index = (grids.flatten(1) * torch.tensor([8, 4, 2, 1])).sum(1)
    every = torch.tensor(list(itertools.product([0, 1], repeat=4))).view(-1, 2, 2)
    expected = 8_000 * model.log_prob((every,), None).sum(1).exp()
    assert expected.min() > 5
    statistic = ((torch.bincount(index, minlength=16) - expected).square() / expected).sum()
    assert statistic < 37.7


def test_the_uniform_prior_is_uniform_within_each_level() -> None:
    layout = SequenceLayout([(2, 2), (2, 4)], [3, 5])
    top, bottom = uniform_codes(layout, uniforms(0, torch.arange(3_000), 12))
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
