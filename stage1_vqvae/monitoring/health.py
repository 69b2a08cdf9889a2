"""The codebook doctor: what a split's codes and the codebooks say of their health, and what to change.

Usage is the share of codes hit at least once; perplexity is 2 to the entropy of how often each is hit.
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

# A window or split with fewer vectors a code than this says nothing of usage.
_ENOUGH_PER_CODE = 4
# Healthy codebooks were seen to fill half of their codes within the first hundred steps, collapsing ones never.
_LOW_USAGE, _LOW_PERPLEXITY_SHARE = 0.5, 0.1
# Windows in a row, and by how much perplexity has to grow over them to be on its way up.
_LASTING, _GROWING = 4, 1.1
# Nearest neighbours of this many codes at most are looked at, each among all.
_MOST_PROBED = 2048


@dataclass(frozen=True, kw_only=True)
class LevelHealth:
    """What the codes of one level say over a split."""

    num_codes: int
    """K, the size of the level's codebook."""
    usage: float
    """Share of the codes that were chosen at least once."""
    perplexity: float
    """2 ** entropy of how often each code was chosen."""
    dead: int
    """Codes that were never chosen."""
    histogram: dict[str, int]
    """How many codes were chosen so many times: 0, 1, 2-3, 4-7, ..."""
    judged: bool
    """Whether the split had enough vectors to say anything of usage."""
    nearest_pair: float | None
    """The least distance of two codes as a share of the codes' root-mean-square distance from their mean; null where the
    level has no codebook."""
    nearest_median: float | None
    """The median over codes of the distance to the nearest other one, as the same share."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """The health of all levels after a training step."""

    step: int
    processes: int
    """Processes whose quantizers were equal bit for bit."""
    checksum: str
    """Hash of the quantizer's weights and buffers."""
    levels: list[LevelHealth]
    warning: str | None
    """Names a collapse and what to change."""


def examine(counts: Tensor, vectors: Tensor | None) -> LevelHealth:
    """The health of a level from its counts (K,) over a split and its codebook's vectors (K, d), if it has one."""
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
    """Codes by how often they were hit, in bins that double: {"0": 3, "1": 0, "2-3": 12, ...}."""
    bins = {"0": int((counts == 0).sum())}
    low = 1
    while low <= float(counts.max()):
        name = str(low) if low == 1 else f"{low}-{2 * low - 1}"
        bins[name] = int(((counts >= low) & (counts < 2 * low)).sum())
        low *= 2
    return bins


@torch.no_grad()
def nearest_distances(vectors: Tensor) -> Tensor:
    """The distance of each code (of the first few thousand) to the nearest other one, as a share of the root-mean-square
    distance of codes (K, d) from their mean.
    """
    vectors = as_float64(vectors)
    vectors = vectors - vectors.mean(0)
    scale = vectors.square().sum(1).mean().sqrt().clamp(min=1e-30)
    found: list[Tensor] = []
    size = max(1, 2**24 // len(vectors))
    for first in range(0, min(len(vectors), _MOST_PROBED), size):
        block = vectors[first : min(first + size, _MOST_PROBED)]
        # By definition and not by |a|^2 - 2 a.b + |b|^2, which loses just the small distances.
        distances = torch.cdist(block, vectors, compute_mode="donot_use_mm_for_euclid_dist")
        distances[torch.arange(len(block)), torch.arange(first, first + len(block))] = float("inf")
        found.append(distances.min(1).values)
    return torch.cat(found) / scale


def checksum(module: nn.Module) -> int:
    """A 63-bit hash of all weights and buffers: equal on processes whose codebooks are equal bit for bit."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


class CollapseWatch:
    """Judges window after window of training steps, and names a collapse that lasts.

    A codebook that is little used at one moment may be on its way up: an untrained encoder's latents lie close together, and
    k-means and restarts need some tens of steps to spread the codes over them. It is collapsing if it was little used in each of
    the last few windows and its perplexity has not grown over them. A resumed run watches anew.
    """

    def __init__(self, quantizer: Levels, config: Tokenizer) -> None:
        self._quantizer, self._config = quantizer, config
        self._low: dict[int, list[float]] = {}

    def warning(self, counts: Sequence[Tensor]) -> str | None:
        """One line that names a collapsing codebook and what to change, or None; counts (K,) a level, of the newest window."""
        found = None
        for number, used in enumerate(_by_codebook(counts, self._quantizer)):
            if not enough_to_judge(used):
                continue
            lasting = self._low.setdefault(number, [])
            spread = perplexity(used)
            if not little_used(usage(used), spread, len(used)):
                lasting.clear()
                continue
            lasting.append(spread)
            if len(lasting) >= _LASTING and lasting[-1] < _GROWING * lasting[-_LASTING] and found is None:
                found = _named(number, used, self._quantizer, self._config)
        return found


def collapse_warning(counts: Sequence[Tensor], quantizer: Levels, config: Tokenizer) -> str | None:
    """One line that names a collapsed codebook and what to change, or None; counts (K,) a level, of a whole split at one moment."""
    for number, used in enumerate(_by_codebook(counts, quantizer)):
        if enough_to_judge(used) and little_used(usage(used), perplexity(used), len(used)):
            return _named(number, used, quantizer, config)
    return None


def _named(number: int, used: Tensor, quantizer: Levels, config: Tokenizer) -> str:
    codebooks = len(quantizer.codebooks()) or len(quantizer.num_codes)
    name = "the codebook" if codebooks == 1 else f"codebook {number + 1} of {codebooks}"
    found = f"{int((used > 0).sum())} of {len(used)} codes in use, perplexity {perplexity(used):.1f}"
    return f"{name} is collapsing: {found}; {config.quantizer.advice_on_collapse}"


def little_used(share: float, spread: float, num_codes: int) -> bool:
    """Whether few codes are chosen at all (`share` of them), or few of them carry nearly everything (`spread`, their perplexity)."""
    return share < _LOW_USAGE or spread - 1 < _LOW_PERPLEXITY_SHARE * (num_codes - 1)


def enough_to_judge(counts: Tensor) -> bool:
    """Whether counts (K,) are of enough vectors to say anything of usage."""
    return float(counts.sum()) >= _ENOUGH_PER_CODE * len(counts)


def _by_codebook(counts: Sequence[Tensor], quantizer: Levels) -> list[Tensor]:
    """Counts (K,) of each codebook, over the levels that use it: what residuals leave to the later levels needs few of its codes.
    Of each level, where nothing is learned.
    """
    if not quantizer.codebooks():
        return list(counts)
    together = [torch.zeros_like(counts[0]) for _ in quantizer.codebooks()]
    for level, used in enumerate(counts):
        together[quantizer.codebook_of(level)] += used
    return together


def health_table(health: Health) -> str:
    """The health as plain text for a terminal."""
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
    """The inverse of `dataclasses.asdict`."""
    return Health(**{**content, "levels": [LevelHealth(**level) for level in content["levels"]]})
