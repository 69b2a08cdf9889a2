"""Priors under torch.compile."""

from __future__ import annotations

import pytest
import torch

from tests.stage2_prior.priors.prior_kinds import LAYOUTS, build, random_codes


@pytest.mark.parametrize("kind", ["transformer", "pixelcnn, attention"])  # which has all that the other PixelCNNs have
def test_it_trains_compiled_without_a_break(kind: str) -> None:
    """Whole, through torch.compile's own tracers, checkpointed, and to the same gradients."""
    prior = build(kind, LAYOUTS["top and bottom"], layers=2).double().train()
    prior.checkpointing = True
    codes, labels = random_codes(prior.layout, 2), torch.tensor([1, 5])
    gradients = []
    for model in (prior, torch.compile(prior, fullgraph=True, backend="aot_eager")):
        prior.zero_grad()
        model(codes, labels).backward()
        gradients.append([parameter.grad.clone() for parameter in prior.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(list(prior.parameters()))
    assert all(torch.allclose(plain, compiled) for plain, compiled in zip(*gradients, strict=True))
