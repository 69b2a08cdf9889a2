"""Sampling codes from a prior, position by position: warp the logits, draw, go on to the next position.

A sample is a function of (seed, its number, label, weights): its uniforms are drawn once, on the CPU, and turned into
codes by inverting the cumulative distribution. So it is the same whatever it is batched with.

`generate` runs eagerly; `Sampler` in sampler.py replays CUDA graphs that include guidance, warp and draw.
"""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import Sampling
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.priors.contract import AutoregressivePrior
from training.devices import as_float64, float64_device
from training.precision import full_precision
from training.randomness import generator


def default_precision(device: torch.device) -> Literal["float64", "float32", "bfloat16"]:
    """Default sampling precision: float64 on a CPU; on a GPU bfloat16 where supported, otherwise float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "float64" if device.type == "cpu" else "float32"


def in_bfloat16(prior: AutoregressivePrior) -> AutoregressivePrior:
    """Copy of a prior with bfloat16 parameters, for sampling. Rotary angles (buffers) stay float32."""
    prior = copy.deepcopy(prior)
    for parameter in prior.parameters():
        parameter.data = parameter.data.bfloat16()
    return prior


def uniforms(seed: int, numbers: Tensor, length: int) -> Tensor:
    """The uniforms (B, T), float64 in [0, 1), of the samples of those numbers."""
    rows = [torch.rand(length, generator=generator(seed, "sample", number), dtype=torch.float64) for number in numbers.tolist()]
    return torch.stack(rows) if rows else torch.empty(0, length, dtype=torch.float64)


def guided(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022) on logits: unconditional at scale 0, conditional at 1; any real scale."""
    return unconditional + scale * (conditional - unconditional)


def guidance_scales(config: Sampling, length: int) -> list[float]:
    """The guidance scale of each of `length` positions: config.guidance, or on the way to it from 1 at the first position.

    A rising scale (Chang et al. 2023, "Muse", section 2.7) leaves the first codes, which decide the rest, their variety.
    """
    way = [position / max(1, length - 1) for position in range(length)]
    if config.guidance_schedule == "constant":
        return [config.guidance] * length
    if config.guidance_schedule == "cosine":
        way = [(1 - math.cos(math.pi * share)) / 2 for share in way]
    return [1 + share * (config.guidance - 1) for share in way]


def warp(logits: Tensor, config: Sampling) -> Tensor:
    """Probabilities (B, K), float64, of logits (B, K): temperature, then what may be drawn at all.

    The three limits that follow each look at what those before have left:
    top_k keeps the k likeliest, and those equal to the k-th; top_p the fewest likeliest whose probability reaches p
    (Holtzman et al. 2020); min_p those at least that share as likely as the likeliest (Nguyen et al. 2024).
    """
    logits = as_float64(logits)
    if config.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    if config.temperature != 1:
        logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        least = logits.topk(config.top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if config.min_p > 0:
        least = logits.amax(-1, keepdim=True) + math.log(config.min_p)
        below = logits < least
    probabilities = logits.softmax(-1)
    if config.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token is kept if those before it have not yet reached p: the first always is.
        # Less the sum's rounding, which is not to bring in another token where p is just reached.
        kept = ordered.cumsum(-1) - ordered < config.top_p - 1e-12
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered * kept)
    if config.min_p > 0:
        probabilities = probabilities.masked_fill(below, 0)
    return probabilities / probabilities.sum(-1, keepdim=True)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The code (B,) at which the cumulative distribution of (B, K) first exceeds the uniform (B,)."""
    cumulative = probabilities.cumsum(-1)
    # The last sum may be 1 - 1e-16; scaling the uniform by it keeps every draw on a code that has probability.
    threshold = (uniform.to(cumulative) * cumulative[..., -1])[..., None]
    return torch.searchsorted(cumulative, threshold, right=True)[..., 0].clamp_(max=probabilities.shape[-1] - 1)


def draw_position(logits: Tensor, uniform: Tensor, config: Sampling, scale: float | Tensor | None) -> tuple[Tensor, Tensor]:
    """Draw the codes of one position: guidance, warp, draw.

    Args:
        logits: (B, K), float32 or wider; under guidance (2 B, K), conditional rows first.
        uniform: (B,) float64.
        config: temperature, top_k, top_p, min_p.
        scale: guidance scale, of the logits' dtype if a tensor (1,); None: no guidance.
    Returns: codes (B,), int64, and whether a row's probabilities are finite, (B,).
    """
    if scale is not None:
        batch = len(uniform)
        logits = guided(logits[:batch], logits[batch:], scale)
    probabilities = warp(logits, config)
    # A softmax over a NaN is NaN throughout, so one entry of a row tells.
    return draw(probabilities, uniform), probabilities[:, 0].isfinite()


def drawn_positions(layout: SequenceLayout, kept: Codes | None) -> list[int]:
    """The positions to draw, ascending: all that the masks (h, w) per level, where there are such, do not keep."""
    return list(range(layout.length)) if kept is None else (~layout.flat(kept)[0]).nonzero()[:, 0].tolist()


def check_finite(finite: bool, config: Sampling) -> None:
    """Errors: UserError unless all probabilities were finite."""
    if not finite:
        raise UserError(f"guidance, temperature: expected finite probabilities, found some that are not ({config})")


@torch.no_grad()
def generate(
    prior: AutoregressivePrior,
    condition: Tensor | None,
    uniform: Tensor,
    config: Sampling,
    given: Codes | None = None,
    kept: Codes | None = None,
) -> Codes:
    """Sample codes, one image a row.

    Args:
        prior: in eval mode.
        condition: (B, ...), or None.
        uniform: (B, T) from `uniforms`.
        config: temperature, top_k, top_p, min_p, guidance.
        given: codes (B, h, w) per level, kept where `kept`, masks (h, w) per level, is true; the others are drawn, each
            conditioned on those before it.
    Returns: codes, int64 (B, h, w) per level.
    Errors: UserError if a probability is not finite.
    """
    assert not prior.training
    assert (given is None) == (kept is None)
    device, layout = prior.device, prior.layout
    uniform = uniform.to(float64_device(device))
    batch = len(uniform)
    guides = condition is not None and config.guidance != 1
    condition = None if condition is None else condition.to(device)
    if guides:
        assert condition is not None
        # Conditional and unconditional sequences run in one batch and share every code.
        condition = torch.cat([condition, prior.null_condition(batch)])
    scales = guidance_scales(config, layout.length)
    sequences = layout.flat(given).to(device) if given is not None else torch.empty(batch, layout.length, dtype=torch.int64, device=device)
    finite = torch.ones((), dtype=torch.bool, device=uniform.device)
    cache, reached = prior.new_cache(batch * 2 if guides else batch), 0
    # Kept codes are taken in at once where they lie before a drawn one, and behind the last of those not at all.
    for position in drawn_positions(layout, kept):
        if reached < position:
            prior.prefill(sequences.repeat(2, 1) if guides else sequences, reached, position, condition, cache)
        before = sequences[:, position - 1] if position else None
        before = before.repeat(2) if before is not None and guides else before
        logits = full_precision(prior.step(before, condition, cache))
        scale = scales[position] if guides else None
        sequences[:, position], rows_finite = draw_position(logits, uniform[:, position], config, scale)
        # Read on the host once, at the end, so that a GPU is never waited for.
        finite &= rows_finite.all()
        reached = position + 1
    check_finite(bool(finite), config)
    return layout.grids_of(sequences)


def uniform_codes(layout: SequenceLayout, uniform: Tensor) -> Codes:
    """Codes of the uniform prior from the same uniforms (B, T): each code of a level equally likely."""
    sizes = torch.cat([torch.full((length,), k) for length, k in zip(layout.lengths, layout.num_codes, strict=True)])
    return layout.grids_of((uniform * sizes).long())
