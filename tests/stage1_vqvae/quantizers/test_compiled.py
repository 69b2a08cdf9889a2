"""Quantizers under torch.compile: one graph, with the values and gradients of eager mode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.stage1_vqvae.quantizers.quantizer_kinds import D, build


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outputs_and_gradients(quantizer: torch.nn.Module, z: torch.Tensor) -> list[torch.Tensor]:
    """Return all outputs of a quantizer and its gradients for latents and parameters."""
    z = z.clone().requires_grad_()
    output = quantizer(z)
    losses = [output.losses[name] for name in sorted(output.losses)]
    inputs = [z, *(parameter for parameter in quantizer.parameters() if parameter.requires_grad)]
    total = (output.z_q * torch.linspace(-1, 1, output.z_q.numel()).view_as(output.z_q)).sum() + sum(losses)
    gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    statistics = [output.statistics[name] for name in sorted(output.statistics)]
    return [output.z_q, *output.codes, *losses, *statistics, *output.latents, *(slope for slope in gradients if slope is not None)]


# Both operators and a nested quantizer; compiling every kind takes over a minute.
@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("gradient_entropy", [(4, D, 3, 5), (2, D, 4, 4)]),  # the second shape makes the compiler's sizes dynamic
        ("ema_cosine_projected", [(4, D, 3, 5)]),
        ("residual_rotation", [(4, D, 3, 5)]),
        ("multiscale", [(4, D, 3, 5)]),
    ],
)
def test_a_quantizer_compiles_to_one_graph(kind: str, shapes: list[tuple[int, ...]]) -> None:
    """`fullgraph` raises at graph breaks; codes agree exactly."""
    quantizer = build(kind).train()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for shape in shapes:
        z = torch.randn(shape)
        expected, results = outputs_and_gradients(quantizer, z), outputs_and_gradients(compiled, z)
        assert len(expected) == len(results)
        for result, reference in zip(results, expected, strict=True):
            assert result.dtype == reference.dtype
            assert torch.equal(result, reference) if result.dtype == torch.int64 else torch.allclose(result, reference, atol=1e-5)
