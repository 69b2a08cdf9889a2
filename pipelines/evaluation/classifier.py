"""A small classifier of the run's own labels: features to compare images by where Inception says little, as on digits.

Trained once on the labelled training split and kept in the run, so that all evaluations of the run use the same one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.errors import UserError
from configs.run_dir import RunDir
from stage1_vqvae.data.pixels import to_model
from stage1_vqvae.data.splits import TRAIN, ImageSource, ImageSplit
from stage1_vqvae.data.variants import make_variants, num_variants
from stage1_vqvae.training.batching import batches
from stage1_vqvae.training.optimizer import adamw
from stage1_vqvae.training.progress import progress_bar
from stage1_vqvae.training.randomness import DataOrder, generator
from stage1_vqvae.training.schedule import learning_rate, set_learning_rate
from stage1_vqvae.training.weights_file import load_weights, save_weights

_KIND = "classifier"
_SEED, _BATCH, _RATE = 0, 128, 2e-3
# At most; a few images are seen a hundred times instead, but for so many steps at least.
_STEPS, _EPOCHS, _LEAST_STEPS = 1000, 100, 150
_CHANNELS = (32, 64, 128, 128)


class Classifier(nn.Module):
    """Four convolutions, each after the first at half the size, the mean over positions, a linear map to labels."""

    def __init__(self, channels: int, label_names: list[str]) -> None:
        super().__init__()
        self.label_names = label_names
        layers: list[nn.Module] = []
        for number, width in enumerate(_CHANNELS):
            layers += [nn.Conv2d(channels, width, 3, stride=2 if number else 1, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels, len(label_names))

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to (B, 128)."""
        return self.layers(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to logits (B, classes)."""
        return self.head(self.features(images))


def run_classifier(run: RunDir, source: ImageSource, device: torch.device) -> Classifier:
    """The run's classifier, in eval mode; trained first, if it is not there yet, on the source's training split.

    Errors: UserError for a source without labels.
    """
    train = source.splits[TRAIN]
    if train.labels is None or source.label_names is None:
        raise UserError("features classifier: expected images with labels, found none; name another network with --features")
    names, channels = source.label_names, train.pixels.shape[-1]
    if run.classifier.exists():
        weights, header = load_weights(run.classifier, _KIND)
        if header["label_names"] != names:
            raise UserError(f"{run.show(run.classifier)}: expected a classifier of this run's labels, found one of others; remove the file")
        classifier = Classifier(channels, names)
        classifier.load_state_dict(weights)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            classifier = Classifier(channels, names)
        fit(classifier.to(device), train, device)
        save_weights(run.classifier, classifier.state_dict(), {"kind": _KIND, "label_names": names})
    return classifier.to(device).eval().requires_grad_(False)


def fit(classifier: Classifier, train: ImageSplit, device: torch.device) -> None:
    """Train it: up to 1,000 steps of 128 images, shifted by up to a pixel, with AdamW."""
    assert train.labels is not None
    steps = min(_STEPS, max(_LEAST_STEPS, _EPOCHS * len(train) // _BATCH))
    optimizer = adamw(classifier, _RATE, weight_decay=0.05, beta2=0.99)
    order = DataOrder(len(train), _BATCH, _SEED)
    classifier.train()
    with progress_bar(steps * _BATCH, "train the classifier", "img") as bar:
        for step in range(steps):
            set_learning_rate(optimizer, learning_rate(step, peak=_RATE, warmup_steps=50, steps=steps, final_share=0.01))
            rows = order.batch(step)
            variants = torch.randint(num_variants("shift"), rows.shape, generator=generator(_SEED, "variants", step))
            images = make_variants(to_model(train.pixels[rows].to(device)), "shift", variants)
            F.cross_entropy(classifier(images), train.labels[rows].to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            bar.update(_BATCH)


@torch.no_grad()
def labels_found(classifier: Classifier, pixels: Tensor, batch_size: int) -> Tensor:
    """The label (N,) that it gives each of the images, uint8 (N, H, W, C); on the CPU."""
    device = classifier.head.weight.device
    parts = [classifier(to_model(pixels[part].to(device))).argmax(1).cpu() for part in batches(len(pixels), batch_size)]
    return torch.cat(parts)
