"""Priors under torch.compile."""

from __future__ import annotations

import pytest
import torch

from tests.stage2_prior.priors.prior_kinds import LAYOUTS, build, random_codes


@pytest.mark.parametrize("kind", ["transformer", "pixelcnn, attention"])  # with every kind of layer
def test_priors_compile_as_one_graph_with_the_same_gradients(kind: str) -> None:
    """Through torch.compile's tracers, with gradient checkpointing."""
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
