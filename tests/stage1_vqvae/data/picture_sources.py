"""Pictures written as every kind of source, for tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import datasets

from configs.data import Data


def data(path: Path | None, **settings: object) -> Data:
    return Data(**{"path": str(path) if path else None, "height": 8, "width": 12, "validation_share": 0.25, **settings})  # type: ignore[arg-type]


def rows_of(pictures: Path) -> list[tuple[bytes, str]]:
    """Return content and class of each picture, ordered by path."""
    return [(path.read_bytes(), path.parent.name) for path in sorted(pictures.rglob("*.png"))]


def table(rows: list[tuple[bytes, Any]], feature: Any, **other_columns: Any) -> datasets.Dataset:
    """Build a data set of pictures and labels of the given feature."""
    features = datasets.Features({"img": datasets.Image(), "label": feature, **{name: column[0] for name, column in other_columns.items()}})
    content = {"img": [{"bytes": row, "path": None} for row, _ in rows], "label": [value for _, value in rows]}
    return datasets.Dataset.from_dict({**content, **{name: column[1] for name, column in other_columns.items()}}, features)


def classes(rows: list[tuple[bytes, str]]) -> datasets.Dataset:
    numbers = [(row, int(name == "down")) for row, name in rows]
    return table(numbers, datasets.ClassLabel(names=["across", "down"]))


def write_tar(path: Path, rows: list[tuple[bytes, str]]) -> None:
    """Write a WebDataset shard: the files of each sample are adjacent."""
    with tarfile.open(path, "w") as archive:
        for number, (content, name) in enumerate(rows):
            for ending, body in (("png", content), ("cls", str(int(name == "down")).encode())):
                entry = tarfile.TarInfo(f"{number:04d}.{ending}")
                entry.size = len(body)
                archive.addfile(entry, io.BytesIO(body))


def write_folders(path: Path, rows: list[tuple[bytes, str]]) -> None:
    for number, (content, name) in enumerate(rows):
        (path / name).mkdir(parents=True, exist_ok=True)
        (path / name / f"{number:04d}.png").write_bytes(content)


def write_listed(path: Path, rows: list[tuple[bytes, str]]) -> None:
    """Write images in one folder, and a table of their labels."""
    path.mkdir(parents=True)
    lines = ["file_name,label"]
    for number, (content, name) in enumerate(rows):
        (path / f"{number:04d}.png").write_bytes(content)
        lines.append(f"{number:04d}.png,{name}")
    (path / "metadata.csv").write_text("\n".join(lines) + "\n")


MISSING = "expected a label for every image of train, found 1 without, the first row 1"
