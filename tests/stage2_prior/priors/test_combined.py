"""Fields of a prior that change its loss, together: corrupted context, orders, digits, guidance-free training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from configs.parts import part_from
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.draw import uniforms
from stage2_prior.priors.contract import Prior
from stage2_prior.priors.digit_transformer import DigitTransformer
from stage2_prior.priors.masked import Masked, MaskedSampling
from stage2_prior.priors.prior_file import build_prior
from stage2_prior.priors.transformer import Transformer, TransformerSampling
from tests.stage2_prior.priors.prior_kinds import build, classes, manifest, random_codes

LAYOUT = SequenceLayout([(1, 3), (2, 3)], [4, 5])


def guidance_free(kind: str = "transformer", **fields: Any) -> Prior:
    torch.manual_seed(0)
    sizes = {"layers": 2, "width": 16, "heads": 2, "dropout": 0.0}
    prior = build_prior(part_from("prior", {"kind": kind, "guidance_free": True, **sizes, **fields}), classes(3), manifest(LAYOUT))
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return prior.double().eval()


def test_digits_are_predicted_given_the_clean_digits_of_their_own_code_and_a_corrupted_context() -> None:
    """By the logits of whole codes, which no digit of the code itself enters."""
    layout = SequenceLayout([(2, 3)], [8], [(2, 2, 2)])
    prior = build("digits", layout, corruption=1.0, order="annealed")
    assert isinstance(prior, DigitTransformer)
    codes, draws, progress = random_codes(layout, 4), torch.rand(4, prior.num_draws), torch.tensor(0.0)
    draws[:, 0] = 1  # a share of 1
    context = prior.corrupted(codes, draws, progress)
    assert not torch.equal(context[0], codes[0])
    draws[:, -1 - layout.length] = 1  # raster order, once the share of random ones is below 1
    progress = torch.tensor(0.6)
    draws[:, 0] /= 1 - 4 / 3 * 0.6
    assert torch.equal(prior.corrupted(codes, draws, progress)[0], context[0])
    nats = [
        -prior.code_logits(context, None, 0, index).log_softmax(1).gather(1, codes[0].flatten(1)[:, index, None])
        for index in range(layout.length)
    ]
    torch.testing.assert_close(prior(codes, None, None, draws, progress), torch.cat(nats, 1).mean())


def test_both_passes_of_guidance_free_training_look_back_at_the_same_codes_in_the_same_order() -> None:
    prior, codes, labels, progress = guidance_free(order="any", corruption=1.0), random_codes(LAYOUT, 4), torch.arange(4), torch.tensor(0.2)
    draws = torch.rand(4, prior.num_draws)
    assert isinstance(prior, Transformer)
    assert prior.num_draws == 1 + (1 + 2 * LAYOUT.length) + (1 + LAYOUT.length)
    beta = 1 - draws[:, 0].double()
    beta[3] = 1  # label 3 is the null
    context, order = prior.corrupted(codes, draws[:, 1:], progress), LAYOUT.order_by(draws[:, -LAYOUT.length :])
    assert prior.guidance_free is not None
    given = prior.logits(context, prior.guidance_free.with_beta(labels, beta), order=order)
    null = prior.logits(context, None, order=order)
    scale = beta[:, None, None]
    mixed = [scale * ours + (1 - scale) * other for ours, other in zip(given, null, strict=True)]
    nats = [F.cross_entropy(logits.mT, grid.flatten(1), reduction="none") for logits, grid in zip(mixed, codes, strict=True)]
    loss = prior(codes, labels, None, draws, progress)
    # beta is float32 in the prior.
    torch.testing.assert_close(loss, torch.cat(nats, 1).mean(), rtol=1e-6, atol=0)


def test_rounds_of_a_guidance_free_prior_take_one_row_at_its_beta() -> None:
    prior, labels = guidance_free(order="any"), torch.arange(3)
    noise = uniforms(0, torch.arange(3), prior.num_noise)
    assert prior.guidance_free is not None
    rows = prior.guidance_free.with_beta(labels, torch.full((3,), 1 / 2.5))
    guided = LAYOUT.flat(prior.sample(labels, noise, TransformerSampling(rounds=2, guidance=2.5)))
    assert torch.equal(guided, LAYOUT.flat(prior.sample(rows, noise, TransformerSampling(rounds=2))))
    assert not torch.equal(guided, LAYOUT.flat(prior.sample(labels, noise, TransformerSampling(rounds=2))))


def test_a_levelwise_guidance_free_prior_gives_each_level_the_draws_of_its_context() -> None:
    """Its loss does not depend on how levels share the draws, if they corrupt nothing: only on beta."""
    sizes: dict[str, Any] = {"kind": "transformer", "layers": 1, "width": 16, "heads": 2, "dropout": 0.0, "corruption": 1.0}
    config = {"kind": "levelwise", "guidance_free": True, "levels": [sizes, {**sizes, "order": "annealed"}]}
    prior = build_prior(part_from("prior", config), classes(3), manifest(LAYOUT)).eval()
    assert prior.num_draws == 1 + 2 + 2 * LAYOUT.length + 1 + LAYOUT.lengths[1]
    codes, labels = random_codes(LAYOUT, 4), torch.arange(4)
    draws = torch.rand(4, prior.num_draws)
    others = torch.cat([draws[:, :1], torch.rand(4, prior.num_draws - 1)], 1)
    losses = {
        progress: [prior(codes, labels, None, rows, torch.tensor(progress)).item() for rows in (draws, others)] for progress in (0.0, 0.8)
    }
    assert losses[0.8][0] == losses[0.8][1]
    assert losses[0.0][0] != losses[0.0][1]


def test_a_prior_of_digits_has_no_random_order_to_the_end() -> None:
    with pytest.raises(ValueError, match=r"prior\.order: expected raster or annealed with prior\.head digits, found any"):
        part_from("prior", {"kind": "transformer", "head": "digits", "order": "any"})


def test_a_masked_prior_is_told_its_guidance() -> None:
    """Its loss is that of logits mixed by hand; a guided sample is that of rows with beta."""
    prior = guidance_free("masked")
    assert isinstance(prior, Masked)
    codes, labels, draws = random_codes(LAYOUT, 4), torch.arange(4), torch.rand(4, prior.num_draws)
    beta = 1 - draws[:, 0].double()
    beta[3] = 1  # label 3 is the null
    predicted, masked = prior.random_masks(draws[:, 1:])
    assert prior.guidance_free is not None
    given = prior.features(codes, masked, prior.guidance_free.with_beta(labels, beta))
    null = prior.features(codes, masked, None)
    nats = torch.zeros(4, LAYOUT.length, dtype=torch.float64)
    for row, position in predicted.nonzero().tolist():
        level, index = LAYOUT.level_and_index(position)
        ours, other = (prior.head_logits(features[row, position], level) for features in (given, null))
        mixed = beta[row] * ours + (1 - beta[row]) * other
        nats[row, position] = -mixed.log_softmax(0)[codes[level][row].flatten()[index]]
    expected = (nats.sum(1) / predicted.sum(1)).mean()
    # beta is float32 in the prior.
    torch.testing.assert_close(prior(codes, labels, None, draws), expected, rtol=1e-6, atol=0)
    noise = uniforms(0, torch.arange(4), prior.num_noise)
    rows = prior.guidance_free.with_beta(labels, torch.full((4,), 1 / 2.5))
    sample = LAYOUT.flat(prior.sample(labels, noise, MaskedSampling(guidance=2.5)))
    assert torch.equal(sample, LAYOUT.flat(prior.sample(rows, noise, MaskedSampling())))
    assert not torch.equal(sample, LAYOUT.flat(prior.sample(labels, noise, MaskedSampling())))
