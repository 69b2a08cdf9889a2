"""Guidance-free training: the prior's logits at a beta against guidance by two rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from configs.parts import part_from
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.conditions.guidance_free import GuidanceFree
from stage2_prior.conditions.none import NoCondition
from stage2_prior.draw import StepwiseSampling, uniforms
from stage2_prior.priors.prior_file import build_prior
from stage2_prior.priors.stepwise import Logits, StepwisePrior
from stage2_prior.sampler import Sampler
from tests.stage2_prior.priors.prior_kinds import KINDS, classes, manifest, random_codes
from tests.stage2_prior.simulated_graphs import SimulatedCuda, simulated_cuda

__all__ = ["simulated_cuda"]

LAYOUT = SequenceLayout([(1, 2), (2, 2)], [4, 5])
ALL_KINDS = pytest.mark.parametrize("kind", ["transformer", "pixelcnn", "levelwise", "next_scale"])


def build(kind: str, num_classes: int = 3) -> StepwisePrior:
    torch.manual_seed(0)
    sizes = {"layers": 2, "width": 16, "heads": 2, "dropout": 0.0}
    levels = [{**sizes, **KINDS[name]} for name in ("transformer", "pixelcnn")]
    fields = {"levels": levels} if kind == "levelwise" else sizes
    prior = build_prior(part_from("prior", {"kind": kind, "guidance_free": True, **fields}), classes(num_classes), manifest(LAYOUT))
    assert isinstance(prior, StepwisePrior)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return prior.double().eval()


def told(prior: StepwisePrior, labels: torch.Tensor, beta: float) -> torch.Tensor:
    assert prior.guidance_free is not None
    return prior.guidance_free.with_beta(labels, torch.full((len(labels),), beta))


@ALL_KINDS
def test_the_loss_is_that_of_logits_mixed_by_hand(kind: str) -> None:
    """Also of a row whose condition was dropped; gradients reach the unconditional logits from that row alone."""
    prior, codes, labels = build(kind), random_codes(LAYOUT, 3), torch.tensor([2, 3, 0])
    uniform = torch.tensor([[0.25], [0.9], [0.5]])
    expected = torch.zeros((), dtype=torch.float64)
    for row, beta in enumerate((0.75, 1.0, 0.5)):
        one, label = tuple(level[row : row + 1] for level in codes), labels[row : row + 1]
        mixed = [
            beta * ours + (1 - beta) * null.detach()
            for ours, null in zip(prior.logits(one, told(prior, label, beta)), prior.logits(one, None), strict=True)
        ]
        nats = [F.cross_entropy(logits[0], level.flatten(), reduction="sum") for logits, level in zip(mixed, one, strict=True)]
        expected = expected + torch.stack(nats).sum() / (3 * LAYOUT.length)
    loss = prior(codes, labels, None, uniform)
    torch.testing.assert_close(loss, expected)
    weights = [weight for weight in prior.parameters() if weight.requires_grad]
    for found, wanted in zip(*(torch.autograd.grad(value, weights, allow_unused=True) for value in (loss, expected)), strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found, wanted)


@ALL_KINDS
def test_a_guided_sample_takes_one_row_at_beta_the_reciprocal_of_guidance(kind: str, simulated_cuda: SimulatedCuda) -> None:
    """By eager steps and by graphs, against greedy full passes; without guidance, and in likelihoods, beta is 1."""
    prior, labels, uniform = build(kind), torch.arange(3), uniforms(0, torch.arange(3), LAYOUT.length)
    sampler = Sampler(prior, graphs=True)
    for guidance in (1.0, 2.5, 4.0):
        sequences = torch.zeros(3, LAYOUT.length, dtype=torch.int64)
        for position in range(LAYOUT.length):
            logits = prior.logits(LAYOUT.grids_of(sequences), told(prior, labels, 1 / guidance))
            sequences[:, position] = [part for level in logits for part in level.unbind(1)][position].argmax(1)
        settings = StepwiseSampling(guidance=guidance, temperature=1e-6)
        for sample in (prior.sample, sampler):
            assert torch.equal(LAYOUT.flat(sample(labels, uniform, settings)), sequences)
    assert bool(simulated_cuda.graphs) == (kind != "next_scale")
    codes = random_codes(LAYOUT, 3)
    assert torch.equal(prior.nats(codes, labels), prior.nats(codes, told(prior, labels, 1.0)))
    assert not torch.allclose(prior.nats(codes, labels), prior.nats(codes, told(prior, labels, 0.4)))


class ExactPrior(StepwisePrior):
    """One code given one of two classes, with the logits of guidance by two rows: unconditional + (conditional - unconditional) / beta."""

    def __init__(self, probabilities: torch.Tensor) -> None:
        super().__init__(SequenceLayout([(1, 1)], [4]), GuidanceFree(classes(2)))
        self.logarithms = nn.Parameter(torch.cat([probabilities, probabilities.mean(0, keepdim=True)]).log())

    def logits(self, codes: Codes, condition: torch.Tensor | None, variants: torch.Tensor | None = None) -> Logits:
        beta, number = self.condition_or_null(condition, len(codes[0])).split(1, 1)
        unconditional = self.logarithms[2]
        return ((unconditional + (self.logarithms[number[:, 0].long()] - unconditional) / beta)[:, None],)

    def new_cache(self, batch: int, above: Codes = ()) -> None:
        raise NotImplementedError

    def step(self, code: torch.Tensor | None, condition: torch.Tensor | None, cache: None) -> torch.Tensor:
        raise NotImplementedError


def test_the_logits_of_guidance_by_two_rows_have_the_least_loss() -> None:
    """The entropy of codes given the class, or given none, which no prediction of them can go below."""
    counts = torch.tensor([[5, 3, 1, 1], [2, 3, 4, 1]])
    codes = torch.arange(4).repeat(2).repeat_interleave(counts.flatten()).repeat(2).view(-1, 1, 1)
    labels = torch.tensor([0, 1, 2, 2]).repeat_interleave(10)  # all rows again, with their condition dropped
    prior = ExactPrior(counts / 10)
    entropies = -(prior.logarithms.exp() * prior.logarithms).sum(1)
    least = entropies @ torch.tensor([0.25, 0.25, 0.5])
    torch.testing.assert_close(prior((codes,), labels, None, torch.rand(40, 1)), least)
    prior.logarithms.data += 0.1 * torch.randn(3, 4)
    assert prior((codes,), labels, None, torch.rand(40, 1)) > least


def test_guidance_free_priors_need_a_condition() -> None:
    config = part_from("prior", {"kind": "transformer", "guidance_free": True, "layers": 1, "width": 16, "heads": 1})
    with pytest.raises(ValueError, match=r"prior\.guidance_free: expected false without a condition"):
        build_prior(config, NoCondition(), manifest(LAYOUT))
