"""Features of a reference split, computed in one pass and cached: moments of all images, vectors of up to 50,000."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.data import LOCAL_KEYS, Data
from configs.parts import as_dict
from pipelines.evaluation.distances import Gaussian, Moments
from stage1_vqvae.data.cache import cache_folder, cached_tensors
from stage1_vqvae.data.device_batches import device_batches
from stage1_vqvae.data.splits import ImageSource, Pixels
from stage1_vqvae.features.networks import FeatureNetwork
from training.devices import float64_device
from training.precision import ieee_float32
from training.progress import progress_bar
from training.randomness import generator

ROWS = 50_000
"""Largest number of images, drawn at random, whose vectors are stored: 400 MB of Inception's. Moments are of all images."""


class ReferenceFeatures(NamedTuple):
    """Features of a reference's images."""

    vectors: Tensor
    """float32 (n, D), of the images `rows`."""
    rows: Tensor
    """(n,), ascending: at most 50,000, the same in every evaluation."""
    gaussian: Gaussian | None
    """Gaussian of all images; None for fewer than two."""
    pixels_sha256: str
    """The `pixels_hash` of all images."""


def pixels_identity(data: Data, source: ImageSource, split: str) -> dict[str, Any]:
    """Return everything that determines a split's pixels, as a cache key."""
    keys = {key: value for key, value in as_dict(data).items() if key not in LOCAL_KEYS}
    return {"data": keys, "split": split, "rows": len(source.splits[split]), "files": source.fingerprints, "skipped": source.skipped}


def reference_features(network: FeatureNetwork, source: ImageSource, split: str, data: Data, batch_size: int) -> ReferenceFeatures:
    """Load a split's features from the image cache, or compute and cache them, so that a later evaluation reads no images."""
    identity = {**pixels_identity(data, source, split), "features": network.name, "weights": network.sha256, "kept": f"features of {ROWS}"}

    def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
        features = one_pass(network, source.splits[split].pixels, split, batch_size)
        moments = {} if features.gaussian is None else {"mean": features.gaussian.mean, "covariance": features.gaussian.covariance}
        return {"vectors": features.vectors, "rows": features.rows, **moments}, {"pixels_sha256": features.pixels_sha256}

    tensors, facts = cached_tensors(cache_folder(data), identity, compute)
    moments_on_device = [tensors[name].to(float64_device(network.device)) for name in ("mean", "covariance") if name in tensors]
    return ReferenceFeatures(
        tensors["vectors"], tensors["rows"], Gaussian(*moments_on_device) if moments_on_device else None, facts["pixels_sha256"]
    )


@torch.no_grad()
def one_pass(network: FeatureNetwork, pixels: Pixels, name: str, batch_size: int, most: int = ROWS) -> ReferenceFeatures:
    """Compute features of images, uint8 (N, H, W, C), reading each once.

    Takes the memory of `most` vectors and a covariance. `name`: name of the images for the progress bar.
    """
    rows = torch.randperm(len(pixels), generator=generator(0, "reference features"))[:most].sort().values
    read, moments, vectors_of_rows = _Hashed(pixels), Moments(network.device), list[Tensor]()
    with progress_bar(len(pixels), f"features of {name}", "img") as bar, ieee_float32(network.device):
        for part, (batch,) in device_batches(network.device, batch_size, read):
            vectors = network.forward(batch).vectors
            moments.add(vectors)
            first, last = torch.searchsorted(rows, torch.tensor([part.start, part.stop])).tolist()
            vectors_of_rows.append(vectors[(rows[first:last] - part.start).to(vectors.device)].float().cpu())
            bar.update(part.stop - part.start)
    return ReferenceFeatures(torch.cat(vectors_of_rows), rows, moments.gaussian(), read.digest.hexdigest())


class _Hashed:
    """Images whose pixels are hashed while they are read in order."""

    def __init__(self, pixels: Pixels) -> None:
        self._pixels, self.shape = pixels, pixels.shape
        self.digest = hashlib.sha256(str(tuple(pixels.shape)).encode())

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        images = self._pixels[rows]
        self.digest.update(images.contiguous().numpy().data)
        return images
