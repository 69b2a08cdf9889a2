"""Images to codes and back, batch by batch; their pixels in memory or in a temporary file."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stage1_vqvae.data.device_batches import device_batches
from stage1_vqvae.data.pixels import to_model, to_uint8
from stage1_vqvae.data.splits import Pixels
from stage1_vqvae.model import VQVAE
from stage1_vqvae.quantizers.contract import Codes
from training.progress import progress_bar


def allocate_pixels(shape: Sequence[int], folder: Path | None = None) -> Tensor:
    """Allocate uint8 pixels of a shape: in memory, or in a temporary file in a folder, which is deleted with the tensor.

    Errors: OSError if the disk is too full.
    """
    size = math.prod(shape)
    if folder is None or size == 0:
        return torch.empty(*shape, dtype=torch.uint8)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            if hasattr(os, "posix_fallocate"):  # a sparse file on a full disk would end the process at the first write
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        file.truncate(size)
        return torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=tuple(shape)))  # the mapping outlives the closed file


@torch.no_grad()
def encode(tokenizer: VQVAE, pixels: Pixels, batch_size: int, progress: bool = False, reconstructions: Tensor | None = None) -> Codes:
    """Encode images.

    Args:
        tokenizer: in eval mode.
        pixels: uint8 (N, H, W, C).
        batch_size: images per batch.
        progress: show a bar.
        reconstructions: uint8 (N, H, W, C) to write the decoded codes into; None: codes are not decoded.
    Returns: int64 (N, h, w) per level, on the CPU.
    """
    device = next(tokenizer.parameters()).device
    parts: list[Codes] = []
    with progress_bar(len(pixels), "encode" if reconstructions is None else "encode and decode", "img", shown=progress) as bar:
        for rows, (images,) in device_batches(device, batch_size, pixels):
            codes = tokenizer.encode(to_model(images))
            if reconstructions is not None:
                reconstructions[rows] = to_uint8(tokenizer.decode(codes)).cpu()
            parts.append(tuple(level.cpu() for level in codes))
            bar.update(rows.stop - rows.start)
    return tuple(torch.cat(level) for level in zip(*parts, strict=True))


def encode_and_decode(
    tokenizer: VQVAE, pixels: Pixels, batch_size: int, progress: bool = False, folder: Path | None = None
) -> tuple[Codes, Tensor]:
    """Compute codes and reconstructions, uint8 (N, H, W, C), of images. `folder`: as in `allocate_pixels`; the others: as in `encode`."""
    reconstructions = allocate_pixels(pixels.shape, folder)
    return encode(tokenizer, pixels, batch_size, progress, reconstructions), reconstructions


@torch.no_grad()
def decode(tokenizer: VQVAE, codes: Codes, batch_size: int) -> Tensor:
    """Decode codes, (N, h, w) per level, to uint8 (N, H, W, C) on the CPU."""
    channels, height, width = tokenizer.image_shape
    pictures = allocate_pixels((len(codes[0]), height, width, channels))
    for rows, batch in device_batches(next(tokenizer.parameters()).device, batch_size, *codes):
        pictures[rows] = to_uint8(tokenizer.decode(batch)).cpu()
    return pictures
