"""Splits of a data set: decoded images with their labels, and how validation images are held out where the source has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from stage1_vqvae.training.randomness import generator

TRAIN, VALIDATION, TEST = "train", "validation", "test"


class ImageSplit:
    """One split, decoded: `pixels` uint8 (N, H, W, C), `labels` int64 (N,) or None."""

    def __init__(self, pixels: Tensor, labels: np.ndarray | None) -> None:
        assert pixels.dtype == torch.uint8
        assert pixels.ndim == 4
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
        identities: Mapping[str, str] | None = None,
        skipped: Sequence[str] = (),
    ) -> None:
        self.splits = splits
        self.label_names = label_names
        self.identities = dict(identities or {})
        """Of each split, what is another if the files that it was read from are."""
        self.skipped = list(skipped)
        """A line for each image that could not be read and was left out."""


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
