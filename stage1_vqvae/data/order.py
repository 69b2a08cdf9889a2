"""Order in which training takes images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from stage1_vqvae.data.encoded import EncodedPixels
from stage1_vqvae.data.splits import Pixels
from training.randomness import DataOrder, generator

_MOST_LANES = 32
_SHUFFLED = 512  # rows


class Order(Protocol):
    """An endless order of rows, in batches."""

    def batch(self, step: int) -> Tensor:
        """Return the rows of a step, (B,)."""


class FileOrder:
    """An endless order of rows in files that reads each file from its beginning to its end.

    An epoch is all files in a random order, one after another, cut into equal lanes. A batch takes the same number of rows from every lane,
    at random from a window of the next ones. So every row is taken once per epoch of its lane; lanes drift apart by at most a row per
    epoch. The rows of a step are a function of the seed and the step alone, as with `DataOrder`.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int) -> None:
        """`lengths`: (F,) rows per file."""
        self.lengths, self.batch_size, self.seed = np.asarray(lengths, np.int64), batch_size, seed
        count, files = int(self.lengths.sum()), int((self.lengths > 0).sum())
        self.lanes = max(lanes for lanes in range(1, min(_MOST_LANES, files, batch_size) + 1) if batch_size % lanes == 0)
        self._bounds = count * np.arange(self.lanes + 1) // self.lanes
        self._window = max(1, _SHUFFLED // self.lanes)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def batch(self, step: int) -> Tensor:
        """Return the rows of a step, (B,), lane after lane."""
        count = self.batch_size // self.lanes
        return torch.from_numpy(np.concatenate([self._lane_rows(lane, step * count, (step + 1) * count) for lane in range(self.lanes)]))

    def _lane_rows(self, lane: int, first: int, end: int) -> np.ndarray:
        """Return entries first..end-1 of a lane's endless order."""
        length, rows = int(self._bounds[lane + 1] - self._bounds[lane]), []
        while first < end:
            epoch, position = divmod(first, length)
            window, offset = divmod(position, self._window)
            start = window * self._window
            size = min(self._window, length - start)
            shuffled = torch.randperm(size, generator=generator(self.seed, "window", epoch, lane, window)).numpy()
            positions = shuffled[offset : offset + end - first]
            rows.append(self._rows_at(epoch, self._bounds[lane] + start + positions))
            first += len(positions)
        return np.concatenate(rows)

    def _rows_at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the rows at positions of an epoch, whose files come in a random order."""
        if epoch not in self._epochs:
            self._epochs = {old: files for old, files in self._epochs.items() if old >= epoch - 1}
            files = torch.randperm(len(self.lengths), generator=generator(self.seed, "files", epoch)).numpy()
            ends = np.cumsum(self.lengths[files])
            self._epochs[epoch] = ends, np.cumsum(self.lengths)[files] - ends  # distance from position to row, per file
        ends, distances = self._epochs[epoch]
        return positions + distances[np.searchsorted(ends, positions, side="right")]


def build_order(pixels: Pixels, batch_size: int, seed: int) -> Order:
    """Build the order of training images: a uniform shuffle, or for streamed files one that reads each from end to end."""
    if isinstance(pixels, EncodedPixels) and pixels.file_lengths is not None:
        return FileOrder(pixels.file_lengths, batch_size, seed)
    return DataOrder(len(pixels), batch_size, seed)
