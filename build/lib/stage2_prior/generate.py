"""Drawing codes from a prior: warp the logits, draw, go on to the next place.

A sample is a function of (seed, its number, label, weights): its uniforms are drawn once, on the CPU, and turned into
tokens by inverting the cumulative distribution. So it is the same whatever it is batched with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from configs.schema import Sampling
from stage1_vqvae.quantizers.contract import Codes
from stage1_vqvae.training.randomness import generator
from stage2_prior.sequence import SequenceLayout
from stage2_prior.transformer import Transformer


def uniforms(seed: int, numbers: Tensor, length: int) -> Tensor:
    """The uniforms (B, T), float64 in [0, 1), of the samples of those numbers."""
    rows = [torch.rand(length, generator=generator(seed, "sample", number), dtype=torch.float64) for number in numbers.tolist()]
    return torch.stack(rows) if rows else torch.empty(0, length, dtype=torch.float64)


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022) on logits: unconditional at scale 0, conditional at 1; any real scale."""
    return unconditional + scale * (conditional - unconditional)


def warp(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities (B, V), float64, of logits (B, V): temperature, then the k likeliest, then the nucleus.

    Args:
        logits: (B, V).
        temperature: divides the logits; 0: all on the likeliest (the first of equals).
        top_k: keep the k likeliest, and those equal to the k-th; 0: all.
        top_p: keep the fewest likeliest tokens whose probability reaches p (Holtzman et al. 2020); 1: all.
    """
    logits = logits.double()
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token is kept if those before it have not yet reached p: the first always is.
        kept = ordered.cumsum(-1) - ordered < top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered * kept)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token (B,) at which the cumulative distribution of (B, V) first exceeds the uniform (B,)."""
    cumulative = probabilities.cumsum(-1)
    # The last sum may be 1 - 1e-16; scaling the uniform by it keeps every draw on a token that has probability.
    threshold = (uniform.to(cumulative) * cumulative[..., -1])[..., None]
    return torch.searchsorted(cumulative, threshold, right=True)[..., 0].clamp_(max=probabilities.shape[-1] - 1)


@torch.no_grad()
def generate(prior: Transformer, labels: Tensor | None, uniform: Tensor, config: Sampling) -> Codes:
    """Sample one sequence a row.

    Args:
        prior: in eval mode.
        labels: (B,) on the prior's device, or None for no label.
        uniform: (B, T) from `uniforms`.
        config: temperature, top_k, top_p, guidance.
    Returns: codes, int64 (B, h, w) a level.
    """
    assert not prior.training
    device = prior.start.device
    uniform = uniform.to(device)
    batch = len(uniform)
    guides = labels is not None and config.guidance != 1
    if guides:
        assert labels is not None
        # Conditional and unconditional sequences run in one batch and share every token.
        labels = torch.cat([labels, torch.full_like(labels, prior.num_labels)])
    cache = prior.new_cache(batch * 2 if guides else batch)
    tokens = torch.empty(batch, prior.layout.length, dtype=torch.int64, device=device)
    token = None
    for t in range(prior.layout.length):
        logits = prior.step(token, labels, cache)
        if guides:
            logits = guided(logits[:batch], logits[batch:], config.guidance)
        tokens[:, t] = draw(warp(logits, config.temperature, config.top_k, config.top_p), uniform[:, t])
        token = tokens[:, t].repeat(2) if guides else tokens[:, t]
    return prior.layout.to_codes(tokens)


def uniform_codes(layout: SequenceLayout, uniform: Tensor) -> Codes:
    """Codes of the uniform prior from the same uniforms (B, T): each code of a level equally likely."""
    levels = zip(layout.lengths, layout.num_codes, layout.offsets, strict=True)
    sizes = torch.cat([torch.full((length,), k) for length, k, _ in levels])
    starts = torch.cat([torch.full((n,), offset) for n, offset in zip(layout.lengths, layout.offsets, strict=True)])
    return layout.to_codes((uniform * sizes).long() + starts)
