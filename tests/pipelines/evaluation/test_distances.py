"""Distances and neighbours, compared with other implementations of the same formulas."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import _compute_fid

from pipelines.evaluation.distances import Reference, inception_score, mean_with_interval, nearest, nearest_codes, neighbourhoods


def two_sets(first: int = 60, second: int = 80, width: int = 6) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=draws)
    return torch.randn(first, width, generator=draws) @ mixing, 1.3 * torch.randn(second, width, generator=draws) @ mixing + 0.5


def test_frechet_distance_equals_that_of_other_libraries() -> None:
    first, second = (features.double() for features in two_sets())
    covariances = [np.cov(features.numpy(), rowvar=False) for features in (first, second)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    by_hand = (first.mean(0) - second.mean(0)).square().sum().item() + np.trace(covariances[0] + covariances[1] - 2 * root)
    by_torchmetrics = _compute_fid(first.mean(0), first.T.cov(), second.mean(0), second.T.cov()).item()
    distance = Reference(two_sets()[1]).frechet(two_sets()[0])
    assert distance == pytest.approx(by_hand, rel=1e-3)
    assert distance == pytest.approx(by_torchmetrics, rel=1e-3)
    assert Reference(first).frechet(first) == pytest.approx(0, abs=1e-6)


def test_parts_are_disjoint_and_representative() -> None:
    """The samples' labels alternate, so that every fifth sample would have only a few labels."""
    labels = torch.arange(500) % 5
    samples = torch.randn(500, 5, generator=torch.Generator().manual_seed(1)) + 10 * torch.nn.functional.one_hot(labels, 5)
    reference = Reference(samples)
    every_fifth, all_samples = reference.frechet(samples[::5]), reference.frechet(samples)
    spread = reference.frechet_of_parts(samples, seed=0)
    assert every_fifth is not None
    assert all_samples is not None
    assert spread is not None
    assert every_fifth > 50
    assert all_samples < spread.mean < 5
    assert spread.deviation > 0
    assert spread == Reference(samples).frechet_of_parts(samples, seed=0)


def test_kernel_distance_is_the_unbiased_estimate() -> None:
    """With subsets as large as the sets, all subsets are the same and the estimate is the plain one."""
    first, second = two_sets(50, 50)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / a.shape[1] + 1) ** 3

    n = len(first)
    within = [(kernel(x, x).sum() - kernel(x, x).trace()) / (n * (n - 1)) for x in (first, second)]
    estimate = Reference(second).kernel(first, seed=0)
    assert estimate is not None
    assert estimate.mean == pytest.approx(float(within[0] + within[1] - 2 * kernel(first, second).mean()), rel=1e-6)
    assert estimate.deviation == pytest.approx(0, abs=1e-6)


def brute_radii(points: np.ndarray, k: int) -> np.ndarray:
    return np.array([np.sort(np.linalg.norm(points - point, axis=1))[k] for point in points])


def test_precision_recall_density_and_coverage_count_balls() -> None:
    samples, reference = two_sets()
    generated, real = samples.numpy(), reference.numpy()
    real_radii, generated_radii = brute_radii(real, 3), brute_radii(generated, 3)
    precision = np.mean([(np.linalg.norm(real - point, axis=1) <= real_radii).any() for point in generated])
    recall = np.mean([(np.linalg.norm(generated - point, axis=1) <= generated_radii).any() for point in real])
    assert Reference(reference).precision_recall(samples) == pytest.approx((precision, recall))
    assert precision != recall
    real_radii = brute_radii(real, 5)
    inside = np.array([np.linalg.norm(real - point, axis=1) < real_radii for point in generated])
    assert Reference(reference).density_coverage(samples) == pytest.approx((inside.sum() / (5 * len(generated)), inside.any(0).mean()))


def test_coverage_does_not_depend_on_the_number_of_samples() -> None:
    """Without subsets of equal size, coverage would be 0.2 to 0.9."""
    draws = torch.Generator().manual_seed(0)
    sets = {str(count): torch.randn(count, 8, generator=draws) for count in (100, 500, 2000)}
    reference = torch.randn(2000, 8, generator=draws)
    unequal = [(Reference(reference).density_coverage(vectors) or (0, 0))[1] for vectors in sets.values()]
    assert unequal[0] < 0.3 < 0.8 < unequal[2]
    equal = neighbourhoods(sets, reference, 0)
    assert equal["n"] == 100
    for key, margin in (("coverage", 0.05), ("recall", 0.2), ("precision", 0.2)):
        figures = [equal["sets"][name][key] for name in sets]
        assert max(figures) - min(figures) < margin, (key, figures)
    plain = (Reference(sets["500"]).precision_recall(reference[:500]), Reference(sets["500"]).density_coverage(reference[:500]))
    single = neighbourhoods({"": reference[:500]}, sets["500"], 0)["sets"][""]
    assert ((single["precision"], single["recall"]), (single["density"], single["coverage"])) == plain


def test_a_set_against_itself_and_against_a_shifted_copy() -> None:
    first, _ = two_sets()
    reference = Reference(first)
    assert reference.precision_recall(first) == (1, 1)
    assert (reference.density_coverage(first) or (0, 0))[1] == 1
    assert reference.precision_recall(first + 100) == (0, 0)
    assert reference.density_coverage(first + 100) == (0, 0)


def test_precision_and_recall_equal_torch_fidelitys() -> None:
    samples, reference = two_sets(300, 200)
    other = prc_features_to_metric(samples, reference, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False)
    assert Reference(reference).precision_recall(samples) == pytest.approx((other["precision"], other["recall"]), rel=1e-3)


@pytest.mark.parametrize(("images", "reference"), [(1, 50), (50, 1), (3, 50), (50, 3), (50, 5), (2, 2)])
def test_too_few_vectors_give_no_figure_and_no_error(images: int, reference: int) -> None:
    first, second = two_sets(images, reference)
    target = Reference(second)
    assert (target.frechet(first) is None) == (min(images, reference) < 2)
    assert (target.kernel(first, 0) is None) == (min(images, reference) < 2)
    assert (target.precision_recall(first) is None) == (min(images, reference) < 4)
    assert (target.density_coverage(first) is None) == (reference < 6)
    assert (target.frechet_of_parts(first, 0) is None) == (images < 10 or reference < 2)
    assert inception_score(first, 0).mean > 0.99


def test_a_copy_is_found_at_distance_zero_among_far_vectors() -> None:
    """A search by matrix products alone would be off by the rounding of large squares."""
    reference = torch.randn(500, 2048, generator=torch.Generator().manual_seed(0)) * 0.01 + 100
    neighbours = nearest(reference[::50], reference, 1)
    assert torch.equal(neighbours.rows[:, 0], torch.arange(0, 500, 50))
    assert neighbours.distances.eq(0).all()


def test_inception_score_counts_the_labels_in_use() -> None:
    sure = 50 * torch.nn.functional.one_hot(torch.arange(4000) % 8, 8).float()
    assert inception_score(sure, seed=0).mean == pytest.approx(8, rel=0.02)
    assert inception_score(torch.zeros(100, 8), seed=0).mean == pytest.approx(1)


@pytest.mark.parametrize("count", [5, 2000])
def test_neighbours_are_the_nearest(count: int) -> None:
    queries, reference = two_sets(count, 300)
    neighbours = nearest(queries, reference, 3)
    distances = np.linalg.norm(queries.numpy()[:, None] - reference.numpy(), axis=2)
    assert np.allclose(neighbours.distances.numpy(), np.sort(distances)[:, :3], atol=1e-4)
    assert np.allclose(np.take_along_axis(distances, neighbours.rows.numpy(), 1), neighbours.distances.numpy(), atol=1e-4)


@pytest.mark.parametrize("blocks", [1, 7, 30])
def test_neighbours_by_codes_count_positions(blocks: int) -> None:
    draws = torch.Generator().manual_seed(0)
    queries, reference = torch.randint(4, (7, 10), generator=draws), torch.randint(4, (30, 10), generator=draws)
    neighbours = nearest_codes(queries, reference.split(blocks), 2)
    other = np.array([[np.mean(a != b) for b in reference.numpy()] for a in queries.numpy()])
    assert np.allclose(neighbours.distances.numpy(), np.sort(other)[:, :2])
    assert np.allclose(np.take_along_axis(other, neighbours.rows.numpy(), 1), neighbours.distances.numpy())
    assert nearest_codes(reference[3:4], [reference], 1).distances.item() == 0


def test_intervals_equal_those_of_scipy() -> None:
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).exp()
    mean, low, high = mean_with_interval(values, seed=0)
    other = scipy.stats.bootstrap((values.numpy(),), np.mean, n_resamples=5000, method="percentile").confidence_interval
    assert mean == pytest.approx(float(values.mean()), rel=1e-6)
    width = float(other.high - other.low)
    assert low == pytest.approx(float(other.low), abs=0.1 * width)
    assert high == pytest.approx(float(other.high), abs=0.1 * width)
