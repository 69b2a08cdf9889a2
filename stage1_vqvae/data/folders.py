"""Folders of images: a class a subfolder, a split a folder of those, where there are such."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from configs.data import Data
from configs.errors import UserError, say
from stage1_vqvae.data import tables
from stage1_vqvae.data.cache import files_identity
from stage1_vqvae.data.encoded import EncodedSplit, FilePaths
from stage1_vqvae.data.listings import Listing
from stage1_vqvae.data.names import NO_LABELS, our_splits, refuse_keys
from stage1_vqvae.data.splits import TRAIN, SourceSplit

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables that name images (`file_name`) and what is known of them, as `datasets` has it."""
_NOT_OURS = ("lost+found",)  # at the root of a file system, for nobody but its owner
_NOT_ONE_IMAGE = ("HDF5", "MPEG", "PDF")  # formats that Pillow knows, of files that hold none or many


def is_image(file: Path) -> bool:
    """Whether a file's ending is that of images that Pillow reads, not of those that it only writes."""
    kind = Image.registered_extensions().get(file.suffix.lower())
    return kind in Image.OPEN and kind not in _NOT_ONE_IMAGE


def image_folder(path: Path, files: Sequence[Path], data: Data) -> tuple[dict[str, SourceSplit], list[str] | None]:
    """Splits and label names of a folder's images.

    Folders at its top that are named as splits are splits; file names never are, whatever they begin with. Labels are the names of the
    folders that images lie in, if there are several, all as deep; or what a table of metadata says, if there is one.

    Errors: UserError for a folder without images, or with some beside its splits.
    """
    images = [file for file in files if is_image(file)]
    if not images:
        raise UserError(f"data.path {path}: expected images, found {len(files)} files and none that is an image")
    names = our_splits(data, sorted(folder.name for folder in path.iterdir() if folder.is_dir()), only=False)
    roots = {split: path / name for name, split in names.items()} or {TRAIN: path}
    of_splits: dict[str, list[Path]] = {split: [] for split in roots}
    beside: list[Path] = []
    for image in images:
        found = of_splits.get(names.get(image.relative_to(path).parts[0], "")) if names else of_splits[TRAIN]
        (beside if found is None else found).append(image)
    if beside:
        if len(names) == 1 and data.train_split is None and any(image.parent != path for image in beside):  # a class called `train`?
            told = f"found some in {next(iter(names))} and others beside it; if those are classes, rename that one, else --data.train_split"
            raise UserError(f"{beside[0]}: expected all images in the folders of their splits, {told}")
        say(f"data.path {path}: {len(beside):,} images beside the splits' folders ({', '.join(names)}) are left out; one is {beside[0]}")
    for split, found in of_splits.items():
        if not found:
            raise UserError(f"data.path {roots[split]}: expected images of split {split}, found none")
    tables_of = {split: [file for file in files if file.name in METADATA and file.is_relative_to(root)] for split, root in roots.items()}
    if any(tables_of.values()):
        return _with_metadata(path, of_splits, tables_of, data)
    if any(file.name in METADATA for file in files):
        raise UserError(f"data.path {path}: expected metadata in the folder of each split, found it above them")
    refuse_keys(data, ("image_column",), f"{path}, a folder of images, which has no columns")
    depths = {split: {len(file.relative_to(roots[split]).parts) for file in found} for split, found in of_splits.items()}
    labelled = [split for split, depth in depths.items() if len(depth) == 1 and depth != {1}]
    label_names = sorted({file.parent.name for split in labelled for file in of_splits[split]})
    if data.label_column is not None:
        if data.label_column != NO_LABELS:
            raise UserError(f"data.label_column: expected {NO_LABELS}, or nothing, for a folder of images, found {data.label_column}")
        label_names = []
    numbers = {name: number for number, name in enumerate(label_names)}
    splits: dict[str, SourceSplit] = {}
    for split, found in of_splits.items():
        paths = sorted(map(str, found))
        labels = None
        if split in labelled and len(label_names) > 1:
            labels = np.asarray([numbers[os.path.basename(os.path.dirname(file))] for file in paths], np.int64)
        splits[split] = EncodedSplit(split, FilePaths(paths), labels, files_identity(map(Path, paths)))
    return splits, label_names if len(label_names) > 1 else None


def _with_metadata(
    path: Path, images: dict[str, list[Path]], tables_of: dict[str, list[Path]], data: Data
) -> tuple[dict[str, SourceSplit], list[str] | None]:
    """As `image_folder`, of images that tables of metadata name; what they do not name is left out, and said so."""
    for split, found in tables_of.items():
        if not found:
            raise UserError(f"data.path {path}: expected metadata in the folder of each split, found none in that of {split}")
    splits, label_names = tables.of_listings({split: Listing(tables_of[split], found) for split, found in images.items()}, data)
    for split, of_split in splits.items():
        if len(of_split) < len(images[split]):
            say(f"data.path {path}, {split}: {len(images[split]) - len(of_split):,} images that the metadata does not name are left out")
    if label_names is None and any(len({file.parent for file in found}) > 1 for found in images.values()):
        say(f"data.path {path}: no labels: the metadata, which stands for the folders' names, has no column of them (--data.label_column)")
    return splits, label_names


def files_below(folder: Path, above: frozenset[Path] = frozenset()) -> list[Path]:
    """The files of a folder and of those in it, through links to folders too, what is hidden aside.

    Errors: UserError for a folder that cannot be read, or that is a link to one above it: images would be missing, and nobody would know.
    For a name that is not UTF-8, which no table can hold.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: expected a folder that can be read, found: {error.strerror}")

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith((".", "__")) and name not in _NOT_OURS]
        for path in [Path(parent, name) for name in folders]:
            if path.is_symlink():
                within = above | {Path(parent).resolve(), *Path(parent).resolve().parents}
                if path.resolve() in within:
                    raise UserError(f"{path}: expected a folder, found a link to one above it; remove the link")
                found += files_below(path, within)
        names = [name for name in names if not name.startswith(".") and os.path.isfile(os.path.join(parent, name))]
        for name in (*folders, *names):
            if name != name.encode(errors="ignore").decode():  # what is not UTF-8 is surrogates here
                raise UserError(f"{os.fsencode(os.path.join(parent, name))!r}: expected a name in UTF-8, found another encoding; rename it")
        found += [Path(parent, name) for name in names]
    return found
