"""Names of splits and classes: how those of a source map to ours; settings that a source has no use for; missing labels."""

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
"""Value of `data.label_column` by which a source's labels are ignored."""
_CONVENTIONAL_NAMES = {
    TRAIN: ("train", "training", "trn"),
    VALIDATION: ("validation", "validate", "valid", "val", "dev", "eval", "evaluation"),
    TEST: ("test", "testing", "tst"),
}
_SPLITS = {name: split for split, names in _CONVENTIONAL_NAMES.items() for name in names}


def normalised(name: str) -> str:
    """Return a name in Unicode's composed form (NFC), in which names are compared: macOS writes `é` as two characters, others as one."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def class_numbers(names: Iterable[str], known: Sequence[str]) -> np.ndarray:
    """Return the index of each name among the known classes, (len(names),) int64; -1 for other names.

    Labels of different sources are compared by this function only, since an additional class moves all numbers.
    """
    numbers = {normalised(name): number for number, name in enumerate(known)}
    return np.asarray([numbers.get(normalised(name), -1) for name in names], np.int64)


def composed_names(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return the distinct names of classes in composed form, and the index (len(names),) of each input name among them."""
    composed = list(dict.fromkeys(map(normalised, names)))
    return composed, class_numbers(names, composed)


def conventional_split(name: str) -> str | None:
    """Return the split that a name conventionally means, in any case; None for other names."""
    return _SPLITS.get(name.casefold())


def map_splits(data: Data, names: Collection[str], required: bool = True) -> dict[str, str]:
    """Map names of a source's splits to ours; other names are missing from the result.

    Args:
        data: the recipe's section, whose `*_split` come before conventional names.
        names: the source's names.
        required: take a single split of any name for training, and refuse several without a known name.
    Errors: UserError for a setting that the source does not have, or several names for one split.
    """
    configured = {TRAIN: data.train_split, VALIDATION: data.validation_split, TEST: data.test_split}
    data_name, available = data.path or data.name, listed([str(name) for name in names]) or "none"
    spelling = {normalised(str(name)): name for name in names}
    splits: dict[str, str] = {}
    for ours, setting in configured.items():
        if setting is not None and normalised(setting) not in spelling:
            raise UserError(f"data.{ours}_split: expected a split of {data_name}, {available}, found {setting}")
        if setting is not None and splits.setdefault(spelling[normalised(setting)], ours) != ours:
            raise UserError(f"data.train_split: expected another split than for validation and test, found {available} named twice")
    conventional = {
        name: split for name in names if name not in splits and (split := conventional_split(name)) and configured[split] is None
    }
    _check_distinct(conventional, data_name)
    splits |= conventional
    if not splits and required and len(names) == 1:
        return {next(iter(names)): TRAIN}
    if not splits and required:
        raise UserError(f"{data_name}: expected a split to train on (--data.train_split NAME), found {available}")
    return splits


def splits_of_folders(data: Data, folders: Collection[str]) -> dict[str, str]:
    """Map folders to splits where each has a split's conventional name as a word of its name (`train2017`, `seg_test`) and one is for
    training; otherwise return nothing, since a class may be called `bullet_train`.

    Errors: UserError for two of one split.
    """
    candidates = {name: {split for word in words(name) if (split := conventional_split(word))} for name in folders}
    if any(len(candidate) != 1 for candidate in candidates.values()):
        return {}
    splits = {name: candidate.pop() for name, candidate in candidates.items()}
    if TRAIN not in splits.values() or set(splits.values()) == {TRAIN}:
        return {}
    _check_distinct(splits, data.path or data.name)
    return splits


def _check_distinct(splits: dict[str, str], data_name: str | None) -> None:
    """Errors: UserError if several names map to one split."""
    for ours in _CONVENTIONAL_NAMES:
        names = [name for name, split in splits.items() if split == ours]
        if len(names) > 1:
            raise UserError(f"{data_name}: expected one {ours} split (--data.{ours}_split NAME), found {listed(names)}")


def words(name: str) -> list[str]:
    """Return the words of a name: `train2017`, `Train_set` and `TrainImages` begin with `train`, `trainer` does not."""
    return re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)


def group_files_by_split(files: Iterable[Path], root: Path, data: Data) -> dict[str, list[Path]]:
    """Group files of rows by split: by the begin of their name (`train-00000.parquet`), a word in it (`cifar-train-00000.tar`), or a folder
    above them (`val/0.tar`). If no file names a split, all are for training; otherwise files that name none are left out with a message.

    Errors: UserError for a name with two splits.
    """
    configured = {name for name in (data.train_split, data.validation_split, data.test_split) if name is not None}
    groups: dict[str, list[Path]] = {}
    for file in files:
        stem, folders = file.stem, file.relative_to(root).parent.parts
        prefixes = [name for name in configured if re.match(rf"{re.escape(name)}($|[-_.])", stem)]
        conventional = [word.casefold() for word in words(stem) if conventional_split(word)]
        prefixes += [word for word in conventional[:1] if stem.casefold().startswith(word)]
        inside = [*(word for word in re.split(r"[-_.]", stem) if word in configured), *conventional]
        above = [
            name if name in configured else name.casefold() for name in reversed(folders) if name in configured or conventional_split(name)
        ]
        if not prefixes and len(set(inside)) > 1:
            raise UserError(f"{file}: expected a name that tells one split, found {', '.join(dict.fromkeys(inside))}; rename the file")
        groups.setdefault(next(iter([*prefixes, *inside, *above]), ""), []).append(file)
    others = groups.pop("", [])
    if not groups:
        groups[TRAIN] = others
    elif others:
        say(f"{root}: {len(others):,} files whose names tell no split, as others do, are left out; one is {others[0].name}")
    return {ours: sorted(groups[name]) for name, ours in map_splits(data, groups).items()}


def refuse_keys(data: Data, keys: Iterable[str], data_name: str) -> None:
    """Refuse settings that this kind of source has no use for. Errors: UserError for one that is set."""
    for key in keys:
        if getattr(data, key) not in (None, False):
            raise UserError(f"data.{key}: expected nothing for {data_name}, found {getattr(data, key)}")


def check_labels(
    labels: np.ndarray | None, split: str, data_name: str, row_name: Callable[[int], str] = "row {}".format
) -> np.ndarray | None:
    """Return a split's labels (N,), in which -1 is a missing one, or None if all are missing, or some of a test split.

    Errors: UserError if some are missing in another split, with the `row_name` of the first.
    """
    if labels is None or bool((labels < 0).all()):
        return None
    missing = np.flatnonzero(labels < 0)
    if len(missing) and split == TEST:  # contests publish their test images so
        say(f"{data_name}: {len(missing):,} of {len(labels):,} images of {split} have no label: the others' are not used either")
        return None
    if len(missing):
        detail = f"found {len(missing)} without, the first {row_name(int(missing[0]))}"
        way = f"--data.label_column {NO_LABELS} leaves all labels away"
        raise UserError(f"{data_name}: expected a label for every image of {split}, {detail}; {way}")
    return labels
