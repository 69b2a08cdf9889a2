"""Bits of images: of their codes under a prior, and of their pixels given the codes.

-log p(x) <= -log p(x | z) - log p(z), with the one z that the encoder chooses. Its posterior is a point, without entropy, so
these two terms are the complete evidence bound (van den Oord et al. 2017, section 3.2). It is not tight: other z may also give the image.
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
    """Compute -log2 p(x | z) of each image, (N,), float64 on the CPU.

    Args:
        tokenizer: in eval mode, its objective a likelihood.
        codes: int64 (N, h, w) per level.
        pixels: uint8 (N, H, W, C).
        progress: show a bar.
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
    """Compute the bits of each image, (N,), float64, per p(z): `uniform`, `unigram`, `learned` and `learned, given the class`, as far as
    available; and under `pixels` the part -log2 p(x | z) alone.

    Args:
        tokenizer: in eval mode, its objective a likelihood.
        codes: int64 (N, h, w) per level, of the images.
        pixels: the images, uint8 (N, H, W, C).
        counts: occurrences of each code in training, (K,) per level, to which 1 is added; None: unknown.
        prior: in eval mode; None: not trained.
        condition: (N, ...) rows of the prior's condition, or None.
        supports_unconditional: whether the prior has learned p(z) without a condition.
        progress: show bars.
    """
    exact = float64_copy(tokenizer)
    given_codes = pixel_bits(exact, codes, pixels, progress)
    bits = {"pixels": given_codes, "uniform": given_codes + index_bits(tokenizer.grids, tokenizer.quantizer.num_codes)}
    if counts is not None:
        bits["unigram"] = given_codes.clone()
        for level, count in zip(codes, counts, strict=True):
            smoothed = torch.from_numpy(count).double() + 1
            bits["unigram"] -= (smoothed / smoothed.sum()).log2()[level].flatten(1).sum(1)
    if prior is not None:
        prior = float64_copy(prior)
        if supports_unconditional:
            bits["learned"] = given_codes + surprisals(prior, codes, None, "bits of codes", progress).sum(1)
        if condition is not None:
            bits["learned, given the class"] = given_codes + surprisals(prior, codes, condition, "bits of codes", progress).sum(1)
    return bits
