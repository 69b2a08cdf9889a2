"""All figures of an evaluation: reconstructions, codes, samples beside real images, training images that come back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs.data import Data
from configs.errors import UserError, say
from configs.schema import Evaluation
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
    some,
)
from pipelines.evaluation.reference import ReferenceFeatures, pixels_identity, reference_features
from pipelines.evaluation.reference_batch import BatchComparison, ReferenceBatch
from pipelines.images.bound import image_bits
from pipelines.images.inputs import encode, encode_and_decode
from pipelines.images.scoring import ScoringPrior
from stage1_vqvae.data.cache import cache_folder, cached_tensors
from stage1_vqvae.data.device_batches import device_batches
from stage1_vqvae.data.names import class_numbers
from stage1_vqvae.data.pixels import to_model, to_uint8
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
from training.batching import batches
from training.devices import float64_device
from training.precision import ieee_float32

# Images whose nearest training images are looked for, drawn at random: splits may stand in the order of their labels.
_LOOKED_UP = 1000
# In the picture of them: so many that are nearest, the first so many, and so many training images of each.
_NEAREST, _FIRST, _NEIGHBOURS = 4, 10, 3
_HASHED_AT_ONCE = 1024
_CODES_AT_ONCE = 2**16  # images, of which all codes are compared at once


class Samples(NamedTuple):
    """Samples to judge, and where they are from."""

    pixels: Tensor
    """uint8 (N, H, W, C)."""
    codes: Codes | None
    """What they were decoded from, (N, h, w) a level; None: made elsewhere."""
    labels: list[str] | None
    """What each was asked to show; all of them labels of the run."""
    details: dict[str, Any]
    """Their origin: `source` in words; `prior`, `prior_sha256`, `sampling`, `tokenizer_sha256`, null where made elsewhere."""


class ExtractedFeatures(NamedTuple):
    """Features of one image set."""

    features: Features
    spatial: Moments
    """Moments of sFID's spatial features; empty without a reference batch."""


class Assessor:
    """Computes a run's figures; every set of images goes through the networks once."""

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
    ) -> None:
        """
        Args:
            data: the recipe's, of which `source` is.
            batch: reference for the samples, which needs a network with sFID's features; None: the reference is a split.
            training: this tokenizer's codes of the training images; None: they are encoded, and kept as features are.
            tokenizer_sha256: by which those are known again.
        """
        self.tokenizer, self.network, self.source, self.data, self.config = tokenizer, network, source, data, config
        self.batch, self._training, self._tokenizer_sha256 = batch, training, tokenizer_sha256
        self.layout = SequenceLayout(tokenizer.grids, tokenizer.quantizer.num_codes)
        self._extracted: dict[str, ExtractedFeatures] = {}
        self._references: dict[str, ReferenceFeatures] = {}
        self._coded: dict[str, tuple[Tensor, Tensor]] = {}
        self._encoded: Tensor | None = None

    def features(self, name: str, pixels: Pixels | None = None) -> Features:
        """Features of a split by its name, or of other `pixels` under a name of their own."""
        return self.extracted(name, pixels).features

    def extracted(self, name: str, pixels: Pixels | None = None) -> ExtractedFeatures:
        """`features`, with the moments of sFID's features if there is a reference batch."""
        if name not in self._extracted:
            pixels = self.source.splits[name].pixels if pixels is None else pixels
            moments = Moments(self.network.device)
            add = None if self.batch is None else moments.add
            features = self.network(pixels, self.config.batch_size, name, spatial=add)
            self._extracted[name] = ExtractedFeatures(features, moments)
        return self._extracted[name]

    def coded(self, split: str) -> tuple[Tensor, Tensor]:
        """Code sequences (N, T) and reconstructions, uint8 (N, H, W, C), of a split."""
        if split not in self._coded:
            codes, pictures = encode_and_decode(self.tokenizer, self.source.splits[split].pixels, self.config.batch_size, progress=True)
            self._coded[split] = (self.layout.flat(codes), pictures)
        return self._coded[split]

    def reference(self, split: str) -> ReferenceFeatures:
        """Features of a split that images are compared with: computed once for all evaluations, since it may be of millions."""
        if split not in self._references:
            self._references[split] = reference_features(self.network, self.source, split, self.data, self.config.batch_size)
        return self._references[split]

    def training_sequences(self, rows: Tensor) -> Tensor:
        """Codes (B, T) of those training images."""
        return self._encoded_training()[rows].long() if self._training is None else self.layout.flat(self._training.codes(rows))

    def _training_blocks(self) -> Iterator[Tensor]:
        """Codes (M, T) of all training images in order, some at a time."""
        if self._training is None:
            yield from self._encoded_training().split(_CODES_AT_ONCE)
            return
        for shard in range(self._training.manifest.num_shards):
            levels = [level[:, 0].reshape(len(level), -1) for level in self._training.shard(shard)]
            for part in batches(len(levels[0]), _CODES_AT_ONCE):
                yield torch.from_numpy(np.concatenate([level[part].astype(np.int32) for level in levels], 1))

    def _encoded_training(self) -> Tensor:
        """Codes (N, T) of all training images, of a run whose codes have not been extracted."""
        if self._encoded is None:
            most = max(self.layout.num_codes)
            dtype = torch.uint8 if most <= 2**8 else torch.int16 if most <= 2**15 else torch.int32
            identity = pixels_identity(self.data, self.source, TRAIN) | {"kept": "codes", "tokenizer": self._tokenizer_sha256}

            def find() -> tuple[dict[str, Tensor], dict[str, Any]]:
                codes = encode(self.tokenizer, self.source.splits[TRAIN].pixels, self.config.batch_size)
                return {"codes": self.layout.flat(tuple(level.to(dtype) for level in codes))}, {}

            self._encoded = cached_tensors(cache_folder(self.data), identity, find)[0]["codes"]
        return self._encoded

    @torch.no_grad()
    def _decoded(self, sequences: Tensor) -> Tensor:
        """The pictures of codes (N, T), uint8 (N, H, W, C), on the CPU."""
        device = next(self.tokenizer.parameters()).device
        parts = device_batches(device, self.config.batch_size, *self.layout.grids_of(sequences))
        return torch.cat([to_uint8(self.tokenizer.decode(codes)).cpu() for _, codes in parts])

    def sequences(self, samples: Samples) -> Tensor:
        """(N, T): the codes samples were decoded from, or else what the tokenizer makes of them."""
        if samples.codes is not None:
            return self.layout.flat(samples.codes)
        return self.layout.flat(encode(self.tokenizer, samples.pixels, self.config.batch_size))

    def some(self, count: int, wanted: int, purpose: str) -> Tensor:
        """Rows of `wanted` of `count` images, or of all if they are fewer, drawn once and for all."""
        return some(count, wanted, self.config.seed, purpose)

    def reconstruction(self, split: str) -> dict[str, Any]:
        """Means over a split's images, each with its 95 % interval, on 8-bit pixels taken as [0, 1]; null where a figure is not
        defined or its network is not at hand. `frechet`: between the split and its own reconstructions (rFD).
        """
        originals, pictures = self.source.splits[split].pixels, self.coded(split)[1]
        parts = device_batches(float64_device(self.network.device), self.config.batch_size, pictures, originals)
        errors, similarities = torch.cat([torch.stack([squared_errors(*pair), ssim_per_image(*pair)]).cpu() for _, pair in parts], 1)
        of_each = {
            "mse": errors,
            "psnr": psnr_per_image(errors),
            "ssim": None if similarities.isnan().any() else similarities,
            "lpips": perceptual_distances(pictures, originals, self.config.batch_size, self.network.device),
        }
        found: dict[str, Any] = {
            name: None if values is None else dict(zip(("mean", "low", "high"), mean_with_interval(values, self.config.seed), strict=True))
            for name, values in of_each.items()
        }
        made, real = self.features("reconstructions", pictures).vectors, self.features(split).vectors
        return found | {"psnr_of_mean_mse": psnr(float(errors.mean())), "frechet": Reference(real, self.network.device).frechet(made)}

    def bound(self, split: str, prior: ScoringPrior | None, training: CodeStore | None) -> dict[str, Any]:
        """The bound on bits a dimension of a split's images by each p(z), their share of pixels first, with its 95 % interval, as bound.py
        has it; `learned` by that prior, and `unigram` by those training codes.
        """
        images, codes = self.source.splits[split], self.layout.grids_of(self.coded(split)[0])
        self.tokenizer.likelihood().check(images.pixels)
        labels = None
        if prior is not None and prior.header.label_names is not None and images.labels is not None and self.source.label_names is not None:
            labels = torch.from_numpy(class_numbers(self.source.label_names, prior.header.label_names))[images.labels]
            if bool((labels < 0).any()):
                unknown = self.source.label_names[int(images.labels[labels < 0][0])]
                say(f"the prior does not know the label {unknown}: no bound, given the class")
                labels = None
        counts = None if training is None else training.counts()
        learned, alone = (None, True) if prior is None else (prior.prior, prior.header.knows_no_label)
        bits = image_bits(self.tokenizer, codes, images.pixels, counts, learned, labels, alone, progress=True)
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
        """Usage and perplexity of the codebooks over a split."""
        sequences = self.coded(split)[0].split(self.layout.lengths, 1)
        counts = [level.flatten().bincount(minlength=k) for level, k in zip(sequences, self.layout.num_codes, strict=True)]
        return {"usage": usage(*counts), "perplexity": perplexity(*counts)}

    def distances(self, images: Features, reference: Reference) -> dict[str, Any]:
        """How a set of images lies to the reference; null where there are too few for a figure."""
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
        """`distances` to the reference: of samples, of held-out images, and of their reconstructions, which no sample can be
        expected to surpass; of the more numerous of the first two also as many as there are of the other, so that Fréchet
        distances can be compared. And the shares that the classifier puts in their class.

        Beside them `coverage`: precision, recall, density and coverage of as many images of each of these sets and of the reference.
        """
        sets = {"samples": self.features("samples", samples.pixels), f"{split}, real": self.features(split)}
        sets[f"{split}, reconstructed"] = self.features("reconstructions", self.coded(split)[1])
        of_reference = self.reference(reference)
        known = Reference(of_reference.vectors, self.network.device, of_reference.gaussian)
        found = {name: self.distances(images, known) for name, images in self._with_equal_numbers(sets).items()}
        if classifier is not None:
            self._add_classes(found, samples, split, classifier)
        vectors = {name: images.vectors for name, images in sets.items()}
        return found, neighbourhoods(vectors, of_reference.vectors, self.config.seed, self.network.device)

    def _with_equal_numbers(self, sets: dict[str, Features]) -> dict[str, Features]:
        """The sets, and of each that has more images than another as many as that has."""
        fewest = min(len(images.vectors) for images in sets.values())
        result = dict(sets)
        for name, images in sets.items():
            if len(images.vectors) > fewest:
                # At random: labels take turns, so that every second would have some labels alone, or stand in order.
                rows = self.some(len(images.vectors), fewest, "equal numbers")
                result[f"{name}, {fewest} of them"] = Features(*(tensor[rows] for tensor in images))
        return result

    def beside_batch(self, samples: Samples | None, split: str, classifier: Classifier | None) -> dict[str, Any]:
        """Metrics of ADM's evaluation against the reference batch: of samples, if any, held-out images and their reconstructions; also the
        share of each set that the classifier puts in its class.
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
        """Add `in_their_class` to each set's figures: the share of images that the classifier puts in their class."""
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
        """How near samples are to training images, by features and by codes, beside how near unseen real images are, and
        training images that went through the tokenizer, which is what a prior would give that knows them by heart.

        Of up to 1,000 of each, drawn at random.
        """
        sets = {"samples": (self.features("samples", samples.pixels).vectors, self.sequences(samples))}
        sets["held_out"] = (self.features(split).vectors, self.coded(split)[0])
        known = self.reference(TRAIN)
        own = self.training_sequences(known.rows[self.some(len(known.rows), _LOOKED_UP, "copies")])
        sets["copies"] = (self.features("copies of training images", self._decoded(own)).vectors, own)
        rows = {name: self.some(len(vectors), _LOOKED_UP, "neighbours") for name, (vectors, _) in sets.items()}
        # All sets in one pass over the training codes.
        sequences = torch.cat([of_set[rows[name]] for name, (_, of_set) in sets.items()])
        others = nearest_codes(sequences, self._training_blocks(), 1, self.network.device).distances
        found: dict[str, Any] = {}
        for (name, (vectors, _)), other in zip(sets.items(), others.split([len(rows[name]) for name in sets]), strict=True):
            distances = nearest(vectors[rows[name]], known.vectors, 1, self.network.device).distances
            found[name] = {
                "n": len(distances),
                "median_distance": float(distances.median()),
                "median_share_of_other_codes": float(other.median()),
                "with_all_codes_of_a_training_image": int((other == 0).sum()),
            }
        real = found["held_out"]["median_distance"]
        ratios = {name: found[name]["median_distance"] / real if real > 0 else None for name in ("samples", "copies")}
        searched = {"training_images": len(self.source.splits[TRAIN]), "training_images_by_features": len(known.rows)}
        return found | searched | {"ratio_of_median_distances": ratios["samples"], "ratio_of_copies": ratios["copies"]}

    def neighbours(self, samples: Samples) -> Tensor:
        """A row a sample: the sample, its nearest training images by features, and by codes. On top the samples that are nearest
        to theirs, where a copy would be; then some as they come. Of 1,000 drawn at random.
        """
        training = self.source.splits[TRAIN].pixels
        rows = self.some(len(samples.pixels), _LOOKED_UP, "neighbours")
        vectors, sequences = self.features("samples", samples.pixels).vectors[rows], self.sequences(samples)[rows]
        known = self.reference(TRAIN)
        k = min(_NEIGHBOURS, len(known.rows))
        by_features = nearest(vectors, known.vectors, k, self.network.device)
        shown = torch.cat([by_features.distances[:, 0].argsort()[:_NEAREST], torch.arange(min(_FIRST, len(vectors)))])
        by_codes = nearest_codes(sequences[shown], self._training_blocks(), k, self.network.device)
        own = samples.pixels[rows[shown]][:, None]
        gap = torch.full_like(own, 255)
        found = [training[rows.flatten()].unflatten(0, rows.shape) for rows in (known.rows[by_features.rows[shown]], by_codes.rows)]
        pictures = torch.cat([own, gap, found[0], gap, found[1]], 1)
        return image_grid(pictures.flatten(0, 1), pictures.shape[1])


def _dictionary(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else spread._asdict()


def pixels_hash(pixels: Pixels) -> str:
    """The sha256 of images, uint8 (N, H, W, C), and of their shape: which images a figure is of."""
    found = hashlib.sha256(str(tuple(pixels.shape)).encode())
    for part in batches(len(pixels), _HASHED_AT_ONCE):
        found.update(pixels[part].contiguous().numpy().tobytes())
    return found.hexdigest()


def lpips_at_hand() -> LPIPS | None:
    """LPIPS with AlexNet, if its weights are in torch's cache: nothing is downloaded for it.

    Errors: UserError for a file of other things than its weights.
    """
    try:
        return LPIPS("alex", cached_weights("alex")) if cached_weights("alex").exists() else None
    except UserError as error:
        raise UserError(f"{error}; remove the file, and LPIPS is left out") from None


def perceptual_distances(pictures: Tensor, originals: Pixels, batch_size: int, device: torch.device | str = "cpu") -> Tensor | None:
    """LPIPS of each image (Zhang et al. 2018), (N,); None below 32 pixels a side, or if its weights are not at hand."""
    network = lpips_at_hand() if min(pictures.shape[1:3]) >= LEAST_PIXELS else None
    if network is None:
        return None
    device = torch.device(device)
    network.to(device)
    with torch.no_grad(), ieee_float32(device):
        return torch.cat([network(*map(to_model, pair)).cpu() for _, pair in device_batches(device, batch_size, pictures, originals)])
