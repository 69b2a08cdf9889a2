"""Metrics of stage 1: pure functions, each with its scale.

Usage is the share of codes that a split uses at least once; perplexity is 2 to the entropy of code frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from training.devices import as_float64, float64_device

_SSIM_WINDOW = 11
# Values per batch on an accelerator, to bound memory. On a CPU one image at a time: the same bits, and up to twice as fast as 128 images
# at once, since intermediate results stay in its caches.
_SSIM_VALUES = 2**22


def squared_errors(pictures: Tensor, originals: Tensor) -> Tensor:
    """Compute the mean squared error per image, (B,), of uint8 (B, H, W, C) scaled to [0, 1]."""
    return ((as_float64(pictures) - as_float64(originals)) / 255).square().mean(dim=(1, 2, 3))


def psnr(mse: float) -> float:
    """Compute the peak signal-to-noise ratio in dB of a mean squared error on [0, 1] pixels, at most 100 dB.

    For a split: of the mean error, since the mean PSNR over images is infinite if one image is reproduced exactly.
    """
    return -10 * math.log10(max(mse, 1e-10))


def psnr_per_image(mse: Tensor) -> Tensor:
    """Compute `psnr` per image, of mean squared errors (B,)."""
    return -10 * mse.clamp(min=1e-10).log10()


def ssim_per_image(pictures: Tensor, originals: Tensor) -> Tensor:
    """Compute the structural similarity per image, (B,), of uint8 (B, H, W, C) scaled to [0, 1]. NaN below 11 pixels per side.

    Wang et al. 2004: a Gaussian window of 11 pixels and standard deviation 1.5, inside the image only; the mean over channels. In float64,
    on the CPU if the images' device has none.
    """
    # Slow to import.
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(pictures.shape[1:3]) < _SSIM_WINDOW:
        return torch.full((len(pictures),), torch.nan, dtype=torch.float64, device=float64_device(pictures.device))
    size = 1 if pictures.device.type == "cpu" else max(1, _SSIM_VALUES // pictures[0].numel())
    # Windows that reach beyond the image are left out, as in the paper's code and scikit-image; torchmetrics keeps them.
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
    """Compute the share of codes with a count above zero, over all levels together; counts (K,) per level."""
    return float(as_float64(torch.cat(counts) > 0).mean())


def entropy_bits(counts: Tensor) -> float:
    """Compute the entropy in bits of the distribution of counts (K,); 0 for no counts."""
    counts = as_float64(counts)
    shares = counts / counts.sum().clamp(min=1)
    return float(torch.special.entr(shares).sum() / math.log(2))


def perplexity(*counts: Tensor) -> float:
    """Compute 2 ** entropy, the number of equally used codes with the same information; the geometric mean over levels."""
    return 2.0 ** (sum(entropy_bits(level) for level in counts) / len(counts))


def index_bits(grids: Sequence[tuple[int, int]], num_codes: Sequence[int]) -> float:
    """Compute the bits per image as code indices under the uniform prior: log2 K per code."""
    return sum(h * w * math.log2(k) for (h, w), k in zip(grids, num_codes, strict=True))


def compression_ratio(raw: float, coded: float) -> float:
    """Compute raw bits per coded bit; infinite if the prior predicts every code with certainty."""
    return raw / coded if coded > 0 else math.inf


def raw_bits(height: int, width: int, channels: int) -> int:
    """Compute the bits per image as 8-bit pixels."""
    return height * width * channels * 8
