"""Muon against singular value decompositions, torch's own Muon, and AdamW."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from stage1_vqvae.training.muon import orthogonalised
from stage1_vqvae.training.optimizer import adamw, muon


class Net(nn.Module):
    """A layer with a fused map, an embedding before it and a head after it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token, self.qkv, self.out = nn.Embedding(9, 8), nn.Linear(8, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.out(self.qkv(self.token(tokens)).tanh()))


def stepped(net: Net, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> Net:
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        tokens = torch.randint(9, (32,), generator=draws)
        nn.functional.cross_entropy(net(tokens), (3 * tokens + 1) % 9).backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrices = torch.randn(5, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    found = left.mT @ orthogonalised(matrices) @ right.mT
    diagonal = found.diagonal(dim1=1, dim2=2)
    assert torch.allclose(found, torch.diag_embed(diagonal), atol=1e-9)
    # What began above a hundredth of the norm; five steps cannot raise what is far smaller.
    raised = diagonal[values > 0.02 * values.norm(dim=1, keepdim=True)]
    assert float(raised.min()) > 0.6
    assert float(raised.max()) < 1.3


def test_matrices_move_as_torchs_muon_moves_them_and_the_rest_as_adamw_does() -> None:
    """To the two or three digits of its bfloat16; a fused map as three matrices."""
    ours, theirs, start = Net(), Net(), Net()
    optimizer, rest = muon(ours, 1e-3, 0.1, beta2=0.95), adamw(theirs, 1e-3, 0.1, beta2=0.95)
    separate = [nn.Parameter(part.detach().clone()) for part in theirs.qkv.weight.chunk(3)]
    reference = torch.optim.Muon([*separate, theirs.out.weight], lr=1e-2, weight_decay=0.01, momentum=0.95, adjust_lr_fn="original")
    draws = torch.Generator().manual_seed(2)
    for _ in range(3):
        gradients = {name: torch.randn(weight.shape, generator=draws) for name, weight in ours.named_parameters()}
        for net in (ours, theirs):
            for name, weight in net.named_parameters():
                weight.grad = gradients[name].clone()
        for part, gradient in zip(separate, gradients["qkv.weight"].chunk(3), strict=True):
            part.grad = gradient.clone()
        optimizer.step()
        reference.step()
        theirs.qkv.weight.grad = theirs.out.weight.grad = None
        rest.step()
    theirs.qkv.weight.data = torch.cat([part.data for part in separate])
    for name, weight in ours.state_dict().items():
        moved, expected = weight - start.state_dict()[name], theirs.state_dict()[name] - start.state_dict()[name]
        tolerance = 0.03 if name in ("qkv.weight", "out.weight") else 0.0
        assert float((moved - expected).norm()) <= tolerance * float(expected.norm()), name


def test_it_resumes_bit_for_bit() -> None:
    whole, half = Net(), Net()
    stepped(whole, optimizer := muon(whole, 1e-2, 0.1, beta2=0.95), 4)
    stepped(half, first := muon(half, 1e-2, 0.1, beta2=0.95), 4)
    second = muon(half, 1e-2, 0.1, beta2=0.95)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    stepped(whole, optimizer, 3, seed=1)
    stepped(half, second, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), half.parameters(), strict=True))
