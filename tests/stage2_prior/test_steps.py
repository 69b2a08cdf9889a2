"""Training state of a prior."""

from __future__ import annotations

import pytest
import torch

from configs.schema import Compute, Stage2, prior_from
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.conditions.classes import Classes
from stage2_prior.steps import PriorState
from training.processes import start

LAYOUT = SequenceLayout([(2, 3)], [16])


@pytest.mark.parametrize("kind", ["transformer", "pixelcnn", "masked"])
def test_likelihoods_are_computed_in_float32_under_mixed_precision(kind: str) -> None:
    torch.manual_seed(0)
    prior = prior_from({"kind": kind, "layers": 2, "width": 16, "heads": 2}).build(LAYOUT, Classes(names=["a", "b", "c"]))
    codes, labels, draws = (torch.randint(16, (4, 2, 3)),), torch.tensor([0, 1, 2, 3]), torch.rand(4, prior.num_draws)
    expected = prior.eval().nats(codes, labels)
    compute = Compute(mixed_precision="bf16", threads=1)
    state = PriorState(start(compute), prior, Stage2(), compute)
    assert torch.equal(state.average.model.eval().nats(codes, labels), expected)
    in_bf16, in_float32 = (model(codes, labels, None, draws) for model in (state.model, state.average.model))
    assert not torch.equal(in_bf16, in_float32)
