"""Folders of images: splits, classes, and what is left out."""

from __future__ import annotations

import os
import shutil
import sys
import types
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from configs.errors import UserError
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN, VALIDATION, ImageSource
from tests.stage1_vqvae.data.picture_sources import data, rows_of, write_tar


def test_symlinked_folders_are_followed(pictures: Path, tmp_path: Path) -> None:
    """`datasets` skips them silently, whole classes of them."""
    for name in ("across", "down"):
        os.symlink(pictures / name, tmp_path / name)

    def load(path: Path) -> ImageSource:
        return load_images(data(path))

    linked, plain = load(tmp_path), load(pictures)
    assert linked.label_names == plain.label_names == ["across", "down"]
    for name in (TRAIN, VALIDATION):
        assert torch.equal(linked.splits[name].pixels[:], plain.splits[name].pixels[:])


def test_folders_of_images_are_listed_without_datasets(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes minutes for a hundred thousand names."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(load_images(data(pictures)).splits[TRAIN]) == 36


def test_an_archive_beside_unpacked_images_is_ignored(pictures: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    write_tar(folder / "pictures.tar", rows_of(pictures)[:7])
    source = load_images(data(folder))
    assert sum(map(len, source.splits.values())) == 48
    assert source.label_names == ["across", "down"]


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
FOLDERS: dict[str, tuple[list[str], object, str]] = {
    # case: folders or files (two images per folder); labels per split, or parts of the error; part of the announcement
    "splits in any case": (["TRAIN/a", "TRAIN/b", "Test/a", "Test/b"], {"train": "aabb", "test": "aabb"}, "train 4 (TRAIN), test 4 (Test)"),
    "other usual names": (["Training/a", "Training/b", "Eval/a", "Eval/b"], {"train": "aabb", "validation": "aabb"}, "validation 4 (Eval)"),
    "names with a year": (["train2017/a", "train2017/b", "val2017/b"], {"train": "aabb", "validation": "bb"}, "validation 2 (val2017)"),
    "splits further down": (["x/y/train/a", "x/y/train/b", "x/y/tst/b"], {"train": "aabb", "test": "bb"}, "(x/y/train), test 2 (x/y/tst)"),
    "splits in themselves": (["train/train/a", "train/train/b", "Test/test"], {"train": "aabb", "test": ""}, "test 2 (Test/test)"),
    "classes that sound like splits": (
        ["bullet_train", "test_tube", "cat"],
        {"train": ["bullet_train", "cat", "test_tube"] * 2},
        "3 classes",
    ),
    "two of one split": (["train", "Train", "test"], ["expected one train split (--data.train_split NAME), found Train, train"], ""),
    "splits inside classes": (
        ["a/train", "a/test", "b/train", "b/test"],
        ["expected the folders of splits at the top, found a/train and a/test"],
        "",
    ),
    "an empty split": (["train/a", "train/b", "val/a/notes.txt"], ["val: expected images of split validation, found none"], ""),
    "a picture beside classes": (["a", "b", "p.png"], {"train": "aabb"}, "left out beside the folders of classes: 1, such as p.png"),
    "pictures and classes": (["a", "b", "p.png", "q.png"], ["or images without classes (--data.label_column none), found 2 beside"], ""),
    "a folder in a class": (["a", "a/c", "b"], {"train": "aaaabb"}, "folders inside that of a class are part of it, as a/c of a"),
    "classes at two depths": (["a/x", "b/x/y"], ["expected images of all classes in folders of one depth", "a/x", "b/x/y"], ""),
    "a folder in every class": (["n1/images", "n2/images"], {"train": ["n1", "n1", "n2", "n2"]}, "4 images in 2 classes"),
    "dunder": (["__background__", "a", "__MACOSX/a"], {"train": ["__background__"] * 2 + ["a"] * 2}, "4 images in 2 classes"),
    "thumbnails": (
        ["a", "b", "a/@eaDir/0.png", "b/.thumbnails", "#recycle/a", "a/Thumbs.db"],
        {"train": "aabb"},
        "data: 4 images in 2 classes (a, b); train 4",
    ),
    "names in two forms": (
        [f"train/{COMPOSED}", "train/t", f"val/{DECOMPOSED}"],
        {"train": [COMPOSED] * 2 + ["t"] * 2, "validation": [COMPOSED] * 2},
        "",
    ),
    "other files": (
        ["a", "b", "a/i.HEIC", "a/j.HEIC", "b/k.svg", "b/l"],
        {"train": "aabb"},
        "2 .HEIC (install pillow-heif), 1 .svg, 1 without ending",
    ),
    "no images": (["a/i.heic"], ["expected images, found none among its files: 1 .heic (install pillow-heif)"], ""),
}


def write_entries(root: Path, entries: list[str], content: Iterator[bytes]) -> None:
    """Write files, and folders of two images each."""
    for entry in entries:
        for path in [root / entry] if "." in entry[1:] or entry.endswith("/l") else [root / entry / "0.png", root / entry / "1.png"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(next(content))


@pytest.mark.parametrize("case", FOLDERS)
def test_folder_roles_are_inferred_or_refused(case: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries, outcome, announced = FOLDERS[case]
    write_entries(tmp_path / "data", entries, (row for row, _ in rows_of(pictures)))
    if isinstance(outcome, list):
        with pytest.raises(UserError) as error:
            load_images(data(tmp_path / "data"), hold_out=False)
        assert all(words in str(error.value) for words in outcome), error.value
        return
    assert isinstance(outcome, dict)
    source = load_images(data(tmp_path / "data"), hold_out=False, announce=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data.path ")]
    assert len(lines) == 1
    assert announced in lines[0]
    assert source.label_names is not None
    labels_by_split = {
        name: [] if split.labels is None else [source.label_names[label] for label in split.labels.tolist()]
        for name, split in source.splits.items()
    }
    assert {name: sorted(labels) for name, labels in labels_by_split.items()} == {name: sorted(labels) for name, labels in outcome.items()}


def test_formats_with_an_installed_plugin_are_read(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_entries(tmp_path, ["a", "b", "a/i.heic"], (row for row, _ in rows_of(pictures)))
    Image.init()
    for registry in ("ID", "EXTENSION", "OPEN"):
        monkeypatch.setattr(Image, registry, getattr(Image, registry).copy())

    def register() -> None:
        Image.register_open("HEIF", Image.OPEN["PNG"][0])
        Image.register_extension("HEIF", ".heic")

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register))
    assert len(load_images(data(tmp_path), hold_out=False).splits[TRAIN]) == 5
