"""What stage 1 is judged by: thin functions, each saying on what scale.

Usage is the share of codes hit at least once over a whole split; perplexity is 2 to the entropy of how often each is hit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from training.devices import as_float64, float64_device

_SSIM_WINDOW = 11
# Values per batch on an accelerator, to bound memory. On a CPU one image at a time: the same bits, and up to twice as fast as 128 at once,
# since intermediate results stay in its caches.
_SSIM_VALUES = 2**22


def squared_errors(pictures: Tensor, originals: Tensor) -> Tensor:
    """Mean squared error of each image, (B,); both uint8 (B, H, W, C), taken as [0, 1]."""
    return ((as_float64(pictures) - as_float64(originals)) / 255).square().mean(dim=(1, 2, 3))


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error on [0, 1] pixels; 100 dB for what is practically none.

    Of the mean error of a split, not the mean over images, which one flat image copied exactly would make infinite.
    """
    return -10 * math.log10(max(mse, 1e-10))


def psnr_per_image(mse: Tensor) -> Tensor:
    """`psnr` of each image's own mean squared error, (B,)."""
    return -10 * mse.clamp(min=1e-10).log10()


def ssim_per_image(pictures: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity of each image, (B,); both uint8 (B, H, W, C), taken as [0, 1]. NaN below 11 pixels a side.

    Wang et al. 2004: a Gaussian window of deviation 1.5 and 11 pixels, inside the image only, the mean over channels. In float64, on the
    CPU where the images' device has none.
    """
    # Slow to import, and few commands need it.
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(pictures.shape[1:3]) < _SSIM_WINDOW:
        return torch.full((len(pictures),), torch.nan, dtype=torch.float64, device=float64_device(pictures.device))
    size = 1 if pictures.device.type == "cpu" else max(1, _SSIM_VALUES // pictures[0].numel())
    # Positions whose window reaches beyond the image are left out, as the paper's own code and scikit-image do; torchmetrics keeps them.
    border = _SSIM_WINDOW // 2
    parts = []
    for pair in zip(pictures.split(size), originals.split(size), strict=True):
        images, targets = (as_float64(batch.movedim(-1, 1)) / 255 for batch in pair)
        _, similarities = structural_similarity_index_measure(
            images, targets, sigma=1.5, reduction="none", data_range=1.0, return_full_image=True
        )
        parts.append(similarities[..., border:-border, border:-border].mean((1, 2, 3)))
    return torch.cat(parts)


def usage(*counts: Tensor) -> float:
    """Share of codes with a count above zero; counts (K,), of several levels all codes together."""
    return float(as_float64(torch.cat(counts) > 0).mean())


def entropy_bits(counts: Tensor) -> float:
    """Entropy in bits of the distribution the counts (K,) give; 0 without any."""
    counts = as_float64(counts)
    shares = counts / counts.sum().clamp(min=1)
    return float(torch.special.entr(shares).sum() / math.log(2))


def perplexity(*counts: Tensor) -> float:
    """2 ** entropy: as many equally used codes would carry the same information. Of several levels, the geometric mean."""
    return 2.0 ** (sum(entropy_bits(level) for level in counts) / len(counts))


def index_bits(grids: Sequence[tuple[int, int]], num_codes: Sequence[int]) -> float:
    """Bits of one image as code indices under the uniform prior: log2 K for each code of each level."""
    return sum(h * w * math.log2(k) for (h, w), k in zip(grids, num_codes, strict=True))


def compression_ratio(raw: float, coded: float) -> float:
    """How many times as many bits images take raw as coded; infinite where a prior is sure of every code."""
    return raw / coded if coded > 0 else math.inf


def raw_bits(height: int, width: int, channels: int) -> int:
    """Bits of one image as 8-bit pixels."""
    return height * width * channels * 8
