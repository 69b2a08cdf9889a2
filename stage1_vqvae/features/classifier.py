"""Small feature networks trained on first use, where Inception's weights are missing or its features say little.

Trained once per run on its training split and stored in the run's folder, so that all comparisons use the same network. It classifies
the run's own labels or, without labels, by how many quarter turns an image was rotated.
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
# At most 1,000 steps or 100 epochs, whichever is less, but at least 150 steps.
_STEPS, _EPOCHS, _MIN_STEPS = 1000, 100, 150
_CHANNELS = (32, 64, 128, 128)
# Pixels along the longer side after averaging: more would take minutes and add little, since it does not judge fine detail.
_SIDE = 32


class Classifier(nn.Module):
    """Four convolutions, all but the first of stride 2, global average pooling and a linear map to labels."""

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
        """Compute features (B, 128) of images (B, C, H, W) in [-1, 1], averaged over blocks to at most 32 pixels per side."""
        block = -(-max(images.shape[2:]) // _SIDE)
        images = F.avg_pool2d(images, block, ceil_mode=True) if block > 1 else images
        return self.layers(images.contiguous(memory_format=torch.channels_last)).mean((2, 3))  # a fifth faster on a CPU

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (B, classes) of images (B, C, H, W) in [-1, 1]."""
        return self.head(self.features(images))


def network_path(folder: Path, kind: str) -> Path:
    """Return the path of a network trained on first use."""
    return folder / f"{kind}.safetensors"


Examples = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""From rows (B,) and the step to training images (B, C, h, w) in [-1, 1] and their classes (B,)."""


class NotTrainedError(LookupError):
    """The network has not been trained yet."""


def load_classifier(folder: Path, source: ImageSource, device: torch.device, seed: int = 0, may_train: bool = True) -> Classifier:
    """Load the folder's classifier of the run's classes, in eval mode; train and save it if it is missing.

    Errors: UserError for a source without labels; NotTrainedError if it is missing and `may_train` is false.
    """
    train = source.splits[TRAIN]
    if train.labels is None or source.label_names is None:
        raise UserError(f"features {CLASSIFIER}: expected images with labels, found none; take {ROTATION}, which needs none")
    labels = train.labels

    def examples(rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        numbers = torch.randint(len(VARIANTS["shift"]), rows.shape, generator=generator(seed, "variants", step))
        return VARIANTS["shift"].apply(to_model(train.pixels[rows].to(device)), numbers), labels[rows].to(device)

    return _load_or_train(folder, CLASSIFIER, source.label_names, train, examples, device, seed, may_train)


def load_rotation_network(folder: Path, source: ImageSource, device: torch.device, seed: int = 0, may_train: bool = True) -> Classifier:
    """Load the folder's network that predicts by how many quarter turns an image was rotated, in eval mode; train it if it is missing.

    Gidaris et al. 2018, "Unsupervised Representation Learning by Predicting Image Rotations". Trained on the largest centred square of
    each image; takes images of any shape. Errors: NotTrainedError if it is missing and `may_train` is false.
    """
    train = source.splits[TRAIN]
    height, width = train.pixels.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2

    def examples(rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        images = to_model(train.pixels[rows][:, top : top + side, left : left + side].to(device))
        turns = torch.randint(4, rows.shape, generator=generator(seed, "turns", step)).to(device)
        rotated = torch.stack([images.rot90(quarter, (2, 3)) for quarter in range(4)])
        return rotated[turns, torch.arange(len(rows), device=device)], turns

    return _load_or_train(folder, ROTATION, [f"{90 * quarter} degrees" for quarter in range(4)], train, examples, device, seed, may_train)


def _load_or_train(
    folder: Path,
    kind: str,
    names: list[str],
    train: ImageSplit,
    examples: Examples,
    device: torch.device,
    seed: int,
    may_train: bool,
) -> Classifier:
    """Load the network from the folder's file, or train a new one on examples and save it."""
    path = network_path(folder, kind)
    # The global generator is left as it was, whether the network is loaded or trained.
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
        raise NotTrainedError(kind)
    else:
        fit(classifier.to(device), kind, len(train), build_order(train.pixels, _BATCH, seed), examples)
        save_weights(path, classifier.state_dict(), {"kind": kind, "label_names": names, "side": _SIDE})
    return classifier.to(device).eval().requires_grad_(False)


def fit(classifier: Classifier, kind: str, count: int, order: Order, examples: Examples) -> None:
    """Train the classifier with AdamW, for up to 1,000 steps of 128 of `count` images."""
    steps = min(_STEPS, max(_MIN_STEPS, _EPOCHS * count // _BATCH))
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
def predict_labels(classifier: Classifier, pixels: Pixels, batch_size: int) -> Tensor:
    """Predict the label (N,) of images, uint8 (N, H, W, C); on the CPU."""
    device = classifier.head.weight.device
    with ieee_float32(device):
        return torch.cat([classifier(to_model(images)).argmax(1).cpu() for _, (images,) in device_batches(device, batch_size, pixels)])
