"""Feature networks against their libraries, safe loading of weights, and the names of their distances."""

from __future__ import annotations

import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from configs.errors import UserError
from stage1_vqvae.data.pixels import to_model
from stage1_vqvae.data.splits import TRAIN, ImageSource, ImageSplit
from stage1_vqvae.features.classifier import load_rotation_network, predict_labels
from stage1_vqvae.features.networks import AUTO, POOLED, SPATIAL, feature_network

NO_IMAGES = ImageSource({}, None)
CPU = torch.device("cpu")


def resized_by_matrices(images: Tensor, side: int) -> Tensor:
    """Resize (B, C, H, W) bilinearly to a square, output pixel i at i * H / side, as TensorFlow 1 does without `align_corners`."""

    def matrix(size: int) -> Tensor:
        positions = torch.arange(side) * (size / side)
        low = positions.long()
        share = (positions - low)[:, None]
        one_hot = [torch.nn.functional.one_hot(rows.clamp(max=size - 1), size).float() for rows in (low, low + 1)]
        return one_hot[0] * (1 - share) + one_hot[1] * share

    height, width = images.shape[2:]
    return matrix(height) @ images @ matrix(width).T


def reference_inception(path: Path, images: Tensor) -> dict[str, Tensor]:
    """Apply the library's layers one by one to images (B, 3, H, W) in [-1, 1]; return the last map of each size and the spatial map
    that sFID uses.
    """
    layers = FeatureExtractorInceptionV3("own", ["2048"], feature_extractor_weights_path=str(path))
    x = (resized_by_matrices((images + 1) * 127.5, 299) - 128) / 128
    maps = {"149": layers.Conv2d_1a_3x3(x)}
    maps["147"] = x = layers.Conv2d_2b_3x3(layers.Conv2d_2a_3x3(maps["149"]))
    maps["73"] = x = layers.Conv2d_3b_1x1(layers.MaxPool_1(x))
    maps["71"] = x = layers.Conv2d_4a_3x3(x)
    maps["35"] = x = layers.Mixed_5d(layers.Mixed_5c(layers.Mixed_5b(layers.MaxPool_2(x))))
    x = layers.Mixed_6c(layers.Mixed_6b(layers.Mixed_6a(x)))
    maps["spatial"] = layers.Mixed_6d.branch1x1(x)
    maps["17"] = x = layers.Mixed_6e(layers.Mixed_6d(x))
    maps["8"] = layers.Mixed_7c(layers.Mixed_7b(layers.Mixed_7a(x)))
    return maps


def test_inception_layers_and_image_gradients_equal_the_librarys(inception_weights: Path, tmp_path: Path) -> None:
    images = torch.rand(1, 3, 20, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    gradients, features = [], []
    for layers in (feature_network(AUTO, str(inception_weights), tmp_path, NO_IMAGES, CPU).layers, None):
        image = images.clone().requires_grad_()
        reference = reference_inception(inception_weights, image) if layers is None else {}
        maps = list(layers(image)) if layers is not None else [value for name, value in reference.items() if name != "spatial"]
        sum(feature_map.square().mean() for feature_map in maps).backward()
        assert image.grad is not None
        gradients.append(image.grad)
        features.append(maps)
    assert [feature_map.shape[1:] for feature_map in features[0]] == [
        (32, 149, 149),
        (64, 147, 147),
        (80, 73, 73),
        (192, 71, 71),
        (288, 35, 35),
        (768, 17, 17),
        (2048, 8, 8),
    ]
    for ours, theirs in zip(*features, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.detach().abs().max()))
    assert gradients[1].abs().min(1).values.gt(0).all()
    assert torch.allclose(*gradients, rtol=1e-2, atol=1e-3 * float(gradients[1].abs().max()))


def test_sfid_features_are_seven_channels_per_position(inception_weights: Path, tmp_path: Path) -> None:
    """They are `mixed_6/conv` after its activation, as in ADM's evaluation."""
    network = feature_network("inception", str(inception_weights), tmp_path, NO_IMAGES, CPU)
    pixels = torch.randint(256, (3, 20, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    maps: list[Tensor] = []
    features = network(pixels, batch_size=2, what="some", progress=False, spatial=maps.append)
    reference = reference_inception(inception_weights, to_model(pixels))["spatial"]
    expected = torch.stack([reference[:, channel, row, column] for row in range(17) for column in range(17) for channel in range(7)], 1)
    assert expected.shape == (3, SPATIAL)
    assert [len(batch) for batch in maps] == [2, 1]
    assert torch.allclose(torch.cat(maps), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert features.vectors.shape == (3, POOLED)
    assert torch.equal(features.vectors, network(pixels, batch_size=2, what="some", progress=False).vectors)


def test_inception_equals_the_librarys_and_is_not_called_fid_with_other_weights(inception_weights: Path, tmp_path: Path) -> None:
    network = feature_network(AUTO, str(inception_weights), tmp_path, NO_IMAGES, CPU)
    grey = torch.randint(256, (3, 28, 20, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = network(grey, batch_size=2, what="some", progress=False)
    inception = FeatureExtractorInceptionV3("own", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_weights))
    vectors, logits = inception(grey.movedim(-1, 1).repeat(1, 3, 1, 1))
    assert torch.allclose(features.vectors, vectors, rtol=1e-4, atol=1e-5)
    assert torch.allclose(features.logits, logits, rtol=1e-4, atol=1e-5)
    assert "FID" not in network.distance


def test_missing_weights_offline_are_reported_with_their_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_connection(*_: object, **__: object) -> None:
        raise URLError("no connection")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_connection)
    with pytest.raises(UserError, match=r"features inception: .*hub.*no connection"):
        feature_network("inception", None, tmp_path, NO_IMAGES, CPU)
    # The default falls back on a network trained on the unlabelled images, of any shape.
    pixels = torch.randint(256, (12, 9, 14, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = ImageSource({TRAIN: ImageSplit(pixels, None)}, None)
    network = feature_network(AUTO, None, tmp_path, source, CPU)
    assert network.name == "rotation"
    assert "no connection" in capsys.readouterr().out
    assert "expected its weights in torch's cache" in (network.instead_of or "")
    assert str(tmp_path) not in (network.instead_of or "")
    assert "FID" not in network.distance
    features = network(pixels, batch_size=5, what="some", progress=False)
    assert features.vectors.shape == (12, 128)
    assert features.logits.shape == (12, 0)
    again = feature_network("rotation", None, tmp_path, source, CPU)
    assert again.sha256 == network.sha256
    assert torch.equal(again(pixels, batch_size=12, what="some", progress=False).vectors, features.vectors)


def test_the_rotation_network_learns_rotations(tmp_path: Path) -> None:
    """Trained on images that are dark at the top and bright at the bottom."""
    shade = torch.linspace(30, 220, 8).round().to(torch.uint8)
    pixels = (shade[:, None] + torch.randint(20, (64, 1, 1), generator=torch.Generator().manual_seed(0))).expand(64, 8, 8)[..., None]
    source = ImageSource({TRAIN: ImageSplit(pixels.to(torch.uint8).contiguous(), None)}, None)
    network = load_rotation_network(tmp_path, source, CPU)
    for turns in range(4):
        turned = source.splits[TRAIN].pixels.rot90(turns, (1, 2)).contiguous()
        assert (predict_labels(network, turned, 64) == turns).double().mean() > 0.95


def test_weights_in_torchs_cache_are_used_and_verified(inception_weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir(parents=True)
    cached.symlink_to(inception_weights)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    network = feature_network(AUTO, None, tmp_path, NO_IMAGES, CPU)
    assert "FID" not in network.distance  # by the file's content, not its name


def test_the_distance_is_called_fid_with_the_published_weights(
    inception_weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("stage1_vqvae.features.networks.fingerprint", lambda path: "6726825d" + "0" * 56)
    assert feature_network(AUTO, str(inception_weights), tmp_path, NO_IMAGES, CPU).distance == "FID"


def test_torchvision_features_are_the_input_of_the_last_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18(weights=None)
    safetensors.torch.save_file(resnet.state_dict(), tmp_path / "resnet18.safetensors")
    network = feature_network("resnet18", str(tmp_path / "resnet18.safetensors"), tmp_path, NO_IMAGES, CPU)
    pixels = torch.randint(256, (2, 40, 30, 3), dtype=torch.uint8)
    features = network(pixels, batch_size=2, what="some", progress=False)
    resnet.eval()
    prepare = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    with torch.no_grad():
        pooled = torch.nn.Sequential(*list(resnet.children())[:-1])(prepare(pixels.movedim(-1, 1))).flatten(1)
    assert torch.allclose(features.vectors, pooled, atol=1e-5)
    assert torch.allclose(features.logits, resnet.fc(pooled), atol=1e-5)
    assert network.distance == "Fréchet distance (resnet18 features)"


class CodeOnLoad:
    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("code from a weights file was run",))


@pytest.mark.parametrize("content", ["pickle", "another network", "a tensor", "text", "nothing"])
@pytest.mark.parametrize("features", ["inception", "resnet18"])
def test_invalid_weight_files_are_refused_and_never_executed(features: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if content == "pickle":
        path.write_bytes(pickle.dumps(CodeOnLoad()))
    elif content == "another network":
        torch.save({"weight": torch.zeros(2)}, path)
    elif content == "a tensor":
        torch.save(torch.zeros(2), path)
    elif content == "text":
        path.write_text("no weights")
    with pytest.raises(UserError, match=r"weights\.pth"):
        feature_network(features, str(path), tmp_path, NO_IMAGES, CPU)


def test_a_network_without_a_last_layer_is_refused(tmp_path: Path) -> None:
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="linear layer, found squeezenet1_1"):
        feature_network("squeezenet1_1", str(tmp_path / "w.pth"), tmp_path, NO_IMAGES, CPU)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet", None, "features: expected auto, inception, classifier, rotation, .* found resnet"),
        ("resnet18", None, "features resnet18: expected a file of its weights"),
        ("classifier", "w.pth", "weights: expected none"),
    ],
)
def test_invalid_options_are_refused(name: str, weights: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        feature_network(name, weights, tmp_path, NO_IMAGES, CPU)
