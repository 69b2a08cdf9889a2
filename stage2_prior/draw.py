"""From logits to codes: guidance, warp, draw.

A sample is a function of (seed, its number, condition, weights): its uniforms are drawn once, on the CPU, and turned into
codes by inverting the cumulative distribution. So it is the same whatever it is batched with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.errors import UserError, require
from configs.parts import Sampling
from training.devices import as_float64
from training.randomness import generator

LOGITS_PER_DRAW = 2**24
"""Logits from which codes are drawn at once, over all rows and positions: 128 MB in float64."""


@dataclass(frozen=True, kw_only=True)
class StepwiseSampling(Sampling):
    """How codes are drawn in turn: limits on the codes that may be drawn at a position."""

    top_k: int = 0
    """Draw among the k likeliest codes only; 0 = all."""
    top_p: float = 1.0
    """Draw among the fewest codes whose probability reaches p; 1 = all."""
    min_p: float = 0.0
    """Draw only codes at least this share as likely as the likeliest; 0 = all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.top_k >= 0, "top_k", "at least 0", self.top_k)
        require(0 < self.top_p <= 1, "top_p", "above 0, up to 1", self.top_p)
        require(0 <= self.min_p <= 1, "min_p", "0 to 1", self.min_p)


def uniforms(seed: int, numbers: Tensor, length: int) -> Tensor:
    """Uniform random numbers (B, T), float64 in [0, 1), of the samples with these numbers."""
    rows = [torch.rand(length, generator=generator(seed, "sample", number), dtype=torch.float64) for number in numbers.tolist()]
    return torch.stack(rows) if rows else torch.empty(0, length, dtype=torch.float64)


def is_guided(condition: Tensor | None, settings: Sampling) -> bool:
    """Whether a batch is drawn with classifier-free guidance, so that each sample has a second, unconditional row."""
    return condition is not None and settings.guidance != 1


def guided(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022) on logits: unconditional at scale 0, conditional at 1; any real scale."""
    return unconditional + scale * (conditional - unconditional)


def guidance_scales(settings: Sampling, length: int) -> list[float]:
    """Guidance scale of each of `length` positions (or rounds): 1 + w (settings.guidance - 1), of weights w as in `guidance_weights`."""
    return [1 + weight * (settings.guidance - 1) for weight in guidance_weights(settings, length)]


def guidance_weights(settings: Sampling, length: int) -> list[float]:
    """Weight, 0 to 1, of guidance at each of `length` positions (or rounds): by schedule, and 0 outside the interval.

    A rising weight (Chang et al. 2023, "Muse", section 2.7) leaves the first codes, which decide the rest, their variety. `power_cosine`
    is RAR's (Yu et al. 2024, "Randomized Autoregressive Visual Generation"), here reaching 1 at the last position. The interval is that of
    Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval", of positions in place of noise levels.
    """
    shares = [position / max(1, length - 1) for position in range(length)]
    if settings.guidance_schedule == "constant":
        weights = [1.0] * length
    elif settings.guidance_schedule == "linear":
        weights = shares
    else:
        power = settings.guidance_power if settings.guidance_schedule == "power_cosine" else 1.0
        weights = [(1 - math.cos(math.pi * share**power)) / 2 for share in shares]
    first, last = settings.guidance_interval
    return [weight if first <= share <= last else 0.0 for share, weight in zip(shares, weights, strict=True)]


def round_stops(count: int, rounds: int) -> list[int]:
    """Divide `count` codes into rounds, each of which has at least one; their number known before the first round and after each.

    After a share x of the rounds, 1 - cos(pi x / 2) of the codes are known (Chang et al. 2022, MaskGIT, section 3.2).
    """
    rounds = min(rounds, count)
    # Less the rounding of a cosine, which is not to add another code.
    known = [math.ceil(count * (1 - math.cos(math.pi * number / rounds / 2)) - 1e-9) for number in range(1, rounds + 1)]
    return [0, *map(max, known, range(1, rounds + 1))]


def warp(logits: Tensor, settings: StepwiseSampling) -> Tensor:
    """Probabilities (B, K), float64, of logits (B, K) after temperature and the limits on what may be drawn.

    Each limit applies to the codes that the limits before it have left:
    top_k keeps the k likeliest, and those equal to the k-th; top_p the fewest likeliest whose probability reaches p
    (Holtzman et al. 2020); min_p those at least that share as likely as the likeliest (Nguyen et al. 2024).
    """
    logits = as_float64(logits)
    if settings.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    if settings.temperature != 1:
        logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        least = logits.topk(settings.top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if settings.min_p > 0:
        least = logits.amax(-1, keepdim=True) + math.log(settings.min_p)
        below = logits < least
    probabilities = logits.softmax(-1)
    if settings.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token is kept if those before it have not yet reached p: the first always is.
        # Less the sum's rounding, which is not to bring in another token where p is just reached.
        kept = ordered.cumsum(-1) - ordered < settings.top_p - 1e-12
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered * kept)
    if settings.min_p > 0:
        probabilities = probabilities.masked_fill(below, 0)
    return probabilities / probabilities.sum(-1, keepdim=True)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The code (B,) at which the cumulative distribution of (B, K) first exceeds the uniform (B,)."""
    cumulative = probabilities.cumsum(-1)
    # The last sum may be 1 - 1e-16; scaling the uniform by it keeps every draw on a code that has probability.
    threshold = (uniform.to(cumulative) * cumulative[..., -1])[..., None]
    return torch.searchsorted(cumulative, threshold, right=True)[..., 0].clamp_(max=probabilities.shape[-1] - 1)


def draw_position(logits: Tensor, uniform: Tensor, settings: StepwiseSampling, scale: float | Tensor | None) -> tuple[Tensor, Tensor]:
    """Draw the codes of one position: guidance, warp, draw.

    Args:
        logits: (B, K), float32 or wider; under guidance (2 B, K), conditional rows first.
        uniform: (B,) float64.
        settings: temperature, top_k, top_p, min_p.
        scale: guidance scale, of the logits' dtype if a tensor (1,); None: no guidance.
    Returns: codes (B,), int64, and whether a row's probabilities are finite, (B,).
    """
    if scale is not None:
        batch = len(uniform)
        logits = guided(logits[:batch], logits[batch:], scale)
    probabilities = warp(logits, settings)
    # A softmax over a NaN is NaN throughout, so one entry of a row tells.
    return draw(probabilities, uniform), probabilities[:, 0].isfinite()


def check_finite(finite: bool, settings: Sampling) -> None:
    """Errors: UserError unless all probabilities were finite."""
    if not finite:
        raise UserError(f"guidance, temperature: expected finite probabilities, found some that are not ({settings})")
