"""What sources call their splits and classes, and what we call them; what a recipe says of a source that has no such thing; labels that
are missing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from configs.data import Data
from configs.errors import UserError, listed, say
from stage1_vqvae.data.splits import TEST, TRAIN, VALIDATION

NO_LABELS = "none"
"""What `data.label_column` says of a source whose labels are not to be used."""
_USUAL_NAMES = {
    TRAIN: ("train", "training", "trn"),
    VALIDATION: ("validation", "validate", "valid", "val", "dev", "eval", "evaluation"),
    TEST: ("test", "testing", "tst"),
}
_SPLITS = {name: split for split, names in _USUAL_NAMES.items() for name in names}


def normalised(name: str) -> str:
    """A name in Unicode's composed form (NFC), in which all names are compared: macOS writes `é` as two characters, others as one."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def class_numbers(names: Iterable[str], known: Sequence[str]) -> np.ndarray:
    """The number of each class among known ones, by its name: (len(names),) int64; -1 where it is none of them.

    Wherever labels of one source meet those of another, this is how they are compared: a class more or less moves all numbers.
    """
    numbers = {normalised(name): number for number, name in enumerate(known)}
    return np.asarray([numbers.get(normalised(name), -1) for name in names], np.int64)


def composed_names(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Names of classes in composed form, each once, and the number (len(names),) that each of the given ones has among those."""
    composed = list(dict.fromkeys(map(normalised, names)))
    return composed, class_numbers(names, composed)


def conventional_split(name: str) -> str | None:
    """The split that a name is usual for, whatever its case; None if it is usual for none."""
    return _SPLITS.get(name.casefold())


def map_splits(data: Data, found: Collection[str], only: bool = True) -> dict[str, str]:
    """Which of the splits that a source has are which of ours; others are not used.

    Args:
        data: the recipe's, which may name them.
        found: the source's names.
        only: take a single split for the one to train on, if neither the recipe nor custom has a name for it.
    Errors: UserError for a name that the source does not have, or several for one of ours.
    """
    asked = {TRAIN: data.train_split, VALIDATION: data.validation_split, TEST: data.test_split}
    what, there = data.path or data.name, listed([str(name) for name in found]) or "none"
    spelled = {normalised(str(name)): name for name in found}
    named: dict[str, str] = {}
    for ours, name in asked.items():
        if name is not None and normalised(name) not in spelled:
            raise UserError(f"data.{ours}_split: expected a split of {what}, {there}, found {name}")
        if name is not None and named.setdefault(spelled[normalised(name)], ours) != ours:
            raise UserError(f"data.train_split: expected another split than for validation and test, found {there} named twice")
    usual = {name: split for name in found if name not in named and (split := conventional_split(name)) and asked[split] is None}
    _one_each(usual, what)
    splits = {**named, **usual}
    if not splits and only and len(found) == 1:
        return {next(iter(found)): TRAIN}
    if not splits and only:
        raise UserError(f"{what}: expected a split to train on (--data.train_split NAME), found {there}")
    return splits


def splits_of_folders(data: Data, folders: Collection[str]) -> dict[str, str]:
    """Which folder is which of our splits, where every one has a split's usual name as a word of its own (`train2017`, `seg_test`) and one
    is to train on; otherwise none is, since a class may be called `bullet_train`.

    Errors: UserError for two of one split.
    """
    candidates = {name: {split for word in words(name) if (split := conventional_split(word))} for name in folders}
    if any(len(candidate) != 1 for candidate in candidates.values()):
        return {}
    splits = {name: candidate.pop() for name, candidate in candidates.items()}
    if TRAIN not in splits.values() or set(splits.values()) == {TRAIN}:
        return {}
    _one_each(splits, data.path or data.name)
    return splits


def _one_each(splits: dict[str, str], what: str | None) -> None:
    """Errors: UserError if several names are of one split."""
    for ours in _USUAL_NAMES:
        names = [name for name, split in splits.items() if split == ours]
        if len(names) > 1:
            raise UserError(f"{what}: expected one {ours} split (--data.{ours}_split NAME), found {listed(names)}")


def words(name: str) -> list[str]:
    """The words of a name: `train2017`, `Train_set` and `TrainImages` begin with one, `trainer` does not."""
    return re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)


def group_files_by_split(files: Iterable[Path], below: Path, data: Data) -> dict[str, list[Path]]:
    """Files of rows by split: what their name begins with (`train-00000.parquet`), or has in it (`cifar-train-00000.tar`), or else a folder
    above them (`val/0.tar`). All are to train on, if none tells; otherwise those that do not tell are left out, and said so.

    Errors: UserError for a name that tells two.
    """
    asked = {name for name in (data.train_split, data.validation_split, data.test_split) if name is not None}
    found: dict[str, list[Path]] = {}
    for file in files:
        stem, folders = file.stem, file.relative_to(below).parent.parts
        parts = [part for part in re.split(r"[-_.]", stem) if part in asked]
        begins = [name for name in asked if re.match(rf"{re.escape(name)}($|[-_.])", stem)]
        usual = [word.casefold() for word in words(stem) if conventional_split(word)]
        begins += [word for word in usual[:1] if stem.casefold().startswith(word)]
        within = [*parts, *usual]
        above = [part if part in asked else part.casefold() for part in reversed(folders) if part in asked or conventional_split(part)]
        if not begins and len(set(within)) > 1:
            raise UserError(f"{file}: expected a name that tells one split, found {', '.join(dict.fromkeys(within))}; rename the file")
        found.setdefault(next(iter([*begins, *within, *above]), ""), []).append(file)
    untold = found.pop("", [])
    if not found:
        found[TRAIN] = untold
    elif untold:
        say(f"{below}: {len(untold):,} files whose names tell no split, as others do, are left out; one is {untold[0].name}")
    return {ours: sorted(found[name]) for name, ours in map_splits(data, found).items()}


def refuse_keys(data: Data, keys: Iterable[str], what: str) -> None:
    """Errors: UserError for a key that says nothing of such a source, and which somebody has given all the same."""
    for key in keys:
        if getattr(data, key) not in (None, False):
            raise UserError(f"data.{key}: expected nothing for {what}, found {getattr(data, key)}")


def check_labels(labels: np.ndarray | None, split: str, what: str, row_name: Callable[[int], str] = "row {}".format) -> np.ndarray | None:
    """A split's labels (N,), of which -1 is none: None if it has none at all, or is a test split of which some are missing.

    Errors: UserError if some are missing otherwise, with what `row_name` says of the first.
    """
    if labels is None or bool((labels < 0).all()):
        return None
    missing = np.flatnonzero(labels < 0)
    if len(missing) and split == TEST:  # contests publish their test images so
        say(f"{what}: {len(missing):,} of {len(labels):,} images of {split} have no label: the others' are not used either")
        return None
    if len(missing):
        found = f"found {len(missing)} without, the first {row_name(int(missing[0]))}"
        way = f"--data.label_column {NO_LABELS} leaves all labels away"
        raise UserError(f"{what}: expected a label for every image of {split}, {found}; {way}")
    return labels
