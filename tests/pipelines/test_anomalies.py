"""The command `anomalies.py`."""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from PIL import Image

from configs.run_dir import read_json, read_summed_json, write_summed_json
from pipelines.anomalies import main, panel_positions, percent_below
from pipelines.scoring.heat_maps import colour_scale, heat_maps, overlaid
from pipelines.scoring.surprisals import surprisals
from stage1_vqvae.data.splits import VALIDATION
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.codes.store import CodeStore
from stage2_prior.priors.prior_file import load_prior
from stage2_prior.priors.stepwise import StepwisePrior
from training.weights_file import fingerprint

Row = dict[str, str]


def ranked(run: Path, *arguments: object) -> tuple[Path, list[Row]]:
    before = set((run / "anomalies").glob("*")) if (run / "anomalies").exists() else set()
    main(["--run", str(run), *map(str, arguments)])
    (new,) = set((run / "anomalies").glob("*")) - before
    with open(new / "anomalies.csv", newline="") as file:
        return new, list(csv.DictReader(file))


def loaded(run: Path, name: str = "transformer") -> tuple[StepwisePrior, CodeStore]:
    prior, _ = load_prior(run / "priors" / name / "prior.safetensors", fingerprint(run / "tokenizer.safetensors"))
    return prior, CodeStore(run / "codes" / VALIDATION)


def test_a_split_is_ranked_by_its_bits_and_compared_with_itself(run_copy: Path) -> None:
    """Bits are recomputed per image from the prior's single steps, which sampling uses, instead of its full pass."""
    folder, rows = ranked(run_copy)
    assert {path.name for path in folder.iterdir()} == {"anomalies.png", "anomalies.csv", "maps"}
    prior, store = loaded(run_copy)
    (codes,) = store.codes(torch.arange(len(store)))
    assert store.condition is not None
    expected = []
    for grid, label in zip(codes, store.condition, strict=True):
        cache, code, nats = prior.new_cache(1), None, 0.0
        for position in grid.flatten():
            nats -= float(prior.step(code, label[None], cache).double().log_softmax(-1)[0, position])
            code = position[None]
        expected.append(nats / math.log(2))
    bits = {int(row["name"].split("/")[1]): float(row["bits"]) for row in rows}
    assert [bits[number] for number in range(12)] == pytest.approx(expected, rel=1e-5)
    assert list(bits.values()) == sorted(bits.values(), reverse=True)
    assert [int(row["rank"]) for row in rows] == list(range(1, 13))
    mean_error = read_json(run_copy / "stage1" / "report.json")["validation"]["mse"]
    for row in rows:
        below = 100 * np.mean(np.asarray(expected) < float(row["bits"]) - 1e-3)
        assert float(row["percent_of_validation_below"]) == pytest.approx(below)
        assert float(row["bits_per_token"]) == pytest.approx(float(row["bits"]) / 6)
        assert float(row["mse_over_validation_mean"]) == pytest.approx(float(row["mse"]) / mean_error)
        assert np.asarray(Image.open(folder / row["file"])).shape == (8, 12, 3)
    # Stage 1 measured the same images.
    assert np.mean([float(row["mse"]) for row in rows]) == pytest.approx(mean_error, rel=1e-5)


def test_noise_among_images_of_the_run_stands_out_by_its_error(run_copy: Path, pictures: Path, tmp_path: Path) -> None:
    """Its bits are inconspicuous, as so small an encoder sees grey. Images of a folder without labels are scored and compared without."""
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for path in [*sorted((pictures / "across").glob("*.png"))[:4], *sorted((pictures / "down").glob("*.png"))[:4]]:
        shutil.copy(path, mixed / f"{path.parent.name}-{path.name}")
    noise = 255 * np.random.default_rng(0).integers(0, 2, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).save(mixed / "noise.png")
    _, rows = ranked(run_copy, "--images", mixed)
    errors = {Path(row["name"]).name: float(row["mse_over_validation_mean"]) for row in rows}
    assert len(errors) == 9
    assert errors.pop("noise.png") > 2 * max(errors.values())
    prior, store = loaded(run_copy)
    usual = prior.nats(store.codes(torch.arange(len(store))), None).sum(1).double().numpy() / math.log(2)
    for row in rows:
        assert float(row["percent_of_validation_below"]) == pytest.approx(100 * np.mean(usual < float(row["bits"]) - 1e-3))


def test_surprisals_do_not_depend_on_the_batch(run_copy: Path) -> None:
    """With more images than a batch holds; labels matter."""
    prior, store = loaded(run_copy)
    rows = torch.arange(150) % 12
    assert store.condition is not None
    labels = store.condition[rows]
    many = surprisals(prior, store.codes(rows), labels, "bits")
    few = surprisals(prior, store.codes(rows[:12]), labels[:12], "bits")
    assert many.shape == (150, 6)
    assert torch.allclose(many, few[rows], atol=1e-4)
    assert not torch.allclose(few, surprisals(prior, store.codes(rows[:12]), None, "bits"), atol=1e-2)


@pytest.mark.parametrize("grids", [[(2, 3)], [(2, 3)] * 3, [(1, 2), (2, 4)], [(2, 2), (3, 5)]])
def test_a_heat_map_sums_to_the_bits_of_its_image(grids: list[tuple[int, int]]) -> None:
    layout = SequenceLayout(grids, [16] * len(grids))
    bits = torch.rand(4, layout.length, dtype=torch.float64)
    heat = heat_maps(bits, layout)
    assert heat.shape == (4, *grids[-1])
    assert torch.allclose(heat.sum((1, 2)), bits.sum(1))
    # More bits at one position are shared equally by the cells under it.
    for position, (level, row, column) in enumerate(layout.coordinates().tolist()):
        more = bits.clone()
        more[:, position] += 1
        change = heat_maps(more, layout)[0] - heat[0]
        (h, w), (high, wide) = grids[level], grids[-1]
        under = torch.tensor([[y * h // high == row and x * w // wide == column for x in range(wide)] for y in range(high)])
        assert torch.allclose(change, under.double() / under.sum())


def test_colours_cover_the_patches_of_their_codes() -> None:
    heat = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 99.0]], dtype=torch.float64)
    colours = ScalarMappable(Normalize(0, 4), "inferno")
    picture = torch.zeros(4, 9, 3, dtype=torch.uint8)
    overlay = overlaid(picture, heat, colours)
    assert overlay.shape == (4, 9, 3)
    assert overlay.dtype == torch.uint8
    brightness = overlay.double().sum(-1)
    for row in range(2):
        for column in range(3):
            patch = overlay[2 * row : 2 * row + 2, 3 * column : 3 * column + 3].reshape(-1, 3)
            assert len(patch.unique(dim=0)) == 1
    assert brightness[0, 0] < brightness[0, 3] < brightness[0, 6] < brightness[2, 0] < brightness[2, 3] == brightness[2, 6]
    # The picture shows through.
    picture[0, 0] = 255
    assert overlaid(picture, heat, colours).double().sum(-1)[0, 0] > brightness[0, 0]


def test_colours_end_at_twice_the_uniform_cost_of_a_patch() -> None:
    assert colour_scale(SequenceLayout([(2, 3)], [16])).norm.vmax == 8
    assert colour_scale(SequenceLayout([(2, 3)] * 2, [16, 4])).norm.vmax == 12
    assert colour_scale(SequenceLayout([(1, 1), (2, 2)], [16, 4])).norm.vmax == 6


def test_percentiles_agree_with_numpy() -> None:
    usual = torch.rand(101, dtype=torch.float64) * 100
    values = torch.rand(50, dtype=torch.float64) * 120 - 10
    expected = [100 * np.mean(usual.numpy() < value) for value in values.tolist()]
    assert percent_below(values, usual).tolist() == pytest.approx(expected)
    assert percent_below(usual.max()[None], usual).tolist() == pytest.approx([100 * 100 / 101])  # not below itself


def test_no_image_is_shown_twice() -> None:
    errors = torch.tensor([9.0, 1, 2, 8, 3, 7, 4, 5])
    assert list(panel_positions(errors, 3).values()) == [[0, 1, 2], [3, 5], [7, 6]]
    assert list(panel_positions(errors[:2], 16).values()) == [[0, 1]]
    assert list(panel_positions(errors[:4], 3).values()) == [[0, 1, 2], [3]]


def test_without_validation_codes_there_is_no_comparison(run_copy: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run_copy / "codes")
    _, rows = ranked(run_copy, "--images", pictures / "down" / "000.png")
    assert [row["percent_of_validation_below"] for row in rows] == [""]
    assert "extract_codes.py" in capsys.readouterr().out


def test_images_are_scored_under_the_label_of_their_folder_or_option(run_copy: Path, pictures: Path) -> None:
    """Only for images in the folder `down` is the option's label `down` the same."""
    by_folder = ranked(run_copy, "--images", pictures)[1]
    down = ranked(run_copy, "--images", pictures, "--label", "down")[1]
    by_option = {row["name"]: float(row["bits"]) for row in down}
    for row in by_folder:
        assert (float(row["bits"]) == pytest.approx(by_option[row["name"]], abs=1e-3)) == (row["label"] == "down")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--top", "0"], ["--top", "at least 1"]),
        (["--prior", "uniform"], ["--prior", "learned", "uniform"]),
        (["--prior", "best"], ["--prior best"]),
        (["--split", "dev"], ["--split", "dev"]),
        (["--images", "nowhere"], ["nowhere"]),
        (["--label", "left"], ["label: ", "across"]),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(
    run_copy: Path, arguments: list[str], parts: list[str], one_line_error: Callable[..., str]
) -> None:
    line = one_line_error(main, "--run", run_copy, *arguments)
    assert all(part in line for part in parts), line
    assert not (run_copy / "anomalies").exists()


def test_without_a_prior_the_error_names_the_command_to_run(run_copy: Path, one_line_error: Callable[..., str]) -> None:
    shutil.rmtree(run_copy / "priors")
    assert "stage2_prior/train.py" in one_line_error(main, "--run", run_copy)


def test_codes_of_another_tokenizer_are_refused(run_copy: Path, one_line_error: Callable[..., str]) -> None:
    path = run_copy / "codes" / VALIDATION / "manifest.json"
    write_summed_json(path, {**read_summed_json(path), "tokenizer_sha256": "0" * 64})
    assert "extract them again" in one_line_error(main, "--run", run_copy)
    assert not (run_copy / "anomalies").exists()
