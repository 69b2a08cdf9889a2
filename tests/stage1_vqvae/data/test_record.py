"""The record of a run's data, and which differences count as changes."""

from __future__ import annotations

import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from configs.data import Data
from stage1_vqvae.data.record import Record, changes
from stage1_vqvae.data.sources import load_images

SIZE = {"height": 8, "width": 12}


def record(path: Path, **fields: Any) -> Record:
    return load_images(Data(path=str(path), decode="each_time", **SIZE, **fields)).record


@pytest.fixture
def images(pictures: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pictures, tmp_path / "images"))


def test_a_copy_of_the_files_has_the_same_record(images: Path, tmp_path: Path) -> None:
    (images / "down").rename(images / unicodedata.normalize("NFC", "café"))
    copy = shutil.copytree(images, tmp_path / "elsewhere" / "copy")
    (copy / unicodedata.normalize("NFC", "café")).rename(copy / unicodedata.normalize("NFD", "café"))  # as some file systems write it
    for number, path in enumerate(copy.rglob("*.png")):
        os.utime(path, (number, number))
    original, copied = record(images), record(copy)
    for name in original:
        original[name]["classes"] = copied[name]["classes"] = None  # one of the names is normalised differently
    assert original == copied
    assert original["train"]["images"] + original["validation"]["images"] == 48


def test_every_change_is_described(images: Path) -> None:
    before, pictures = record(images), sorted(images.rglob("*.png"))
    pictures[0].rename(images / "down/z.png")
    pictures[-1].rename(images / "across/z.png")
    same = [f"{name}: not the same {before[name]['images']} images (names, sizes, order or labels differ)" for name in before]
    assert changes(before, record(images)) == same
    (images / "down").rename(images / "below")
    assert changes(before, record(images))[2:] == ['class "below" is new', 'class "down" is gone']
    (images / "across/z.png").unlink()
    (images / "across/001.png").unlink()
    assert changes(before, record(images))[0] == "train: 42 images, was 44"
    assert changes(before, record(images, seed=1, label_column="none"))[-1] == 'class "across", "down" are gone'


def test_another_seed_changes_both_splits(images: Path) -> None:
    assert [line.partition(":")[0] for line in changes(record(images), record(images, seed=1))] == ["train", "validation"]


def test_incomparable_records_count_as_equal() -> None:
    """A local copy of a data set of the Hub, imported codes, a split that was not read."""
    split = {"images": 3, "classes": None, "files": "hub:me/mine@None", "rows": "a"}
    for files in ("0" * 64, None):
        assert changes({"train": split}, {"train": {**split, "files": files}}) == []
    assert changes({"train": split}, {"test": {**split, "images": 4}}) == []
    assert changes({"train": split}, {"train": {**split, "files": "hub:me/mine@v2"}}) != []
    classes = {"train": {**split, "classes": {"a": 1, "b": 2}}}
    reordered = {"train": {**split, "classes": {"b": 2, "a": 1}}}
    assert changes(classes, reordered) == ["the classes are in another order"]
