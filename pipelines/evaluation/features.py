"""What images are compared by: a network's features, and its logits.

Only Inception with the weights of the original FID gives a figure that may be called FID (Heusel et al. 2017).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from configs.errors import UserError
from configs.run_dir import RunDir
from configs.schema import Evaluation
from pipelines.evaluation.classifier import CLASSIFIER, ROTATION, Classifier, run_classifier, run_rotation
from stage1_vqvae.data.pixels import to_model
from stage1_vqvae.data.splits import ImageSource
from stage1_vqvae.training.batching import batches
from stage1_vqvae.training.progress import progress_bar
from stage1_vqvae.training.weights_file import fingerprint

AUTO, INCEPTION = "auto", "inception"
_OTHERS = "or the name of a classification network of torchvision, such as resnet50"


class Features(NamedTuple):
    """What a network makes of images."""

    vectors: Tensor
    """float32 (N, D), on the CPU: what its last layer sees."""
    logits: Tensor
    """float32 (N, classes); (N, 0) of a network whose classes say nothing of what images show."""


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
    device: torch.device
    instead_of: str | None = None
    """One line on what was missing, if it stands in for another network."""
    label_names: list[str] | None = None
    """Names of the classes of its logits, if they are the run's own."""

    @torch.no_grad()
    def __call__(self, pixels: Tensor, batch_size: int, what: str, progress: bool = True) -> Features:
        """Features of images, uint8 (N, H, W, C), on the CPU; `what` they are, for the progress bar."""
        found = []
        with progress_bar(len(pixels), f"features of {what}", "img", shown=progress) as bar:
            for part in batches(len(pixels), batch_size):
                found.append(Features(*(tensor.float().cpu() for tensor in self.forward(pixels[part].to(self.device)))))
                bar.update(part.stop - part.start)
        return Features(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def feature_network(config: Evaluation, run: RunDir, source: ImageSource, device: torch.device) -> FeatureNetwork:
    """The network that the recipe names; the run's classifier is trained if it is not there yet.

    Errors: UserError for a name there is not, or weights that are missing or another network's.
    """
    if config.features == AUTO:
        try:
            return _inception(config.weights, device)
        except UserError as error:
            if config.weights is not None:
                raise
            missing = f"{error}; until then images are compared by --features {ROTATION}, whose distances are no FID"
            return replace(feature_network(replace(config, features=ROTATION), run, source, device), instead_of=missing)
    if config.features == ROTATION:
        _no_weights(ROTATION, config)
        return _made_here(ROTATION, run_rotation(run, source, device), run.rotation, device)
    if config.features == CLASSIFIER:
        _no_weights(CLASSIFIER, config)
        classifier = run_classifier(run, source, device)
        return replace(_made_here(CLASSIFIER, classifier, run.classifier, device), label_names=classifier.label_names)
    if config.features == INCEPTION:
        return _inception(config.weights, device)
    if config.features not in torchvision.models.list_models(torchvision.models):
        raise UserError(f"features: expected {AUTO}, {INCEPTION}, {CLASSIFIER}, {ROTATION}, {_OTHERS}, found {config.features}")
    if config.weights is None:
        raise UserError(f"features {config.features}: expected a file of its weights (--weights FILE), found none")
    return _of_torchvision(config.features, Path(config.weights).expanduser(), device)


def _no_weights(features: str, config: Evaluation) -> None:
    if config.weights is not None:
        raise UserError(f"weights: expected none for {features}, which is made from the run's own images, found {config.weights}")


def _made_here(name: str, network: Classifier, path: Path, device: torch.device) -> FeatureNetwork:
    """A network trained on the run's own images."""

    def forward(pixels: Tensor) -> Features:
        vectors = network.features(to_model(pixels))
        # Which way up an image is says nothing of what it shows.
        return Features(vectors, vectors[:, :0] if name == ROTATION else network.head(vectors))

    return FeatureNetwork(name, f"Fréchet distance ({name} features)", fingerprint(path), forward, device)


def _inception(weights: str | None, device: torch.device) -> FeatureNetwork:
    """Inception as FID has it, by torch-fidelity, with its way of scaling images."""
    # Slow to import, and only this needs it.
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

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
        torch.save(weights_in(path), copy)
        try:
            network = FeatureExtractorInceptionV3(INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(copy))
        except RuntimeError as error:
            raise UserError(f"{path}: expected the weights of FID's Inception, found another network's ({error})") from None
    network.to(device)

    def forward(pixels: Tensor) -> Features:
        return Features(*network(pixels.movedim(-1, 1).expand(-1, 3, -1, -1)))

    standard = sha256.startswith(_hash_in(file_name))
    return FeatureNetwork(INCEPTION, "FID" if standard else "Fréchet distance (Inception, other weights)", sha256, forward, device)


def _hash_in(file_name: str) -> str:
    """The beginning of the sha256 that a file of torch's hub bears in its name: NAME-HASH.pth."""
    return file_name.rsplit("-", 1)[1].split(".")[0]


def _of_torchvision(name: str, path: Path, device: torch.device) -> FeatureNetwork:
    """What the last linear layer of a torchvision network sees, under the transforms of torchvision's default weights for it."""
    sha256 = _checked(path)
    network = torchvision.models.get_model(name, weights=None)
    try:
        network.load_state_dict(weights_in(path))
    except RuntimeError as error:
        raise UserError(f"{path}: expected the weights of {name}, found another network's ({error})") from None
    network.to(device).eval()
    prepare = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(f"features: expected a network that ends in a linear layer, found {name}, which has none")
    seen: list[Tensor] = []
    linear[-1].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))

    def forward(pixels: Tensor) -> Features:
        seen.clear()
        logits = network(prepare(pixels.movedim(-1, 1).expand(-1, 3, -1, -1)))
        return Features(seen[-1].flatten(1), logits)

    return FeatureNetwork(name, f"Fréchet distance ({name} features)", sha256, forward, device)


def _checked(path: Path) -> str:
    """The file's sha256. Errors: UserError if there is no file."""
    if not path.is_file():
        raise UserError(f"--weights {path}: expected a file, found none")
    return fingerprint(path)


def weights_in(path: Path) -> dict[str, Tensor]:
    """Weights in a safetensors file, or in one of torch, of which only tensors are read. Errors: UserError for another file."""
    wanted = f"{path}: expected weights (safetensors, or torch's format with named tensors alone)"
    try:
        is_safetensors = path.suffix == ".safetensors"
        found = safetensors.torch.load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: pickle's own, zip's, safetensors'
        raise UserError(f"{wanted}, found: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()):
        raise UserError(f"{wanted}, found a {type(found).__name__}")
    return dict(found)
