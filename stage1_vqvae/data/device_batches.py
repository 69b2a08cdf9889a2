"""Images, and whatever else has a row for each of them, batch by batch on a device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stage1_vqvae.data.loader import read_to
from stage1_vqvae.data.splits import Pixels
from stage1_vqvae.training.batching import batches


def device_batches(device: torch.device, size: int, *sources: Pixels) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """`size` rows at a time of each source, on the device, after the slice that they are; the sources have one length.

    For an accelerator they are read ahead (see `read_to`), so the caller must wait for each batch's result before it asks for many more:
    what is read ahead of it takes memory.
    """
    parts = batches(len(sources[0]), size)
    yield from zip(parts, read_to(device, lambda rows: tuple(source[rows] for source in sources), parts), strict=True)
