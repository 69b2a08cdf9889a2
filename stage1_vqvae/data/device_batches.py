"""Batches of images and parallel tensors on a device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stage1_vqvae.data.splits import Pixels
from training.batching import batches
from training.prefetch import read_to


def device_batches(device: torch.device, size: int, *sources: Pixels) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Yield (slice, tensors on the device) for `size` rows at a time; all sources have the same length.

    On an accelerator batches are prefetched (see `read_to`) and copied asynchronously: a caller that never waits for its own results lets
    batches pile up in device memory.
    """
    slices = batches(len(sources[0]), size)
    yield from zip(slices, read_to(device, lambda rows: tuple(source[rows] for source in sources), slices), strict=True)
