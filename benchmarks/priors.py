"""Cached sampling against a full forward pass for every position, as a ratio within one run.

    python benchmarks/sampling.py

Random weights: time does not depend on them. Medians of alternated runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from configs.schema import Prior, Sampling
from stage2_prior.generate import draw, generate, uniforms, warp
from stage2_prior.sequence import SequenceLayout
from stage2_prior.transformer import Transformer

_ROUNDS = 3
_IMAGES = 64


@torch.no_grad()
def uncached(prior: Transformer, labels: Tensor, uniform: Tensor) -> Tensor:
    """Tokens (B, T), by one pass over all places so far for each new one."""
    tokens = torch.empty(len(labels), 0, dtype=torch.int64)
    for t in range(prior.layout.length):
        logits = prior(tokens, labels)[:, -1]
        tokens = torch.cat([tokens, draw(warp(logits, 1.0, 0, 1.0), uniform[:, t])[:, None]], 1)
    return tokens


def seconds(function: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    print("| grid | K | layers x width | cached s | uncached s | ratio | same tokens |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for grid, layers, width in (((7, 7), 4, 192), ((8, 8), 6, 384)):
        layout = SequenceLayout([grid], [512])
        prior = Transformer(Prior(layers=layers, width=width, heads=width // 48), layout, 10).eval()
        labels, uniform = torch.arange(_IMAGES) % 10, uniforms(0, torch.arange(_IMAGES), layout.length)
        codes = generate(prior, labels, uniform, Sampling())
        same = torch.equal(layout.to_tokens(codes), uncached(prior, labels, uniform))
        fast, slow = [], []
        for _ in range(_ROUNDS):
            fast.append(seconds(lambda p=prior, y=labels, u=uniform: generate(p, y, u, Sampling())))
            slow.append(seconds(lambda p=prior, y=labels, u=uniform: uncached(p, y, u)))
        ratio = statistics.median(slow) / statistics.median(fast)
        times = f"{statistics.median(fast):.2f} | {statistics.median(slow):.2f} | {ratio:.1f}"
        print(f"| {grid[0]}x{grid[1]} | 512 | {layers} x {width} | {times} | {'yes' if same else 'NO'} |")


if __name__ == "__main__":
    main()
