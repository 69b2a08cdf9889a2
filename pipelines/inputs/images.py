"""The input images of a pipeline: files and folders that the user names, or a split of the run's data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from configs.data import Data
from configs.errors import UserError
from configs.run_dir import RunDir
from stage1_vqvae.data.files import load_files
from stage1_vqvae.data.names import class_numbers
from stage1_vqvae.data.record import Record, check_unchanged
from stage1_vqvae.data.sources import load_images, load_spread
from stage1_vqvae.data.splits import TEST, TRAIN, VALIDATION, ImageSplit

# Bytes of a name: file systems allow 255, including a number and an ending.
_LONGEST = 230


class Images(NamedTuple):
    """Images with their names, labels and columns."""

    pixels: Tensor
    """uint8 (N, H, W, C)."""
    names: list[str]
    """Paths; or split and row, such as validation/17."""
    labels: list[str] | None
    """Name of each image's class."""
    below: list[str] | None = None
    """Path of each image below the folder that the user named, with `/` and without ending; None: images of a split."""
    columns: Mapping[str, Sequence[Any]] = MappingProxyType({})
    """Columns of the data set, (N,) each."""

    def split(self) -> ImageSplit:
        """Return the images as a split, for encoding a condition."""
        if self.labels is None:
            return ImageSplit(self.pixels, None, None, self.columns)
        names = list(dict.fromkeys(self.labels))
        return ImageSplit(self.pixels, class_numbers(self.labels, names), names, self.columns)


def image_options(parser: Any) -> None:
    """Add the options that select images."""
    parser.add_argument("--images", type=str, nargs="+", help="image files and folders (default: a split of the run's data)")
    parser.add_argument("--split", type=str, help=f"the split: {TRAIN}, {VALIDATION} or {TEST} (default: {VALIDATION})")


def chosen_images(
    options: Any, data: Data, progress: bool, run: RunDir | None = None, count: int | None = None, columns: Sequence[str] = ()
) -> Images:
    """Load the images that the options of `image_options` select.

    Args:
        options: parsed options.
        data: the recipe's section.
        progress: show a bar.
        run: run whose record of data is checked; None: no check.
        count: number of images to decode, evenly spaced; None: all.
        columns: columns of the data set to load besides images and labels.
    Errors: UserError for missing or unreadable images, and for other data than the run's.
    """
    split_name = options.split or VALIDATION
    if options.images is not None:
        if options.split is not None:
            raise UserError(f"--images: expected no --split beside it, found {options.split}")
        files = load_files(options.images, data, progress, count)
        return Images(files.pixels, files.paths, files.labels, files.relative_names)
    if split_name not in (TRAIN, VALIDATION, TEST):
        raise UserError(f"--split: expected {TRAIN}, {VALIDATION} or {TEST}, found {split_name}")

    def check(record: Record) -> None:
        if run is not None:
            check_unchanged(run.data, record, str(run), options.accept_changed_data)

    if count is None:
        # Validation images may be drawn from the training split, so its rows depend on them.
        source = load_images(data, [TRAIN, VALIDATION] if split_name == TRAIN else [split_name], progress, check=check, columns=columns)
    else:
        source, numbers = load_spread(data, split_name, count, progress, check, columns)
    if split_name not in source.splits:
        raise UserError(f"--split {split_name}: the run's data has no such split; name another, or images with --images")
    split = source.splits[split_name]
    labels = None
    if split.labels is not None and source.label_names is not None:
        labels = [source.label_names[label] for label in split.labels.tolist()]
    rows = range(len(split)) if count is None else numbers.tolist()
    return Images(split.pixels[:], [f"{split_name}/{row}" for row in rows], labels, columns=split.columns)


def unique_names(names: Sequence[str]) -> list[str]:
    """Make names of PNG files unique, with or without folders (`a/b/c`), by appending numbers.

    Names that differ only in case, and names of folders, count as duplicates. Unique names stay unchanged.
    """
    paths = [[os.fsdecode(os.fsencode(part)[:_LONGEST]) for part in name.split("/")] for name in names]
    taken = {"/".join(path[:depth]).casefold() for path in paths for depth in range(1, len(path))}  # the folders
    counts: dict[str, int] = {}
    result = []
    for path in paths:
        name = candidate = "/".join(path)
        while f"{candidate}.png".casefold() in taken:
            counts[name] = counts.get(name, 1) + 1
            candidate = f"{name}-{counts[name]}"
        taken.add(f"{candidate}.png".casefold())
        result.append(candidate)
    return result
