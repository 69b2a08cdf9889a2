"""The quantizer layer (forward, backward, moving average) against the floor: one matrix product, argmin and gather.

    python benchmarks/quantizer_layer.py
    pip install -e '.[bench]' && python benchmarks/quantizer_layer.py     (with vector-quantize-pytorch as a peer)

Medians of alternated runs, as ratios to the floor within one run; two threads. Memory is the peak above the level
before the call (Linux only).
"""

from __future__ import annotations

import ctypes
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from configs.parts import part_from

_SHAPES = ((16_384, 512, 64), (4_096, 1_024, 512), (16_384, 16_384, 8))
_ROUNDS = 15
_IMAGES = 16


def floor(z: Tensor, codebook: Tensor) -> Callable[[], object]:
    """Return the lower bound of an exact search: matrix product, argmin and gather on contiguous rows (N, D), without learning."""
    rows = z.movedim(1, -1).reshape(-1, z.shape[1]).contiguous()
    distances = torch.empty(len(rows), len(codebook))

    def call() -> Tensor:
        torch.addmm(codebook.square().sum(1), rows, codebook.T, alpha=-2, out=distances)
        return codebook[distances.argmin(1)]

    return call


def ours(z: Tensor, codebook: Tensor, **section: object) -> Callable[[], object]:
    """Return the layer's part of a training step, on latents (B, D, h, w)."""
    quantizer = part_from("tokenizer.quantizer", {"num_codes": len(codebook), **section}).build(codebook.shape[1]).train()
    gradient = torch.randn_like(z)  # in z's layout, as a decoder gives it

    def call() -> None:
        output = quantizer(z)
        torch.autograd.backward([output.z_q, *output.losses.values()], [gradient, *(None for _ in output.losses)])
        z.grad = None
        quantizer.zero_grad()
        quantizer.update_(output.statistics)

    return call


def peer(z: Tensor, codebook: Tensor) -> Callable[[], object]:
    """Return the same part of vector-quantize-pytorch's `VectorQuantize`, with moving averages and straight-through gradients."""
    from vector_quantize_pytorch import VectorQuantize

    quantizer = VectorQuantize(
        dim=codebook.shape[1], codebook_size=len(codebook), decay=0.95, accept_image_fmap=True, rotation_trick=False
    ).train()
    gradient = torch.randn_like(z)

    def call() -> None:
        z_q, _, loss = quantizer(z)
        torch.autograd.backward([z_q, loss.sum()], [gradient, None])
        z.grad = None

    return call


def seconds(function: Callable[[], object]) -> float:
    """Measure seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_mib(function: Callable[[], object]) -> float:
    """Measure the peak memory of a call above the level before it."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return float("nan")

    def field(name: str) -> float:
        return float(next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(name)).split()[1]) / 1024

    # A first call allocates what persists between calls; the trim returns freed memory to the system.
    function()
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5", encoding="utf-8")
    before = field("VmRSS")
    function()
    return field("VmHWM") - before


def main() -> None:
    """Run the benchmark and print its table."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    print("| N, K, D | layer | ms | times the floor | peak MiB |\n| --- | --- | --- | --- | --- |", flush=True)
    for count, num_codes, dim in _SHAPES:
        side = int((count / _IMAGES) ** 0.5)
        # Channels last, as the encoder gives them.
        z = torch.randn(_IMAGES, dim, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
        codebook = torch.randn(num_codes, dim)
        layers = {"floor": floor(z.detach(), codebook), "EMA": ours(z, codebook), "gradient": ours(z, codebook, kind="gradient")}
        layers["EMA, rotation trick"] = ours(z, codebook, gradient_estimator="rotation")
        layers["EMA, cosine"] = ours(z, codebook, metric="cosine")
        layers["EMA, channels first"] = ours(z.detach().contiguous().requires_grad_(), codebook)
        if importlib.util.find_spec("vector_quantize_pytorch"):
            layers["vector-quantize-pytorch, EMA"] = peer(z, codebook)
        memory = {name: peak_mib(call) for name, call in layers.items()}
        times: dict[str, list[float]] = {name: [] for name in layers}
        for number in range(_ROUNDS):
            for name, call in layers.items():
                # The peer takes tens of times as long: three of its rounds are enough.
                if number < 3 or "pytorch" not in name:
                    times[name].append(seconds(call))
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name, median in medians.items():
            ratio = median / medians["floor"]
            print(f"| {count}, {num_codes}, {dim} | {name} | {1000 * median:.1f} | {ratio:.2f} | {memory[name]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
