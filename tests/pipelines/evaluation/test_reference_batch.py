"""Metrics on ADM's reference batches, compared with their definitions in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import UserError
from pipelines.evaluation.distances import Gaussian, Moments, Reference, adm_inception_score
from pipelines.evaluation.reference_batch import BatchComparison, ReferenceBatch, load_reference_batch
from stage1_vqvae.features.networks import POOLED, SPATIAL, Features

CPU = torch.device("cpu")
CLASSES = 1008
SHAPE = (8, 12, 3)


def frechet_by_definition(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance of vectors (N, D). For covariances A^T A and B^T B, the eigenvalues of the product are the squared singular values
    of A B^T, a matrix no larger than the sets.
    """
    sets = [vectors.astype(np.float64) for vectors in (first, second)]
    means = [vectors.mean(0) for vectors in sets]
    centred = [(vectors - mean) / np.sqrt(len(vectors) - 1) for vectors, mean in zip(sets, means, strict=True)]
    traces = [(vectors**2).sum() for vectors in centred]
    shared = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    return float(((means[0] - means[1]) ** 2).sum() + traces[0] + traces[1] - 2 * shared)


def inception_score_by_definition(logits: np.ndarray, part: int) -> float:
    """Mean over consecutive parts of the images of exp(mean KL(p(y | x) || p(y)))."""
    scores = []
    for start in range(0, len(logits), part):
        block = logits[start : start + part].astype(np.float64)
        shares = np.exp(block - block.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        scores.append(np.exp((shares * (np.log(shares) - np.log(shares.mean(0)))).sum(1).mean()))
    return float(np.mean(scores))


def share_inside(points: np.ndarray, centres: np.ndarray) -> float:
    """Share of points within a ball around some centre, whose radius is the distance to its third nearest other centre."""
    between = np.linalg.norm(centres[:, None] - centres, axis=2)
    radii = np.sort(between + np.diag(np.full(len(centres), np.inf)), axis=1)[:, 2]
    return float((np.linalg.norm(points[:, None] - centres, axis=2) <= radii).any(1).mean())


def random_features(count: int, seed: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pooled features, spatial features and logits of Inception's shapes, with overlapping distributions."""
    draws = np.random.default_rng(seed)
    pooled, spatial = (
        np.abs(draws.standard_normal((count, 5)) @ np.random.default_rng(width).standard_normal((5, width)) + shift)
        + 0.3 * draws.random((count, width))
        for width in (POOLED, SPATIAL)
    )
    return pooled.astype(np.float32), spatial.astype(np.float32), (4 * draws.standard_normal((count, CLASSES))).astype(np.float32)


def accumulate(vectors: np.ndarray) -> Moments:
    moments = Moments(CPU)
    for block in torch.from_numpy(vectors).split(7):
        moments.add(block)
    return moments


def batch(pooled: Gaussian | None, spatial: Gaussian | None) -> ReferenceBatch:
    return ReferenceBatch(Path("reference.npz"), None, pooled, spatial, None)


def features(vectors: np.ndarray, logits: np.ndarray) -> Features:
    return Features(torch.from_numpy(vectors), torch.from_numpy(logits))


def test_metrics_at_inceptions_shapes_agree_with_their_definitions() -> None:
    reference, samples = random_features(40, 0), random_features(50, 1, shift=0.2)
    comparison = BatchComparison(batch(None, None), features(reference[0], reference[2]), accumulate(reference[1]), CPU)
    figures = comparison.figures(features(samples[0], samples[2]), accumulate(samples[1]))
    assert figures["n"] == 50
    assert figures["frechet"] == pytest.approx(frechet_by_definition(reference[0], samples[0]), rel=1e-4)
    assert figures["spatial_frechet"] == pytest.approx(frechet_by_definition(reference[1], samples[1]), rel=1e-4)
    assert figures["class_score"] == pytest.approx(inception_score_by_definition(samples[2], 5000), rel=1e-6)
    assert figures["precision"] == share_inside(samples[0], reference[0])
    assert figures["recall"] == share_inside(reference[0], samples[0])
    assert 0 < figures["precision"] != figures["recall"] > 0


def small(count: int, seed: int, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32) * (1 + seed) + seed


def test_statistics_of_the_file_take_precedence_over_those_of_its_images() -> None:
    """The statistics cover a full data set; the images, used for precision and recall, are a part of it."""
    full, part, samples = small(200, 0), small(200, 0)[:20], small(30, 1)
    logits = np.zeros((30, 3), np.float32)
    statistics = accumulate(full).gaussian()
    comparison = BatchComparison(batch(statistics, statistics), features(part, part), accumulate(part), CPU)
    figures = comparison.figures(features(samples, logits), accumulate(samples))
    assert figures["frechet"] == figures["spatial_frechet"] == pytest.approx(frechet_by_definition(full, samples), rel=1e-6)
    assert (figures["precision"], figures["recall"]) == (share_inside(samples, part), share_inside(part, samples))
    assert figures["class_score"] == pytest.approx(1)


def test_missing_images_or_spatial_statistics_leave_metrics_out_with_a_note() -> None:
    pooled = accumulate(small(20, 0)).gaussian()
    pooled_only = batch(pooled, None)
    figures = BatchComparison(pooled_only, None, None, CPU).figures(features(small(9, 1), small(9, 1)), accumulate(small(9, 1)))
    assert figures["frechet"] > 0
    assert (figures["spatial_frechet"], figures["precision"], figures["recall"]) == (None, None, None)
    assert [line.split(":")[0] for line in pooled_only.missing()] == ["Precision and recall", "sFID"]
    assert [line.split(":")[0] for line in batch(pooled, pooled).missing()] == ["Precision and recall"]


@pytest.mark.parametrize("sizes", [(1, 2), (50,), (30, 1, 19), (1,) * 50])
def test_moments_agree_with_numpy_for_any_batch_sizes(sizes: tuple[int, ...]) -> None:
    vectors = small(sum(sizes), 3, width=4) + 1000  # far from zero, where sums of squares would cancel
    moments = Moments(CPU)
    for block in torch.from_numpy(vectors).split(list(sizes)):
        moments.add(block)
    gaussian = moments.gaussian()
    assert gaussian is not None
    assert np.allclose(gaussian.mean, vectors.mean(0, dtype=np.float64), rtol=1e-12)
    assert np.allclose(gaussian.covariance, np.cov(vectors.astype(np.float64), rowvar=False), rtol=1e-9)


def test_one_vector_has_no_covariance() -> None:
    assert accumulate(small(1, 0)).gaussian() is None
    assert Moments.of(torch.empty(0, 3), CPU).gaussian() is None


@pytest.mark.parametrize(("first", "second"), [(60, 80), (4, 80), (4, 3)])
def test_accelerators_compute_the_fréchet_distance_of_a_cpu(first: int, second: int) -> None:
    """Also where there are fewer vectors than dimensions."""
    vectors = [torch.from_numpy(small(count, seed)) for seed, count in enumerate((first, second))]
    gaussians = [Moments.of(one_set, CPU).gaussian() for one_set in vectors]
    assert gaussians[0] is not None
    assert gaussians[1] is not None
    assert gaussians[0].frechet(gaussians[1]) == pytest.approx(Reference(vectors[0]).frechet(vectors[1]), rel=1e-6)
    assert gaussians[0].frechet(gaussians[0]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("part", [1, 7, 20, 100])
def test_the_ordered_inception_score_takes_consecutive_parts(part: int) -> None:
    logits = np.random.default_rng(0).standard_normal((20, 9)).astype(np.float32) * 5
    assert adm_inception_score(torch.from_numpy(logits), part) == pytest.approx(inception_score_by_definition(logits, part))
    sure = 200 * torch.eye(8).repeat(5, 1)  # probabilities underflow to zero
    assert adm_inception_score(sure, 40) == pytest.approx(8)


def test_files_are_read_back(tmp_path: Path) -> None:
    images, vectors = np.random.default_rng(0).integers(0, 256, (5, *SHAPE), dtype=np.uint8), small(20, 0)
    statistics = {"mu": vectors.mean(0), "sigma": np.cov(vectors, rowvar=False)}
    spatial = {"mu_s": vectors.mean(0)[:4], "sigma_s": np.cov(vectors, rowvar=False)[:4, :4].astype(np.float32)}
    np.savez(tmp_path / "all.npz", arr_0=images, **statistics, **spatial)
    loaded = load_reference_batch(tmp_path / "all.npz", SHAPE, (6, 4))
    assert loaded.images is not None
    assert loaded.pooled is not None
    assert loaded.spatial is not None
    assert np.array_equal(loaded.images, images)
    assert np.array_equal(loaded.pooled.mean, statistics["mu"])
    assert np.array_equal(loaded.pooled.covariance, statistics["sigma"])
    assert np.array_equal(loaded.spatial.covariance, spatial["sigma_s"])
    assert loaded.missing() == []
    assert loaded.contents().startswith("5 images and statistics mu, sigma, mu_s, sigma_s, sha256 ")
    np.savez(tmp_path / "images.npz", images)
    assert load_reference_batch(tmp_path / "images.npz", SHAPE, (6, 4)).contents() == "5 images"
    np.savez(tmp_path / "statistics.npz", **statistics)
    assert load_reference_batch(tmp_path / "statistics.npz", SHAPE, (6, 4)).contents().startswith("statistics mu, sigma, sha256 ")


GOOD: dict[str, Any] = {"mu": np.zeros(6), "sigma": np.eye(6), "mu_s": np.zeros(4), "sigma_s": np.eye(4)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"expected arr_0 \(images\), or mu and sigma \(statistics\), found none"),
        ({"images": np.zeros(3)}, "or mu and sigma .* found images"),
        ({"mu": np.zeros(6)}, "expected sigma beside mu, found none"),
        ({"sigma_s": np.eye(4)}, "expected mu_s beside sigma_s, found none"),
        ({"mu_s": np.zeros(4), "sigma_s": np.eye(4)}, "expected mu and sigma beside mu_s, found none"),
        ({**GOOD, "mu": np.zeros(5)}, r"expected mu as float64 or float32 \(6,\), found float64 \(5,\)"),
        ({**GOOD, "sigma": np.eye(6, dtype=int)}, r"expected sigma as float64 or float32 \(6, 6\), found int64 \(6, 6\)"),
        ({**GOOD, "sigma_s": np.full((4, 4), np.nan)}, "expected finite numbers in sigma_s"),
        ({**GOOD, "sigma": np.triu(np.ones((6, 6)))}, "expected a symmetric matrix in sigma"),
        ({**GOOD, "mu": np.array([None] * 6)}, "expected an npz file with mu, found: mu of pickled objects"),
        ({**GOOD, "arr_0": np.zeros((3, 8, 8, 3), np.uint8)}, r"arr_0 as uint8 \(N, 8, 12, 3\).* found uint8 \(3, 8, 8, 3\)"),
        ({**GOOD, "arr_0": np.zeros((3, *SHAPE))}, r"arr_0 as uint8 \(N, 8, 12, 3\).* found float64"),
        ({**GOOD, "arr_0": np.zeros((1, *SHAPE), np.uint8)}, r"of at least 2, found uint8 \(1, 8, 12, 3\)"),
    ],
)
def test_invalid_files_are_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "reference.npz", **content)
    with pytest.raises(UserError, match=rf"--reference .*reference\.npz: .*{message}"):
        load_reference_batch(tmp_path / "reference.npz", SHAPE, (6, 4))
