"""The images a pipeline works on: files and folders that the user names, or a split of the run's data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs.data import Data
from configs.errors import UserError, listed, say
from configs.run_dir import RunDir
from pipelines.drawing import labels_of
from stage1_vqvae.data.files import load_files
from stage1_vqvae.data.names import class_numbers
from stage1_vqvae.data.record import Record, check_unchanged
from stage1_vqvae.data.sources import load_images, load_spread
from stage1_vqvae.data.splits import TEST, TRAIN, VALIDATION
from stage2_prior.priors.prior_file import PriorHeader

# Bytes of a name, so that a number and an ending have room in the 255 that file systems take.
_LONGEST = 230


class Images(NamedTuple):
    """Images, where each is from, and what it shows."""

    pixels: Tensor
    """uint8 (N, H, W, C)."""
    names: list[str]
    """Paths; or split and row, such as validation/17."""
    labels: list[str] | None
    below: list[str] | None = None
    """The path of each below the folder that the user named, with `/` and without ending; None: of a split."""


def image_options(parser: Any) -> None:
    """The options by which a user names images."""
    parser.add_argument("--images", type=str, nargs="+", help="image files and folders (default: a split of the run's data)")
    parser.add_argument("--split", type=str, help=f"the split: {TRAIN}, {VALIDATION} or {TEST} (default: {VALIDATION})")


def chosen_images(options: Any, data: Data, progress: bool, run: RunDir | None = None, count: int | None = None) -> Images:
    """The images that `image_options` name, or `count` of them spread evenly, and then no others are decoded.

    Errors: UserError for what is missing or cannot be read, and for other data than the run's.
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
        # The validation images may have to be drawn from the training split: only who loads both knows what is left of it.
        source = load_images(data, [TRAIN, VALIDATION] if split_name == TRAIN else [split_name], progress, check=check)
    else:
        source, numbers = load_spread(data, split_name, count, progress, check)
    if split_name not in source.splits:
        raise UserError(f"--split {split_name}: the run's data has no such split; name another, or images with --images")
    split = source.splits[split_name]
    labels = None
    if split.labels is not None and source.label_names is not None:
        labels = [source.label_names[label] for label in split.labels.tolist()]
    rows = range(len(split)) if count is None else numbers.tolist()
    return Images(split.pixels[:], [f"{split_name}/{row}" for row in rows], labels)


def labels_for(asked: str | None, images: Images, header: PriorHeader | None) -> Tensor | None:
    """Labels (N,) in the prior's numbering: as asked, or the images' own; None where there are none.

    Errors: UserError for a label that the prior does not know, or none, where it needs one.
    """
    if asked is not None or header is None or header.label_names is None:
        return labels_of(asked, len(images.pixels), header)
    if images.labels is not None:
        numbers = class_numbers(images.labels, header.label_names)
        if (numbers < 0).any():
            known, unknown = listed(header.label_names), images.labels[int(np.argmin(numbers))]
            raise UserError(f"label: expected images with labels that the prior knows ({known}), or one for all, found {unknown}")
        return torch.from_numpy(numbers)
    if not header.knows_no_label:
        raise UserError("label: expected one, for a prior trained with stage2.label_dropout 0, found none")
    return None


def known_labels_for(asked: str | None, images: Images, header: PriorHeader | None) -> Tensor | None:
    """`labels_for`, but where the prior does not know the label of some image, all are taken without: so their bits
    can be compared.
    """
    if asked is None and images.labels is not None and header is not None and header.label_names is not None:
        numbers = class_numbers(images.labels, header.label_names)
        if (numbers < 0).any() and header.knows_no_label:
            unknown = images.labels[int(np.argmin(numbers))]
            say(f"the prior does not know the label {unknown}: all images are taken without labels (--label names one for all)")
            images = images._replace(labels=None)
    return labels_for(asked, images, header)


def unique_names(names: Sequence[str]) -> list[str]:
    """Names of PNG files, with or without folders before them (`a/b/c`), numbered where they would meet, also where case is all
    that tells them apart, or where a folder bears a file's name; where none do, as they are.
    """
    parts = [[os.fsdecode(os.fsencode(part)[:_LONGEST]) for part in whole.split("/")] for whole in names]
    taken = {"/".join(found[:depth]).casefold() for found in parts for depth in range(1, len(found))}  # the folders
    met: dict[str, int] = {}
    result = []
    for found in parts:
        name = candidate = "/".join(found)
        while f"{candidate}.png".casefold() in taken:
            met[name] = met.get(name, 1) + 1
            candidate = f"{name}-{met[name]}"
        taken.add(f"{candidate}.png".casefold())
        result.append(candidate)
    return result
