"""Export of codes to other tools, and import from them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from configs.run_dir import read_summed_json, write_summed_json
from stage2_prior.codes.exchange import ExternalCodes, read_classes
from stage2_prior.codes.store import CodeStore
from stage2_prior.conditions.none import NoCondition
from stage2_prior.export_codes import main as export_codes
from stage2_prior.extract_codes import main as extract_codes
from stage2_prior.import_codes import main as import_codes


def contents(codes: Path) -> dict[str, bytes]:
    return {path.relative_to(codes).as_posix(): path.read_bytes() for path in sorted(codes.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("form", ["npy", "datasets"])
@pytest.mark.parametrize("augmentation", ["none", "horizontal_flip"])
def test_exported_codes_can_be_imported_again(form: str, augmentation: str, run_copy: Path, tmp_path: Path) -> None:
    extract_codes(["--run", str(run_copy), "--overwrite", "--extraction.augmentation", augmentation])
    before, store = contents(run_copy / "codes"), CodeStore(run_copy / "codes/train")
    export_codes(["--run", str(run_copy), "--to", form, "--output", str(tmp_path / "out")])
    all_rows = torch.arange(len(store))
    mirrored = torch.full((len(store),), store.manifest.variants - 1)
    if form == "npy":
        codes, labels = np.load(tmp_path / "out/train/level0.npy"), np.load(tmp_path / "out/train/labels.npy")
        assert codes.dtype == np.uint8
        names = None
    else:
        rows = datasets.load_from_disk(str(tmp_path / "out/train"))
        codes, labels = np.asarray(rows.with_format("numpy")["level0"][:]), np.asarray(rows["label"][:])
        names = rows.features["label"].names
    assert np.array_equal(codes[:, 0], store.codes(all_rows)[0].numpy())
    assert np.array_equal(codes[:, -1], store.codes(all_rows, mirrored)[0].numpy())
    assert store.condition is not None
    assert labels.tolist() == store.condition.tolist()
    assert names in (None, ["across", "down"])
    import_codes(["--run", str(run_copy), "--from", form, "--folder", str(tmp_path / "out"), "--overwrite"])
    assert contents(run_copy / "codes") == before
    assert sorted(path.name for path in run_copy.glob("codes*")) == ["codes"]


@pytest.mark.parametrize("shape", ["grids", "sequences", "one variant"])
def test_arrays_of_other_tools_can_be_imported(shape: str, run_copy: Path, tmp_path: Path) -> None:
    """2x3 codes per image, without labels."""
    before = {name: CodeStore(run_copy / "codes" / name) for name in ("train", "validation")}
    stored = {name: store.codes(torch.arange(len(store)))[0] for name, store in before.items()}
    for name, codes in stored.items():
        (tmp_path / name).mkdir()
        array = codes.numpy().astype(np.int32)
        array = {"grids": array, "sequences": array.reshape(len(array), -1), "one variant": array[:, None]}[shape]
        np.save(tmp_path / name / "level0.npy", array)
    import_codes(["--run", str(run_copy), "--folder", str(tmp_path), "--overwrite"])
    for name, codes in stored.items():
        store = CodeStore(run_copy / "codes" / name)
        assert torch.equal(store.codes(torch.arange(len(store)))[0], codes)
        assert store.condition is None
        expected = dataclasses.replace(before[name].manifest, condition=NoCondition(), sha256=store.manifest.sha256)
        assert store.manifest == expected
        store.verify()


def test_names_that_differ_only_in_unicode_form_are_one_class() -> None:
    names = {"train": ["caf\u00e9", "t", "cafe\u0301"], "validation": ["cafe\u0301", "t", "cafe\u0301"]}
    classes = read_classes(
        {name: ExternalCodes([], np.array([2, 0, 1]), split_names, None, None) for name, split_names in names.items()}, Path("codes")
    )
    assert classes[0] == ["caf\u00e9", "t"]
    assert [labels.tolist() for labels in classes[1].values()] == [[0, 0, 1]] * 2


def bad_arrays(codes: np.ndarray) -> dict[str, tuple[dict[str, np.ndarray], str]]:
    """Return the arrays of a split and the error they get, per kind of mistake."""
    return {
        "too high": ({"level0": codes + 14}, "expected codes of level 0, whole numbers from 0 to 15, found 14 to 29 of int64"),
        "no numbers": ({"level0": codes / 2}, "found .* of float64"),
        "transposed": (
            {"level0": codes.transpose(0, 2, 1)},
            r"expected an array \(40, \[variants,\] 2, 3\) of level 0, or with 6 as its last",
        ),
        "unexplained variants": ({"level0": np.stack([codes, codes], 1)}, "expected one variant per image where no manifest.json says"),
        "a level too many": ({"level0": codes, "level1": codes}, "expected codes of 1 levels, the tokenizer's, found 2"),
        "none": ({}, r"expected codes of level 0 \(level0\.npy\), found none"),
        "too few labels": ({"level0": codes, "labels": np.arange(7)}, "expected 40 labels, as many as images, found"),
        "fractional labels": (
            {"level0": codes, "labels": np.arange(40) / 2},
            "expected labels that are whole numbers from 0 on, one per image, found .40. of float64",
        ),
        "Python's objects": ({"level0": codes.astype(object)}, r"level0\.npy: expected an array of numbers, found"),
        "no rows": ({"level0": codes[:0]}, r"expected an array \(rows, \[variants,\] 2, 3\)"),
        "a number": ({"level0": np.array(3)}, r"expected an array \(rows, "),
    }


BAD_ARRAYS = bad_arrays(np.arange(240).reshape(40, 2, 3) % 16)


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_codes_that_do_not_fit_get_one_line_and_change_nothing(
    kind: str, run_copy: Path, tmp_path: Path, one_line_error: Callable[..., str]
) -> None:
    before = contents(run_copy / "codes")
    arrays, pattern = BAD_ARRAYS[kind]
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        for name, array in arrays.items():
            np.save(tmp_path / split / f"{name}.npy", array)
    line = one_line_error(import_codes, "--run", run_copy, "--folder", tmp_path, "--overwrite")
    assert re.search(pattern, line), line
    assert contents(run_copy / "codes") == before
    assert "add --overwrite" in one_line_error(import_codes, "--run", run_copy, "--folder", tmp_path)


def test_splits_agree_on_labels_and_on_the_tokenizer(run_copy: Path, tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    """A label that only validation images have is a class too."""
    codes = np.zeros((12, 2, 3), np.uint8)
    for split, highest in (("train", 8), ("validation", 9)):
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "level0.npy", codes)
        np.save(tmp_path / split / "labels.npy", np.arange(12) % (highest + 1))
    import_codes(["--run", str(run_copy), "--folder", str(tmp_path), "--overwrite"])
    for split in ("train", "validation"):
        assert CodeStore(run_copy / "codes" / split).manifest.condition.class_names == [str(label) for label in range(10)]
    np.save(tmp_path / "train/labels.npy", np.array([4_000_000_000, 7] * 6))  # ids, as other tools have
    import_codes(["--run", str(run_copy), "--folder", str(tmp_path), "--overwrite"])
    store = CodeStore(run_copy / "codes/train")
    assert store.manifest.condition.class_names == [*(str(label) for label in range(10)), "4000000000"]
    assert store.condition is not None
    assert store.condition[:2].tolist() == [10, 7]
    (tmp_path / "validation/labels.npy").unlink()
    line = one_line_error(import_codes, "--run", run_copy, "--folder", tmp_path, "--overwrite")
    assert "expected labels of training and validation images, or of none, found them of train" in line
    export_codes(["--run", str(run_copy), "--output", str(tmp_path / "out")])
    manifest = tmp_path / "out/train/manifest.json"
    write_summed_json(manifest, {**read_summed_json(manifest), "tokenizer_sha256": "0" * 64})
    line = one_line_error(import_codes, "--run", run_copy, "--folder", tmp_path / "out", "--overwrite")
    assert re.search("expected codes of the run's tokenizer .*, found those of 0000", line)


def test_a_test_split_need_not_have_labels(run_copy: Path, tmp_path: Path) -> None:
    """Competitions publish test images without labels."""
    for split, labelled in (("train", True), ("validation", True), ("test", False)):
        (tmp_path / "in" / split).mkdir(parents=True)
        np.save(tmp_path / "in" / split / "level0.npy", np.zeros((12, 2, 3), np.uint8))
        if labelled:
            np.save(tmp_path / "in" / split / "labels.npy", np.arange(12) % 3)
    import_codes(["--run", str(run_copy), "--folder", str(tmp_path / "in"), "--overwrite"])
    before = contents(run_copy / "codes")
    for form in ("npy", "datasets"):
        export_codes(["--run", str(run_copy), "--to", form, "--output", str(tmp_path / form)])
        import_codes(["--run", str(run_copy), "--from", form, "--folder", str(tmp_path / form), "--overwrite"])
        assert contents(run_copy / "codes") == before
    assert CodeStore(run_copy / "codes/test").condition is None
