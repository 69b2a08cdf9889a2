"""The command `complete.py`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.run_dir import RunDir
from pipelines.complete import kept_rows, main, masked_pictures, row_mask
from pipelines.drawing import kept_codes
from stage1_vqvae.data.pixels import to_model, to_uint8
from stage1_vqvae.data.splits import VALIDATION
from stage1_vqvae.model import load_tokenizer
from stage2_prior.codes.store import CodeStore
from stage2_prior.train import main as train_prior


def completed(run: Path, *arguments: object) -> Path:
    before = set((run / "completions").glob("*")) if (run / "completions").exists() else set()
    main(["--run", str(run), *map(str, arguments)])
    (new,) = set((run / "completions").glob("*")) - before
    return new


def drawn(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "images").glob("*.png"))])


def test_kept_rows_are_those_of_the_image_and_the_others_vary(run_copy: Path) -> None:
    """2 x 3 codes: the first row of each image is kept, the second drawn four times."""
    folder = completed(run_copy, "--n", 3, "--continuations", 4, "--prefix-rows", 1, "--seed", 1)
    assert {path.name for path in folder.iterdir()} == {"completions.png", "completions.json", "images"}
    details = json.loads((folder / "completions.json").read_text())
    assert (details["kept_rows"], details["rows"], details["n"], details["continuations"]) == ([0], 2, 3, 4)
    tokenizer = load_tokenizer(RunDir(run_copy))
    store = CodeStore(run_copy / "codes" / VALIDATION)
    rows = torch.tensor([0, 4, 8])  # of 12
    (originals,) = store.codes(rows)
    assert store.condition is not None
    assert details["labels"] == store.condition[rows].tolist() == [0, 0, 1]
    completions = drawn(folder).reshape(3, 4, 8, 12, 3)
    for image in range(3):
        # Some codes in the second row must give that picture together with the image's first row.
        seconds = torch.cartesian_prod(*[torch.arange(16)] * 3)[:, None]
        candidates = torch.cat([originals[image, :1].expand(len(seconds), 1, 3), seconds], 1)
        decoded = np.concatenate([to_uint8(tokenizer.decode((part,))).numpy() for part in candidates.split(512)])
        for continuation in completions[image]:
            assert (np.abs(decoded.astype(int) - continuation).max((1, 2, 3)) <= 1).any()
    assert len(np.unique(completions.reshape(12, -1), axis=0)) > 3


@pytest.mark.parametrize("arguments", [[], ["--prior", "uniform"], ["--batch-size", 2]])
def test_keeping_all_rows_gives_the_reconstruction(run_copy: Path, pictures_of_one_label: Path, arguments: list[object]) -> None:
    """For every image of a folder; none is held out."""
    folder = completed(run_copy, "--continuations", 2, "--prefix-rows", 2, "--images", pictures_of_one_label, *arguments)
    tokenizer = load_tokenizer(RunDir(run_copy))
    originals = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in sorted(pictures_of_one_label.glob("*.png"))]))
    assert len(originals) == 3
    reconstructions = to_uint8(tokenizer.decode(tokenizer.encode(to_model(originals)))).numpy()
    assert np.abs(drawn(folder).astype(int) - reconstructions.repeat(2, 0)).max() <= 1
    assert json.loads((folder / "completions.json").read_text())["labels"] is None


@pytest.fixture(scope="module")
def pictures_of_one_label(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unlabelled")
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_labels_of_a_folder_are_matched_by_name(run_copy: Path, pictures: Path, tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    """Another label, first in the alphabet, changes the folder's numbers but not its names."""
    for label in ("down", "across"):
        shutil.copytree(pictures / label, tmp_path / "images" / label)
    folder = completed(run_copy, "--n", 4, "--continuations", 1, "--images", tmp_path / "images")
    assert json.loads((folder / "completions.json").read_text())["labels"] == [0, 0, 1, 1]
    (tmp_path / "images" / "across").rename(tmp_path / "images" / "aaa")
    assert "aaa" in one_line_error(main, "--run", run_copy, "--images", tmp_path / "images")
    completed(run_copy, "--n", 2, "--images", tmp_path / "images", "--label", "down")


def test_kept_rows_are_given_by_number_or_by_list() -> None:
    assert kept_rows(None, None, 5) == [True, True, False, False, False]
    assert kept_rows(3, None, 4) == [True, True, True, False]
    assert kept_rows(None, "0,3", 4) == [True, False, False, True]


def test_finer_levels_and_pixels_are_kept_under_kept_rows(run_copy: Path) -> None:
    class Two:
        grids = [(2, 3), (4, 6)]  # noqa: RUF012

    below = row_mask([False, True], 8, 12)
    coarse, fine = kept_codes(Two(), below)  # type: ignore[arg-type]
    assert coarse.tolist() == [[False] * 3, [True] * 3]
    assert fine.tolist() == [[False] * 6] * 2 + [[True] * 6] * 2
    hole = torch.ones(8, 12, dtype=torch.bool)
    hole[0, 5] = False
    coarse, fine = kept_codes(Two(), hole)  # type: ignore[arg-type]
    assert (~coarse).nonzero().tolist() == [[0, 1]]  # columns 4 to 7
    assert (~fine).nonzero().tolist() == [[0, 2]]  # columns 4 and 5
    part = masked_pictures(torch.zeros(1, 8, 12, 3, dtype=torch.uint8), below)
    assert part[0, :4].eq(128).all()
    assert part[0, 4:].eq(0).all()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--prefix-rows", "3"], ["--prefix-rows", "0 to 2", "3"]),
        (["--keep-rows", "0,2"], ["--keep-rows", "0 to 1", "0,2"]),
        (["--prefix-rows", "x"], ["prefix_rows", "int", "x"]),
        (["--keep-rows", "top"], ["--keep-rows", "top"]),
        (["--mask", "nowhere.png"], ["--mask nowhere.png", "No such file"]),
        (["--mask", "{run}/stage1/training.png"], ["--mask", "12 x 8 pixels"]),
        (["--mask", "x.png", "--keep-rows", "0"], ["--mask", "--keep-rows"]),
        (["--keep-rows", "0", "--prefix-rows", "1"], ["--keep-rows", "--prefix-rows"]),
        (["--n", "0"], ["--n", "at least 1"]),
        (["--continuations", "0"], ["--continuations", "at least 1"]),
        (["--images", "nowhere"], ["nowhere"]),
        (["--prior", "best"], ["--prior best"]),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(
    run_copy: Path, arguments: list[str], parts: list[str], one_line_error: Callable[..., str]
) -> None:
    line = one_line_error(main, "--run", run_copy, *[argument.format(run=run_copy) for argument in arguments])
    assert all(part in line for part in parts), line
    assert not (run_copy / "completions").exists()


def test_a_prior_trained_without_label_dropout_needs_a_label(
    run_copy: Path, one_line_error: Callable[..., str], pictures_of_one_label: Path
) -> None:
    train_prior(["--run", str(run_copy), "--name", "sure", "--stage2.condition_dropout", "0", "--stage2.steps", "2"])
    assert "label: " in one_line_error(main, "--run", run_copy, "--images", pictures_of_one_label)
    assert completed(run_copy, "--images", pictures_of_one_label, "--label", "down", "--n", 2).exists()
