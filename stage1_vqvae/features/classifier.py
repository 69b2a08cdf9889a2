"""Small networks made on the spot: features to compare images by where Inception's weights are missing or say little.

Trained once on a run's training split and kept in a folder of the run, so that whoever compares images by it uses the same one: to
tell the run's own classes, or, where there are no labels, to tell by how many quarter turns an image was turned.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.errors import UserError
from configs.run_dir import RunDir
from stage1_vqvae.data.device_batches import device_batches
from stage1_vqvae.data.order import Order, build_order
from stage1_vqvae.data.pixels import to_model
from stage1_vqvae.data.splits import TRAIN, ImageSource, ImageSplit, Pixels
from stage1_vqvae.data.variants import VARIANTS
from training.optimizer import adamw
from training.precision import ieee_float32
from training.progress import progress_bar
from training.randomness import generator
from training.schedule import learning_rate, set_learning_rate
from training.weights_file import built_from, load_weights, save_weights

CLASSIFIER, ROTATION = "classifier", "rotation"
_BATCH, _RATE = 128, 2e-3
# At most; a few images are seen a hundred times instead, but for so many steps at least.
_STEPS, _EPOCHS, _LEAST_STEPS = 1000, 100, 150
_CHANNELS = (32, 64, 128, 128)
# Pixels along the longer side that it sees: more would take minutes for little, since it is no judge of fine detail.
_SIDE = 32


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
        """Images (B, C, H, W) in [-1, 1], averaged over blocks down to at most 32 pixels a side, to (B, 128)."""
        block = -(-max(images.shape[2:]) // _SIDE)
        images = F.avg_pool2d(images, block, ceil_mode=True) if block > 1 else images
        return self.layers(images.contiguous(memory_format=torch.channels_last)).mean((2, 3))  # a fifth faster on a CPU

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to logits (B, classes)."""
        return self.head(self.features(images))


def kept_at(folder: Path, kind: str) -> Path:
    """The file of a network made on the spot."""
    return folder / f"{kind}.safetensors"


Examples = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""From rows (B,) and the step to images (B, C, h, w) in [-1, 1] and the classes (B,) to tell."""


class NotMadeYetError(LookupError):
    """A network that would have to be trained first."""


def run_classifier(folder: Path, source: ImageSource, device: torch.device, seed: int = 0, may_train: bool = True) -> Classifier:
    """The folder's classifier of a run's own classes, in eval mode; trained first, if it is not there yet.

    Errors: UserError for a source without labels; NotMadeYetError if it may not be trained.
    """
    train = source.splits[TRAIN]
    if train.labels is None or source.label_names is None:
        wanted = f"expected images with labels, found none; take {ROTATION}, which needs none"
        raise UserError(f"features {CLASSIFIER}: {wanted}")
    labels = train.labels

    def examples(rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        numbers = torch.randint(len(VARIANTS["shift"]), rows.shape, generator=generator(seed, "variants", step))
        return VARIANTS["shift"].apply(to_model(train.pixels[rows].to(device)), numbers), labels[rows].to(device)

    return _kept(folder, CLASSIFIER, source.label_names, train, examples, device, seed, may_train)


def run_rotation(folder: Path, source: ImageSource, device: torch.device, seed: int = 0, may_train: bool = True) -> Classifier:
    """The folder's network that tells by how many quarter turns an image was turned, in eval mode; trained first, if it is not there.

    Gidaris et al. 2018, "Unsupervised Representation Learning by Predicting Image Rotations". It is trained on the largest centred
    square of each image, and takes images of any shape. Errors: NotMadeYetError if it may not be trained.
    """
    train = source.splits[TRAIN]
    height, width = train.pixels.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2

    def examples(rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        images = to_model(train.pixels[rows][:, top : top + side, left : left + side].to(device))
        turns = torch.randint(4, rows.shape, generator=generator(seed, "turns", step)).to(device)
        turned = torch.stack([images.rot90(quarter, (2, 3)) for quarter in range(4)])
        return turned[turns, torch.arange(len(rows), device=device)], turns

    return _kept(folder, ROTATION, [f"{90 * quarter} degrees" for quarter in range(4)], train, examples, device, seed, may_train)


def _kept(
    folder: Path,
    kind: str,
    names: list[str],
    train: ImageSplit,
    examples: Examples,
    device: torch.device,
    seed: int,
    may_train: bool,
) -> Classifier:
    """The network in the folder's file, or a new one, trained on examples and written there."""
    path = kept_at(folder, kind)
    # Whether it is read or trained, nobody else's first weights depend on it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(train.pixels.shape[-1], names)
    if path.exists():
        weights, header = load_weights(path, kind)
        reduced = max(train.pixels.shape[1:3]) > _SIDE
        if header["label_names"] != names or (reduced and header.get("side") != _SIDE):
            raise UserError(
                f"{RunDir.show(path)}: expected a {kind} network of this run's labels and images, found another; remove the file"
            )
        with built_from(path, kind):
            classifier.load_state_dict(weights)
    elif not may_train:
        raise NotMadeYetError(kind)
    else:
        fit(classifier.to(device), kind, len(train), build_order(train.pixels, _BATCH, seed), examples)
        save_weights(path, classifier.state_dict(), {"kind": kind, "label_names": names, "side": _SIDE})
    return classifier.to(device).eval().requires_grad_(False)


def fit(classifier: Classifier, kind: str, count: int, order: Order, examples: Examples) -> None:
    """Train it: up to 1,000 steps of 128 of `count` images, with AdamW."""
    steps = min(_STEPS, max(_LEAST_STEPS, _EPOCHS * count // _BATCH))
    optimizer = adamw(classifier, _RATE, weight_decay=0.05, beta2=0.99)
    classifier.train()
    with progress_bar(steps * _BATCH, f"train the {kind} network", "img") as bar:
        for step in range(steps):
            set_learning_rate(optimizer, learning_rate(step, peak=_RATE, warmup_steps=50, steps=steps, final_share=0.01))
            images, classes = examples(order.batch(step), step)
            F.cross_entropy(classifier(images), classes).backward()
            optimizer.step()
            optimizer.zero_grad()
            bar.update(_BATCH)


@torch.no_grad()
def labels_found(classifier: Classifier, pixels: Pixels, batch_size: int) -> Tensor:
    """The label (N,) that it gives each of the images, uint8 (N, H, W, C); on the CPU."""
    device = classifier.head.weight.device
    with ieee_float32(device):
        return torch.cat([classifier(to_model(images)).argmax(1).cpu() for _, (images,) in device_batches(device, batch_size, pixels)])
