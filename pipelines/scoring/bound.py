"""What images cost in bits: their codes under a prior, and their pixels given the codes.

-log p(x) <= -log p(x | z) - log p(z), with the one z that the encoder chooses. Its posterior is a point, without entropy, so
these two terms are the whole evidence bound (van den Oord et al. 2017, section 3.2): other z may share the image's probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipelines.scoring.surprisals import BATCH_SIZE, surprisals
from stage1_vqvae.data.device_batches import device_batches
from stage1_vqvae.data.splits import Pixels
from stage1_vqvae.metrics import index_bits
from stage1_vqvae.model import VQVAE
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.priors.contract import Prior
from training.devices import float64_copy
from training.progress import progress_bar


@torch.no_grad()
def pixel_bits(tokenizer: VQVAE, codes: Codes, pixels: Pixels, progress: bool = False) -> Tensor:
    """-log2 p(x | z) of each image, (N,), float64 on the CPU.

    Args:
        tokenizer: in eval mode, its objective a likelihood.
        codes: int64 (N, h, w) a level.
        pixels: uint8 (N, H, W, C).
    """
    assert not tokenizer.training
    device = next(tokenizer.parameters()).device
    bits = torch.empty(len(pixels), dtype=torch.float64)
    with progress_bar(len(pixels), "bits of pixels", "img", shown=progress) as bar:
        for part, (images, *levels) in device_batches(device, BATCH_SIZE, pixels, *codes):
            bits[part] = tokenizer.nats(tuple(levels), images).cpu().double() / math.log(2)
            bar.update(part.stop - part.start)
    return bits


def image_bits(
    tokenizer: VQVAE,
    codes: Codes,
    pixels: Pixels,
    counts: Sequence[np.ndarray] | None,
    prior: Prior | None,
    condition: Tensor | None,
    supports_unconditional: bool = True,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The bits of each image by what is known of its codes, (N,), in float64: `pixels`, the share of -log2 p(x | z) alone, and the whole
    under p(z) `uniform`, `unigram`, `learned`, and `learned, given the class`, where there is such a p(z).

    Args:
        tokenizer: in eval mode, its objective a likelihood.
        codes: int64 (N, h, w) a level, of images `pixels`, uint8 (N, H, W, C).
        counts: how often each code occurs in training, (K,) a level; each counts once more. None: not known.
        prior: in eval mode; None: not trained.
        condition: (N, ...) rows of the prior's condition, or None.
        supports_unconditional: whether the prior has learned p(z) without a condition.
        progress: show bars.
    """
    exact = float64_copy(tokenizer)
    of_pixels = pixel_bits(exact, codes, pixels, progress)
    found = {"pixels": of_pixels, "uniform": of_pixels + index_bits(tokenizer.grids, tokenizer.quantizer.num_codes)}
    if counts is not None:
        found["unigram"] = of_pixels.clone()
        for level, count in zip(codes, counts, strict=True):
            smoothed = torch.from_numpy(count).double() + 1
            found["unigram"] -= (smoothed / smoothed.sum()).log2()[level].flatten(1).sum(1)
    if prior is not None:
        prior = float64_copy(prior)
        if supports_unconditional:
            found["learned"] = of_pixels + surprisals(prior, codes, None, "bits of codes", progress).sum(1)
        if condition is not None:
            found["learned, given the class"] = of_pixels + surprisals(prior, codes, condition, "bits of codes", progress).sum(1)
    return found
