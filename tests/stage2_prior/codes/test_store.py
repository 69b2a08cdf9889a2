"""Stored codes: writing, reading, damage."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from configs.errors import UserError
from configs.run_dir import read_summed_json, write_summed_json
from stage2_prior.codes.store import CodeStore, Manifest, smallest_dtype, write_manifest, write_shard
from stage2_prior.conditions.classes import Classes
from stage2_prior.conditions.none import NoCondition

ROWS, VARIANTS = 25, 2
MANIFEST = Manifest(
    split="train",
    rows=ROWS,
    grids=[(2, 3), (4, 6)],
    num_codes=[300, 7],
    condition=Classes(names=["a", "b", "c"]),
    augmentation="horizontal_flip",
    variants=VARIANTS,
    image_shape=(3, 8, 12),
    tokenizer_sha256="f" * 64,
    rows_per_shard=1000,
    sha256=[],
)


def levels() -> list[torch.Tensor]:
    return [torch.randint(k, (ROWS, VARIANTS, *grid)) for grid, k in zip(MANIFEST.grids, MANIFEST.num_codes, strict=True)]


def written(folder: Path, codes: list[torch.Tensor], labels: torch.Tensor | None, manifest: Manifest = MANIFEST) -> Path:
    for shard in range(manifest.num_shards):
        rows = torch.tensor(manifest.shard_rows(shard))
        write_shard(folder, manifest, shard, [level[rows] for level in codes], None if labels is None else labels[rows])
    write_manifest(folder, manifest)
    return folder


def test_classes_are_compared_by_name(tmp_path: Path) -> None:
    """A prior may know fewer classes, or names in another Unicode form."""
    labels = torch.randint(3, (ROWS,))
    manifest = dataclasses.replace(MANIFEST, condition=Classes(names=["a", "b", "caf\u00e9"]))
    store = CodeStore(written(tmp_path / "train", levels(), labels, manifest))
    other = Classes(names=["cafe\u0301", "x", "a"])
    assert torch.equal(store.translated(other), torch.tensor([2, -1, 0])[labels])  # type: ignore[arg-type]
    expected = r"train: expected codes of a condition that the prior knows \(classes a, cafe.\), found b; train another prior"
    with pytest.raises(UserError, match=expected):
        store.condition_for(Classes(names=["a", "cafe\u0301"]))
    translated = store.condition_for(Classes(names=["x", "caf\u00e9", "b", "a"]))
    assert torch.equal(translated, torch.tensor([3, 2, 1])[labels])  # type: ignore[arg-type]
    assert store.condition_for(NoCondition()) is None
    store = CodeStore(written(tmp_path / "without", levels(), None, dataclasses.replace(MANIFEST, condition=NoCondition())))
    assert store.translated(other) is None
    with pytest.raises(UserError, match="found none"):
        store.condition_for(other)


@pytest.mark.parametrize(("rows_per_shard", "files"), [(10, 3), (25, 1), (1000, 1)])
def test_written_codes_are_read_back(rows_per_shard: int, files: int, tmp_path: Path) -> None:
    codes, labels = levels(), torch.randint(3, (ROWS,))
    manifest = dataclasses.replace(MANIFEST, rows_per_shard=rows_per_shard)
    folder = written(tmp_path / "train", codes, labels, manifest)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert names == [f"codes-{number:05d}-of-{files:05d}.safetensors" for number in range(files)]
    store = CodeStore(folder, "f" * 64)
    rows, variants = torch.tensor([24, 0, 7]), torch.tensor([1, 0, 1])
    for level, grid in zip(codes, store.codes(rows, variants), strict=True):
        assert grid.dtype == torch.int64
        assert torch.equal(grid, level[rows, variants])
    for level, grid in zip(codes, store.codes(rows), strict=True):
        assert torch.equal(grid, level[rows, 0])
    assert store.condition is not None
    assert torch.equal(store.condition, labels)
    for level, counts in zip(codes, store.counts(), strict=True):
        assert np.array_equal(counts, np.bincount(level.flatten().numpy(), minlength=len(counts)))
    sums = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]
    assert store.manifest == dataclasses.replace(manifest, sha256=sums)
    store.verify()


def test_codes_take_the_smallest_type(tmp_path: Path) -> None:
    assert [smallest_dtype(k) for k in (2, 256, 257, 65_536, 65_537)] == [np.uint8, np.uint8, np.uint16, np.uint16, np.uint32]
    content = safetensors.numpy.load_file(written(tmp_path / "train", levels(), torch.zeros(ROWS)) / "codes-00000-of-00001.safetensors")
    assert {name: array.dtype for name, array in content.items()} == {"level0": np.uint16, "level1": np.uint8, "condition": np.uint8}


def test_codes_without_labels_have_no_condition(tmp_path: Path) -> None:
    manifest = dataclasses.replace(MANIFEST, condition=NoCondition())
    assert CodeStore(written(tmp_path / "train", levels(), None, manifest)).condition is None


def test_a_shard_with_a_missing_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write_shard(tmp_path, MANIFEST, 0, [level[:-1] for level in levels()], torch.zeros(ROWS - 1))
    assert not list(tmp_path.iterdir())


def test_codes_take_no_memory_until_they_are_read(tmp_path: Path) -> None:
    """Counts anonymous memory only: the system takes pages of files back when it needs them."""
    rows = 2**15
    manifest = dataclasses.replace(MANIFEST, rows=rows, grids=[(32, 32)], num_codes=[512], condition=NoCondition(), rows_per_shard=2**13)
    codes = torch.randint(512, (2**13, VARIANTS, 32, 32))
    for shard in range(manifest.num_shards):
        write_shard(tmp_path, manifest, shard, [codes], None)
    write_manifest(tmp_path, manifest)
    del codes

    def anonymous_mib() -> float:
        return sum(int(line.split()[1]) for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if "Anonymous:" in line) / 1024

    before = anonymous_mib()
    store = CodeStore(tmp_path)
    drawn = torch.randint(rows, (64,))
    grids = store.codes(drawn, drawn % 2)
    assert anonymous_mib() - before < 16  # of 128 MiB on disk; allocators keep some memory
    assert torch.equal(store.codes(drawn[5:6], drawn[5:6] % 2)[0], grids[0][5:6])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("another tokenizer", "expected codes of the run's tokenizer 000000000000, found codes of ffffffffffff"),
        ("no manifest", r"manifest\.json: expected a JSON file, found nothing"),
        ("broken manifest", r"manifest\.json: expected JSON"),
        ("another bit", r"manifest\.json: expected JSON as it was written"),
        ("foreign manifest", r"manifest\.json: expected a manifest of format 1"),
        ("no codes", r"codes-00000-of-00001\.safetensors: expected a file of codes, found nothing"),
        ("truncated codes", r"codes-00000-of-00001\.safetensors: expected a file of codes, found a truncated"),
        ("other codes", r"codes-00000-of-00001\.safetensors: expected \{.*\(25, 2, 4, 6\).*found .*\(24, 2, 4, 6\)"),
    ],
)
def test_damaged_or_foreign_stores_are_refused(damage: str, message: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "train", levels(), torch.zeros(ROWS))
    manifest, codes = folder / "manifest.json", folder / "codes-00000-of-00001.safetensors"
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "broken manifest":
        manifest.write_text("{")
    elif damage == "another bit":
        manifest.write_text(manifest.read_text().replace('"rows": 25', '"rows": 24'))
    elif damage == "foreign manifest":
        write_summed_json(manifest, {"rows": 3})
    elif damage == "no codes":
        codes.unlink()
    elif damage == "truncated codes":
        codes.write_bytes(codes.read_bytes()[:-10])
    elif damage == "other codes":
        content = safetensors.numpy.load_file(codes)
        safetensors.numpy.save_file({**content, "level1": content["level1"][1:]}, codes)
    with pytest.raises(UserError, match=message):
        CodeStore(folder, "0" * 64 if damage == "another tokenizer" else "f" * 64)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("rows", 2**40), ("rows", "25"), ("rows", -25), ("rows_per_shard", 0), ("rows_per_shard", 1e9), ("variants", 2**60)),
        *(("num_codes", [300, 2**40]), ("num_codes", [300]), ("grids", [[2, 3], 4]), ("grids", []), ("image_shape", [3, 8])),
    ],
)
def test_false_sizes_in_a_manifest_are_refused(name: str, value: object, tmp_path: Path) -> None:
    """The manifest's checksum is right."""
    folder = written(tmp_path / "train", levels(), torch.zeros(ROWS))
    write_summed_json(folder / "manifest.json", {**read_summed_json(folder / "manifest.json"), name: value})
    with pytest.raises(UserError, match=r"manifest of format 1|expected a file of codes|expected \{"):
        CodeStore(folder)


def test_digits_are_stored_and_older_stores_have_none(tmp_path: Path) -> None:
    digits = [[k] for k in MANIFEST.num_codes]
    folder = written(tmp_path / "train", levels(), torch.zeros(ROWS), dataclasses.replace(MANIFEST, digits=digits))
    content = read_summed_json(folder / "manifest.json")
    assert CodeStore(folder).manifest.digits == digits
    write_summed_json(folder / "manifest.json", {**content, "digits": [[k + 1] for k in MANIFEST.num_codes]})
    with pytest.raises(UserError, match="manifest"):
        CodeStore(folder)
    del content["digits"]
    write_summed_json(folder / "manifest.json", content)
    assert CodeStore(folder).manifest.digits == []


def test_codes_that_changed_since_they_were_written_are_refused(tmp_path: Path) -> None:
    """By the file's checksum; codes beyond the codebook are refused on reading at the latest."""
    folder = written(tmp_path / "train", levels(), torch.zeros(ROWS))
    path = folder / "codes-00000-of-00001.safetensors"
    content = safetensors.numpy.load_file(path)
    content["level1"][3, 0, 1, 1] = 7
    safetensors.numpy.save_file(content, path, {"tokenizer_sha256": MANIFEST.tokenizer_sha256})
    store = CodeStore(folder)
    with pytest.raises(UserError, match="as it was written"):
        store.verify()
    with pytest.raises(UserError, match="expected codes of level 1 below 7, found 7"):
        store.codes(torch.tensor([1, 3]))
    store.codes(torch.tensor([1, 2]))
