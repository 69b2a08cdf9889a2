"""Images, and whatever else has a row for each of them, batch by batch on a device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stage1_vqvae.data.loader import read_ahead, worth_reading_ahead
from stage1_vqvae.data.splits import Pixels
from stage1_vqvae.training.batching import batches


def device_batches(device: torch.device, size: int, *sources: Pixels) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """`size` rows at a time of each source, on the device, after the slice that they are; the sources have one length.

    For an accelerator the next batches are read in a thread while it works on the last; for a GPU into page-locked memory, so that the host
    does not wait for the copies. The caller must wait for each batch's result before it asks for many more: what is read ahead of the GPU
    takes memory.
    """
    gpu: int | None = None
    if device.type == "cuda":
        gpu = torch.cuda.current_device() if device.index is None else device.index

    def read(rows: slice) -> tuple[slice, list[Tensor]]:
        found = [source[rows] for source in sources]
        if gpu is None:
            return rows, found
        torch.cuda.set_device(gpu)  # of this thread, which would pin memory for the first one otherwise
        return rows, [tensor.pin_memory() for tensor in found]

    for rows, found in read_ahead(read, batches(len(sources[0]), size), worth_reading_ahead(device)):
        yield rows, tuple(tensor.to(device, non_blocking=gpu is not None) for tensor in found)
