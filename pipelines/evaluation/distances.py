"""Distances between sets of feature vectors, and nearest neighbours.

Vectors are float tensors (N, D) on the CPU; expensive parts run on a device, with full float32 products.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.devices import float64_device
from training.precision import ieee_float32
from training.randomness import generator

# Number of the neighbour that sets a ball's radius, for precision and recall and for density and coverage, as in the papers.
_PRECISION_K, _DENSITY_K = 3, 5
# Subsets of the kernel distance, and vectors in each, as published.
_SUBSETS, _SUBSET_SIZE = 100, 1000
# Splits of the inception score, as published.
_SPLITS = 10
# Largest number of vectors per set for precision, recall, density and coverage, which take all pairwise distances.
_NEIGHBOURHOODS = 10_000
PARTS = 5
"""Disjoint parts of the images for the spread of a Fréchet distance."""
# Vectors per block of distances, and most distances in memory: 256 MiB.
_BLOCK, _DISTANCES = 1024, 2**26


class Spread(NamedTuple):
    """Mean and standard deviation over parts."""

    mean: float
    deviation: float


class Neighbours(NamedTuple):
    """Nearest vectors of a reference, nearest first."""

    distances: Tensor
    """Their distances, (N, k)."""
    rows: Tensor
    """Their rows in the reference, (N, k)."""


class Moments:
    """Running mean and covariance of vectors, accumulated batch by batch in float64."""

    def __init__(self, device: torch.device) -> None:
        """`device`: where to accumulate."""
        self._device, self._count = float64_device(device), 0
        self._mean = self._scatter = torch.zeros((), dtype=torch.float64, device=self._device)

    def add(self, vectors: Tensor) -> None:
        """Add a batch (B, D) (Chan et al. 1979, "Updating formulae and a pairwise algorithm for computing sample variances")."""
        if not len(vectors):
            return
        vectors = vectors.to(self._device).double()
        mean = vectors.mean(0)
        centred, step = vectors - mean, mean - self._mean
        total = self._count + len(vectors)
        between = self._count * len(vectors) / total
        self._scatter = self._scatter + centred.T @ centred + between * torch.outer(step, step)
        self._mean = self._mean + step * (len(vectors) / total)
        self._count = total

    def gaussian(self) -> Gaussian | None:
        """Return the Gaussian with this mean and covariance (over N - 1); None for fewer than two vectors."""
        return None if self._count < 2 else Gaussian(self._mean, self._scatter / (self._count - 1))

    @classmethod
    def of(cls, vectors: Tensor, device: torch.device) -> Moments:
        """Compute the moments of vectors (N, D)."""
        moments = cls(device)
        for block in vectors.split(_BLOCK):
            moments.add(block)
        return moments


class Gaussian:
    """Multivariate Gaussian with mean (D,) and covariance (D, D), float64."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean, self.covariance = mean, covariance

    @cached_property
    def _root(self) -> Tensor:
        """Square root R of the covariance, R R^T."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp(min=0).sqrt()

    def frechet(self, other: Gaussian) -> float:
        """Compute |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, equation 6; Dowson and Landau 1982).

        S1 S2 has the eigenvalues of the symmetric matrix R^T S2 R, where S1 = R R^T; R is computed once per Gaussian.
        """
        inner = self._root.T @ other.covariance @ self._root
        shared = torch.linalg.eigvalsh(inner).clamp(min=0).sqrt().sum()
        distance = (self.mean - other.mean).square().sum() + self.covariance.trace() + other.covariance.trace() - 2 * shared
        return max(0.0, float(distance))


class Reference:
    """Reference set of vectors, with its statistics computed once, on first use.

    A figure is None if either set has too few vectors for it.
    """

    def __init__(self, vectors: Tensor, device: torch.device | str = "cpu", gaussian: Gaussian | None = None) -> None:
        """`gaussian`: Gaussian of a larger set that `vectors` were drawn from; None: computed from `vectors`."""
        self.vectors, self.device, self._given_gaussian = vectors, torch.device(device), gaussian

    @cached_property
    def _gaussian(self) -> Gaussian | None:
        return self._given_gaussian or Moments.of(self.vectors, self.device).gaussian()

    @cached_property
    def _radii(self) -> Tensor:
        """Distances of each vector to its nearest others, (N, k)."""
        return _radii(self.vectors, max(_PRECISION_K, _DENSITY_K), self.device)

    def frechet(self, images: Tensor) -> float | None:
        """Compute the Fréchet distance between Gaussians with the sets' means and covariances (Heusel et al. 2017, equation 6)."""
        gaussian = Moments.of(images, self.device).gaussian()
        return None if self._gaussian is None or gaussian is None else self._gaussian.frechet(gaussian)

    def frechet_of_parts(self, images: Tensor, seed: int) -> Spread | None:
        """Compute `frechet` of disjoint random parts of the images, each to the complete reference.

        Bootstrap resampling would shrink the covariances and so bias the distance upward. Small parts bias it upward too, but all by the
        same amount: their spread measures the uncertainty of the distance, their mean does not estimate it.
        """
        # Random, since labels take turns and every fifth image would have few labels.
        order = torch.randperm(len(images), generator=generator(seed, "parts"))
        distances = [self.frechet(images[rows]) for rows in order.tensor_split(PARTS)]
        values = [value for value in distances if value is not None]
        return Spread(float(np.mean(values)), float(np.std(values, ddof=1))) if len(values) == PARTS else None

    def kernel(self, images: Tensor, seed: int) -> Spread | None:
        """Compute the squared maximum mean discrepancy under a cubic kernel (Binkowski et al. 2018), over random subsets."""
        from torch_fidelity.metric_kid import kernel_mmd

        size = min(_SUBSET_SIZE, len(images), len(self.vectors))
        if size < 2:
            return None
        draws, distances = np.random.RandomState(seed), []
        for _ in range(_SUBSETS):
            # Convert to float64 per subset: converting all vectors would take twice their memory.
            pair = [vectors[draws.choice(len(vectors), size, replace=False)] for vectors in (images, self.vectors)]
            distances.append(kernel_mmd(*(subset.double().numpy() for subset in pair)))
        return Spread(float(np.mean(distances)), float(np.std(distances)))

    def precision_recall(self, images: Tensor) -> tuple[float, float] | None:
        """Compute precision, the share of images in a ball around any vector of the reference, and recall, the reverse. A ball's radius
        is the distance to its centre's third neighbour (Kynkaanniemi et al. 2019).
        """
        if min(len(images), len(self.vectors)) <= _PRECISION_K:
            return None
        precision = _within(images, self.vectors, self._radii[:, _PRECISION_K - 1], self.device)
        recall = _within(self.vectors, images, _radii(images, _PRECISION_K, self.device)[:, -1], self.device)
        return float((precision > 0).double().mean()), float((recall > 0).double().mean())

    def density_coverage(self, images: Tensor) -> tuple[float, float] | None:
        """Compute density, the number of the reference's balls around an image, divided by k = 5, and coverage, the share of balls with an
        image inside (Naeem et al. 2020, equations 4 and 5).
        """
        if len(self.vectors) <= _DENSITY_K:
            return None
        radii = self._radii[:, _DENSITY_K - 1]
        density = _within(images, self.vectors, radii, self.device).double().mean() / _DENSITY_K
        covered = nearest(self.vectors, images, 1, self.device).distances[:, 0] < radii
        return float(density), float(covered.double().mean())


def neighbourhoods(sets: dict[str, Tensor], reference: Tensor, seed: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Compute precision, recall, density and coverage of sets of vectors. They depend on the number of vectors, so all sets and the
    reference are reduced to the smallest size, at most 10,000: `n`. Null where these are too few.
    """
    count = min(_NEIGHBOURHOODS, *(len(vectors) for vectors in (*sets.values(), reference)))
    real, figures = Reference(reference[random_rows(len(reference), count, seed, "neighbourhoods of the reference")], device), {}
    for name, vectors in sets.items():
        chosen = vectors[random_rows(len(vectors), count, seed, "neighbourhoods")]
        precision, recall = real.precision_recall(chosen) or (None, None)
        density, coverage = real.density_coverage(chosen) or (None, None)
        figures[name] = {"precision": precision, "recall": recall, "density": density, "coverage": coverage}
    return {"n": count, "sets": figures}


def random_rows(count: int, size: int, seed: int, purpose: str) -> Tensor:
    """Draw ascending rows of `size` of `count` images (at most all), a function of seed and purpose."""
    return torch.randperm(count, generator=generator(seed, purpose))[:size].sort().values


def inception_score(logits: Tensor, seed: int) -> Spread:
    """Compute the inception score of logits (N, classes) over splits (Salimans et al. 2016): exp of the mean label divergence."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    score = isc_features_to_metric(logits, splits=min(_SPLITS, len(logits)), rng_seed=seed)
    return Spread(score[KEY_METRIC_ISC_MEAN], score[KEY_METRIC_ISC_STD])


def adm_inception_score(logits: Tensor, part: int = 5000) -> float:
    """Compute ADM's inception score of logits (N, classes): the mean over consecutive parts of `part` images, the last one smaller."""
    scores = []
    for block in logits.split(part):
        log_probabilities = block.double().log_softmax(1)
        probabilities = log_probabilities.exp()
        # KL divergence of each image's labels from the part's marginal; x log x = 0 at x = 0.
        log_marginal = probabilities.mean(0).clamp(min=torch.finfo(torch.float64).tiny).log()
        divergences = (probabilities * log_probabilities).sum(1) - probabilities @ log_marginal
        scores.append(float(divergences.mean().exp()))
    return float(np.mean(scores))


def nearest(queries: Tensor, reference: Tensor, k: int, device: torch.device | str = "cpu") -> Neighbours:
    """Find the k nearest vectors of the reference to each query, by Euclidean distance."""
    rows = torch.cat([block.topk(k, largest=False).indices.cpu() for block in _blocks(queries, reference, device)])
    # The search uses matrix products, whose rounding errors are large for small distances: compute the resulting distances again.
    pairs = zip(queries.split(_BLOCK), rows.split(_BLOCK), strict=True)
    distances = torch.cat([torch.stack([(query - reference[row]).norm(dim=-1) for row in chosen.T], 1) for query, chosen in pairs])
    distances, order = distances.sort(dim=1, stable=True)
    return Neighbours(distances, rows.gather(1, order))


def nearest_codes(queries: Tensor, reference: Iterable[Tensor], k: int, device: torch.device | str = "cpu") -> Neighbours:
    """Find the k nearest code sequences to each query (N, T) by the share of differing positions; the reference comes in blocks (M, T)."""
    best: list[tuple[Tensor, Tensor]] = []
    first = 0
    for codes in reference:
        block = codes.to(device)
        # One comparison takes B x M x T bytes.
        parts = queries.split(max(1, 2**28 // max(1, block.numel())))
        closest = [(part.to(device)[:, None] != block).sum(-1).topk(min(k, len(block)), largest=False) for part in parts]
        best.append((torch.cat([near.values.cpu() for near in closest]), torch.cat([near.indices.cpu() for near in closest]) + first))
        first += len(block)
        numbers, rows = (torch.cat(tensors, 1) for tensors in zip(*best, strict=True))
        numbers, order = numbers.sort(dim=1, stable=True)
        best = [(numbers[:, :k], rows.gather(1, order)[:, :k])]
    ((numbers, rows),) = best
    return Neighbours(numbers.double() / queries.shape[1], rows)


def mean_with_interval(values: Tensor, seed: int, resamples: int = 1000) -> tuple[float, float, float]:
    """Compute the mean of (N,) and the 95 % interval of bootstrap means (Efron 1979)."""
    draws = np.random.default_rng(seed)
    array = values.double().numpy()
    means = [array[draws.integers(len(array), size=len(array))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(array.mean()), float(low), float(high)


def _within(points: Tensor, centres: Tensor, radii: Tensor, device: torch.device | str) -> Tensor:
    """Count the balls around each point, (N,)."""
    return torch.cat([(block <= radii.to(block)).sum(1).cpu() for block in _blocks(points, centres, device)])


def _radii(vectors: Tensor, k: int, device: torch.device | str) -> Tensor:
    """Compute each vector's distances to its k nearest others, (N, k)."""
    # The nearest is the vector itself or a duplicate.
    return nearest(vectors, vectors, min(k + 1, len(vectors)), device).distances[:, 1:]


def _blocks(points: Tensor, others: Tensor, device: torch.device | str) -> Iterator[Tensor]:
    """Yield distances (block, M) of blocks of points to all others, on the device."""
    # Centre the vectors, which minimises rounding.
    centre, device = others.mean(0), torch.device(device)
    moved = (others - centre).to(device)
    size = max(1, min(_BLOCK, _DISTANCES // max(1, len(others))))
    for block in points.split(size):
        with ieee_float32(device):
            distances = torch.cdist((block - centre).to(device), moved)
        yield distances
