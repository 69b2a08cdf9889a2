"""Feature networks: features and logits of images, for distances between sets of images.

Only Inception with the original weights gives a figure that may be called FID (Heusel et al. 2017) or sFID (Nash et al. 2021).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn

from configs.errors import UserError, brief, say
from stage1_vqvae.data.device_batches import device_batches
from stage1_vqvae.data.pixels import to_model, to_uint8
from stage1_vqvae.data.splits import ImageSource, Pixels
from stage1_vqvae.features.classifier import CLASSIFIER, ROTATION, Classifier, load_classifier, load_rotation_network, network_path
from stage1_vqvae.features.weights import read_weights
from training.precision import full_precision, ieee_float32
from training.progress import progress_bar
from training.weights_file import fingerprint

AUTO, INCEPTION = "auto", "inception"
FID, FRECHET = "FID", "Fréchet distance"
POOLED, SPATIAL = 2048, 7 * 17 * 17
"""Widths of Inception's pooled features and of sFID's spatial features."""
_SIDE = 299  # side of Inception's input in pixels
_SPATIAL_CHANNELS = 7
_OTHERS = "or the name of a classification network of torchvision, such as resnet50"


class Features(NamedTuple):
    """Features of images."""

    vectors: Tensor
    """float32 (N, D), on the CPU: the input of the network's last layer."""
    logits: Tensor
    """float32 (N, classes); (N, 0) for a network whose classes say nothing of what images show."""


class Layers:
    """Feature maps of a frozen network, differentiable in the images.

    From images (B, C, H, W) in [-1, 1] to one tensor (B, C', h, w) per size of feature map: the last of each size, in order.
    """

    def __init__(self, network: nn.Module, run: Callable[[Tensor], object], blocks: Iterable[nn.Module] | None = None) -> None:
        """`run` applies `network` to images; the outputs of `blocks` (default: all modules) are collected."""
        self._run, self._collected = run, dict[torch.Size, Tensor]()
        self._collecting = False
        network.requires_grad_(False)
        for module in network.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # type: ignore[assignment]  # in-place layers would change collected outputs
        for module in network.modules() if blocks is None else blocks:
            module.register_forward_hook(self._collect)

    def _collect(self, _: nn.Module, __: object, output: object) -> None:
        # A single position is not a feature map.
        if self._collecting and isinstance(output, Tensor) and output.dim() == 4 and output.shape[2:].numel() > 1:
            self._collected[output.shape[2:]] = output

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Compute the feature maps."""
        self._collecting = True
        try:
            self._run(images)
            return list(self._collected.values())
        finally:
            self._collecting, self._collected = False, {}


@dataclass(frozen=True)
class FeatureNetwork:
    """A feature network, and what must be reported beside its figures."""

    name: str
    distance: str
    """Name of the Fréchet distance of its features."""
    sha256: str
    """sha256 of its weights."""
    forward: Callable[[Tensor], Features]
    """From images, uint8 (B, H, W, C), on its device, to features."""
    layers: Layers
    device: torch.device
    instead_of: str | None = None
    """If it substitutes for another network, one line on what was missing."""
    label_names: list[str] | None = None
    """Names of the classes of its logits, if they are the run's own."""
    spatial: Callable[[Tensor], tuple[Features, Tensor]] | None = None
    """`forward` plus sFID's spatial features (B, D'); None: not Inception."""

    def named(self, standard: str, general: str) -> str:
        """Name a figure: `standard`, reserved for the original Inception, or `general` with the network's name."""
        return standard if self.distance == FID else self.distance.replace(FRECHET, general)

    @torch.no_grad()
    def __call__(
        self, pixels: Pixels, batch_size: int, what: str, progress: bool = True, spatial: Callable[[Tensor], None] | None = None
    ) -> Features:
        """Compute features of images, uint8 (N, H, W, C); returned on the CPU. `what`: name of the images, for the progress bar.

        In full float32, as for published figures. `spatial` is called with sFID's features batch by batch, on the device: storing them
        would double the memory.
        """
        assert spatial is None or self.spatial is not None
        features: Features | None = None
        with progress_bar(len(pixels), f"features of {what}", "img", shown=progress) as bar, ieee_float32(self.device):
            for rows, (batch,) in device_batches(self.device, batch_size, pixels):
                if spatial is not None and self.spatial is not None:
                    batch_features, spatial_features = self.spatial(batch)
                    spatial(spatial_features)
                else:
                    batch_features = self.forward(batch)
                features = features or Features(*(torch.empty(len(pixels), tensor.shape[1]) for tensor in batch_features))
                for stored, tensor in zip(features, batch_features, strict=True):
                    stored[rows] = tensor.float().cpu()
                bar.update(rows.stop - rows.start)
        assert features is not None
        return features


def feature_network(
    name: str,
    weights: str | None,
    folder: Path,
    source: ImageSource,
    device: torch.device,
    seed: int = 0,
    option: str | None = None,
    may_train: bool = True,
) -> FeatureNetwork:
    """Load the feature network that a recipe names.

    Args:
        name: see `Evaluation.features`.
        weights: file of its weights; None: see `Evaluation.weights`.
        folder: of networks that are trained on first use.
        source: images to train those on.
        device: of the network.
        seed: for that training.
        option: key of the recipe that names the network, for messages; None: evaluation.
        may_train: whether a missing one is trained.
    Errors: UserError for an unknown name, or for weights that are missing or another network's; NotTrainedError.
    """
    if option is not None:
        try:
            return feature_network(name, weights, folder, source, device, seed, may_train=may_train)
        except UserError as error:
            raise UserError(f"{option}: {error}") from None
    if name == AUTO:
        try:
            return _inception(weights, device)
        except UserError as error:
            if weights is not None:
                raise
            until_then = f"until then images are compared by --features {ROTATION}, whose distances are no FID"
            say(f"{error}; {until_then}")
            # Not the error's own text: it has paths of this machine, and evaluations may be published.
            missing = f"features {INCEPTION}: expected its weights in torch's cache, or a connection, found neither; {until_then}"
            return replace(feature_network(ROTATION, None, folder, source, device, seed, may_train=may_train), instead_of=missing)
    if name in (CLASSIFIER, ROTATION):
        if weights is not None:
            raise UserError(f"weights: expected none for {name}, which is made from the run's own images, found {weights}")
        network = (load_classifier if name == CLASSIFIER else load_rotation_network)(folder, source, device, seed, may_train)
        return _from_classifier(name, network, network_path(folder, name), device)
    if name == INCEPTION:
        return _inception(weights, device)
    if name not in torchvision.models.list_models(torchvision.models):
        raise UserError(f"features: expected {AUTO}, {INCEPTION}, {CLASSIFIER}, {ROTATION}, {_OTHERS}, found {name}")
    if weights is None:
        raise UserError(f"features {name}: expected a file of its weights (weights FILE), found none")
    return _torchvision(name, Path(weights).expanduser(), device)


def _from_classifier(name: str, network: Classifier, path: Path, device: torch.device) -> FeatureNetwork:
    """Wrap a network trained on the run's own images."""
    has_classes = name == CLASSIFIER  # an image's orientation says nothing of what it shows

    def forward(pixels: Tensor) -> Features:
        vectors = network.features(to_model(pixels))
        return Features(vectors, network.head(vectors) if has_classes else vectors[:, :0])

    labels = network.label_names if has_classes else None
    layers = Layers(network, network.features)
    return FeatureNetwork(name, f"{FRECHET} ({name} features)", fingerprint(path), forward, layers, device, label_names=labels)


def _inception_weights(weights: str | None) -> Path:
    """Return the file of Inception's weights, by default in torch's cache, where it is downloaded. Errors: UserError if it is missing."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    if weights is not None:
        return Path(weights).expanduser()
    file_name = URL_INCEPTION_V3.rsplit("/", 1)[1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=_hash_in(file_name))
        except (URLError, OSError, RuntimeError) as error:
            expected = f"expected its weights at {path}, or a connection to {URL_INCEPTION_V3}"
            raise UserError(f"features {INCEPTION}: {expected}, found: {error}") from None
    return path


def _inception_network(path: Path) -> nn.Module:
    """Build torch-fidelity's Inception with the weights in a file. Errors: UserError for another network's weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.TemporaryDirectory() as folder:
        # The library unpickles its file, so it gets a copy of the tensors alone.
        copy = Path(folder) / "weights.pth"
        torch.save(read_weights(path), copy)
        try:
            return FeatureExtractorInceptionV3(INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(copy))
        except RuntimeError as error:
            raise UserError(f"{path}: expected the weights of FID's Inception, found another network's ({brief(error)})") from None


def _inception(weights: str | None, device: torch.device) -> FeatureNetwork:
    """Load FID's Inception of torch-fidelity, with its way of resizing images."""
    # Slow to import.
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    path = _inception_weights(weights)
    sha256 = _sha256(path)
    network: Any = _inception_network(path).to(device)

    def forward(pixels: Tensor) -> Features:
        return Features(*network(pixels.movedim(-1, 1).expand(-1, 3, -1, -1)))

    def with_spatial(pixels: Tensor) -> tuple[Features, Tensor]:
        outputs: list[Tensor] = []
        # `mixed_6/conv` of the original TensorFlow graph: the first of the block's four branches.
        hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: outputs.append(output[:, :_SPATIAL_CHANNELS]))
        try:
            features = forward(pixels)
        finally:
            hook.remove()
        return features, outputs[0].movedim(1, -1).flatten(1)  # channels last, like published statistics

    def run(images: Tensor) -> object:
        # The library's forward pass rounds images to uint8, which stops gradients; a hook feeds the first layer unrounded images. In
        # float32, since 16-bit floats cannot represent the sampling positions of 299 pixels.
        rgb = full_precision(images).expand(-1, 3, -1, -1)
        scaled = interpolate_bilinear_2d_like_tensorflow1x((rgb + 1) * 127.5, size=(_SIDE, _SIDE), align_corners=False)
        hook = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda *_: ((scaled - 128) / 128,))
        try:
            return forward(to_uint8(images.detach()))
        finally:
            hook.remove()

    standard = sha256.startswith(_hash_in(URL_INCEPTION_V3))
    distance = FID if standard else f"{FRECHET} (Inception, other weights)"
    # Whole blocks only: among all modules, the last 35 x 35 or 17 x 17 output is a branch inside the block that downsamples.
    layers = Layers(network, run, network.children())
    return FeatureNetwork(INCEPTION, distance, sha256, forward, layers, device, spatial=with_spatial)


def _hash_in(file_name: str) -> str:
    """Return the beginning of the sha256 in the name of a torch hub file, NAME-HASH.pth."""
    return file_name.rsplit("-", 1)[1].split(".")[0]


def _torchvision(name: str, path: Path, device: torch.device) -> FeatureNetwork:
    """Load a torchvision network: features are the input of its last linear layer, under the transforms of its default weights."""
    sha256 = _sha256(path)
    network = torchvision.models.get_model(name, weights=None)
    try:
        network.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise UserError(f"{path}: expected the weights of {name}, found another network's ({brief(error)})") from None
    network.to(device).eval()
    prepare = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(f"features: expected a network that ends in a linear layer, found {name}, which has none")
    inputs: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[:] = arguments[:1]

    linear[-1].register_forward_pre_hook(keep)

    def forward(pixels: Tensor) -> Features:
        logits = network(prepare(pixels.movedim(-1, 1).expand(-1, 3, -1, -1)))
        return Features(inputs.pop().flatten(1), logits)

    def run(images: Tensor) -> object:
        network(prepare((images.expand(-1, 3, -1, -1) + 1) / 2))
        return inputs.pop()  # otherwise its graph would be held until the next call

    return FeatureNetwork(name, f"{FRECHET} ({name} features)", sha256, forward, Layers(network, run), device)


def _sha256(path: Path) -> str:
    """Compute the file's sha256. Errors: UserError if there is no file."""
    if not path.is_file():
        raise UserError(f"weights {path}: expected a file, found none")
    return fingerprint(path)
