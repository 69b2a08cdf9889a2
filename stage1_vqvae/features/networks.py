"""What images are compared by: a network's features, and its logits.

Only Inception with the weights of the original FID gives a figure that may be called FID (Heusel et al. 2017), or sFID (Nash et al. 2021).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
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
_SIDE = 299  # pixels that Inception sees
_SPATIAL_CHANNELS = 7
_OTHERS = "or the name of a classification network of torchvision, such as resnet50"


class Features(NamedTuple):
    """What a network makes of images."""

    vectors: Tensor
    """float32 (N, D), on the CPU: what its last layer sees."""
    logits: Tensor
    """float32 (N, classes); (N, 0) of a network whose classes say nothing of what images show."""


class Layers:
    """What a frozen network has inside: from images (B, C, H, W) in [-1, 1] to one tensor (B, C', h, w) for each size that its features
    have, the last of that size, in the order in which they come. A gradient reaches the images.
    """

    def __init__(self, network: nn.Module, run: Callable[[Tensor], object], blocks: Iterable[nn.Module] | None = None) -> None:
        """`run` applies `network` to images; outputs of `blocks` (default: all modules) are collected."""
        self._run, self._found = run, dict[torch.Size, Tensor]()
        self._collecting = False
        network.requires_grad_(False)
        for module in network.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # type: ignore[assignment]  # what was collected would change after it
        for module in network.modules() if blocks is None else blocks:
            module.register_forward_hook(self._collect)

    def _collect(self, _: nn.Module, __: object, output: object) -> None:
        # A single position is no map of features.
        if self._collecting and isinstance(output, Tensor) and output.dim() == 4 and output.shape[2:].numel() > 1:
            self._found[output.shape[2:]] = output

    def __call__(self, images: Tensor) -> list[Tensor]:
        """The features."""
        self._collecting = True
        try:
            self._run(images)
            return list(self._found.values())
        finally:
            self._collecting, self._found = False, {}


@dataclass(frozen=True)
class FeatureNetwork:
    """A network and all that must be said of it beside a figure."""

    name: str
    distance: str
    """What a Fréchet distance of its features is called."""
    sha256: str
    """The sha256 of its weights."""
    forward: Callable[[Tensor], Features]
    """Images, uint8 (B, H, W, C), on its device."""
    layers: Layers
    device: torch.device
    instead_of: str | None = None
    """One line on what was missing, if it stands in for another network."""
    label_names: list[str] | None = None
    """Names of the classes of its logits, if they are the run's own."""
    spatial: Callable[[Tensor], tuple[Features, Tensor]] | None = None
    """`forward` plus sFID's spatial features (B, D'); None: not Inception."""

    def named(self, standard: str, general: str) -> str:
        """What a figure of its features is called: `standard` is what only Inception's may be called, `general` names the features."""
        return standard if self.distance == FID else self.distance.replace(FRECHET, general)

    @torch.no_grad()
    def __call__(
        self, pixels: Pixels, batch_size: int, what: str, progress: bool = True, spatial: Callable[[Tensor], None] | None = None
    ) -> Features:
        """Features of images, uint8 (N, H, W, C), on the CPU. `what`: name of the images, for the progress bar.

        In full float32, as in published figures. `spatial` receives sFID's features batch by batch, on the device: those of all images
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
    """The network of that name, as a recipe names it.

    Args:
        name: see `Evaluation.features`.
        weights: the file of its weights; None: see `Evaluation.weights`.
        folder: where networks made on the spot are kept; they are trained if they are not there yet.
        source: the images that those are trained on.
        device: where it is to run.
        seed: of the training of those.
        option: key of the recipe that names the network, for messages; None: evaluation.
        may_train: whether one that is not there yet is made.
    Errors: UserError for a name there is not, or weights that are missing or another network's; NotTrainedError.
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
            # Without the error's words: they name places of this machine, and the evaluation may be published.
            missing = f"features {INCEPTION}: expected its weights in torch's cache, or a connection, found neither; {until_then}"
            return replace(feature_network(ROTATION, None, folder, source, device, seed, may_train=may_train), instead_of=missing)
    if name in (CLASSIFIER, ROTATION):
        if weights is not None:
            raise UserError(f"weights: expected none for {name}, which is made from the run's own images, found {weights}")
        made = (load_classifier if name == CLASSIFIER else load_rotation_network)(folder, source, device, seed, may_train)
        return _made_here(name, made, network_path(folder, name), device)
    if name == INCEPTION:
        return _inception(weights, device)
    if name not in torchvision.models.list_models(torchvision.models):
        raise UserError(f"features: expected {AUTO}, {INCEPTION}, {CLASSIFIER}, {ROTATION}, {_OTHERS}, found {name}")
    if weights is None:
        raise UserError(f"features {name}: expected a file of its weights (weights FILE), found none")
    return _of_torchvision(name, Path(weights).expanduser(), device)


def _made_here(name: str, network: Classifier, path: Path, device: torch.device) -> FeatureNetwork:
    """A network trained on the run's own images."""
    knows_classes = name == CLASSIFIER  # which way up an image is says nothing of what it shows

    def forward(pixels: Tensor) -> Features:
        vectors = network.features(to_model(pixels))
        return Features(vectors, network.head(vectors) if knows_classes else vectors[:, :0])

    labels = network.label_names if knows_classes else None
    layers = Layers(network, network.features)
    return FeatureNetwork(name, f"{FRECHET} ({name} features)", fingerprint(path), forward, layers, device, label_names=labels)


def _inception(weights: str | None, device: torch.device) -> FeatureNetwork:
    """Inception as FID has it, by torch-fidelity, with its way of scaling images."""
    # Slow to import, and only this needs it.
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    file_name = URL_INCEPTION_V3.rsplit("/", 1)[1]
    path = Path(weights).expanduser() if weights is not None else Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if weights is None and not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=_hash_in(file_name))
        except (URLError, OSError, RuntimeError) as error:
            wanted = f"expected its weights at {path}, or a connection to {URL_INCEPTION_V3}"
            raise UserError(f"features {INCEPTION}: {wanted}, found: {error}") from None
    sha256 = _checked(path)
    with tempfile.TemporaryDirectory() as folder:
        # The library unpickles whatever is in a file: it gets one made here of tensors alone.
        copy = Path(folder) / "weights.pth"
        torch.save(read_weights(path), copy)
        try:
            network = FeatureExtractorInceptionV3(INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(copy))
        except RuntimeError as error:
            raise UserError(f"{path}: expected the weights of FID's Inception, found another network's ({brief(error)})") from None
    network.to(device)

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

    standard = sha256.startswith(_hash_in(file_name))
    distance = FID if standard else f"{FRECHET} (Inception, other weights)"
    # Whole blocks only: among all modules, the last 35 x 35 or 17 x 17 output is a branch inside the block that downsamples.
    layers = Layers(network, run, network.children())
    return FeatureNetwork(INCEPTION, distance, sha256, forward, layers, device, spatial=with_spatial)


def _hash_in(file_name: str) -> str:
    """The beginning of the sha256 that a file of torch's hub bears in its name: NAME-HASH.pth."""
    return file_name.rsplit("-", 1)[1].split(".")[0]


def _of_torchvision(name: str, path: Path, device: torch.device) -> FeatureNetwork:
    """What the last linear layer of a torchvision network sees, under the transforms of torchvision's default weights for it."""
    sha256 = _checked(path)
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
    seen: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen[:] = arguments[:1]

    linear[-1].register_forward_pre_hook(keep)

    def forward(pixels: Tensor) -> Features:
        logits = network(prepare(pixels.movedim(-1, 1).expand(-1, 3, -1, -1)))
        return Features(seen.pop().flatten(1), logits)

    def run(images: Tensor) -> object:
        network(prepare((images.expand(-1, 3, -1, -1) + 1) / 2))
        return seen.pop()  # or its graph would be held until the next one

    return FeatureNetwork(name, f"{FRECHET} ({name} features)", sha256, forward, Layers(network, run), device)


def _checked(path: Path) -> str:
    """The file's sha256. Errors: UserError if there is no file."""
    if not path.is_file():
        raise UserError(f"weights {path}: expected a file, found none")
    return fingerprint(path)
