"""Folders of images: a subfolder per class, perhaps below a folder per split; the one place that walks them."""

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
"""Tables of labels and other columns per image (`file_name`), named as by `datasets`."""
# Folders and files of operating systems and their programs: thumbnails, recycle bins, snapshots. (Hidden ones begin with a dot.)
_SYSTEM_NAMES = frozenset(
    (
        *("__macosx", "lost+found", "@eadir", "@__thumb", "@recycle", "#recycle", "$recycle.bin", "@recently-snapshot", "#snapshot"),
        *("system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    )
)
_KINDS_LISTED = 5
_MERGED = "folders of one name are one class"

Parts = tuple[str, ...]
"""Path of a folder below the data set's, name by name."""


class FileTree(NamedTuple):
    """All files in a folder, at any depth."""

    root: str
    files: dict[Parts, list[str]]
    """Names of files per folder; folders without files are keys too."""
    broken: list[str]
    """Paths of broken links."""

    def path(self, folder: Parts, name: str = "") -> str:
        """Return the path of a folder, or of a file in it."""
        return os.path.join(self.root, *folder, name) if name else os.path.join(self.root, *folder)

    def paths(self, matches: Callable[[str], bool]) -> list[str]:
        """Return the paths of the files whose names match."""
        return [path for folder, names in self.files.items() for path in _join(self.path(folder), filter(matches, names))]

    def endings(self) -> Counter[str]:
        """Count files per ending, lower-case."""
        return Counter(ending_of(name) for names in self.files.values() for name in names)


def list_files(folder: str | Path) -> FileTree:
    """List all files in a folder at any depth, following links, without hidden files and those of the operating system.

    Errors: UserError for a folder that cannot be read, or that is a link to one above it: images would be missing unnoticed.
    """
    files: dict[Parts, list[str]] = {}
    broken: list[str] = []
    # Folders still to list, each with the real paths above it if it was reached through a link.
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
                        # `entry.is_dir()` raises for a link to itself, os.path.isdir returns False.
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
            if path != path.encode(errors="ignore").decode():  # bytes that are not UTF-8 are surrogates here
                raise UserError(f"{os.fsencode(path)!r}: expected a name in UTF-8, found another encoding; rename it")


def describe_other_files(tree: FileTree, used: Callable[[str], bool]) -> str:
    """Count the unused files per ending, as `20 .HEIC (install pillow-heif), 3 .svg`; empty if all are used."""
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
    """Return the names of images per folder that has some, and `describe_other_files` of the rest without files named `beside`."""
    endings = image_endings(tree.endings())
    images = {folder: [name for name in names if ending_of(name) in endings] for folder, names in tree.files.items()}
    images = {folder: names for folder, names in images.items() if names}
    return images, describe_other_files(tree, lambda name: ending_of(name) in endings or name in beside)


def open_image_folder(path: Path, tree: FileTree, data: Data) -> OpenedSource:
    """Open a folder of images: splits and label names.

    Folders with the names of splits are splits, at the top or below a single chain of folders; names of files never decide a split. Labels
    are those of a table of metadata, if there is one, or else the names of the folders that images lie in (`folder_classes`), if there are
    several.

    Errors: UserError for a folder without images, or with images whose split or class is ambiguous.
    """
    images, others = select_images(tree, METADATA)
    table_folders = [folder for folder, names in tree.files.items() if not set(METADATA).isdisjoint(names)]
    if not images:
        raise UserError(f"data.path {path}: expected images, found none" + (f" among its files: {others}" if others else ""))
    folders_read = [*images, *table_folders]
    root = _root(folders_read, tree, data)
    depth = len(root)
    candidates = [folder[depth] for folder in tree.files if len(folder) == depth + 1 and folder[:depth] == root]
    top_folders = sorted({folder[depth] if len(folder) > depth else "" for folder in images})
    names = map_splits(data, sorted(candidates), required=False) or splits_of_folders(data, top_folders)
    if not names:
        _check_no_splits_below(path, images)
    roots = {split: _unwrap((*root, name), split, folders_read) for name, split in names.items()} or {TRAIN: root}
    split_images, beside = _group_by_split(images, roots)
    notes = []
    if beside:
        example = next(tree.path(folder, files[0]) for folder, files in beside.items())
        if len(names) == 1 and data.train_split is None and any(folder != root for folder in beside):  # a class called `train`?
            ways = "if those are classes, rename that one, else --data.train_split NAME"
            expected = "expected all images in the folders of their splits"
            raise UserError(f"{example}: {expected}, found some in {next(iter(names))} and others beside it; {ways}")
        count = sum(map(len, beside.values()))
        notes.append(f"left out beside the splits' folders ({listed(names)}): {count:,} images, such as {example}")
    for split, folders in split_images.items():
        if not folders:
            raise UserError(f"data.path {tree.path(roots[split])}: expected images of split {split}, found none")
    source_names = {split: "/".join(roots[split]) for split in names.values()}
    if table_folders:
        return OpenedSource(*_with_metadata(path, tree, roots, split_images, table_folders, data, notes), source_names, others, notes)
    refuse_keys(data, ("image_column",), f"{path}, a folder of images, which has no columns")
    classes: dict[str, dict[Parts, str]] = {}
    if data.label_column is None:
        classes = folder_classes(split_images, f"data.path {path}", notes)
    elif data.label_column != NO_LABELS:
        raise UserError(f"data.label_column: expected {NO_LABELS}, or nothing, for a folder of images, found {data.label_column}")
    return OpenedSource(*_build_splits(tree, roots, split_images, classes), source_names, others, notes)


def _group_by_split(
    images: Mapping[Parts, list[str]], roots: Mapping[str, Parts]
) -> tuple[dict[str, dict[Parts, list[str]]], dict[Parts, list[str]]]:
    """Return, per split, the names of images per folder below the split's folder; and those of folders outside all splits."""
    split_images: dict[str, dict[Parts, list[str]]] = {split: {} for split in roots}
    beside: dict[Parts, list[str]] = {}
    for folder, files in images.items():
        split = next((split for split, root in roots.items() if folder[: len(root)] == root), "")
        if split:
            split_images[split][folder[len(roots[split]) :]] = files
        else:
            beside[folder] = files
    return split_images, beside


def _build_splits(
    tree: FileTree,
    roots: Mapping[str, Parts],
    split_images: Mapping[str, Mapping[Parts, list[str]]],
    classes: Mapping[str, Mapping[Parts, str]],
) -> tuple[dict[str, SourceSplit], list[str] | None]:
    """Build splits and label names from the classes of folders per split; in a split with classes, other folders are left out."""
    label_names = sorted({name for split_classes in classes.values() for name in split_classes.values()})
    numbers = {name: number for number, name in enumerate(label_names)}
    splits: dict[str, SourceSplit] = {}
    for split, folders in split_images.items():
        class_of = {tree.path((*roots[split], *folder)): numbers[name] for folder, name in classes.get(split, {}).items()}
        labelled = len(label_names) > 1 and bool(class_of)
        folders_read = {folder: files for folder, files in folders.items() if not labelled or folder in classes[split]}
        paths = sorted(path for folder, files in folders_read.items() for path in _join(tree.path((*roots[split], *folder)), files))
        labels = np.asarray([class_of[os.path.dirname(file)] for file in paths], np.int64) if labelled else None
        splits[split] = EncodedSplit(split, FilePaths(paths), labels, files_fingerprint(map(Path, paths)))
    return splits, label_names if len(label_names) > 1 else None


def folder_classes(splits: Mapping[str, Mapping[Parts, Collection[str]]], data_name: str, notes: list[str]) -> dict[str, dict[Parts, str]]:
    """Return the class of each folder of images per split; folders whose images have no class are missing.

    The class is the name of the folder that images lie in. Folders inside it belong to it; where the innermost folders of all classes have
    the same name (`n01/images`), the class is the folder above. A few images beside the folders of classes have no class.

    Args:
        splits: per split, names of files per folder, by its path below the split's folder.
        data_name: name of the data set in messages.
        notes: is appended a line for each decision that the user may have meant otherwise.
    Errors: UserError for images at several depths, whose classes are ambiguous.
    """
    outer = {split: {folder: outermost_image_folder(folder, folders) for folder in folders if folder} for split, folders in splits.items()}
    for split_outer in outer.values():
        depths = {len(folder): folder for folder in split_outer.values()}
        if len(depths) > 1:
            shallow, deep = ("/".join(depths[depth]) for depth in (min(depths), max(depths)))
            expected = "expected images of all classes in folders of one depth, or images without classes (--data.label_column none)"
            raise UserError(f"{data_name}: {expected}, found some in {shallow} and some in {deep}")
        if inside := sorted(folder for folder, above in split_outer.items() if folder != above):
            notes.append(f"folders inside that of a class are part of it, as {'/'.join(inside[0])} of {split_outer[inside[0]][-1]}")
    suffix = common_suffix_length({folder for split_outer in outer.values() for folder in split_outer.values()})
    classes: dict[str, dict[Parts, str]] = {}
    for split, split_outer in outer.items():
        first: dict[str, Parts] = {}
        classes[split] = {}
        for folder, above in sorted(split_outer.items()):
            if len(above) > suffix:
                classes[split][folder] = name = normalised(above[-1 - suffix])
                if first.setdefault(name, above) != above and not any(note.startswith(_MERGED) for note in notes):
                    notes.append(f"{_MERGED}, as {'/'.join(first[name])} and {'/'.join(above)}")
    if len({name for split_classes in classes.values() for name in split_classes.values()}) > 1:
        for split, folders in splits.items():
            if classes[split] and () in folders:
                notes.append(_note_strays(folders, classes[split], data_name))
    return classes


def _note_strays(folders: Mapping[Parts, Collection[str]], classes: Mapping[Parts, str], data_name: str) -> str:
    """Describe the images beside the folders of classes. Errors: UserError if they are as many as those of some class."""
    strays = folders[()]
    counts: Counter[str] = Counter()
    for folder, name in classes.items():
        counts[name] += len(folders[folder])
    if len(strays) >= min(counts.values()):
        expected = "expected images in folders of classes, or images without classes (--data.label_column none)"
        raise UserError(f"{data_name}: {expected}, found {len(strays):,} beside the folders; one is {min(strays)}")
    return f"left out beside the folders of classes: {len(strays):,}, such as {min(strays)}"


def folder_classes_at_any_depth(images: Mapping[Parts, Collection[str]]) -> dict[Parts, str]:
    """Return the class of each folder of images as `folder_classes` does, but at any depth, without the folders of splits.

    For images that are not a whole data set. Folders whose images have no class are missing.
    """
    splits: dict[Parts, set[Parts]] = {}
    for folder in images:
        split = folder[:1] if folder and conventional_split(folder[0]) else ()
        splits.setdefault(split, set()).add(folder[len(split) :])
    outer = {
        (*split, *folder): outermost_image_folder(folder, folders) for split, folders in splits.items() for folder in folders if folder
    }
    suffix = common_suffix_length(set(outer.values()))
    return {folder: normalised(above[-1 - suffix]) for folder, above in outer.items() if len(above) > suffix}


def outermost_image_folder(folder: Parts, folders: Collection[Parts]) -> Parts:
    """Return the outermost of a folder and those above it (but not the data set's folder) that contains images itself."""
    return next(folder[:depth] for depth in range(1, len(folder) + 1) if folder[:depth] in folders)


def common_suffix_length(folders: Collection[Parts]) -> int:
    """Count the names at the end that all paths share: 1 of `n01/images` and `n02/images`; 0 of a single path."""
    length = 0
    while len(folders) > 1 and all(len(folder) > length for folder in folders) and len({folder[-1 - length] for folder in folders}) == 1:
        length += 1
    return length


def _root(folders: Sequence[Parts], tree: FileTree, data: Data) -> Parts:
    """Return the innermost folder above all images and above every folder with the name of a split."""
    split_names = {normalised(name) for name in (data.train_split, data.validation_split, data.test_split) if name is not None}
    root: Parts = ()
    for name, other in zip(min(folders), max(folders), strict=False):
        if name != other:
            break
        inside = [folder[-1] for folder in tree.files if len(folder) == len(root) + 1 and folder[:-1] == root]
        if any(conventional_split(child) or normalised(child) in split_names for child in inside):
            break
        root = (*root, name)
    return root


def _unwrap(root: Parts, split: str, folders: Collection[Parts]) -> Parts:
    """Return a split's folder; of `test/test`, as some archives unpack, the inner one if it has all images."""
    inside = {folder[: len(root) + 1] for folder in folders if folder[: len(root)] == root}
    (inner,) = inside if len(inside) == 1 else (root,)
    is_named = inner != root and (inner[-1] == root[-1] or conventional_split(inner[-1]) == split)
    return _unwrap(inner, split, folders) if is_named else root


def _check_no_splits_below(path: Path, images: Mapping[Parts, list[str]]) -> None:
    """Refuse folders with the names of splits inside others: test images would be trained on. Errors: UserError."""
    nested = {
        split: folder[: depth + 1]
        for folder in sorted(images, reverse=True)
        for depth, name in enumerate(folder)
        if (split := conventional_split(name))
    }
    if len(nested) > 1:
        paths = " and ".join("/".join(folder) for folder in nested.values())
        raise UserError(f"data.path {path}: expected the folders of splits at the top, found {paths}; name the folder above, or move them")


def _with_metadata(
    path: Path,
    tree: FileTree,
    roots: Mapping[str, Parts],
    split_images: Mapping[str, Mapping[Parts, list[str]]],
    table_folders: Sequence[Parts],
    data: Data,
    notes: list[str],
) -> tuple[dict[str, SourceSplit], list[str] | None]:
    """Return splits and label names from tables of metadata; `notes` is appended a line about images that they do not name."""
    split_tables = {
        split: [Path(tree.path(at, name)) for at in table_folders if at[: len(root)] == root for name in METADATA if name in tree.files[at]]
        for split, root in roots.items()
    }
    if not any(split_tables.values()):
        raise UserError(f"data.path {path}: expected metadata in the folder of each split, found it above them")
    images = {
        split: [Path(file) for folder, names in folders.items() for file in _join(tree.path((*roots[split], *folder)), names)]
        for split, folders in split_images.items()
    }
    for split, split_paths in split_tables.items():
        if not split_paths:
            raise UserError(f"data.path {path}: expected metadata in the folder of each split, found none in that of {split}")
    splits, label_names = tables.open_listings({split: Listing(split_tables[split], paths) for split, paths in images.items()}, data)
    for split, listed_images in splits.items():
        if len(listed_images) < len(images[split]):
            notes.append(f"{split}: {len(images[split]) - len(listed_images):,} images that the metadata does not name are left out")
    if label_names is None and any(len(folders) > 1 for folders in split_images.values()):
        notes.append("no labels: the metadata, which stands for the folders' names, has no column of them (--data.label_column)")
    return splits, label_names


def _join(folder: str, names: Iterator[str] | Sequence[str]) -> Iterator[str]:
    """Join a folder's path with names of its files."""
    prefix = os.path.join(folder, "")
    return (prefix + name for name in names)
