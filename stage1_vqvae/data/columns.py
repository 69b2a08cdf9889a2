"""Columns of a table of images: which holds the images, which the labels, and labels as numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from configs.data import Data
from configs.errors import UserError, listed, say
from stage1_vqvae.data.encoded import EncodedImages
from stage1_vqvae.data.names import NO_LABELS, normalised
from stage1_vqvae.data.splits import TEST

# Names of columns of labels whose type does not show it, in any case; the last is WebDataset's.
_LABEL_NAMES = ("label", "labels", "class", "cls")
# Kind of labels per beginning of a type's name; only labels of one kind can be compared. A column of the type null has no values.
_LABEL_KINDS = {
    "int": "numbers",
    "uint": "numbers",
    "float": "numbers",
    "string": "text",
    "large_string": "text",
    "bool": "booleans",
    "null": "",
}
_BYTES = ("binary", "large_binary")


class Table(Protocol):
    """Split of a data set as rows with columns."""

    @property
    def features(self) -> Mapping[str, Any]:
        """Type of each column, as of `datasets`."""

    @property
    def column_names(self) -> Sequence[str]:
        """Names of the columns."""

    def __len__(self) -> int: ...

    def values(self, column: str) -> list[Any]:
        """Return a column of numbers or text."""

    def images(self, column: str) -> EncodedImages:
        """Return a column of images."""

    def fingerprint(self) -> str:
        """Return a text that changes whenever the files of the rows change."""


def image_column(rows: Table, data: Data) -> str:
    """Return the name of the column of images. Errors: UserError for none, or several and none named by the recipe."""
    import datasets

    # In Parquet without Hugging Face's metadata an image is bytes, or a struct of bytes and a path.
    features = rows.features.items()
    columns = [
        name for name, feature in features if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)
    ]
    columns = columns or [name for name, feature in features if isinstance(feature, datasets.Value) and feature.dtype in _BYTES]
    if data.image_column is not None:
        columns = [name for name, feature in features if name == data.image_column and (name in columns or _may_be_bytes(feature))]
    if len(columns) != 1:
        expected = f"one column of images (--data.image_column NAME), found {listed(columns)} of {listed(rows.column_names)}"
        raise UserError(f"{data.path or data.name}: expected {expected}")
    return columns[0]


def label_column(rows: Table, data: Data) -> str | None:
    """Return the name of the column of labels; None: no labels. Errors: UserError for several, or a named one that is missing."""
    import datasets

    if data.label_column == NO_LABELS:
        return None
    if data.label_column is not None:
        if data.label_column not in rows.column_names:
            expected = f"a column {data.label_column} (data.label_column), found {listed(rows.column_names)}"
            raise UserError(f"{data.path or data.name}: expected {expected}")
        return data.label_column
    columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    called = [name for name in rows.column_names if name.lower() in _LABEL_NAMES]
    columns = columns or [name for name in called if _label_kind(rows.features[name]) is not None]
    if len(columns) > 1:
        expected = f"one column of labels (--data.label_column NAME, or {NO_LABELS})"
        raise UserError(f"{data.path or data.name}: expected {expected}, found {listed(columns)}")
    if called and not columns:
        holds = f"holds no classes, whole numbers or text, but {rows.features[called[0]]}"
        say(f"{data.path or data.name}: no labels: the column {called[0]} {holds}")
    return columns[0] if columns else None


def _may_be_bytes(feature: Any) -> bool:
    """Return whether a column that the user names can contain encoded images."""
    import datasets

    item = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
    return isinstance(item, datasets.Value) and item.dtype in (("uint8",) if item is not feature else _BYTES)


def _label_kind(feature: Any) -> str | None:
    """Return the kind of a column's labels: numbers, text, booleans; "" for a column without values; None for values of other types."""
    import datasets

    dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
    return next((kind for begin, kind in _LABEL_KINDS.items() if dtype.startswith(begin)), None)


def _label_name(value: Any) -> str | None:
    """Return a label as text, None for a missing one. Errors: ValueError for a fraction."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError
        value = int(value)
    return normalised(str(value).strip()) or None


def number_labels(
    kinds: Mapping[str, Any], values: Mapping[str, Sequence[Any]], column: str, data_name: str
) -> tuple[list[str] | None, dict[str, np.ndarray]]:
    """Return the names of labels, and per split the label of each row (N,) as an index of them, -1 for a missing one.

    Names are those of the column's classes, or all numbers and texts that occur, numbers in the order of their value, others of their text.

    Args:
        kinds: type of the column per split.
        values: values of the column per split.
        column: name of the column.
        data_name: name of the data set in messages.
    Errors: UserError for a value that is not a label, and for splits whose labels cannot be compared.
    """
    import datasets

    first = next(iter(kinds.values()))
    classes = [getattr(kind, "names", None) for kind in kinds.values()]
    name_of: dict[Any, str | None] = {None: None, -1: None}
    if isinstance(first, datasets.ClassLabel):
        if any(names != first.names for names in classes):
            raise UserError(f"{data_name}: expected the same classes in all splits, found others")
        name_of |= {number: _label_name(name) for number, name in enumerate(first.names)}
        names = [name for name in dict.fromkeys(name_of.values()) if name is not None]
    else:
        _check_label_kinds(kinds, column, data_name)
        name_of = {}
        for split, split_values in values.items():
            for value in set(split_values):
                try:
                    name_of[value] = _label_name(value)
                except ValueError:
                    expected = f"whole numbers or text in {column} (--data.label_column NAME, or {NO_LABELS})"
                    row = split_values.index(value)
                    raise UserError(f"{data_name}: expected {expected}, found {value} in row {row} of {split}") from None
        _set_minus_one(name_of, values, column, data_name)
        names = _in_order({name for name in name_of.values() if name is not None})
    number_of = {name: number for number, name in enumerate(names)}
    numbers = {value: -1 if name is None else number_of[name] for value, name in name_of.items()}
    result = {}
    for split, split_values in values.items():
        try:
            result[split] = np.fromiter((numbers[value] for value in split_values), np.int64, len(split_values))
        except KeyError as error:
            raise UserError(f"{data_name}: expected numbers of {len(names)} classes in {column} of {split}, found {error}") from None
    if not any((split_numbers >= 0).any() for split_numbers in result.values()):
        say(f"{data_name}: no labels: the column {column} has none")
        return None, {}
    return names, result


def _check_label_kinds(kinds: Mapping[str, Any], column: str, data_name: str) -> None:
    """Errors: UserError for a column that holds no labels, or labels that cannot be compared between splits."""
    comparable = {split: _label_kind(kind) for split, kind in kinds.items()}
    for split, kind in comparable.items():
        if kind is None:
            expected = "labels that are classes, whole numbers or text (data.label_column)"
            raise UserError(f"{data_name}: expected {expected}, found {kinds[split]} in {column} of {split}")
    if len(set(comparable.values()) - {""}) > 1:
        listing = ", ".join(f"{kind} in {split}" for split, kind in comparable.items() if kind)
        raise UserError(f"{data_name}: expected labels of one kind in all splits, found in {column} {listing}")


def _set_minus_one(name_of: dict[Any, str | None], values: Mapping[str, Sequence[Any]], column: str, data_name: str) -> None:
    """Decide whether -1 is a class or a missing label where the column lists no classes: missing if only the test split has it."""
    unlabelled = [value for value, name in name_of.items() if name == "-1"]
    if not unlabelled:
        return
    if not any(value in split_values for value in unlabelled for split, split_values in values.items() if split != TEST):
        name_of |= dict.fromkeys(unlabelled)
        say(f"{data_name}: -1 in {column} of {TEST} is taken for a missing label, since no other split has it")
    elif len(set(name_of.values()) - {None}) > 2:
        say(f"{data_name}: -1 in {column} is taken for a class like the others; --data.label_column {NO_LABELS} leaves all labels away")


def _in_order(names: set[str]) -> list[str]:
    """Sort names by value if all are whole numbers, or else by text."""
    return sorted(names, key=int if all(re.fullmatch("0|-?[1-9][0-9]*", name) for name in names) else None)
