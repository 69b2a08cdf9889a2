"""In which order training takes images."""

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
        """The rows of a step, (B,)."""


class FileOrder:
    """An endless order of rows that lie in files, by which each file is read from its beginning to its end.

    An epoch is all files in a random order, one after another, cut into as many equal parts as there are lanes. A batch takes the same
    number of rows from every lane, out of the few that come next, at random. So every row is taken once an epoch of its lane; lanes drift
    apart by a row an epoch at most. Which rows are a step's is a function of the seed and the step alone, as with `DataOrder`.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int) -> None:
        """`lengths`: rows of each file, (F,)."""
        self.lengths, self.batch_size, self.seed = np.asarray(lengths, np.int64), batch_size, seed
        count, files = int(self.lengths.sum()), int((self.lengths > 0).sum())
        self.lanes = max(lanes for lanes in range(1, min(_MOST_LANES, files, batch_size) + 1) if batch_size % lanes == 0)
        self._bounds = count * np.arange(self.lanes + 1) // self.lanes
        self._window = max(1, _SHUFFLED // self.lanes)
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def batch(self, step: int) -> Tensor:
        """The training rows of a step, (B,): those of a lane beside one another."""
        each = self.batch_size // self.lanes
        return torch.from_numpy(np.concatenate([self._of_lane(lane, step * each, (step + 1) * each) for lane in range(self.lanes)]))

    def _of_lane(self, lane: int, first: int, end: int) -> np.ndarray:
        """Entries first..end-1 of a lane's endless order."""
        length, found = int(self._bounds[lane + 1] - self._bounds[lane]), []
        while first < end:
            epoch, place = divmod(first, length)
            window, within = divmod(place, self._window)
            start = window * self._window
            size = min(self._window, length - start)
            shuffled = torch.randperm(size, generator=generator(self.seed, "window", epoch, lane, window)).numpy()
            taken = shuffled[within : within + end - first]
            found.append(self._rows(epoch, self._bounds[lane] + start + taken))
            first += len(taken)
        return np.concatenate(found)

    def _rows(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The rows at places of an epoch, of files in their order of that epoch."""
        if epoch not in self._epochs:
            self._epochs = {old: files for old, files in self._epochs.items() if old >= epoch - 1}
            files = torch.randperm(len(self.lengths), generator=generator(self.seed, "files", epoch)).numpy()
            ends = np.cumsum(self.lengths[files])
            self._epochs[epoch] = ends, np.cumsum(self.lengths)[files] - ends  # by how far a file's rows are moved
        ends, moved = self._epochs[epoch]
        return places + moved[np.searchsorted(ends, places, side="right")]


def build_order(pixels: Pixels, batch_size: int, seed: int) -> Order:
    """The order in which training takes images: any, or one that reads them as they lie in files that are streamed."""
    if isinstance(pixels, EncodedPixels) and pixels.file_lengths is not None:
        return FileOrder(pixels.file_lengths, batch_size, seed)
    return DataOrder(len(pixels), batch_size, seed)
