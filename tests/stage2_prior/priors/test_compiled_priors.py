"""Priors under torch.compile."""

from __future__ import annotations

import pytest
import torch

from tests.stage2_prior.priors.prior_kinds import LAYOUTS, build, random_codes
from tests.stage2_prior.priors.test_masked import build as build_masked


@pytest.mark.parametrize("kind", ["transformer", "pixelcnn, attention", "masked", "next_scale"])  # with every kind of layer
def test_priors_compile_as_one_graph_with_the_same_gradients(kind: str) -> None:
    """Through torch.compile's tracers, with gradient checkpointing."""
    layout = LAYOUTS["top and bottom"]
    prior = (build_masked(layout, layers=1) if kind == "masked" else build(kind, layout, layers=2).double()).train()
    prior.checkpointing = True
    codes, labels, draws = random_codes(layout, 2), torch.tensor([1, 5]), torch.rand(2, prior.num_draws)
    gradients = []
    for model in (prior, torch.compile(prior, fullgraph=True, backend="aot_eager")):
        prior.zero_grad()
        model(codes, labels, None, draws).backward()
        gradients.append([parameter.grad.clone() for parameter in prior.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(list(prior.parameters()))
    assert all(torch.allclose(plain, compiled) for plain, compiled in zip(*gradients, strict=True))
