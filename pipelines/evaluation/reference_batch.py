"""Reference batches of ADM's evaluation (Dhariwal and Nichol 2021), and metrics by its definitions.

https://github.com/openai/guided-diffusion/tree/main/evaluations. A batch is an npz file with images, `arr_0`, uint8 (N, H, W, 3), or
statistics of Inception features over a whole data set, or both: `mu`, `sigma` of the pooled features, `mu_s`, `sigma_s` of sFID's.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError, listed
from pipelines.evaluation.distances import Gaussian, Moments, Reference, adm_inception_score
from pipelines.evaluation.npz import array_in, names_in
from stage1_vqvae.features.networks import POOLED, SPATIAL, Features
from training.devices import float64_device

OPTION = "--reference"
IMAGES = "arr_0"
_MEAN, _COVARIANCE, _SPATIAL_MEAN, _SPATIAL_COVARIANCE = STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


class ReferenceBatch(NamedTuple):
    """Images and statistics of an ADM reference batch."""

    path: Path
    images: Tensor | None
    """uint8 (N, H, W, C), memory-mapped; None: the file has only statistics."""
    pooled: Gaussian | None
    """Gaussian of Inception's pooled features, on the CPU."""
    spatial: Gaussian | None
    """Gaussian of sFID's spatial features, on the CPU."""
    sha256: str | None
    """Hash of the statistics; None: there are none."""

    def contents(self) -> str:
        """Summarise the contents, for the report."""
        contents = [] if self.images is None else [f"{len(self.images)} images"]
        if self.sha256 is not None:
            names = STATISTICS if self.spatial is not None else STATISTICS[:2]
            contents.append(f"statistics {', '.join(names)}, sha256 {self.sha256[:16]}")
        return " and ".join(contents)

    def missing(self) -> list[str]:
        """Return one note per metric that needs more than this file contains."""
        lines = []
        if self.images is None:
            lines.append(f"Precision and recall: not computed; they take the reference's images ({IMAGES}), and {self.path.name} has none.")
        if self.pooled is not None and self.spatial is None:
            absent = f"{_SPATIAL_MEAN} and {_SPATIAL_COVARIANCE}"
            lines.append(f"sFID: not computed; it takes {absent} where there are {_MEAN} and {_COVARIANCE}, and {self.path.name} has none.")
        return lines


def load_reference_batch(path: Path, image_shape: tuple[int, int, int], widths: tuple[int, int] = (POOLED, SPATIAL)) -> ReferenceBatch:
    """Load a reference batch from an npz file.

    Args:
        path: the file.
        image_shape: (H, W, C) of the run's images, and required of the batch.
        widths: widths of the pooled and of the spatial features.
    Errors: UserError if the file is no npz, has images or statistics of another shape or type, or a mean without its covariance.
    """
    names = names_in(path, OPTION)
    for mean, covariance in (STATISTICS[:2], STATISTICS[2:]):
        if (mean in names) != (covariance in names):
            present, absent = (mean, covariance) if mean in names else (covariance, mean)
            raise UserError(f"{OPTION} {path}: expected {absent} beside {present}, found none")
    if _SPATIAL_MEAN in names and _MEAN not in names:
        raise UserError(f"{OPTION} {path}: expected {_MEAN} and {_COVARIANCE} beside {_SPATIAL_MEAN}, found none")
    if IMAGES not in names and _MEAN not in names:
        expected = f"{IMAGES} (images), or {_MEAN} and {_COVARIANCE} (statistics)"
        raise UserError(f"{OPTION} {path}: expected {expected}, found {listed(sorted(names))}")
    digest = hashlib.sha256()
    pooled = _gaussian(path, _MEAN, _COVARIANCE, widths[0], digest) if _MEAN in names else None
    spatial = _gaussian(path, _SPATIAL_MEAN, _SPATIAL_COVARIANCE, widths[1], digest) if _SPATIAL_MEAN in names else None
    images = _images(path, image_shape) if IMAGES in names else None
    return ReferenceBatch(path, images, pooled, spatial, None if pooled is None else digest.hexdigest())


def _images(path: Path, image_shape: tuple[int, int, int]) -> Tensor:
    array = array_in(path, IMAGES, OPTION)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != image_shape or len(array) < 2:
        expected = f"uint8 (N, {', '.join(map(str, image_shape))}), as the run's images, of at least 2"
        raise UserError(f"{OPTION} {path}: expected {IMAGES} as {expected}, found {array.dtype} {array.shape}")
    return torch.from_numpy(array)


def _gaussian(path: Path, mean: str, covariance: str, width: int, digest: Any) -> Gaussian:
    """Load the Gaussian stored under these two names and add it to the digest."""
    arrays = []
    for name, shape in ((mean, (width,)), (covariance, (width, width))):
        array = array_in(path, name, OPTION)
        if array.shape != shape or array.dtype not in (np.float32, np.float64):
            raise UserError(f"{OPTION} {path}: expected {name} as float64 or float32 {shape}, found {array.dtype} {array.shape}")
        values = torch.from_numpy(np.array(array, np.float64, order="C"))
        if not values.isfinite().all():
            raise UserError(f"{OPTION} {path}: expected finite numbers in {name}, found others")
        digest.update(values.numpy().tobytes())
        arrays.append(values)
    if not torch.allclose(arrays[1], arrays[1].T, rtol=1e-4, atol=1e-8):
        raise UserError(f"{OPTION} {path}: expected a symmetric matrix in {covariance}, found another")
    return Gaussian(*arrays)


class BatchComparison:
    """Metrics of image sets against a reference batch, as ADM's evaluation defines them.

    A metric is None if there are too few images, or if the file lacks the images or statistics for it.
    """

    def __init__(self, batch: ReferenceBatch, features: Features | None, moments: Moments | None, device: torch.device) -> None:
        """
        Args:
            batch: the reference batch. Its statistics take precedence over those of its images, which may be a subset of the data set.
            features: features of the batch's images; None: it has no images.
            moments: moments of their spatial features.
            device: device of the computations.
        """
        self._device = device
        pooled, spatial = batch.pooled, batch.spatial
        if pooled is None and features is not None and moments is not None:
            pooled, spatial = Moments.of(features.vectors, device).gaussian(), moments.gaussian()
        self._pooled, self._spatial = (None if gaussian is None else _moved(gaussian, device) for gaussian in (pooled, spatial))
        self._reference = None if features is None else Reference(features.vectors, device)

    def figures(self, images: Features, moments: Moments | None) -> dict[str, Any]:
        """Compute all metrics of one image set from its features and, if known, the moments of its spatial features."""
        pooled = Moments.of(images.vectors, self._device).gaussian()
        precision, recall = (None if self._reference is None else self._reference.precision_recall(images.vectors)) or (None, None)
        return {
            "n": len(images.vectors),
            "frechet": _frechet(self._pooled, pooled),
            "spatial_frechet": _frechet(self._spatial, None if moments is None else moments.gaussian()),
            "class_score": adm_inception_score(images.logits),
            "precision": precision,
            "recall": recall,
        }


def _moved(gaussian: Gaussian, device: torch.device) -> Gaussian:
    device = float64_device(device)
    return Gaussian(gaussian.mean.to(device), gaussian.covariance.to(device))


def _frechet(reference: Gaussian | None, images: Gaussian | None) -> float | None:
    return None if reference is None or images is None else reference.frechet(images)
