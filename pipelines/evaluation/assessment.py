"""Metrics of an evaluation: reconstructions, codes, samples compared with real images, memorised training images."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs.data import Data
from configs.errors import UserError, say
from configs.schema import Evaluation
from pipelines.encoding import decode, encode, encode_and_decode
from pipelines.evaluation.distances import (
    PARTS,
    Moments,
    Reference,
    Spread,
    inception_score,
    mean_with_interval,
    nearest,
    nearest_codes,
    neighbourhoods,
    random_rows,
)
from pipelines.evaluation.reference import ReferenceFeatures, pixels_identity, reference_features
from pipelines.evaluation.reference_batch import BatchComparison, ReferenceBatch
from pipelines.scoring.bound import image_bits
from stage1_vqvae.data.cache import cache_folder, cached_tensors
from stage1_vqvae.data.device_batches import device_batches
from stage1_vqvae.data.pixels import to_model
from stage1_vqvae.data.splits import TRAIN, ImageSource, Pixels
from stage1_vqvae.features.classifier import Classifier, predict_labels
from stage1_vqvae.features.lpips import LEAST_PIXELS, LPIPS, cached_weights
from stage1_vqvae.features.networks import FeatureNetwork, Features
from stage1_vqvae.metrics import perplexity, psnr, psnr_per_image, squared_errors, ssim_per_image, usage
from stage1_vqvae.model import VQVAE
from stage1_vqvae.pictures import image_grid
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.codes.store import CodeStore
from stage2_prior.priors.prior_file import LoadedPrior
from training.batching import batches
from training.devices import float64_device
from training.precision import ieee_float32

# Number of images, drawn at random, whose nearest training images are searched: splits may be sorted by label.
_LOOKED_UP = 1000
# In the picture of neighbours: nearest samples, first samples, and training images per sample.
_NEAREST, _FIRST, _NEIGHBOURS = 4, 10, 3
_HASHED_AT_ONCE = 1024
_CODES_AT_ONCE = 2**16  # images per block of code comparisons


class Samples(NamedTuple):
    """Samples to evaluate, and their origin."""

    pixels: Tensor
    """uint8 (N, H, W, C)."""
    codes: Codes | None
    """Codes that they were decoded from, (N, h, w) per level; None: unknown."""
    labels: list[str] | None
    """Label per sample; all are classes of the run's data."""
    details: dict[str, Any]
    """Origin: `source` in words; `prior`, `prior_sha256`, `sampling`, `tokenizer_sha256`, null if unknown."""


class ExtractedFeatures(NamedTuple):
    """Features of one image set."""

    features: Features
    spatial: Moments
    """Moments of sFID's spatial features; empty without a reference batch."""


class Assessor:
    """Computes a run's metrics; each set of images passes the networks once."""

    def __init__(
        self,
        tokenizer: VQVAE,
        network: FeatureNetwork,
        source: ImageSource,
        data: Data,
        config: Evaluation,
        batch: ReferenceBatch | None = None,
        training: CodeStore | None = None,
        tokenizer_sha256: str = "",
        folder: Path | None = None,
    ) -> None:
        """
        Args:
            tokenizer: the run's tokenizer, in eval mode.
            network: feature network.
            source: the run's images.
            data: section of the recipe that `source` was loaded with.
            config: settings of the evaluation.
            batch: reference batch, which needs a network with sFID's features; None: the reference is a split.
            training: the tokenizer's codes of the training images; None: they are encoded and cached.
            tokenizer_sha256: key of that cache.
            folder: folder of a temporary file for the reconstructions; None: in memory.
        """
        self.tokenizer, self.network, self.source, self.data, self.config = tokenizer, network, source, data, config
        self.batch, self._training, self._tokenizer_sha256, self._folder = batch, training, tokenizer_sha256, folder
        self.layout = SequenceLayout(tokenizer.grids, tokenizer.quantizer.num_codes)
        self._extracted: dict[str, ExtractedFeatures] = {}
        self._references: dict[str, ReferenceFeatures] = {}
        self._coded: dict[str, tuple[Tensor, Tensor]] = {}
        self._encoded: Tensor | None = None

    def features(self, name: str, pixels: Pixels | None = None) -> Features:
        """Compute the features of a split by its name, or of `pixels` under another name."""
        return self.extracted(name, pixels).features

    def extracted(self, name: str, pixels: Pixels | None = None) -> ExtractedFeatures:
        """Compute the features of `features` and, if there is a reference batch, the moments of sFID's features."""
        if name not in self._extracted:
            pixels = self.source.splits[name].pixels if pixels is None else pixels
            moments = Moments(self.network.device)
            add = None if self.batch is None else moments.add
            features = self.network(pixels, self.config.batch_size, name, spatial=add)
            self._extracted[name] = ExtractedFeatures(features, moments)
        return self._extracted[name]

    def coded(self, split: str) -> tuple[Tensor, Tensor]:
        """Compute code sequences (N, T) and reconstructions, uint8 (N, H, W, C), of a split."""
        if split not in self._coded:
            pixels = self.source.splits[split].pixels
            codes, pictures = encode_and_decode(self.tokenizer, pixels, self.config.batch_size, True, self._folder)
            self._coded[split] = (self.layout.flat(codes), pictures)
        return self._coded[split]

    def reference(self, split: str) -> ReferenceFeatures:
        """Load the features of a reference split, computed once for all evaluations, since it may have millions of images."""
        if split not in self._references:
            self._references[split] = reference_features(self.network, self.source, split, self.data, self.config.batch_size)
        return self._references[split]

    def training_sequences(self, rows: Tensor) -> Tensor:
        """Return the codes (B, T) of training images by row."""
        return self._encoded_training()[rows].long() if self._training is None else self.layout.flat(self._training.codes(rows))

    def _training_blocks(self) -> Iterator[Tensor]:
        """Yield the codes (M, T) of all training images in order, block by block."""
        if self._training is None:
            yield from self._encoded_training().split(_CODES_AT_ONCE)
            return
        for shard in range(self._training.manifest.num_shards):
            levels = [level[:, 0].reshape(len(level), -1) for level in self._training.shard(shard)]
            for part in batches(len(levels[0]), _CODES_AT_ONCE):
                yield torch.from_numpy(np.concatenate([level[part].astype(np.int32) for level in levels], 1))

    def _encoded_training(self) -> Tensor:
        """Return the codes (N, T) of all training images of a run without extracted codes, from the cache or by encoding."""
        if self._encoded is None:
            most = max(self.layout.num_codes)
            dtype = torch.uint8 if most <= 2**8 else torch.int16 if most <= 2**15 else torch.int32
            identity = pixels_identity(self.data, self.source, TRAIN) | {"kept": "codes", "tokenizer": self._tokenizer_sha256}

            def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
                codes = encode(self.tokenizer, self.source.splits[TRAIN].pixels, self.config.batch_size, progress=True)
                return {"codes": self.layout.flat(tuple(level.to(dtype) for level in codes))}, {}

            self._encoded = cached_tensors(cache_folder(self.data), identity, compute)[0]["codes"]
        return self._encoded

    def sequences(self, samples: Samples) -> Tensor:
        """Return the codes (N, T) that samples were decoded from or, if unknown, those that they encode to."""
        if samples.codes is not None:
            return self.layout.flat(samples.codes)
        return self.layout.flat(encode(self.tokenizer, samples.pixels, self.config.batch_size, progress=True))

    def random_rows(self, count: int, size: int, purpose: str) -> Tensor:
        """Draw ascending rows of `size` of `count` images (at most all), the same in every evaluation with this seed."""
        return random_rows(count, size, self.config.seed, purpose)

    def reconstruction(self, split: str) -> dict[str, Any]:
        """Compute metrics of a split's reconstructions: means with 95 % intervals, on 8-bit pixels scaled to [0, 1]; null for an undefined
        metric, or one whose network is missing. `frechet`: distance between the split and its reconstructions (rFD).
        """
        originals, pictures = self.source.splits[split].pixels, self.coded(split)[1]
        parts = device_batches(float64_device(self.network.device), self.config.batch_size, pictures, originals)
        errors, similarities = torch.cat([torch.stack([squared_errors(*pair), ssim_per_image(*pair)]).cpu() for _, pair in parts], 1)
        values_by_metric = {
            "mse": errors,
            "psnr": psnr_per_image(errors),
            "ssim": None if similarities.isnan().any() else similarities,
            "lpips": perceptual_distances(pictures, originals, self.config.batch_size, self.network.device),
        }
        figures: dict[str, Any] = {
            name: None if values is None else dict(zip(("mean", "low", "high"), mean_with_interval(values, self.config.seed), strict=True))
            for name, values in values_by_metric.items()
        }
        decoded, real = self.features("reconstructions", pictures).vectors, self.features(split).vectors
        return figures | {"psnr_of_mean_mse": psnr(float(errors.mean())), "frechet": Reference(real, self.network.device).frechet(decoded)}

    def bound(self, split: str, prior: LoadedPrior | None, training: CodeStore | None) -> dict[str, Any]:
        """Compute the bound on bits per dimension of a split's images per p(z) of `image_bits`, with 95 % intervals; `learned` is the
        prior's p(z), `unigram` that of the training codes.
        """
        images, codes = self.source.splits[split], self.layout.grids_of(self.coded(split)[0])
        self.tokenizer.likelihood().check(images.pixels)
        condition = None if prior is None else prior.header.condition.encode(images, slice(None))
        if prior is not None and condition is not None and not bool((known := prior.header.condition.known(condition)).all()):
            assert images.labels is not None
            assert images.label_names is not None
            unknown = images.label_names[int(images.labels[~known][0])]
            say(f"the prior does not know the label {unknown}: no bound given the class")
            condition = None
        counts = None if training is None else training.counts()
        learned, unconditional = (None, True) if prior is None else (prior.prior, prior.header.supports_unconditional)
        bits = image_bits(self.tokenizer, codes, images.pixels, counts, learned, condition, unconditional, progress=True)
        dimensions = math.prod(images.pixels.shape[1:])
        return {
            "n": len(images.pixels),
            "dimensions": dimensions,
            "prior": None if prior is None else prior.name,
            "bits_per_dimension": {
                name: dict(zip(("mean", "low", "high"), mean_with_interval(values / dimensions, self.config.seed), strict=True))
                for name, values in bits.items()
            },
        }

    def codes(self, split: str) -> dict[str, float]:
        """Compute usage and perplexity of the codebooks over a split."""
        sequences = self.coded(split)[0].split(self.layout.lengths, 1)
        counts = [level.flatten().bincount(minlength=k) for level, k in zip(sequences, self.layout.num_codes, strict=True)]
        return {"usage": usage(*counts), "perplexity": perplexity(*counts)}

    def distances(self, images: Features, reference: Reference) -> dict[str, Any]:
        """Compute the distances of a set of images from the reference; null where there are too few images."""
        seed = self.config.seed
        parts = reference.frechet_of_parts(images.vectors, seed)
        return {
            "n": len(images.vectors),
            "frechet": reference.frechet(images.vectors),
            "frechet_of_parts": None if parts is None else {"n": len(images.vectors) // PARTS, **parts._asdict()},
            "kernel": _dictionary(reference.kernel(images.vectors, seed)),
            "class_score": _dictionary(inception_score(images.logits, seed) if images.logits.shape[1] else None),
        }

    def beside_real(
        self, samples: Samples, split: str, reference: str, classifier: Classifier | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compare samples, held-out images and their reconstructions, which bound the results of samples, with the reference split.

        Returns `distances`, also for subsets of equal size, since Fréchet distances depend on it, with the share of images that the
        classifier assigns to their class; and `coverage`: precision, recall, density and coverage with the same number of images per set.
        """
        sets = {"samples": self.features("samples", samples.pixels), f"{split}, real": self.features(split)}
        sets[f"{split}, reconstructed"] = self.features("reconstructions", self.coded(split)[1])
        features = self.reference(reference)
        real = Reference(features.vectors, self.network.device, features.gaussian)
        figures = {name: self.distances(images, real) for name, images in self._with_equal_numbers(sets).items()}
        if classifier is not None:
            self._add_classes(figures, samples, split, classifier)
        vectors = {name: images.vectors for name, images in sets.items()}
        return figures, neighbourhoods(vectors, features.vectors, self.config.seed, self.network.device)

    def _with_equal_numbers(self, sets: dict[str, Features]) -> dict[str, Features]:
        """Add to the sets a subset of each larger one, of the smallest one's size."""
        fewest = min(len(images.vectors) for images in sets.values())
        result = dict(sets)
        for name, images in sets.items():
            if len(images.vectors) > fewest:
                # At random, since labels take turns or are sorted.
                rows = self.random_rows(len(images.vectors), fewest, "equal numbers")
                result[f"{name}, {fewest} of them"] = Features(*(tensor[rows] for tensor in images))
        return result

    def beside_batch(self, samples: Samples | None, split: str, classifier: Classifier | None) -> dict[str, Any]:
        """Compute ADM's metrics of samples, if any, held-out images and their reconstructions against the reference batch, and per set the
        share of images that the classifier assigns to their class.
        """
        assert self.batch is not None
        reference: tuple[Features | None, Moments | None] = (
            (None, None) if self.batch.images is None else self.extracted("reference", self.batch.images)
        )
        comparison = BatchComparison(self.batch, *reference, self.network.device)
        sets = {} if samples is None else {"samples": self.extracted("samples", samples.pixels)}
        sets[f"{split}, real"] = self.extracted(split)
        sets[f"{split}, reconstructed"] = self.extracted("reconstructions", self.coded(split)[1])
        figures = {name: comparison.figures(*extracted) for name, extracted in sets.items()}
        equal = self._with_equal_numbers({name: extracted.features for name, extracted in sets.items()})
        figures |= {name: comparison.figures(features, None) for name, features in equal.items() if name not in sets}
        if classifier is not None and samples is not None:
            self._add_classes(figures, samples, split, classifier)
        return figures

    def _add_classes(self, figures: dict[str, Any], samples: Samples, split: str, classifier: Classifier) -> None:
        """Add `in_their_class` to each set's figures: the share of images that the classifier assigns to their class."""
        real = self.source.splits[split]
        real_labels = None if real.labels is None else [classifier.label_names[label] for label in real.labels.tolist()]
        labelled = {"samples": (samples.pixels, samples.labels), f"{split}, real": (real.pixels, real_labels)}
        labelled[f"{split}, reconstructed"] = (self.coded(split)[1], real_labels)
        for name, (pixels, labels) in labelled.items():
            if labels is not None:
                predictions = predict_labels(classifier, pixels, self.config.batch_size).tolist()
                matches = [classifier.label_names[index] == label for index, label in zip(predictions, labels, strict=True)]
                figures[name]["in_their_class"] = sum(matches) / len(labels)

    def memorisation(self, samples: Samples, split: str) -> dict[str, Any]:
        """Compute the distances of samples from their nearest training images, by features and by codes, and for comparison those of unseen
        real images, and of reconstructed training images, which a prior that memorised them would draw.

        Takes up to 1,000 images per set, drawn at random.
        """
        sets = {"samples": (self.features("samples", samples.pixels).vectors, self.sequences(samples))}
        sets["held_out"] = (self.features(split).vectors, self.coded(split)[0])
        training = self.reference(TRAIN)
        copied = self.training_sequences(training.rows[self.random_rows(len(training.rows), _LOOKED_UP, "copies")])
        copy_pixels = decode(self.tokenizer, self.layout.grids_of(copied), self.config.batch_size)
        sets["copies"] = (self.features("copies of training images", copy_pixels).vectors, copied)
        rows = {name: self.random_rows(len(vectors), _LOOKED_UP, "neighbours") for name, (vectors, _) in sets.items()}
        # All sets in one pass over the training codes.
        sequences = torch.cat([codes[rows[name]] for name, (_, codes) in sets.items()])
        shares = nearest_codes(sequences, self._training_blocks(), 1, self.network.device).distances
        figures: dict[str, Any] = {}
        for (name, (vectors, _)), share in zip(sets.items(), shares.split([len(rows[name]) for name in sets]), strict=True):
            distances = nearest(vectors[rows[name]], training.vectors, 1, self.network.device).distances
            figures[name] = {
                "n": len(distances),
                "median_distance": float(distances.median()),
                "median_share_of_other_codes": float(share.median()),
                "with_all_codes_of_a_training_image": int((share == 0).sum()),
            }
        real = figures["held_out"]["median_distance"]
        ratios = {name: figures[name]["median_distance"] / real if real > 0 else None for name in ("samples", "copies")}
        searched = {"training_images": len(self.source.splits[TRAIN]), "training_images_by_features": len(training.rows)}
        return figures | searched | {"ratio_of_median_distances": ratios["samples"], "ratio_of_copies": ratios["copies"]}

    def neighbours(self, samples: Samples) -> Tensor:
        """Arrange a picture with one row per sample: the sample and its nearest training images by features and by codes. First come the
        samples nearest to a training image, where a copy would show, then the first few samples; of 1,000 drawn at random.
        """
        training = self.source.splits[TRAIN].pixels
        rows = self.random_rows(len(samples.pixels), _LOOKED_UP, "neighbours")
        vectors, sequences = self.features("samples", samples.pixels).vectors[rows], self.sequences(samples)[rows]
        references = self.reference(TRAIN)
        k = min(_NEIGHBOURS, len(references.rows))
        by_features = nearest(vectors, references.vectors, k, self.network.device)
        chosen = torch.cat([by_features.distances[:, 0].argsort()[:_NEAREST], torch.arange(min(_FIRST, len(vectors)))])
        by_codes = nearest_codes(sequences[chosen], self._training_blocks(), k, self.network.device)
        sample_pixels = samples.pixels[rows[chosen]][:, None]
        gap = torch.full_like(sample_pixels, 255)
        neighbour_pixels = [
            training[rows.flatten()].unflatten(0, rows.shape) for rows in (references.rows[by_features.rows[chosen]], by_codes.rows)
        ]
        pictures = torch.cat([sample_pixels, gap, neighbour_pixels[0], gap, neighbour_pixels[1]], 1)
        return image_grid(pictures.flatten(0, 1), pictures.shape[1])


def _dictionary(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else spread._asdict()


def pixels_hash(pixels: Pixels) -> str:
    """Compute the sha256 of images, uint8 (N, H, W, C), and their shape."""
    digest = hashlib.sha256(str(tuple(pixels.shape)).encode())
    for part in batches(len(pixels), _HASHED_AT_ONCE):
        digest.update(pixels[part].contiguous().numpy().tobytes())
    return digest.hexdigest()


def local_lpips() -> LPIPS | None:
    """Load LPIPS with AlexNet if its weights are in torch's cache; never downloads them.

    Errors: UserError for a file without its weights.
    """
    try:
        return LPIPS("alex", cached_weights("alex")) if cached_weights("alex").exists() else None
    except UserError as error:
        raise UserError(f"{error}; delete the file to leave LPIPS out") from None


def perceptual_distances(pictures: Tensor, originals: Pixels, batch_size: int, device: torch.device | str = "cpu") -> Tensor | None:
    """Compute LPIPS of each image (Zhang et al. 2018), (N,); None below 32 pixels per side or without cached weights."""
    network = local_lpips() if min(pictures.shape[1:3]) >= LEAST_PIXELS else None
    if network is None:
        return None
    device = torch.device(device)
    network.to(device)
    with torch.no_grad(), ieee_float32(device):
        return torch.cat([network(*map(to_model, pair)).cpu() for _, pair in device_batches(device, batch_size, pictures, originals)])
