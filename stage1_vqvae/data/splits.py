"""Splits of a data set: images with their labels, and how validation images are held out where the source has none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from configs.data import Data
from configs.errors import UserError
from stage1_vqvae.data.crops import Crop
from training.randomness import generator

TRAIN, VALIDATION, TEST = "train", "validation", "test"


class Pixels(Protocol):
    """Images, uint8 (N, H, W, C), read some rows at a time: a tensor, perhaps mapped from a file, or images that are decoded when read."""

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
    """Images of a split without those that cannot be read."""

    pixels: Pixels
    skipped: dict[int, str]
    """Reason for each requested row that is missing from `pixels`."""


class SourceSplit(ABC):
    """Split as its source has it, before any image is decoded."""

    labels: np.ndarray | None
    """(N,) int64."""
    fingerprint: str
    """Changes whenever the source's files change; its last word is the same for a copy of them (cache.py)."""

    @abstractmethod
    def __len__(self) -> int: ...

    def is_kept(self, rows: np.ndarray, data: Data) -> bool:
        """Return whether those rows are in the cache, so that reading them costs nothing."""
        return False

    def column(self, name: str) -> Sequence[Any]:
        """Read a column other than the images and labels, (N,). Errors: UserError if there is no such column."""
        raise UserError(f"condition: expected a column {name} in the data set, found one without columns; it takes a table of rows")

    @abstractmethod
    def read(self, rows: np.ndarray | None, data: Data, progress: bool) -> ReadableImages:
        """Read those rows (None: all) at the recipe's size."""


class OpenedSource(NamedTuple):
    """Data set before any image is decoded."""

    splits: dict[str, SourceSplit]
    label_names: list[str] | None
    source_names: dict[str, str]
    """The source's name per split, where it has one."""
    other_files: str = ""
    """Number of files per kind that are not images of the data set, as text."""
    notes: Sequence[str] = ()
    """Lines about decisions that the user may have meant otherwise."""


class ImageSplit:
    """Split of images: `pixels` uint8 (N, H, W, C), `labels` int64 (N,) or None, and the requested columns, (N,) each."""

    def __init__(
        self,
        pixels: Pixels,
        labels: np.ndarray | None,
        label_names: Sequence[str] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        assert len(pixels.shape) == 4
        self.pixels = pixels
        self.labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        self.label_names, self.columns = label_names, dict(columns or {})

    def __len__(self) -> int:
        return len(self.pixels)


class ImageSource:
    """Splits of a data set and the names of its labels."""

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
        """Fingerprint per split, which changes whenever its files change."""
        self.skipped = list(skipped)
        """One line per image that could not be read and was left out."""
        self.record = dict(record or {})
        """Record of the data that a run keeps (record.py)."""


def stratified_draw(labels: Tensor | None, count: int, share: float, seed: int) -> Tensor:
    """Draw a mask of `share` of the rows, the same share per label, rounded for labels with few images."""
    drawn = torch.zeros(count, dtype=torch.bool)
    groups = [torch.arange(count)] if labels is None else [torch.nonzero(labels == label)[:, 0] for label in labels.unique()]
    for number, rows in enumerate(groups):
        order = torch.randperm(len(rows), generator=generator(seed, "validation split", number))
        drawn[rows[order[: round(share * len(rows))]]] = True
    if labels is not None and not drawn.any():  # every label has too few images
        return stratified_draw(None, count, share, seed)
    return drawn
