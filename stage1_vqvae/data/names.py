"""What sources call their splits, and what we call them; what a recipe says of a source that has no such thing; labels that are missing."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from configs.data import Data
from configs.errors import UserError, say
from stage1_vqvae.data.splits import TEST, TRAIN, VALIDATION

NO_LABELS = "none"
"""What `data.label_column` says of a source whose labels are not to be used."""
_NAMES = {"train": TRAIN, "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION, "dev": VALIDATION, "test": TEST}


def our_splits(data: Data, found: Collection[str], only: bool = True) -> dict[str, str]:
    """Which of the splits that a source has are which of ours; others are not used.

    Args:
        data: the recipe's, which may name them.
        found: the source's names.
        only: take a single split for the one to train on, if neither the recipe nor custom has a name for it.
    Errors: UserError for a name that the source does not have, or several for one of ours.
    """
    asked = {TRAIN: data.train_split, VALIDATION: data.validation_split, TEST: data.test_split}
    there = ", ".join(map(str, found)) or "none"
    for ours, name in asked.items():
        if name is not None and name not in found:
            raise UserError(f"data.{ours}_split: expected a split of {data.path or data.name}, {there}, found {name}")
    named = {name: ours for ours, name in asked.items() if name is not None}
    if len(named) < sum(name is not None for name in asked.values()):
        raise UserError(f"data.train_split: expected another split than for validation and test, found {there} named twice")
    usual = {name: ours for name, ours in _NAMES.items() if name in found and name not in named and asked[ours] is None}
    for ours in asked:
        names = [name for name, of in usual.items() if of == ours]
        if len(names) > 1:
            raise UserError(f"{data.path or data.name}: expected one {ours} split (--data.{ours}_split NAME), found {', '.join(names)}")
    splits = {**named, **usual}
    if not splits and only and len(found) == 1:
        return {next(iter(found)): TRAIN}
    if not splits and only:
        raise UserError(f"{data.path or data.name}: expected a split to train on (--data.train_split NAME), found {there}")
    return splits


def splits_of_files(files: Iterable[Path], below: Path, data: Data) -> dict[str, list[Path]]:
    """Files of rows by split: what their name begins with (`train-00000.parquet`), or has in it (`cifar-train-00000.tar`), or else a folder
    above them (`val/0.tar`). All are to train on, if none tells; otherwise those that do not tell are left out, and said so.

    Errors: UserError for a name that tells two.
    """
    known = [name for name in (data.train_split, data.validation_split, data.test_split, *_NAMES) if name is not None]
    found: dict[str, list[Path]] = {}
    for file in files:
        begins = [name for name in known if re.match(rf"{re.escape(name)}($|[-_.])", file.stem)]
        within = [name for name in known if name in re.split(r"[-_.]", file.stem)]
        above = [part for part in reversed(file.relative_to(below).parent.parts) if part in known]
        if not begins and len(set(within)) > 1:
            raise UserError(f"{file}: expected a name that tells one split, found {', '.join(dict.fromkeys(within))}; rename the file")
        found.setdefault(next(iter([*begins, *within, *above]), ""), []).append(file)
    untold = found.pop("", [])
    if not found:
        found[TRAIN] = untold
    elif untold:
        say(f"{below}: {len(untold):,} files whose names tell no split, as others do, are left out; one is {untold[0].name}")
    named: Mapping[str, str] = our_splits(data, found)
    return {ours: sorted(found[name]) for name, ours in named.items()}


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
