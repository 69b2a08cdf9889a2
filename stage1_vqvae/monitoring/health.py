"""Codebook health: usage, perplexity, distances between codes, and warnings of a collapse.

Usage is the share of codes that are chosen at least once; perplexity is 2 to the entropy of their frequencies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import Tokenizer
from stage1_vqvae.metrics import perplexity, usage
from stage1_vqvae.quantizers.contract import Levels
from training.devices import as_float64

# Least vectors per code for an estimate of usage.
_ENOUGH_PER_CODE = 4
# Measured: healthy codebooks use half of their codes within the first hundred steps, collapsing ones never.
_LOW_USAGE, _LOW_PERPLEXITY_SHARE = 0.5, 0.1
# Consecutive windows, and the factor by which a recovering perplexity grows over them.
_LASTING, _GROWING = 4, 1.1
# Most codes whose nearest neighbours, among all codes, are measured.
_MOST_PROBED = 2048


@dataclass(frozen=True, kw_only=True)
class LevelHealth:
    """Health of the codes of one level over a split."""

    num_codes: int
    """K, the size of the level's codebook."""
    usage: float
    """Share of the codes that were chosen at least once."""
    perplexity: float
    """2 ** entropy of the codes' frequencies."""
    dead: int
    """Codes that were never chosen."""
    histogram: dict[str, int]
    """Number of codes per number of choices: 0, 1, 2-3, 4-7, ..."""
    judged: bool
    """Whether the split has enough vectors for an estimate of usage."""
    nearest_pair: float | None
    """Least distance between two codes, relative to the codes' root-mean-square distance from their mean; null: no codebook."""
    nearest_median: float | None
    """Median over codes of the distance to the nearest other one, on the same scale."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """Health of all levels after a training step."""

    step: int
    processes: int
    """Ranks, whose quantizers were equal bit for bit."""
    checksum: str
    """Hash of the quantizer's weights and buffers."""
    levels: list[LevelHealth]
    warning: str | None
    """Warning of a collapse, with advice."""


def examine(counts: Tensor, vectors: Tensor | None) -> LevelHealth:
    """Measure the health of a level from its counts (K,) over a split and its codebook's vectors (K, d), if it has one."""
    distances = None if vectors is None else nearest_distances(vectors)
    return LevelHealth(
        num_codes=len(counts),
        usage=usage(counts),
        perplexity=perplexity(counts),
        dead=int((counts == 0).sum()),
        histogram=histogram(counts),
        judged=enough_to_judge(counts),
        nearest_pair=None if distances is None else float(distances.min()),
        nearest_median=None if distances is None else float(distances.median()),
    )


def histogram(counts: Tensor) -> dict[str, int]:
    """Count codes by their number of choices, in bins that double: {"0": 3, "1": 0, "2-3": 12, ...}."""
    bins = {"0": int((counts == 0).sum())}
    low = 1
    while low <= float(counts.max()):
        name = str(low) if low == 1 else f"{low}-{2 * low - 1}"
        bins[name] = int(((counts >= low) & (counts < 2 * low)).sum())
        low *= 2
    return bins


@torch.no_grad()
def nearest_distances(vectors: Tensor) -> Tensor:
    """Return the distance of each code (of the first few thousand) to the nearest other one, relative to the root-mean-square distance of
    codes (K, d) from their mean.
    """
    vectors = as_float64(vectors)
    vectors = vectors - vectors.mean(0)
    scale = vectors.square().sum(1).mean().sqrt().clamp(min=1e-30)
    nearest: list[Tensor] = []
    size = max(1, 2**24 // len(vectors))
    for first in range(0, min(len(vectors), _MOST_PROBED), size):
        block = vectors[first : min(first + size, _MOST_PROBED)]
        # Not by |a|^2 - 2 a.b + |b|^2, which is inexact for small distances.
        distances = torch.cdist(block, vectors, compute_mode="donot_use_mm_for_euclid_dist")
        distances[torch.arange(len(block)), torch.arange(first, first + len(block))] = float("inf")
        nearest.append(distances.min(1).values)
    return torch.cat(nearest) / scale


def checksum(module: nn.Module) -> int:
    """Return a 63-bit hash of all weights and buffers, to compare codebooks bit for bit between ranks."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


class CollapseWatch:
    """A detector of lasting collapses, which examines every logged window of training steps.

    Low usage at one moment may be recovering: an untrained encoder's latents lie close together, and k-means and restarts need some tens
    of steps to spread the codes over them. A codebook is collapsing if its usage was low in each of the last few windows and its
    perplexity has not grown over them. A resumed training starts with no windows.
    """

    def __init__(self, quantizer: Levels, config: Tokenizer) -> None:
        self._quantizer, self._config = quantizer, config
        self._low: dict[int, list[float]] = {}

    def warning(self, counts: Sequence[Tensor]) -> str | None:
        """Return a warning of a collapsing codebook with advice, or None. `counts`: (K,) per level, of the newest window."""
        warning = None
        for number, used in enumerate(_by_codebook(counts, self._quantizer)):
            if not enough_to_judge(used):
                continue
            low = self._low.setdefault(number, [])
            spread = perplexity(used)
            if not little_used(usage(used), spread, len(used)):
                low.clear()
                continue
            low.append(spread)
            if len(low) >= _LASTING and low[-1] < _GROWING * low[-_LASTING] and warning is None:
                warning = _warning_text(number, used, self._quantizer, self._config)
        return warning


def collapse_warning(counts: Sequence[Tensor], quantizer: Levels, config: Tokenizer) -> str | None:
    """Return a warning of a collapsed codebook with advice, or None. `counts`: (K,) per level, of a split at one step."""
    for number, used in enumerate(_by_codebook(counts, quantizer)):
        if enough_to_judge(used) and little_used(usage(used), perplexity(used), len(used)):
            return _warning_text(number, used, quantizer, config)
    return None


def _warning_text(number: int, used: Tensor, quantizer: Levels, config: Tokenizer) -> str:
    codebooks = len(quantizer.codebooks()) or len(quantizer.num_codes)
    name = "the codebook" if codebooks == 1 else f"codebook {number + 1} of {codebooks}"
    state = f"{int((used > 0).sum())} of {len(used)} codes in use, perplexity {perplexity(used):.1f}"
    return f"{name} is collapsing: {state}; {config.quantizer.advice_on_collapse}"


def little_used(share: float, spread: float, num_codes: int) -> bool:
    """Return whether few codes are chosen at all (`share` of them), or few dominate (`spread`, their perplexity)."""
    return share < _LOW_USAGE or spread - 1 < _LOW_PERPLEXITY_SHARE * (num_codes - 1)


def enough_to_judge(counts: Tensor) -> bool:
    """Return whether counts (K,) are of enough vectors for an estimate of usage."""
    return float(counts.sum()) >= _ENOUGH_PER_CODE * len(counts)


def _by_codebook(counts: Sequence[Tensor], quantizer: Levels) -> list[Tensor]:
    """Sum counts (K,) per codebook over the levels that share it, because later residual levels need few of its codes; without learned
    codebooks, return them per level.
    """
    if not quantizer.codebooks():
        return list(counts)
    together = [torch.zeros_like(counts[0]) for _ in quantizer.codebooks()]
    for level, used in enumerate(counts):
        together[quantizer.codebook_of(level)] += used
    return together


def health_table(health: Health) -> str:
    """Format health as plain text for a terminal."""
    same = f", equal on {health.processes} processes" if health.processes > 1 else ""
    lines = [f"codebook over the validation split, after step {health.step} (checksum {health.checksum}{same})"]
    for number, level in enumerate(health.levels):
        lines.append(f"level {number + 1} of {len(health.levels)}: K = {level.num_codes}")
        lines.append(f"  usage        {level.usage:.1%} ({level.dead} dead)")
        lines.append(f"  perplexity   {level.perplexity:.1f} ({level.perplexity / level.num_codes:.0%} of K)")
        if level.nearest_pair is not None:
            lines.append(f"  nearest pair {level.nearest_pair:.2g} of the codebook's radius (median {level.nearest_median:.2g})")
        most = max(level.histogram.values())
        lines.append("  hits         codes")
        lines += [f"  {name:<12} {count:<6} {'#' * round(40 * count / most)}" for name, count in level.histogram.items()]
    if health.warning is not None:
        lines.append(f"warning: {health.warning}")
    elif all(level.judged for level in health.levels):
        lines.append("no sign of a collapse")
    else:
        lines.append("too few codes in the split to judge usage by")
    return "\n".join(lines)


def health_from_json(content: dict[str, Any]) -> Health:
    """Invert `dataclasses.asdict`."""
    return Health(**{**content, "levels": [LevelHealth(**level) for level in content["levels"]]})
