"""Splits of a data set: images with their labels, and how validation images are held out where the source has none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from configs.data import Data
from stage1_vqvae.data.crops import Crop
from training.randomness import generator

TRAIN, VALIDATION, TEST = "train", "validation", "test"


class Pixels(Protocol):
    """Images, uint8 (N, H, W, C), of which some are read at a time: a tensor is one, which may be mapped from a file, and images that are
    decoded when they are asked for.
    """

    @property
    def shape(self) -> torch.Size:
        """(N, H, W, C)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor | slice, /) -> Tensor: ...


class CroppablePixels(ABC):
    """Images that are cropped and scaled whenever they are read."""

    def __init__(self, count: int, data: Data) -> None:
        self.shape = torch.Size((count, data.height, data.width, data.channels))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        numbers = torch.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        return self.cropped(numbers, [[None]] * len(numbers))[:, 0]

    @abstractmethod
    def cropped(self, rows: Tensor, crops: Sequence[Sequence[Crop | None]]) -> Tensor:
        """Crops of each row (B,), the same number of each (None: the transform's): uint8 (B, crops, H, W, C)."""


class ReadableImages(NamedTuple):
    """The images of a split that can be read."""

    pixels: Pixels
    skipped: dict[int, str]
    """Which of those asked for are not among them, and why."""


class SourceSplit(ABC):
    """A split as its source has it, before any of its images is decoded."""

    labels: np.ndarray | None
    """(N,) int64."""
    fingerprint: str
    """What is another if the source's files are; its last word is the same for a copy of them (cache.py)."""

    @abstractmethod
    def __len__(self) -> int: ...

    def is_kept(self, rows: np.ndarray, data: Data) -> bool:
        """Whether those rows are decoded already, so that reading them costs nothing."""
        return False

    @abstractmethod
    def read(self, rows: np.ndarray | None, data: Data, progress: bool) -> ReadableImages:
        """Those rows (all, if None) at the recipe's size."""


class OpenedSource(NamedTuple):
    """A data set before any of its images is decoded."""

    splits: dict[str, SourceSplit]
    label_names: list[str] | None
    source_names: dict[str, str]
    """What the source calls each split, where it has a name for it."""
    other_files: str = ""
    """How many files of which kind are no images of it."""
    notes: Sequence[str] = ()
    """What was decided and might have been meant otherwise, a line each."""


class ImageSplit:
    """One split: `pixels` uint8 (N, H, W, C), `labels` int64 (N,) or None."""

    def __init__(self, pixels: Pixels, labels: np.ndarray | None) -> None:
        assert len(pixels.shape) == 4
        self.pixels = pixels
        self.labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.pixels)


class ImageSource:
    """The splits of a data set, `train` and `validation` always among them, and the names of its labels."""

    def __init__(
        self,
        splits: dict[str, ImageSplit],
        label_names: list[str] | None,
        fingerprints: Mapping[str, str] | None = None,
        skipped: Sequence[str] = (),
        record: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        self.splits = splits
        self.label_names = label_names
        self.fingerprints = dict(fingerprints or {})
        """Of each split, what is another if the files that it was read from are."""
        self.skipped = list(skipped)
        """A line for each image that could not be read and was left out."""
        self.record = dict(record or {})
        """What a run writes down of its data (record.py)."""


def stratified_draw(labels: Tensor | None, count: int, share: float, seed: int) -> Tensor:
    """A mask of `share` of the rows, the same share of each label; a label with few images gives what rounds."""
    drawn = torch.zeros(count, dtype=torch.bool)
    groups = [torch.arange(count)] if labels is None else [torch.nonzero(labels == label)[:, 0] for label in labels.unique()]
    for number, rows in enumerate(groups):
        order = torch.randperm(len(rows), generator=generator(seed, "validation split", number))
        drawn[rows[order[: round(share * len(rows))]]] = True
    if labels is not None and not drawn.any():  # no label has enough images to give one
        return stratified_draw(None, count, share, seed)
    return drawn
