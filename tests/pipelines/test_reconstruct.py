"""The command `reconstruct.py`."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from configs.recipe_file import load_recipe
from configs.run_dir import RunDir
from pipelines.reconstruct import main, pairs, quality
from pipelines.scoring.panels import file_names
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import VALIDATION
from stage2_prior.codes.store import CodeStore
from stage2_prior.priors.prior_file import load_prior
from training.weights_file import fingerprint

Row = dict[str, str]


def reconstructed(run: Path, *arguments: object) -> tuple[Path, list[Row]]:
    before = set((run / "reconstructions").glob("*")) if (run / "reconstructions").exists() else set()
    main(["--run", str(run), *map(str, arguments)])
    (new,) = set((run / "reconstructions").glob("*")) - before
    with open(new / "reconstructions.csv", newline="") as file:
        return new, list(csv.DictReader(file))


def validation_pixels(run: Path) -> np.ndarray:
    return load_images(load_recipe(RunDir(run).recipe).data).splits[VALIDATION].pixels.numpy()


def test_a_split_is_measured_per_image_worst_first(run_copy: Path) -> None:
    """PSNR is recomputed from the written images by skimage, and bits by summing over the prior's logits."""
    folder, rows = reconstructed(run_copy)
    assert {path.name for path in folder.iterdir()} == {"reconstructions.png", "reconstructions.csv", "images"}
    originals = validation_pixels(run_copy)
    store = CodeStore(run_copy / "codes" / VALIDATION)
    assert store.condition is not None
    codes = store.codes(torch.arange(len(store)))
    prior, _ = load_prior(run_copy / "priors" / "transformer" / "prior.safetensors", fingerprint(run_copy / "tokenizer.safetensors"))
    (logits,) = prior.logits(codes, store.condition)
    log_probabilities = logits.double().log_softmax(-1).gather(-1, codes[0].flatten(1)[..., None])[..., 0]
    assert sorted(row["name"] for row in rows) == sorted(f"validation/{number}" for number in range(12))
    assert {path.name for path in (folder / "images").iterdir()} == {Path(row["file"]).name for row in rows}
    for row in rows:
        number = int(row["name"].split("/")[1])
        picture = np.asarray(Image.open(folder / row["file"]))
        assert float(row["psnr"]) == pytest.approx(peak_signal_noise_ratio(originals[number], picture, data_range=255), abs=1e-6)
        assert float(row["mse"]) == pytest.approx(((originals[number] / 255 - picture / 255) ** 2).mean(), rel=1e-9)
        assert row["ssim"] == ""  # 8 pixels high
        assert float(row["bits_as_indices"]) == 6 * 4
        assert float(row["bits_under_prior"]) == pytest.approx(-float(log_probabilities[number].sum()) / math.log(2), rel=1e-5)
        assert row["label"] == ("across", "down")[store.condition[number]]
    errors = [float(row["mse"]) for row in rows]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1]
    assert json.loads((run_copy / "history.jsonl").read_text().splitlines()[-1])["resolved"] == {"prior": "transformer", "images": 12}


@pytest.mark.parametrize("channels", [1, 3])
def test_quality_agrees_with_skimage(channels: int) -> None:
    generator = np.random.default_rng(0)
    originals = generator.integers(0, 256, (70, 16, 20, channels), dtype=np.uint8)
    noise = generator.normal(0, np.linspace(1, 80, 70)[:, None, None, None], originals.shape)
    pictures = np.clip(originals + noise, 0, 255).astype(np.uint8)
    measured = quality(torch.from_numpy(pictures), torch.from_numpy(originals))
    for row, (picture, original) in enumerate(zip(pictures, originals, strict=True)):
        settings: dict[str, Any] = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        ssim = structural_similarity(picture / 255, original / 255, channel_axis=-1, **settings)
        assert float(measured["psnr"][row]) == pytest.approx(peak_signal_noise_ratio(original, picture, data_range=255), abs=1e-9)
        assert float(measured["ssim"][row]) == pytest.approx(ssim, abs=1e-6)


def test_a_folder_of_a_splits_images_gives_the_splits_figures(run_copy: Path, tmp_path: Path) -> None:
    """The folder's subfolders are labels of the prior."""
    _, expected = reconstructed(run_copy)
    originals = validation_pixels(run_copy)
    for row in expected:
        number = int(row["name"].split("/")[1])
        path = tmp_path / "images" / row["label"] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(originals[number]).save(path)
    _, rows = reconstructed(run_copy, "--images", tmp_path / "images")
    keys = ("mse", "psnr", "bits_under_prior")
    for one, other in zip(expected, rows, strict=True):
        assert Path(other["name"]).parts[-2:] == (one["label"], f"{int(one['name'].split('/')[1]):02d}.png")
        assert [float(other[key]) for key in keys] == pytest.approx([float(one[key]) for key in keys], rel=1e-5)


def test_one_label_for_all_images_and_unknown_labels(
    run_copy: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unknown labels are no error: all images are then scored without labels, as those of a flat folder."""
    shutil.copytree(pictures / "down", tmp_path / "labelled" / "down")
    shutil.copytree(pictures / "down", tmp_path / "foreign" / "sideways")

    def bits(*arguments: object) -> list[float]:
        return [float(row["bits_under_prior"]) for row in reconstructed(run_copy, *arguments)[1]]

    flat = bits("--images", pictures / "down")
    assert bits("--images", tmp_path / "foreign") == pytest.approx(flat)
    assert "sideways" in capsys.readouterr().out
    as_down = bits("--images", pictures / "down", "--label", "down")
    assert bits("--images", tmp_path / "labelled") == pytest.approx(as_down)
    assert as_down != pytest.approx(flat)
    assert bits("--images", tmp_path / "foreign", "--label", "across") != pytest.approx(as_down)


def test_files_of_the_same_name_get_separate_pictures(run_copy: Path, pictures: Path) -> None:
    _, single = reconstructed(run_copy, "--images", pictures / "across" / "000.png")
    folder, rows = reconstructed(run_copy, "--images", pictures / "across" / "000.png", pictures / "down" / "000.png", "--prior", "uniform")
    assert {row["file"] for row in rows} == {"images/000.png", "images/000-2.png"} == {f"images/{path.name}" for path in folder.glob("*/*")}
    assert next(row["file"] for row in rows if "across" in row["name"]) == "images/000.png"
    assert single[0]["mse"] in {row["mse"] for row in rows}


def test_file_names_are_unique_ignoring_case() -> None:
    names = ["a/x.png", "b/x.jpg", "c/X.png", "x-2.png", "x.tar.png", "validation/7", "a/x.png"]
    unique = file_names(names)
    assert unique[0] == "x.png"
    assert unique[4:6] == ["x.tar.png", "7.png"]
    assert len({name.lower() for name in unique}) == len(names)


def test_without_a_prior_bits_are_those_of_the_indices(run_copy: Path) -> None:
    """By option, or because the run has no prior yet."""
    _, uniform_prior = reconstructed(run_copy, "--prior", "uniform", "--n", 4)
    shutil.rmtree(run_copy / "priors")
    _, no_prior = reconstructed(run_copy, "--n", 4)
    for rows in (uniform_prior, no_prior):
        assert {row["name"] for row in rows} == {f"validation/{number}" for number in (0, 3, 6, 9)}
        assert {(row["bits_as_indices"], row["bits_under_prior"]) for row in rows} == {("24.0", "")}


def test_names_with_formula_characters_are_plain_text(run_copy: Path, pictures: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(pictures / "down" / "000.png", tmp_path / r"$\frac$, 1.png"))
    folder, rows = reconstructed(run_copy, "--images", path)
    assert rows[0]["name"] == str(path)
    assert (folder / "images" / path.name).exists()


@pytest.mark.parametrize(("count", "worst", "best"), [(1, [0], []), (3, [0, 1], [2]), (70, list(range(32)), list(range(69, 37, -1)))])
def test_the_plot_shows_the_worst_then_the_best_and_none_twice(count: int, worst: list[int], best: list[int]) -> None:
    rows = [{"name": str(number), "psnr": 20.0, "ssim": math.nan} for number in range(count)]
    pixels = torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1)
    groups = pairs(pixels, pixels + 100, rows)
    assert [[int(panel.pictures[0]) for panel in panels] for _, panels in groups] == [part for part in (worst, best) if part]
    assert all(int(panel.pictures[1]) == int(panel.pictures[0]) + 100 for _, panels in groups for panel in panels)
    assert [title.split(":")[0] for title, _ in groups] == ["worst", "best"][: len(groups)]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--n", "0"], ["--n", "at least 1"]),
        (["--split", "dev"], ["--split", "dev"]),
        (["--split", "test"], ["--split test"]),
        (["--images", "nowhere.png"], ["nowhere.png"]),
        (["--images", "{run}/recipe.yaml"], ["recipe.yaml", "readable image"]),
        (["--images", "{run}/codes"], ["codes", "no image in it"]),
        (["--prior", "best"], ["--prior best", "transformer"]),
        (["--label", "left"], ["label: ", "across"]),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(
    run_copy: Path, arguments: list[str], parts: list[str], one_line_error: Callable[..., str]
) -> None:
    line = one_line_error(main, "--run", run_copy, *[argument.format(run=run_copy) for argument in arguments])
    assert all(part in line for part in parts), line
    assert not (run_copy / "reconstructions").exists()
