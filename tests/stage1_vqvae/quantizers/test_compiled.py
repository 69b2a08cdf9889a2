"""Quantizers under torch.compile: one graph each, with the values and gradients of the uncompiled ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.stage1_vqvae.quantizers.quantizer_kinds import D, build


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pass_through(quantizer: torch.nn.Module, z: torch.Tensor) -> list[torch.Tensor]:
    """Everything that a step has from a quantizer, and its gradients at latents and parameters."""
    z = z.clone().requires_grad_()
    found = quantizer(z)
    losses = [found.losses[name] for name in sorted(found.losses)]
    learned = [z, *(parameter for parameter in quantizer.parameters() if parameter.requires_grad)]
    total = (found.z_q * torch.linspace(-1, 1, found.z_q.numel()).view_as(found.z_q)).sum() + sum(losses)
    gradients = torch.autograd.grad(total, learned, allow_unused=True)
    statistics = [found.statistics[name] for name in sorted(found.statistics)]
    return [found.z_q, *found.codes, *losses, *statistics, *found.latents, *(slope for slope in gradients if slope is not None)]


# Both operators, and a quantizer of quantizers; to compile every kind takes over a minute.
@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("gradient_entropy", [(4, D, 3, 5), (2, D, 4, 4)]),  # the second batch is one of any size to the compiler
        ("ema_cosine_projected", [(4, D, 3, 5)]),
        ("residual_rotation", [(4, D, 3, 5)]),
    ],
)
def test_a_quantizer_is_one_graph(kind: str, shapes: list[tuple[int, ...]]) -> None:
    """`fullgraph` raises at whatever would break the graph; codes agree to the last bit."""
    quantizer = build(kind).train()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for shape in shapes:
        z = torch.randn(shape)
        expected, found = pass_through(quantizer, z), pass_through(compiled, z)
        assert len(expected) == len(found)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs) if mine.dtype == torch.int64 else torch.allclose(mine, theirs, atol=1e-6)
