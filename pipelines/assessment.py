"""All figures of an evaluation: reconstructions, codes, samples beside real images, training images that come back."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor

from configs.schema import Evaluation
from pipelines.classifier import Classifier, labels_found
from pipelines.distances import (
    PARTS,
    density_coverage,
    frechet_distance,
    frechet_of_parts,
    inception_score,
    kernel_distance,
    mean_with_interval,
    nearest,
    nearest_codes,
    precision_recall,
)
from pipelines.features import FeatureNetwork, Features, weights_in
from pipelines.inputs import encode_and_decode
from stage1_vqvae.images import TRAIN, ImageSource, batches
from stage1_vqvae.metrics import perplexity, psnr, psnr_of_each, squared_errors, ssim_of_each, usage
from stage1_vqvae.model import VQVAE
from stage1_vqvae.plots import image_grid
from stage1_vqvae.training.randomness import generator
from stage2_prior.sequence import SequenceLayout

# Images whose nearest training images are looked for.
_LOOKED_UP = 1000
# In the picture of them: so many that are nearest, the first so many, and so many training images of each.
_NEAREST, _FIRST, _NEIGHBOURS = 4, 10, 3
# LPIPS: AlexNet's pooling leaves nothing of smaller images.
_LPIPS_PIXELS = 32


class Samples(NamedTuple):
    """Images to judge."""

    pixels: Tensor
    """uint8 (N, H, W, C)."""
    labels: list[str] | None
    """What each was asked to show."""
    details: dict[str, Any]
    """Where they are from: `source` in words; `prior`, `prior_sha256`, `sampling`, null where they are made elsewhere."""


class Assessor:
    """Sees every image set once: its features, and its codes under the tokenizer."""

    def __init__(self, tokenizer: VQVAE, network: FeatureNetwork, source: ImageSource, config: Evaluation) -> None:
        self.tokenizer, self.network, self.source, self.config = tokenizer, network, source, config
        self.layout = SequenceLayout(tokenizer.grids, tokenizer.quantizer.num_codes)
        self._features: dict[str, Features] = {}
        self._coded: dict[str, tuple[Tensor, Tensor]] = {}

    def features(self, name: str, pixels: Tensor | None = None) -> Features:
        """Of a split by its name, or of other `pixels` under a name of their own."""
        if name not in self._features:
            self._features[name] = self.network(self._pixels(name, pixels), self.config.batch_size, name)
        return self._features[name]

    def coded(self, name: str, pixels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Places (N, T) and reconstructions, uint8 (N, H, W, C), of the same."""
        if name not in self._coded:
            codes, pictures = encode_and_decode(self.tokenizer, self._pixels(name, pixels), self.config.batch_size, progress=True)
            self._coded[name] = (self.layout.flat(codes), pictures)
        return self._coded[name]

    def _pixels(self, name: str, pixels: Tensor | None) -> Tensor:
        return self.source.splits[name].pixels if pixels is None else pixels

    def reconstruction(self, split: str) -> dict[str, Any]:
        """Means over a split's images, each with its 95 % interval, on 8-bit pixels taken as [0, 1]; null where a figure is not
        defined or its network is not at hand. `frechet`: between the split and its own reconstructions (rFD).
        """
        originals, pictures = self.source.splits[split].pixels, self.coded(split)[1]
        parts = batches(len(pictures), self.config.batch_size)
        errors = torch.cat([squared_errors(pictures[part], originals[part]) for part in parts])
        similarities = torch.cat([ssim_of_each(pictures[part], originals[part]) for part in parts])
        of_each = {
            "mse": errors,
            "psnr": psnr_of_each(errors),
            "ssim": None if similarities.isnan().any() else similarities,
            "lpips": perceptual_distances(pictures, originals, self.config.batch_size),
        }
        found: dict[str, Any] = {
            name: None if values is None else dict(zip(("mean", "low", "high"), mean_with_interval(values, self.config.seed), strict=True))
            for name, values in of_each.items()
        }
        vectors = self.features("reconstructions", pictures).vectors
        return found | {"psnr_of_mean_mse": psnr(float(errors.mean())), "frechet": frechet_distance(vectors, self.features(split).vectors)}

    def codes(self, split: str) -> dict[str, float]:
        """Usage and perplexity of the codebooks over a split."""
        places = self.coded(split)[0].split(self.layout.lengths, 1)
        counts = [level.flatten().bincount(minlength=k) for level, k in zip(places, self.layout.num_codes, strict=True)]
        return {"usage": usage(*counts), "perplexity": perplexity(*counts)}

    def distances(self, images: Features, reference: Features) -> dict[str, Any]:
        """How a set of images lies to the reference."""
        vectors, seed = images.vectors, self.config.seed
        precision, recall = precision_recall(vectors, reference.vectors)
        density, coverage = density_coverage(vectors, reference.vectors)
        parts = frechet_of_parts(vectors, reference.vectors, seed) if len(vectors) >= 2 * PARTS else None
        return {
            "n": len(vectors),
            "frechet": frechet_distance(vectors, reference.vectors),
            "frechet_of_parts": None if parts is None else {"n": len(vectors) // PARTS, **parts._asdict()},
            "kernel": kernel_distance(vectors, reference.vectors, seed)._asdict(),
            "precision": precision,
            "recall": recall,
            "density": density,
            "coverage": coverage,
            "inception_score": inception_score(images.logits, seed)._asdict(),
        }

    def beside_real(self, samples: Samples, split: str, reference: str, classifier: Classifier | None) -> dict[str, Any]:
        """`distances` to the reference: of samples, of as many of them as there are held-out images, of those, and of their
        reconstructions, which no sample can be expected to surpass; and the shares that the classifier puts in their class.
        """
        sampled, held_out, known = self.features("samples", samples.pixels), self.features(split), self.features(reference)
        sets = {"samples": sampled}
        size = len(held_out.vectors)
        if size < len(samples.pixels):
            # At random: labels take turns, so that every second would have some labels alone, or stand in order.
            some = torch.randperm(len(samples.pixels), generator=generator(self.config.seed, "as many as held out"))[:size]
            sets[f"{size} of the samples"] = Features(*(tensor[some] for tensor in sampled))
        sets |= {f"{split}, real": held_out, f"{split}, reconstructed": self.features("reconstructions")}
        found = {name: self.distances(images, known) for name, images in sets.items()}
        if classifier is not None:
            real = self.source.splits[split]
            of_real = None if real.labels is None else [classifier.label_names[label] for label in real.labels.tolist()]
            pictures = {"samples": (samples.pixels, samples.labels), f"{split}, real": (real.pixels, of_real)}
            pictures[f"{split}, reconstructed"] = (self.coded(split)[1], of_real)
            for name, (pixels, asked) in pictures.items():
                if asked is not None:
                    seen = [classifier.label_names[label] for label in labels_found(classifier, pixels, self.config.batch_size).tolist()]
                    found[name]["in_their_class"] = sum(map(str.__eq__, seen, asked)) / len(asked)
        return found

    def memorisation(self, samples: Samples, split: str) -> dict[str, Any]:
        """How near samples are to training images, beside how near unseen real images are, by features and by codes.

        A generator that copies is nearer than those: a ratio of medians far below 1, or all codes of a training image. Of the
        first 1,000 samples and held-out images.
        """
        found: dict[str, Any] = {}
        for name, images, places in (
            ("samples", self.features("samples", samples.pixels), self.coded("samples", samples.pixels)[0]),
            ("held_out", self.features(split), self.coded(split)[0]),
        ):
            distances = nearest(images.vectors[:_LOOKED_UP], self.features(TRAIN).vectors, 1).distances
            others = nearest_codes(places[:_LOOKED_UP], self.coded(TRAIN)[0], 1).distances
            found[name] = {
                "n": len(distances),
                "median_distance": float(distances.median()),
                "median_share_of_other_codes": float(others.median()),
                "with_all_codes_of_a_training_image": int((others == 0).sum()),
            }
        real = found["held_out"]["median_distance"]
        return found | {"ratio_of_median_distances": found["samples"]["median_distance"] / real if real > 0 else None}

    def neighbours(self, samples: Samples) -> Tensor:
        """A row a sample: the sample, its nearest training images by features, and by codes. On top the samples that are nearest
        to theirs, where a copy would be; then the first ones, as they come.
        """
        training = self.source.splits[TRAIN].pixels
        vectors, places = (
            self.features("samples", samples.pixels).vectors[:_LOOKED_UP],
            self.coded("samples", samples.pixels)[0][:_LOOKED_UP],
        )
        k = min(_NEIGHBOURS, len(training))
        by_features = nearest(vectors, self.features(TRAIN).vectors, k)
        shown = torch.cat([by_features.distances[:, 0].argsort()[:_NEAREST], torch.arange(min(_FIRST, len(vectors)))])
        by_codes = nearest_codes(places[shown], self.coded(TRAIN)[0], k)
        gap = torch.full_like(samples.pixels[shown], 255)[:, None]
        row = [samples.pixels[shown][:, None], gap, training[by_features.rows[shown]], gap, training[by_codes.rows]]
        pictures = torch.cat(row, 1)
        return image_grid(pictures.flatten(0, 1), pictures.shape[1])


def pixels_hash(pixels: Tensor) -> str:
    """The sha256 of images, uint8 (N, H, W, C), and of their shape: which images a figure is of."""
    return hashlib.sha256(str(tuple(pixels.shape)).encode() + pixels.contiguous().numpy().tobytes()).hexdigest()


def perceptual_distances(pictures: Tensor, originals: Tensor, batch_size: int) -> Tensor | None:
    """LPIPS of each image (Zhang et al. 2018), (N,), by torchmetrics' AlexNet; None below 32 pixels a side, or if the weights are
    not in torch's cache: nothing is downloaded for it.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints" / torchvision.models.AlexNet_Weights.DEFAULT.url.rsplit("/", 1)[1]
    if not weights.exists() or min(pictures.shape[1:3]) < _LPIPS_PIXELS:
        return None
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    weights_in(weights)  # a file of more than tensors is refused before torchvision unpickles it
    found = []
    for part in batches(len(pictures), batch_size):
        made, wanted = (images[part].movedim(-1, 1).expand(-1, 3, -1, -1).float() / 255 for images in (pictures, originals))
        found.append(learned_perceptual_image_patch_similarity(made, wanted, "alex", reduction="none", normalize=True).flatten())
    return torch.cat(found)
