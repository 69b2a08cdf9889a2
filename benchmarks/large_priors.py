"""Computed cost of large priors on many GPUs: memory per GPU, bytes sent per step, images per second.

    python benchmarks/large_priors.py

Computed from the models' parameters, from a layer's activation memory (measured here), from the communication formulas that
`benchmarks/sharding.py` checks, and from the GPU and network described by the constants below.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks

from configs.parts import part_from
from stage1_vqvae.attention import rotations
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.conditions.classes import Classes
from stage2_prior.priors.blocks import Block

_CODES, _SIDE, _CLASSES, _VARIANTS, _BATCH = 16384, 16, 1000, 10, 256  # those of configs/imagenet256.yaml
_TOKENS = _SIDE**2
_MACHINE = 8  # GPUs that one machine has
# An H100 SXM: dense bf16 operations per second, and bytes per second that it sends within its machine (NVIDIA's data sheet: half of what
# NVLink carries in both directions). A ring through all GPUs leaves each machine once, by eight ports of 400 Gbit/s together.
_PEAK, _NVLINK, _PORTS = 989e12, 450e9, 8 * 50e9
# The share of the peak that large transformers are trained at (nanoGPT, Llama 3: 38 to 43 % of it), an assumption.
_UTILISATION = 0.4

SIZES = {"L": {"preset": "L"}, "3B": {"layers": 24, "width": 3200, "heads": 32}}


class ParameterCounts(NamedTuple):
    """Number of parameters of a prior, inside and outside its layers."""

    layers: int
    width: int
    in_layers: int
    """Parameters of layers."""
    others: int
    """Parameters outside of layers."""

    @property
    def parameters(self) -> int:
        """Total number of parameters."""
        return self.in_layers + self.others


def count_parameters(size: dict[str, Any]) -> ParameterCounts:
    """Count the parameters of a transformer of that size, on the meta device."""
    part = part_from("prior", {"kind": "transformer", **size})
    with torch.device("meta"):
        prior = part.build(SequenceLayout([(_SIDE, _SIDE)], [_CODES]), Classes(names=[*map(str, range(_CLASSES))]), _VARIANTS)
    total = sum(parameter.numel() for parameter in prior.parameters())
    inside = sum(parameter.numel() for module in prior.fsdp_modules() for parameter in module.parameters())
    return ParameterCounts(len(prior.fsdp_modules()), part.sizes().width, inside, total - inside)


def measure_activation(width: int = 256, heads: int = 4, side: int = 8) -> float:
    """Measure activation bytes per token and channel of a layer under bf16 autocast, by the increase per image."""
    block, layout = Block(width, heads, 0.0), SequenceLayout([(side, side)], [2])
    rotary = rotations(layout.centres(), width // heads).float()

    def saved_bytes(images: int) -> int:
        storages: dict[int, int] = {}

        def record(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(record, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
            block(torch.randn(images, side**2, width, requires_grad=True), rotary)
        return sum(storages.values())

    return (saved_bytes(3) - saved_bytes(2)) / (side**2 * width)


def memory(prior: ParameterCounts, gpus: int, activation: float, checkpointing: bool, shards: bool) -> float:
    """Compute bytes per GPU."""
    tokens = _TOKENS * _BATCH / gpus
    # Weight, gradient, two moments, average and best average; replicated, DDP holds gradients twice and the best average is on the host.
    states = prior.parameters * 24 / gpus if shards else prior.parameters * (20 + 4)
    # Outside layers, weights and gradients are gathered for a step; of layers, two in bf16 and one's gradient in bf16 and float32.
    gathered = prior.others * 8 + prior.in_layers / prior.layers * (2 * 2 + 6) if shards else 0
    activations = prior.width * tokens * (4 * prior.layers + activation if checkpointing else activation * prior.layers)
    logits = tokens * _CODES * (2 + 4 + 4 + 4 + 2)
    return states + gathered + activations + logits


def bytes_sent(prior: ParameterCounts, gpus: int, shards: bool) -> float:
    """Compute bytes sent per GPU and step."""
    others = (gpus - 1) / gpus
    if not shards:
        return others * 8 * prior.parameters
    # Layers are gathered in bf16 for the forward and for the backward pass, the rest once in float32; gradients are added in float32.
    return others * (2 * 2 * prior.in_layers + 4 * prior.others + 4 * prior.parameters)


def seconds(prior: ParameterCounts, gpus: int, checkpointing: bool, shards: bool) -> tuple[float, float]:
    """Compute a step's seconds of arithmetic and of communication, which overlap."""
    tokens = _TOKENS * _BATCH / gpus
    products = prior.in_layers + _CODES * prior.width
    per_token = 6 * products + 6 * prior.layers * _TOKENS * prior.width  # causal attention: half of all pairs
    recomputed = 2 * prior.in_layers if checkpointing else 0
    wire = _NVLINK if gpus <= _MACHINE else _PORTS
    return tokens * (per_token + recomputed) / (_PEAK * _UTILISATION), bytes_sent(prior, gpus, shards) / wire


def main() -> None:
    """Run the benchmark and print its table."""
    activation = measure_activation()
    print(f"a layer keeps {activation:.1f} bytes per token and channel (measured)\n")
    print("| prior | GPUs | how | memory per GPU | sent per step | arithmetic s | communication s | images per second |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, size in SIZES.items():
        prior = count_parameters(size)
        for gpus in (8, 64):
            for shards in (False, True):
                for checkpointing in (False, True):
                    compute, wire = seconds(prior, gpus, checkpointing, shards)
                    cells = (
                        f"{name}, {prior.parameters / 1e6:,.0f} M",
                        str(gpus),
                        f"{'in shards' if shards else 'copies'}{', checkpointing' if checkpointing else ''}",
                        f"{memory(prior, gpus, activation, checkpointing, shards) / 1e9:.1f} GB",
                        f"{bytes_sent(prior, gpus, shards) / 1e9:.1f} GB",
                        f"{compute * 1e3:,.0f} ms",
                        f"{wire * 1e3:,.0f} ms",
                        f"{_BATCH / max(compute, wire):,.0f}",
                    )
                    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
