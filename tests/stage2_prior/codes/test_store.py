"""Codes on disk, both ways."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

import stage2_prior.codes.store as code_store
from configs.errors import UserError
from stage2_prior.codes.store import CodeStore, CodeWriter, Manifest, smallest_dtype

ROWS, VARIANTS = 25, 2
MANIFEST = Manifest(
    split="train",
    rows=ROWS,
    grids=[(2, 3), (4, 6)],
    num_codes=[300, 7],
    label_names=["a", "b", "c"],
    augmentation="horizontal_flip",
    variants=VARIANTS,
    image_shape=(3, 8, 12),
    tokenizer_sha256="f" * 64,
)


def levels() -> list[torch.Tensor]:
    return [torch.randint(k, (ROWS, VARIANTS, *grid)) for grid, k in zip(MANIFEST.grids, MANIFEST.num_codes, strict=True)]


def written(folder: Path, codes: list[torch.Tensor], labels: torch.Tensor | None, manifest: Manifest = MANIFEST) -> Path:
    folder.mkdir()
    writer = CodeWriter(folder, manifest)
    for start in range(0, ROWS, 4):
        writer.add([level[start : start + 4] for level in codes], None if labels is None else labels[start : start + 4])
    writer.close()
    return folder


@pytest.mark.parametrize(("rows_per_file", "files"), [(10, 3), (25, 1), (1000, 1)])
def test_what_is_written_is_read(rows_per_file: int, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_store, "_ROWS_PER_FILE", rows_per_file)
    codes, labels = levels(), torch.randint(3, (ROWS,))
    folder = written(tmp_path / "train", codes, labels)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert names == [f"codes-{number:05d}-of-{files:05d}.safetensors" for number in range(files)]
    store = CodeStore(folder, "f" * 64)
    rows, variants = torch.tensor([24, 0, 7]), torch.tensor([1, 0, 1])
    for level, grid in zip(codes, store.codes(rows, variants), strict=True):
        assert grid.dtype == torch.int64
        assert torch.equal(grid, level[rows, variants])
    for level, grid in zip(codes, store.codes(rows), strict=True):
        assert torch.equal(grid, level[rows, 0])
    assert store.labels is not None
    assert torch.equal(store.labels, labels)
    for level, counts in zip(codes, store.counts(), strict=True):
        assert np.array_equal(counts, np.bincount(level.flatten().numpy(), minlength=len(counts)))
    assert store.manifest == MANIFEST


def test_codes_take_the_smallest_type(tmp_path: Path) -> None:
    assert [smallest_dtype(k) for k in (2, 256, 257, 65_536, 65_537)] == [np.uint8, np.uint8, np.uint16, np.uint16, np.uint32]
    content = safetensors.numpy.load_file(written(tmp_path / "train", levels(), torch.zeros(ROWS)) / "codes-00000-of-00001.safetensors")
    assert {name: array.dtype for name, array in content.items()} == {"level0": np.uint16, "level1": np.uint8, "labels": np.uint8}


def test_no_labels(tmp_path: Path) -> None:
    manifest = dataclasses.replace(MANIFEST, label_names=None)
    assert CodeStore(written(tmp_path / "train", levels(), None, manifest)).labels is None


def test_a_missing_row_is_not_closed_over(tmp_path: Path) -> None:
    writer = CodeWriter(tmp_path, MANIFEST)
    writer.add([level[:-1] for level in levels()], torch.zeros(ROWS - 1))
    with pytest.raises(AssertionError):
        writer.close()
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("another tokenizer", "expected codes of the run's tokenizer 000000000000, found codes of ffffffffffff"),
        ("no manifest", r"manifest\.json: expected a JSON file, found nothing"),
        ("broken manifest", r"manifest\.json: expected JSON"),
        ("foreign manifest", r"manifest\.json: expected a manifest of format 1"),
        ("no codes", r"codes-00000-of-00001\.safetensors: expected a file of codes, found nothing"),
        ("truncated codes", r"codes-00000-of-00001\.safetensors: expected a file of codes, found a truncated"),
        ("codes too high", "expected codes .* below 7"),
    ],
)
def test_what_does_not_fit_is_refused(damage: str, message: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "train", levels(), torch.zeros(ROWS))
    manifest, codes = folder / "manifest.json", folder / "codes-00000-of-00001.safetensors"
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "broken manifest":
        manifest.write_text("{")
    elif damage == "foreign manifest":
        manifest.write_text(json.dumps({"rows": 3}))
    elif damage == "no codes":
        codes.unlink()
    elif damage == "truncated codes":
        codes.write_bytes(codes.read_bytes()[:-10])
    elif damage == "codes too high":
        content = safetensors.numpy.load_file(codes)
        content["level1"][3, 0, 1, 1] = 7
        safetensors.numpy.save_file(content, codes)
    with pytest.raises(UserError, match=message):
        CodeStore(folder, "0" * 64 if damage == "another tokenizer" else "f" * 64)
