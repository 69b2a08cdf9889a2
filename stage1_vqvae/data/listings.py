"""Tables of metadata beside images (`metadata.csv`, `.jsonl`, `.parquet`): a row per file, with its name and labels."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError, listed
from stage1_vqvae.data.cache import files_fingerprint
from stage1_vqvae.data.encoded import FilePaths
from stage1_vqvae.data.names import normalised

if TYPE_CHECKING:
    import pyarrow as pa

_FILE_NAME = "file_name"


class Listing:
    """Rows of a split's tables, as a `Table`. All values of a CSV file are text.

    The column `file_name` becomes a column `image`; `mask_file_name` would become `mask`.
    """

    def __init__(self, tables: Sequence[Path], images: Sequence[Path]) -> None:
        """
        Args:
            tables: files of the tables.
            images: all image files of the split.
        Errors: UserError for a table that cannot be read, is cut short, or names a file that is not in its folder.
        """
        import datasets
        import pyarrow as pa

        known = {normalised(path): path for path in map(str, images)}
        pieces, self._paths = [], dict[str, list[str | None]]()
        for table in sorted(tables):
            rows = _read(table)
            for name in [name for name in rows.column_names if name == _FILE_NAME or name.endswith(f"_{_FILE_NAME}")]:
                column = name.removesuffix(_FILE_NAME).rstrip("_") or "image"
                self._paths.setdefault(column, []).extend(_locate(rows[name].to_pylist(), table, known))
                rows = rows.drop_columns(name)
            pieces.append(rows)
        if not self._paths:
            raise UserError(f"{tables[0]}: expected a column {_FILE_NAME}, found {listed(pieces[0].column_names)}")
        try:
            self._rows = pa.concat_tables(pieces, promote_options="permissive")
        except pa.ArrowException as error:
            raise UserError(f"{tables[0]}: expected columns of the same types as in {tables[-1]}, found: {error}") from None
        if any(len(paths) != len(self._rows) for paths in self._paths.values()):
            raise UserError(f"{tables[0]}: expected the same columns of file names as in {tables[-1]}, found others")
        self._files = [*images, *tables]
        self.features = {**dict.fromkeys(self._paths, datasets.Image()), **datasets.Features.from_arrow_schema(self._rows.schema)}
        self.column_names = list(self.features)

    def __len__(self) -> int:
        return len(self._rows)

    def values(self, column: str) -> list[Any]:
        """Return a column of numbers or text."""
        return self._rows[column].to_pylist()

    def images(self, column: str) -> FilePaths:
        """Return a column of images."""
        return FilePaths(self._paths[column])

    def fingerprint(self) -> str:
        """Return a text that changes whenever an image or a table changes."""
        return f"{len(self)} {files_fingerprint(self._files)}"

    def sort_by_path(self, column: str) -> None:
        """Sort the rows by the paths of their images in `column`."""
        import pyarrow as pa

        order = sorted(range(len(self)), key=lambda row: self._paths[column][row] or "")
        self._rows = self._rows.take(pa.array(order, pa.int64()))
        self._paths = {name: [paths[row] for row in order] for name, paths in self._paths.items()}


def _locate(names: Sequence[Any], table: Path, known: Mapping[str, str]) -> list[str | None]:
    """Return the path of each image that a table names; None for an empty name."""
    folder, paths = str(table.parent), list[str | None]()
    for name in names:
        path = None
        if name is not None and name != "":
            path = known.get(normalised(f"{folder}/{name}")) or known.get(normalised(os.path.normpath(f"{folder}/{name}")))
            if path is None:  # an image file without the ending of one
                path = os.path.normpath(os.path.join(folder, str(name)))
                if not Path(path).is_relative_to(folder) or not os.path.isfile(path):
                    raise UserError(f"{table}: expected names of files in its folder, found {name!r}, which is none (a table cut short?)")
        paths.append(path)
    return paths


def _read(table: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if table.suffix == ".csv":
            return pa.table({name: pa.array(values, pa.string()) for name, values in _csv(table).items()})
        if table.suffix == ".jsonl":
            return pa.table({name: _column(name, values) for name, values in _json_lines(table).items()})
        rows = pq.read_table(table, partitioning=None)
    except UserError:
        raise
    except (ValueError, csv.Error, pa.ArrowException) as error:  # a ValueError also of other encodings than UTF-8
        raise UserError(f"{table}: expected a table that can be read to its end, found: {error}") from None
    for number, field in enumerate(rows.schema):
        if pa.types.is_dictionary(field.type):  # pandas' categories
            rows = rows.set_column(number, field.name, rows[field.name].cast(field.type.value_type))
    return rows


def _column(name: str, values: list[Any]) -> pa.Array:
    import pyarrow as pa

    try:
        return pa.array(values)
    except pa.ArrowException as error:
        raise ValueError(f"values of several kinds in {name} ({error})") from None


def _csv(table: Path) -> dict[str, list[str]]:
    with open(table, newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file, strict=True)
        header = [name.strip() for name in next(lines, [])]
        if len(set(header)) < len(header):
            raise ValueError("a column's name twice in its first line")
        rows = []
        for row in lines:
            if row and len(row) != len(header):
                raise ValueError(f"{len(row)} values in line {lines.line_num} under a header of {len(header)}")
            rows.append(row)
    columns = zip(*filter(None, rows), strict=True)
    return {name: list(column) for name, column in zip(header, columns, strict=True)} if any(rows) else {name: [] for name in header}


def _json_lines(table: Path) -> dict[str, list[Any]]:
    rows = []
    with open(table, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    rows.append(dict(json.loads(line)))
                except (ValueError, TypeError):
                    raise ValueError(f"line {number} is not a JSON object") from None
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
