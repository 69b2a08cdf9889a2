"""The entropy term against the same formula over the whole N x K matrix, differentiated by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import stage1_vqvae.quantizers.search as search
from stage1_vqvae.quantizers.entropy import entropy_loss


def reference(rows: Tensor, vectors: Tensor, temperature: float) -> Tensor:
    """Compute the entropy term by its definition."""
    p = (-(rows[:, None] - vectors[None]).square().sum(-1) / temperature).softmax(1)
    mean = p.mean(0)
    return -(p * p.log()).sum(1).mean() + (mean * mean.log()).sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 10.0])
@pytest.mark.parametrize("block_bytes", [1, 8 * 2**20])
def test_value_and_gradients_equal_the_reference(monkeypatch: pytest.MonkeyPatch, temperature: float, block_bytes: int) -> None:
    monkeypatch.setattr(search, "cache_bytes", lambda: block_bytes)
    torch.manual_seed(0)
    rows, vectors = torch.randn(40, 5).double().requires_grad_(), torch.randn(7, 5).double().requires_grad_()
    loss, expected = (function(rows, vectors, temperature) for function in (entropy_loss, reference))
    assert torch.allclose(loss, expected)
    for gradient, expected_gradient in zip(
        torch.autograd.grad(loss, (rows, vectors)), torch.autograd.grad(expected, (rows, vectors)), strict=True
    ):
        assert torch.allclose(gradient, expected_gradient, atol=1e-10)


def test_the_minimum_is_certain_latents_and_uniform_use() -> None:
    vectors = 10 * torch.eye(8)
    uniform, single = vectors.repeat(4, 1), vectors[:1].repeat(32, 1)
    ambiguous = torch.zeros(32, 8)
    losses = [float(entropy_loss(rows, vectors, 1.0)) for rows in (uniform, single, ambiguous)]
    assert losses[0] == pytest.approx(-torch.log(torch.tensor(8.0)).item(), abs=1e-4)
    assert losses[1] == pytest.approx(0, abs=1e-4)
    assert losses[2] == pytest.approx(0, abs=1e-4)


def test_unreachable_codes_leave_finite_gradients() -> None:
    """Their probability underflows to zero, where the slope of x log x is infinite."""
    rows = torch.randn(20, 4).requires_grad_()
    vectors = torch.cat([torch.randn(3, 4), torch.full((1, 4), 1e3)]).requires_grad_()
    entropy_loss(rows, vectors, 0.1).backward()
    assert rows.grad is not None
    assert vectors.grad is not None
    assert bool(torch.isfinite(rows.grad).all())
    assert bool(torch.isfinite(vectors.grad).all())


def test_an_empty_batch_gives_zero() -> None:
    rows = torch.empty(0, 3, requires_grad=True)
    loss = entropy_loss(rows, torch.randn(4, 3), 1.0)
    loss.backward()
    assert loss.item() == 0
