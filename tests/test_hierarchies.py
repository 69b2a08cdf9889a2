"""The entire pipeline over a hierarchy of two grids, with priors of two kinds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from configs.run_dir import RunDir, read_json
from pipelines.anomalies import main as anomalies
from pipelines.complete import main as complete
from pipelines.compress import main as compress
from pipelines.decompress import main as decompress
from pipelines.evaluate import main as evaluate
from pipelines.reconstruct import main as reconstruct
from pipelines.report import main as report
from pipelines.sample import main as sample
from pipelines.summary import main as summary
from stage1_vqvae.data.pixels import to_model, to_uint8
from stage1_vqvae.model import load_tokenizer
from stage1_vqvae.train import main as train_tokenizer
from stage2_prior.codes.store import CodeStore, read_manifest
from stage2_prior.extract_codes import main as extract_codes
from stage2_prior.train import main as train_prior

# 8 x 12 pixels: grids of 2 x 3 and 4 x 6.
HIERARCHY = ["--tokenizer.network.kind", "hierarchical", "--tokenizer.network.downsampling", "2"]
OBJECTIVE = ["--tokenizer.objective.kind", "logistic", "--tokenizer.objective.context", "4"]
GRIDS = [(2, 3), (4, 6)]
PRIORS = ["transformer", "pixelcnn"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    """A run with two grids, a pixel likelihood with context and a prior of each kind. Pipelines only add to it."""
    run = tmp_path_factory.mktemp("hierarchy") / "run"
    train_tokenizer(["--config", str(tiny_recipe), "--run", str(run), *HIERARCHY, *OBJECTIVE, "--stage1.augmentation", "none"])
    extract_codes(["--run", str(run), "--extraction.augmentation", "horizontal_flip"])
    for kind in PRIORS:
        train_prior(["--run", str(run), "--prior.kind", kind])
    return run


def test_grids_of_stored_codes(run: Path) -> None:
    manifest = read_manifest(run / "codes" / "validation")
    assert (manifest.grids, manifest.num_codes) == (GRIDS, [16, 16])
    store = CodeStore(run / "codes" / "train")
    assert store.manifest.variants == 2
    assert [tuple(level.shape) for level in store.codes(torch.arange(3), torch.tensor([0, 1, 1]))] == [(3, *grid) for grid in GRIDS]


@pytest.mark.parametrize("prior", PRIORS)
def test_samples_do_not_depend_on_the_batch_size(prior: str, run: Path) -> None:
    samples = []
    for batch_size in ("5", "1"):
        sample(["--run", str(run), "--n", "5", "--prior", prior, "--batch-size", batch_size])
        samples.append(load_file(max((run / "samples").iterdir()) / "codes.safetensors"))
    assert [tuple(samples[0][f"level{level}"].shape[1:]) for level in range(2)] == GRIDS
    assert all(torch.equal(samples[0][name], samples[1][name]) for name in samples[0])


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("lossless", [False, True])
def test_compressed_images_are_restored(prior: str, lossless: bool, run: Path, pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "images.vqc"
    options = ["--lossless"] if lossless else []
    compress(["--run", str(run), "--images", str(pictures), "--prior", prior, "--output", str(file), *options])
    decompress(["--run", str(run), "--file", str(file), "--output", str(tmp_path / "back")])
    for path in pictures.rglob("*.png"):
        back = tmp_path / "back" / path.relative_to(pictures)
        assert back.exists()
        assert not lossless or np.array_equal(np.asarray(Image.open(back)), np.asarray(Image.open(path)))


def test_a_mask_of_pixels_keeps_codes_of_both_grids(run: Path, pictures: Path, tmp_path: Path) -> None:
    """An all-white mask gives the reconstruction; the more pixels are black, the more the result differs."""
    mask = np.full((8, 12), 255, np.uint8)
    tokenizer = load_tokenizer(RunDir(run))
    paths = sorted(pictures.rglob("*.png"))[:2]
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths]))
    expected = to_uint8(tokenizer.decode(tokenizer.encode(to_model(pixels)))).int()
    changed = []
    for black in (0, 1, 12):
        mask[: 8 if black == 12 else 1, :black] = 0
        Image.fromarray(mask).save(tmp_path / "mask.png")
        options = ["--mask", str(tmp_path / "mask.png"), "--n", "2", "--continuations", "6", "--prior", "pixelcnn", "--label", "down"]
        complete(["--run", str(run), "--images", *map(str, paths), *options])
        folder = max((run / "completions").iterdir())
        completions = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "images").iterdir())])).int()
        changed.append(float((completions.view(2, 6, 8, 12, 3) - expected[:, None]).abs().float().mean()))
    assert changed[0] < 0.01
    assert changed[0] < changed[1] < changed[2]


def test_reports_add_up_the_bits_of_both_grids(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage1_vqvae.features.classifier._MIN_STEPS", 1)
    anomalies(["--run", str(run)])
    reconstruct(["--run", str(run)])
    evaluate(["--run", str(run), "--features", "classifier", "--n", "8", "--prior", "transformer"])
    bound = read_json(max((run / "evaluations").iterdir()) / "evaluation.json")["bound"]["bits_per_dimension"]
    assert bound["uniform"]["mean"] - bound["pixels"]["mean"] == pytest.approx((6 + 24) * 4 / 288)
    report(["--run", str(run)])
    with Image.open(run / "stage1" / "grids.png") as picture:
        assert picture.height > 3 * 8  # the originals, one grid, both grids
    assert "decoded from the coarsest grid of codes alone" in (run / "report.html").read_text()
    summary(["--run", str(run)])
    assert "2x3 of 16 + 4x6 of 16" in capsys.readouterr().out
    likelihood = read_json(run / "priors" / "transformer" / "likelihood.json")
    levels = [level["validation"] for level in likelihood["levels"]]
    assert likelihood["validation"] == pytest.approx((6 * levels[0] + 24 * levels[1]) / 30)


def test_resuming_is_bit_exact(tiny_recipe: Path, tmp_path: Path) -> None:
    """From a checkpoint, as if killed there."""
    settings = ["--config", str(tiny_recipe), *HIERARCHY, *OBJECTIVE, "--stage1.steps", "40", "--stage1.checkpoint_interval", "20"]
    complete, stopped = tmp_path / "complete", tmp_path / "stopped"
    train_tokenizer([*settings, "--run", str(complete)])
    shutil.copytree(complete, stopped)
    (stopped / "tokenizer.safetensors").unlink()
    max((stopped / "stage1" / "checkpoints").iterdir()).unlink()
    train_tokenizer([*settings, "--run", str(stopped), "--resume"])
    assert (stopped / "tokenizer.safetensors").read_bytes() == (complete / "tokenizer.safetensors").read_bytes()


def test_sizes_indivisible_by_the_coarsest_grid_are_refused(tiny_recipe: Path, one_line_error: Callable[..., str]) -> None:
    line = one_line_error(train_tokenizer, "--config", tiny_recipe, *HIERARCHY, "--tokenizer.network.factors", "[4]")
    assert "8" in line
    assert "data.width" in line
