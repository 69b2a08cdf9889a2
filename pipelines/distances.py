"""Distances between two sets of feature vectors, and neighbours: thin functions, by torch-fidelity where it has them.

All take float tensors (N, D) on the CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stage1_vqvae.training.randomness import generator

# Of the k-th neighbour's ball: as in the papers, for precision and recall, and for density and coverage.
_PRECISION_K, _DENSITY_K = 3, 5
# Of the kernel distance, as published: the mean over so many subsets of so many vectors.
_SUBSETS, _SUBSET_SIZE = 100, 1000
# Splits of the inception score, as published.
_SPLITS = 10
PARTS = 5
"""Disjoint parts of the samples for the spread of a Fréchet distance."""
# Vectors whose distances to all others are held at once.
_BLOCK = 1024


class Spread(NamedTuple):
    """Mean and standard deviation over parts."""

    mean: float
    deviation: float


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Between Gaussians with the sets' means and covariances (Heusel et al. 2017, equation 6)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(features.double()) for features in (first, second)]
    return max(0.0, fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def frechet_of_parts(samples: Tensor, reference: Tensor, seed: int) -> Spread:
    """`frechet_distance` of disjoint random parts of the samples, each to the whole reference.

    Resampling with repetition would shrink the covariances and so bias the distance upward; parts are merely small, which
    biases it upward too, but by the same in each: their spread says how sure a distance is, not their mean.
    """
    # Not every fifth: labels take turns, so a part would have some labels alone.
    order = torch.randperm(len(samples), generator=generator(seed, "parts"))
    found = np.array([frechet_distance(samples[rows], reference) for rows in order.tensor_split(PARTS)])
    return Spread(float(found.mean()), float(found.std(ddof=1)))


def kernel_distance(samples: Tensor, reference: Tensor, seed: int) -> Spread:
    """The squared maximum mean discrepancy under a cubic kernel (Binkowski et al. 2018), over random subsets."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(_SUBSET_SIZE, len(samples), len(reference))
    settings = {"kid_subsets": _SUBSETS, "kid_subset_size": size, "rng_seed": seed, "verbose": False}
    found = kid_features_to_metric(samples.double(), reference.double(), **settings)
    return Spread(found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD])


def precision_recall(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """The shares of samples among the reference, and of the reference among the samples (Kynkaanniemi et al. 2019), k = 3."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    settings = {"prc_neighborhood": _PRECISION_K, "prc_batch_size": _BLOCK, "save_cpu_ram": True, "verbose": False}
    found = prc_features_to_metric(samples, reference, **settings)
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def density_coverage(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """How many of the reference's balls a sample lies in, over k; the share of balls with a sample in them (Naeem et al.
    2020, equations 4 and 5), k = 5.
    """
    # The nearest is the vector itself.
    radii = nearest(reference, reference, _DENSITY_K + 1).distances[:, -1]
    inside, covered = 0, torch.zeros(len(reference), dtype=torch.bool)
    for block in samples.split(_BLOCK):
        within = torch.cdist(block, reference) < radii
        inside += int(within.sum())
        covered |= within.any(0)
    return inside / (_DENSITY_K * len(samples)), float(covered.double().mean())


def inception_score(logits: Tensor, seed: int) -> Spread:
    """exp of the mean divergence between a sample's labels and all samples' (Salimans et al. 2016), over splits."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(logits, splits=min(_SPLITS, len(logits)), rng_seed=seed)
    return Spread(found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD])


class Neighbours(NamedTuple):
    """The nearest of a reference, nearest first."""

    distances: Tensor
    """(N, k)."""
    rows: Tensor
    """(N, k), in the reference."""


def nearest(queries: Tensor, reference: Tensor, k: int) -> Neighbours:
    """The k nearest of the reference to each query, by Euclidean distance."""
    found = [torch.cdist(block, reference).topk(k, largest=False) for block in queries.split(_BLOCK)]
    return Neighbours(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def nearest_codes(queries: Tensor, reference: Tensor, k: int) -> Neighbours:
    """The same for codes (N, T), by the share of places with another code."""
    found = []
    # Comparisons are held for one block, B x N x T bytes.
    for block in queries.split(max(1, 2**28 // max(1, reference.numel()))):
        different = (block[:, None] != reference).sum(-1).double() / reference.shape[1]
        found.append(different.topk(k, largest=False))
    return Neighbours(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def mean_with_interval(values: Tensor, seed: int, resamples: int = 1000) -> tuple[float, float, float]:
    """The mean of (N,), and the 95 % interval of the bootstrap's means (Efron 1979)."""
    draws = np.random.default_rng(seed)
    array = values.double().numpy()
    means = [array[draws.integers(len(array), size=len(array))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(array.mean()), float(low), float(high)
