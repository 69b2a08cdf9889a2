"""Evaluations of samples and references in npz files, as ADM's evaluator has them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from pipelines import evaluate as evaluation
from pipelines.evaluate import main
from pipelines.evaluation.reference_batch import load_reference_batch
from pipelines.sample import main as sample
from stage1_vqvae.features.networks import FeatureNetwork, Features, Layers
from tests.pipelines.evaluated import CLASSIFIER, evaluated


def small_inception(*_: object, **__: object) -> FeatureNetwork:
    """Stand-in for Inception: linear maps of an image's pixels to 6 features, 3 logits and 5 spatial features."""
    maps = torch.randn(8 * 12 * 3, 14, generator=torch.Generator().manual_seed(0)) / 100

    def spatial(pixels: torch.Tensor) -> tuple[Features, torch.Tensor]:
        vectors, logits, positions = (pixels.flatten(1).float() / 25 @ maps).split([6, 3, 5], 1)
        return Features(vectors, logits), positions

    layers = Layers(torch.nn.Identity(), lambda images: images)
    return FeatureNetwork("inception", "FID", "0" * 64, lambda pixels: spatial(pixels)[0], layers, torch.device("cpu"), spatial=spatial)


@pytest.fixture
def with_small_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "feature_network", small_inception)
    monkeypatch.setattr(evaluation, "load_reference_batch", lambda *arguments: load_reference_batch(*arguments, (6, 5)))


def random_images(count: int, seed: int, brightest: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, brightest, (count, 8, 12, 3), dtype=np.uint8)


@pytest.mark.usefixtures("with_small_inception")
def test_a_reference_file_gives_the_figures_of_adms_evaluator(run_copy: Path, tmp_path: Path) -> None:
    """FID and sFID use the file's statistics, of more images than it contains; precision and recall use its images."""
    real, samples = random_images(200, 0), random_images(30, 1, 200)
    network = small_inception()
    assert network.spatial is not None

    def features(images: np.ndarray) -> list[np.ndarray]:
        assert network.spatial is not None
        (vectors, logits), spatial = network.spatial(torch.from_numpy(images))
        return [vectors.numpy(), spatial.numpy(), logits.numpy()]

    pooled, spatial, _ = features(real)
    statistics = {"mu": pooled.mean(0), "sigma": np.cov(pooled, rowvar=False)}
    statistics |= {"mu_s": spatial.mean(0), "sigma_s": np.cov(spatial, rowvar=False)}
    np.savez(tmp_path / "reference.npz", arr_0=real[:20], **statistics)
    np.savez(tmp_path / "samples.npz", samples)
    content = evaluated(run_copy, "--reference", tmp_path / "reference.npz", "--samples", tmp_path / "samples.npz", "--batch_size", 7)
    figures = content["beside_batch"]["samples"]

    def frechet(first: np.ndarray, second: np.ndarray) -> float:
        covariances = [np.cov(vectors.astype(np.float64), rowvar=False) for vectors in (first, second)]
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
        return float(((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root))

    def inside(points: np.ndarray, centres: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(centres - centre, axis=1))[3] for centre in centres]
        return float(np.mean([(np.linalg.norm(centres - point, axis=1) <= radii).any() for point in points]))

    vectors, positions, logits = features(samples)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert figures["n"] == 30
    assert figures["frechet"] == pytest.approx(frechet(pooled, vectors), rel=1e-4)
    assert figures["spatial_frechet"] == pytest.approx(frechet(spatial, positions), rel=1e-4)
    assert figures["class_score"] == pytest.approx(np.exp((shares * np.log(shares / shares.mean(0))).sum(1).mean()), rel=1e-4)
    assert figures["precision"] == pytest.approx(inside(vectors, features(real[:20])[0]))
    assert figures["recall"] == pytest.approx(inside(features(real[:20])[0], vectors))
    assert set(content["beside_batch"]) == {"samples", "validation, real", "validation, reconstructed", "samples, 12 of them"}
    assert content["beside_batch"]["samples, 12 of them"]["n"] == content["beside_batch"]["validation, real"]["n"]
    assert "distances" not in content
    assert content["memorisation"]["samples"]["n"] == 30
    shown = next(table for table in content["tables"] if "reference.npz" in table["title"])
    assert shown["columns"][2:5] == ["FID", "sFID", "inception score"]
    assert content["compared"]["reference"].startswith("reference.npz: 20 images and statistics mu, sigma, mu_s, sigma_s, sha256 ")
    assert str(tmp_path) not in content["compared"]["reference"]


@pytest.mark.usefixtures("with_small_inception")
def test_a_file_of_statistics_alone_leaves_figures_out_with_notes(run_copy: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(6), sigma=np.eye(6))
    content = evaluated(run_copy, "--reference", tmp_path / "statistics.npz", "--n", 13)
    figures = content["beside_batch"]["samples"]
    assert figures["frechet"] > 0
    assert figures["class_score"] >= 1
    assert [figures[key] for key in ("spatial_frechet", "precision", "recall")] == [None] * 3
    assert 0 <= figures["in_their_class"] <= 1
    for name in ("Precision and recall", "sFID"):
        assert sum(note.startswith(f"{name}: not computed") for note in content["notes"]) == 1
    assert "labels in turns: 6 or 7 of each of 2 classes" in content["compared"]["samples"]


@pytest.mark.usefixtures("with_small_inception")
def test_without_a_prior_reconstructions_are_compared_with_a_file(run_copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(run_copy / "priors")
    np.savez(tmp_path / "images.npz", random_images(20, 0))
    content = evaluated(run_copy, "--reference", tmp_path / "images.npz")
    assert set(content["beside_batch"]) == {"validation, real", "validation, reconstructed"}
    assert content["notes"][-1].startswith("Samples: not evaluated")


def test_samples_are_written_in_adms_layout(run_copy: Path, tmp_path: Path) -> None:
    """ADM's evaluator can read it: arr_0, uint8 (N, H, W, 3), labels in turns."""
    sample(["--run", str(run_copy), "--n", "5", "--npz"])
    with np.load(run_copy / "samples/000/samples.npz", allow_pickle=False) as written:
        assert list(written) == ["arr_0"]
        assert (written["arr_0"].dtype, written["arr_0"].shape) == (np.uint8, (5, 8, 12, 3))
    assert json.loads((run_copy / "samples/000/samples.json").read_text())["labels"] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((4, 8, 8, 3), np.uint8), "expected uint8 (N, 8, 12, 3), found (4, 8, 8, 3)"),
        (np.zeros((4, 8, 12, 3)), "expected arr_0 as uint8 (N, H, W, C), found float64"),
        (np.zeros((1, 8, 12, 3), np.uint8), "expected at least 2 images, found 1"),
    ],
)
def test_an_npz_of_another_size_is_refused(
    array: np.ndarray, expected: str, run_copy: Path, tmp_path: Path, one_line_error: Callable[..., str]
) -> None:
    np.savez(tmp_path / "samples.npz", array)
    assert expected in one_line_error(main, "--run", run_copy, *CLASSIFIER, "--samples", tmp_path / "samples.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"text"])
def test_invalid_npz_files_are_refused(content: bytes, run_copy: Path, tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    (tmp_path / "samples.npz").write_bytes(content)
    assert "expected an npz file" in one_line_error(main, "--run", run_copy, *CLASSIFIER, "--samples", tmp_path / "samples.npz")
    with open(tmp_path / "samples.npz", "wb") as file:
        np.save(file, np.zeros((4, 8, 12, 3), np.uint8))  # an npy under the name of an npz
    assert "expected an npz file" in one_line_error(main, "--run", run_copy, *CLASSIFIER, "--samples", tmp_path / "samples.npz")
