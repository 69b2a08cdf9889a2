"""Folders of images: a class a subfolder, a split a folder of those, where there are such."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs.data import Data
from configs.errors import UserError, listed
from stage1_vqvae.data import tables
from stage1_vqvae.data.cache import files_fingerprint
from stage1_vqvae.data.encoded import EncodedSplit, FilePaths
from stage1_vqvae.data.formats import ending_of, image_endings, package_for
from stage1_vqvae.data.listings import Listing
from stage1_vqvae.data.names import NO_LABELS, conventional_split, map_splits, normalised, refuse_keys, splits_of_folders
from stage1_vqvae.data.splits import TRAIN, OpenedSource, SourceSplit

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables that name images (`file_name`) and what is known of them, as `datasets` has it."""
# What systems and their programs leave beside files: thumbnails, recycle bins, snapshots. (Hidden ones begin with a dot.)
_SYSTEM_NAMES = frozenset(
    (
        *("__macosx", "lost+found", "@eadir", "@__thumb", "@recycle", "#recycle", "$recycle.bin", "@recently-snapshot", "#snapshot"),
        *("system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    )
)
_KINDS_LISTED = 5
_MERGED = "folders of one name are one class"

Parts = tuple[str, ...]
"""A folder's path below the one that was named, part by part."""


class FileTree(NamedTuple):
    """The files of a folder and of those below it."""

    root: str
    files: dict[Parts, list[str]]
    """Names by folder; folders without files too."""
    broken: list[str]
    """Paths of links that lead nowhere."""

    def path(self, folder: Parts, name: str = "") -> str:
        """The path of a folder, or of a file in it."""
        return os.path.join(self.root, *folder, name) if name else os.path.join(self.root, *folder)

    def paths(self, wanted: Callable[[str], bool]) -> list[str]:
        """Paths of the files with such names."""
        return [path for folder, names in self.files.items() for path in _joined(self.path(folder), filter(wanted, names))]

    def endings(self) -> Counter[str]:
        """How many files there are of each ending, lower-case."""
        return Counter(ending_of(name) for names in self.files.values() for name in names)


def list_files(folder: str | Path) -> FileTree:
    """List the files of a folder and of those below it, through links to folders too; without hidden files and what systems leave.

    Errors: UserError for a folder that cannot be read, or that is a link to one above it: images would be missing, and nobody would know.
    """
    files: dict[Parts, list[str]] = {}
    broken: list[str] = []
    # Each with the real paths above it, where links lead to it.
    pending: list[tuple[str, Parts, frozenset[Path]]] = [(os.fspath(folder), (), frozenset())]
    while pending:
        parent, parts, above = pending.pop()
        names = files[parts] = []
        try:
            with os.scandir(parent) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name.casefold() in _SYSTEM_NAMES:
                        continue
                    if entry.is_symlink():
                        # A link to itself is none to a file or a folder, but an error of `entry`.
                        if os.path.isdir(entry.path):
                            real = Path(parent).resolve()
                            within = above | {real, *real.parents}
                            if Path(entry.path).resolve() in within:
                                raise UserError(f"{entry.path}: expected a folder, found a link to one above it; remove the link")
                            pending.append((entry.path, (*parts, entry.name), within))
                        elif os.path.isfile(entry.path):
                            names.append(entry.name)
                        else:
                            broken.append(entry.path)
                    elif entry.is_dir():
                        pending.append((entry.path, (*parts, entry.name), above))
                    elif entry.is_file():
                        names.append(entry.name)
        except OSError as error:
            raise UserError(f"{error.filename or parent}: expected a folder that can be read, found: {error.strerror}") from None
    return FileTree(os.fspath(folder), files, broken)


def check_utf8(tree: FileTree) -> None:
    """Errors: UserError for a name that is not UTF-8, which no table can hold."""
    for folder, names in tree.files.items():
        for path in (tree.path(folder), *(tree.path(folder, name) for name in names if not name.isascii())):
            if path != path.encode(errors="ignore").decode():  # what is not UTF-8 is surrogates here
                raise UserError(f"{os.fsencode(path)!r}: expected a name in UTF-8, found another encoding; rename it")


def describe_other_files(tree: FileTree, used: Callable[[str], bool]) -> str:
    """How many files of which kind are not used, as `20 .HEIC (install pillow-heif), 3 .svg`; empty if all are."""
    kinds = Counter(os.path.splitext(name)[1] for names in tree.files.values() for name in names if not used(name))
    described = []
    for ending, count in kinds.most_common(_KINDS_LISTED):
        package = package_for(ending.lower())
        described.append(f"{count:,} {ending or 'without ending'}" + (f" (install {package})" if package else ""))
    if more := kinds.total() - sum(count for _, count in kinds.most_common(_KINDS_LISTED)):
        described.append(f"{more:,} of other kinds")
    if tree.broken:
        described.append(f"{len(tree.broken):,} broken link{'s' if len(tree.broken) > 1 else ''}")
    return ", ".join(described)


def select_images(tree: FileTree, beside: Collection[str] = ()) -> tuple[dict[Parts, list[str]], str]:
    """Names of images by folder, of folders that hold some; and what is `describe_other_files`, but for files of the names `beside`."""
    endings = image_endings(tree.endings())
    images = {folder: found for folder, names in tree.files.items() if (found := [name for name in names if ending_of(name) in endings])}
    return images, describe_other_files(tree, lambda name: ending_of(name) in endings or name in beside)


def open_image_folder(path: Path, tree: FileTree, data: Data) -> OpenedSource:
    """Splits and label names of a folder's images.

    Folders that are named as splits are splits, at the top or below folders without anything beside them; file names never are, whatever
    they begin with. Labels are the names of the folders that images lie in (`folder_classes`), if there are several; or what a table of
    metadata says, if there is one.

    Errors: UserError for a folder without images, or with some of which it is not plain what split or class they are of.
    """
    images, omitted = select_images(tree, METADATA)
    table_folders = [folder for folder, names in tree.files.items() if not set(METADATA).isdisjoint(names)]
    if not images:
        raise UserError(f"data.path {path}: expected images, found none" + (f" among its files: {omitted}" if omitted else ""))
    read = [*images, *table_folders]
    root = _root(read, tree, data)
    depth = len(root)
    candidates = [folder[depth] for folder in tree.files if len(folder) == depth + 1 and folder[:depth] == root]
    top_folders = sorted({folder[depth] if len(folder) > depth else "" for folder in images})
    names = map_splits(data, sorted(candidates), only=False) or splits_of_folders(data, top_folders)
    if not names:
        _check_no_splits_below(path, images)
    roots = {split: _unwrapped((*root, name), split, read) for name, split in names.items()} or {TRAIN: root}
    split_images: dict[str, dict[Parts, list[str]]] = {split: {} for split in roots}
    beside: dict[Parts, list[str]] = {}
    for folder, files in images.items():
        split = next((split for split, root in roots.items() if folder[: len(root)] == root), "")
        if split:
            split_images[split][folder[len(roots[split]) :]] = files
        else:
            beside[folder] = files
    notes = []
    if beside:
        example, count = next(tree.path(folder, files[0]) for folder, files in beside.items()), sum(map(len, beside.values()))
        if len(names) == 1 and data.train_split is None and any(folder != root for folder in beside):  # a class called `train`?
            ways = "if those are classes, rename that one, else --data.train_split NAME"
            expected = "expected all images in the folders of their splits"
            raise UserError(f"{example}: {expected}, found some in {next(iter(names))} and others beside it; {ways}")
        notes.append(f"left out beside the splits' folders ({listed(names)}): {count:,} images, such as {example}")
    for split, folders in split_images.items():
        if not folders:
            raise UserError(f"data.path {tree.path(roots[split])}: expected images of split {split}, found none")
    called = {split: "/".join(roots[split]) for split in names.values()}
    if table_folders:
        return OpenedSource(*_with_metadata(path, tree, roots, split_images, table_folders, data, notes), called, omitted, notes)
    refuse_keys(data, ("image_column",), f"{path}, a folder of images, which has no columns")
    classes: dict[str, dict[Parts, str]] = {}
    if data.label_column is None:
        classes = folder_classes(split_images, f"data.path {path}", notes)
    elif data.label_column != NO_LABELS:
        raise UserError(f"data.label_column: expected {NO_LABELS}, or nothing, for a folder of images, found {data.label_column}")
    label_names = sorted({name for of_split in classes.values() for name in of_split.values()})
    numbers = {name: number for number, name in enumerate(label_names)}
    splits: dict[str, SourceSplit] = {}
    for split, folders in split_images.items():
        class_of = {tree.path((*roots[split], *folder)): numbers[name] for folder, name in classes.get(split, {}).items()}
        labelled = len(label_names) > 1 and bool(class_of)
        used = {folder: files for folder, files in folders.items() if not labelled or folder in classes[split]}
        paths = sorted(path for folder, files in used.items() for path in _joined(tree.path((*roots[split], *folder)), files))
        labels = np.asarray([class_of[os.path.dirname(file)] for file in paths], np.int64) if labelled else None
        splits[split] = EncodedSplit(split, FilePaths(paths), labels, files_fingerprint(map(Path, paths)))
    return OpenedSource(splits, label_names if len(label_names) > 1 else None, called, omitted, notes)


def folder_classes(splits: Mapping[str, Mapping[Parts, Collection[str]]], what: str, notes: list[str]) -> dict[str, dict[Parts, str]]:
    """The class of each folder of images, by split; without those whose images are of none.

    A class is the folder that images lie in. A folder inside it is part of it; of a folder that bears the same name in all classes
    (`n01/images`), it is the one above. A few images beside the folders of classes are of none.

    Args:
        splits: file names of each folder, by its path below the split's.
        what: was named, for messages.
        notes: gets a line for each thing that might have been meant otherwise.
    Errors: UserError for images at several depths, of which it is not plain whose class they are of.
    """
    outer = {split: {folder: outermost_image_folder(folder, folders) for folder in folders if folder} for split, folders in splits.items()}
    for of_split in outer.values():
        depths = {len(folder): folder for folder in of_split.values()}
        if len(depths) > 1:
            shallow, deep = ("/".join(depths[depth]) for depth in (min(depths), max(depths)))
            expected = "expected images of all classes in folders of one depth, or images without classes (--data.label_column none)"
            raise UserError(f"{what}: {expected}, found some in {shallow} and some in {deep}")
        if inside := sorted(folder for folder, above in of_split.items() if folder != above):
            notes.append(f"folders inside that of a class are part of it, as {'/'.join(inside[0])} of {of_split[inside[0]][-1]}")
    shared = common_suffix_length({folder for of_split in outer.values() for folder in of_split.values()})
    classes: dict[str, dict[Parts, str]] = {}
    for split, of_split in outer.items():
        first: dict[str, Parts] = {}
        classes[split] = {}
        for folder, above in sorted(of_split.items()):
            if len(above) > shared:
                classes[split][folder] = name = normalised(above[-1 - shared])
                if first.setdefault(name, above) != above and not any(note.startswith(_MERGED) for note in notes):
                    notes.append(f"{_MERGED}, as {'/'.join(first[name])} and {'/'.join(above)}")
    if len({name for of_split in classes.values() for name in of_split.values()}) > 1:
        for split, folders in splits.items():
            if classes[split] and () in folders:
                notes.append(_note_strays(folders, classes[split], what))
    return classes


def _note_strays(folders: Mapping[Parts, Collection[str]], classes: Mapping[Parts, str], what: str) -> str:
    """Describe the images beside the folders of classes. Errors: UserError if they are no fewer than those of some class."""
    strays = folders[()]
    counts: Counter[str] = Counter()
    for folder, name in classes.items():
        counts[name] += len(folders[folder])
    if len(strays) >= min(counts.values()):
        expected = "expected images in folders of classes, or images without classes (--data.label_column none)"
        raise UserError(f"{what}: {expected}, found {len(strays):,} beside the folders; one is {min(strays)}")
    return f"left out beside the folders of classes: {len(strays):,}, such as {min(strays)}"


def folder_classes_at_any_depth(images: Mapping[Parts, Collection[str]]) -> dict[Parts, str]:
    """Return the class of each folder of images as `folder_classes` does, of folders at any depth and of parts of a data set,
    and those of splits aside. Without folders whose images are of no class.
    """
    splits: dict[Parts, set[Parts]] = {}
    for folder in images:
        split = folder[:1] if folder and conventional_split(folder[0]) else ()
        splits.setdefault(split, set()).add(folder[len(split) :])
    outer = {
        (*split, *folder): outermost_image_folder(folder, folders) for split, folders in splits.items() for folder in folders if folder
    }
    shared = common_suffix_length(set(outer.values()))
    return {folder: normalised(above[-1 - shared]) for folder, above in outer.items() if len(above) > shared}


def outermost_image_folder(folder: Parts, folders: Collection[Parts]) -> Parts:
    """The first of a folder and those above it (but for the one that was named) that holds images itself."""
    return next(folder[:depth] for depth in range(1, len(folder) + 1) if folder[:depth] in folders)


def common_suffix_length(folders: Collection[Parts]) -> int:
    """How many folders at the end of all the paths are called the same, as of `n01/images` and `n02/images`; 0 of a single path."""
    shared = 0
    while len(folders) > 1 and all(len(folder) > shared for folder in folders) and len({folder[-1 - shared] for folder in folders}) == 1:
        shared += 1
    return shared


def _root(folders: Sequence[Parts], tree: FileTree, data: Data) -> Parts:
    """The folder nearest to the images that is above all of them, and above every one that is named as a split."""
    named = {normalised(name) for name in (data.train_split, data.validation_split, data.test_split) if name is not None}
    root: Parts = ()
    for part, other in zip(min(folders), max(folders), strict=False):
        if part != other:
            break
        inside = [folder[-1] for folder in tree.files if len(folder) == len(root) + 1 and folder[:-1] == root]
        if any(conventional_split(name) or normalised(name) in named for name in inside):
            break
        root = (*root, part)
    return root


def _unwrapped(root: Parts, split: str, folders: Collection[Parts]) -> Parts:
    """A split's folder; of `test/test`, as some archives unpack, the inner one if it holds all images."""
    inside = {folder[: len(root) + 1] for folder in folders if folder[: len(root)] == root}
    (inner,) = inside if len(inside) == 1 else (root,)
    is_named = inner != root and (inner[-1] == root[-1] or conventional_split(inner[-1]) == split)
    return _unwrapped(inner, split, folders) if is_named else root


def _check_no_splits_below(path: Path, images: Mapping[Parts, list[str]]) -> None:
    """Errors: UserError if folders that are named as splits lie inside others: test images would be trained on."""
    nested = {
        split: folder[: depth + 1]
        for folder in sorted(images, reverse=True)
        for depth, name in enumerate(folder)
        if (split := conventional_split(name))
    }
    if len(nested) > 1:
        found = " and ".join("/".join(folder) for folder in nested.values())
        raise UserError(f"data.path {path}: expected the folders of splits at the top, found {found}; name the folder above, or move them")


def _with_metadata(
    path: Path,
    tree: FileTree,
    roots: Mapping[str, Parts],
    split_images: Mapping[str, Mapping[Parts, list[str]]],
    table_folders: Sequence[Parts],
    data: Data,
    notes: list[str],
) -> tuple[dict[str, SourceSplit], list[str] | None]:
    """Splits and label names of images that tables of metadata name; `notes` gets a line for images that they do not."""
    split_tables = {
        split: [Path(tree.path(at, name)) for at in table_folders if at[: len(root)] == root for name in METADATA if name in tree.files[at]]
        for split, root in roots.items()
    }
    if not any(split_tables.values()):
        raise UserError(f"data.path {path}: expected metadata in the folder of each split, found it above them")
    images = {
        split: [Path(file) for folder, names in found.items() for file in _joined(tree.path((*roots[split], *folder)), names)]
        for split, found in split_images.items()
    }
    for split, found in split_tables.items():
        if not found:
            raise UserError(f"data.path {path}: expected metadata in the folder of each split, found none in that of {split}")
    splits, label_names = tables.open_listings({split: Listing(split_tables[split], found) for split, found in images.items()}, data)
    for split, of_split in splits.items():
        if len(of_split) < len(images[split]):
            notes.append(f"{split}: {len(images[split]) - len(of_split):,} images that the metadata does not name are left out")
    if label_names is None and any(len(found) > 1 for found in split_images.values()):
        notes.append("no labels: the metadata, which stands for the folders' names, has no column of them (--data.label_column)")
    return splits, label_names


def _joined(folder: str, names: Iterator[str] | Sequence[str]) -> Iterator[str]:
    """Paths of files of one folder."""
    prefix = os.path.join(folder, "")
    return (prefix + name for name in names)
