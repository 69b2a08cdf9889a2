"""Features of a reference split, in one pass over its images: moments of all, the vectors of some, kept for later evaluations."""

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
"""Images of a reference at most, drawn at random, whose vectors are kept: 400 MB of Inception's. Its moments are of all images."""


class ReferenceFeatures(NamedTuple):
    """Features of a reference's images."""

    vectors: Tensor
    """float32 (n, D), of the images `rows`."""
    rows: Tensor
    """(n,), ascending: at most 50,000, drawn once and for all."""
    gaussian: Gaussian | None
    """Of all images; None: of fewer than two."""
    pixels_sha256: str
    """Of all images, as `pixels_hash` has it."""


def pixels_identity(data: Data, source: ImageSource, split: str) -> dict[str, Any]:
    """All that decides which pixels a split has."""
    keys = {key: value for key, value in as_dict(data).items() if key not in LOCAL_KEYS}
    return {"data": keys, "split": split, "rows": len(source.splits[split]), "files": source.fingerprints, "skipped": source.skipped}


def reference_features(network: FeatureNetwork, source: ImageSource, split: str, data: Data, batch_size: int) -> ReferenceFeatures:
    """A split's features, from the cache of decoded images, or computed and put there: a later evaluation reads none of its images."""
    identity = {**pixels_identity(data, source, split), "features": network.name, "weights": network.sha256, "kept": f"features of {ROWS}"}

    def find() -> tuple[dict[str, Tensor], dict[str, Any]]:
        found = one_pass(network, source.splits[split].pixels, split, batch_size)
        moments = {} if found.gaussian is None else {"mean": found.gaussian.mean, "covariance": found.gaussian.covariance}
        return {"vectors": found.vectors, "rows": found.rows, **moments}, {"pixels_sha256": found.pixels_sha256}

    tensors, noted = cached_tensors(cache_folder(data), identity, find)
    moved = [tensors[name].to(float64_device(network.device)) for name in ("mean", "covariance") if name in tensors]
    return ReferenceFeatures(tensors["vectors"], tensors["rows"], Gaussian(*moved) if moved else None, noted["pixels_sha256"])


@torch.no_grad()
def one_pass(network: FeatureNetwork, pixels: Pixels, what: str, batch_size: int, most: int = ROWS) -> ReferenceFeatures:
    """Features of images, uint8 (N, H, W, C), each of which is read once.

    Memory: the vectors of `most` images, and a covariance. `what`: name of the images, for the progress bar.
    """
    rows = torch.randperm(len(pixels), generator=generator(0, "reference features"))[:most].sort().values
    read, moments, kept = _Hashed(pixels), Moments(network.device), list[Tensor]()
    with progress_bar(len(pixels), f"features of {what}", "img") as bar, ieee_float32(network.device):
        for part, (batch,) in device_batches(network.device, batch_size, read):
            vectors = network.forward(batch).vectors
            moments.add(vectors)
            first, last = torch.searchsorted(rows, torch.tensor([part.start, part.stop])).tolist()
            kept.append(vectors[(rows[first:last] - part.start).to(vectors.device)].float().cpu())
            bar.update(part.stop - part.start)
    return ReferenceFeatures(torch.cat(kept), rows, moments.gaussian(), read.digest.hexdigest())


class _Hashed:
    """Images that are hashed as they are read, from the first to the last."""

    def __init__(self, pixels: Pixels) -> None:
        self._pixels, self.shape = pixels, pixels.shape
        self.digest = hashlib.sha256(str(tuple(pixels.shape)).encode())

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        found = self._pixels[rows]
        self.digest.update(found.contiguous().numpy().data)
        return found
