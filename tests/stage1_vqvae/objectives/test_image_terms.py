"""Perceptual and adversarial terms: values, gradients and schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import pytest
import torch
import torchvision
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from configs.errors import UserError
from configs.parts import DiscriminatorPart, PerceptualPart, part_from
from configs.schema import Tokenizer
from stage1_vqvae.data.splits import TRAIN, ImageSource, ImageSplit
from stage1_vqvae.features.lpips import LPIPS
from stage1_vqvae.features.networks import feature_network
from stage1_vqvae.model import VQVAE
from stage1_vqvae.objectives.adversarial import Adversary, last_layer
from stage1_vqvae.objectives.discriminators import PatchDiscriminator, ProjectedDiscriminator
from stage1_vqvae.objectives.image_terms import ImageTerms, PerceptualTerm
from stage1_vqvae.objectives.perceptual import FeatureDistance, LPIPSPart

CPU = torch.device("cpu")
NO_IMAGES = ImageSource({TRAIN: ImageSplit(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), None)}, None)


@pytest.fixture
def resnet(tmp_path: Path) -> Any:
    """torchvision's ResNet-18 with random weights, loaded from a file."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None)
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    return feature_network("resnet18", str(tmp_path / "resnet18.pth"), tmp_path, NO_IMAGES, CPU)


def patch(**fields: Any) -> DiscriminatorPart:
    part = part_from("stage1.adversarial", {"kind": "patch", "channels": 4, "layers": 1, **fields})
    assert isinstance(part, DiscriminatorPart)
    return part


class Linear(nn.Module):
    """A linear discriminator with one logit per image."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> list[Tensor]:
        return [(images * self.weight).sum((1, 2, 3), keepdim=True)]


def test_feature_distance_compares_unit_features_of_each_size(resnet: Any) -> None:
    """Against torchvision's blocks applied one by one."""
    images, originals = torch.rand(2, 2, 3, 40, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1
    images.requires_grad_()
    distance = FeatureDistance(resnet, weight=2.0)(images, originals)
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).eval()  # the fixture's weights
    prepare = torchvision.models.ResNet18_Weights.DEFAULT.transforms()

    def blocks(x: Tensor) -> list[Tensor]:
        stem = F.relu(network.bn1(network.conv1(prepare((x + 1) / 2))))
        first = network.layer1(network.maxpool(stem))
        second = network.layer2(first)
        third = network.layer3(second)
        return [stem, first, second, third, network.layer4(third)]

    def unit(x: Tensor) -> Tensor:
        return x / x.norm(dim=1, keepdim=True).clamp(min=1e-3)

    terms = [(unit(a) - unit(b)).square().sum(1).mean() for a, b in zip(blocks(images), blocks(originals), strict=True)]
    expected = 2 * sum(terms) / 5
    assert torch.allclose(distance, expected, rtol=1e-3)
    gradients = [torch.autograd.grad(value, images)[0] for value in (distance, expected)]
    assert torch.allclose(*gradients, rtol=1e-2, atol=1e-3 * float(gradients[1].abs().max()))
    assert float(FeatureDistance(resnet, 1.0)(originals, originals)) == 0


def test_lpips_equals_torchmetrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torchmetrics' public class, which finds the same weights in torch's cache."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    torch.manual_seed(0)
    weights = torchvision.models.alexnet(weights=None).state_dict()
    path = tmp_path / "checkpoints" / torchvision.models.AlexNet_Weights.DEFAULT.url.rsplit("/", 1)[1]
    path.parent.mkdir()
    torch.save(weights, path)
    images, originals = torch.rand(2, 2, 3, 40, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    distance = LPIPSPart(trunk="alex", weights=str(path), weight=3.0).build(tmp_path, NO_IMAGES, CPU, 0)(images, originals)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert torch.allclose(distance, 3 * LearnedPerceptualImagePatchSimilarity("alex")(images, originals), rtol=1e-5)
    torch.save({"features.0.bias": weights["features.0.bias"]}, path)
    with pytest.raises(UserError, match=r"LPIPS: .*expected torchvision's weights of alex, found no features.0.weight"):
        LPIPS("alex", path)


def test_missing_lpips_weights_offline_are_reported_with_their_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_connection(*_: object, **__: object) -> None:
        raise URLError("no connection")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_connection)
    with pytest.raises(UserError, match=r"LPIPS: expected the weights of vgg at .*vgg16.*no connection"):
        LPIPSPart().build(tmp_path, NO_IMAGES, CPU, 0)


@pytest.mark.parametrize(("layers", "pixels"), [(1, 16), (2, 34), (3, 70)])
def test_receptive_field_of_a_logit(layers: int, pixels: int) -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(3, 8, layers, "spectral")
    images = torch.randn(1, 3, 160, 160, requires_grad=True)
    (logits,) = discriminator(images)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], images)
    for axis in (2, 3):
        field = gradient.abs().amax([other for other in (0, 1, 2, 3) if other != axis]).nonzero()
        assert int(field.max() - field.min()) + 1 == pixels


def test_spectral_normalisation_is_updated_once_per_step() -> None:
    torch.manual_seed(0)
    adversary = Adversary(patch(), PatchDiscriminator(3, 4, 1, "spectral"))
    convolutions = [module for module in adversary.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        for layer in convolutions:
            layer.parametrizations.weight.original.normal_()  # type: ignore[union-attr]
    before = [layer.weight.clone() for layer in convolutions]
    adversary.discriminator(torch.randn(2, 3, 16, 16))
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(convolutions, before, strict=True))  # forward is pure
    zero = torch.zeros((), dtype=torch.float64)
    for _ in range(200):
        adversary.update_({f"adversary/{name}": zero for name in ("real", "fake", "others", "own")}, 1)
    for layer in convolutions:
        assert float(torch.linalg.svdvals(layer.weight.detach().flatten(1))[0]) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
def test_losses_of_discriminator_and_tokenizer(loss: Literal["hinge", "non_saturating"]) -> None:
    adversary = Adversary(patch(loss=loss), Linear(3, 4, 4))
    images, fakes = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    real, fake = ((batch * adversary.discriminator.weight).sum((1, 2, 3)) for batch in (images, fakes))  # type: ignore[operator]
    if loss == "hinge":
        discriminator_loss, tokenizer_loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2, -fake.mean()
    else:
        discriminator_loss, tokenizer_loss = (
            -(real.sigmoid().log().mean() + (-fake).sigmoid().log().mean()) / 2,
            -fake.sigmoid().log().mean(),
        )
    assert torch.allclose(adversary.discriminator_loss(images, fakes)[0], discriminator_loss)
    assert torch.allclose(adversary.tokenizer_loss(fakes), tokenizer_loss)


def test_the_discriminators_rate_is_a_share_of_the_tokenizers() -> None:
    """Adam's first step moves each weight by the rate."""
    adversary = Adversary(patch(lr_share=0.25), Linear(3, 4, 4))
    weight = adversary.discriminator.weight.detach().clone()  # type: ignore[operator]
    images, fakes = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss, statistics = adversary.discriminator_loss(images, fakes)
    loss.backward()
    zero = torch.zeros((), dtype=torch.float64)
    adversary.step(Accelerator(cpu=True), 0.01, {**statistics, "adversary/others": zero, "adversary/own": zero}, 1)
    assert torch.allclose((adversary.discriminator.weight - weight).abs(), torch.full_like(weight, 0.25 * 0.01), rtol=1e-3)


def test_r1_and_lecam_penalties() -> None:
    """R1's gradient at real images is the linear discriminator's weight; LeCam's anchors are moving averages of logits."""
    images, fakes = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain, r1, lecam = (Adversary(patch(penalty=kind, penalty_weight=3.0), Linear(3, 4, 4)) for kind in ("none", "r1", "lecam"))
    loss = plain.discriminator_loss(images, fakes)[0]
    weight = plain.discriminator.weight
    assert torch.allclose(r1.discriminator_loss(images, fakes)[0] - loss, 3 / 2 * weight.square().sum())  # type: ignore[operator]
    zero = torch.zeros((), dtype=torch.float64)
    sums = {"adversary/real": zero + 8, "adversary/fake": zero - 4, "adversary/others": zero, "adversary/own": zero}
    lecam.update_(sums, micro_batches=2)  # means 4 and -2
    real, fake = ((batch * weight).sum((1, 2, 3)) for batch in (images, fakes))  # type: ignore[operator]
    expected = 3 * ((real + 0.01 * 2).square().mean() + (fake - 0.01 * 4).square().mean())
    assert torch.allclose(lecam.discriminator_loss(images, fakes)[0] - loss, expected)


def test_adversarial_schedule_and_weight() -> None:
    adversary = Adversary(patch(start=0.25, ramp=0.1, weight=0.5), Linear(3, 4, 4))
    assert [adversary.begin_(step, 100) for step in (0, 24, 25, 26)] == [False, False, True, True]
    assert (int(adversary.started_at), adversary.first_step(100)) == (25, 25)
    assert adversary.begin_(26, 1000)  # extending a finished training keeps start and ramp
    adversary.norms.copy_(torch.tensor([6.0, 2.0]))
    weights = [float(adversary.weight(step)) for step in range(25, 100)]
    assert weights[:11] == [0.0] * 11
    assert weights[11:21] == pytest.approx([0.5 * 3 * share / 10 for share in range(1, 11)])
    assert set(weights[21:]) == {1.5}


@pytest.mark.parametrize("parts", [1, 4])
def test_gradient_bound_holds_per_image_for_any_micro_batches(parts: int) -> None:
    draws = torch.Generator().manual_seed(3)
    images = torch.randn(4, 3, 4, 4, dtype=torch.float64, generator=draws)
    spread = torch.tensor([1e-6, 0.01, 1.0, 100.0], dtype=torch.float64)[:, None, None, None]
    reconstructions = (images + spread * torch.randn(images.shape, dtype=torch.float64, generator=draws)).requires_grad_()
    unbounded, bounded = (Adversary(patch(bound=bound), Linear(3, 4, 4)) for bound in (1e9, 0.5))
    gradients, expected, factors = [], [], []
    for reconstruction, originals in zip(reconstructions.chunk(parts), images.chunk(parts), strict=True):
        (error,) = torch.autograd.grad(nn.functional.mse_loss(reconstruction, originals), reconstruction)
        (gradient,) = torch.autograd.grad(0.001 * unbounded.tokenizer_loss(reconstruction), reconstruction)
        assert torch.equal(unbounded.bounded(gradient, reconstruction.detach() - originals)[0], gradient)
        limited, share = bounded.bounded(gradient, reconstruction.detach() - originals)
        gradients.append(limited / parts)
        factors += [
            min(1.0, 0.5 * float(error_gradient.norm() / term_gradient.norm()))
            for error_gradient, term_gradient in zip(error, gradient, strict=True)
        ]
        assert float(share) == pytest.approx(sum(factors[-len(reconstruction) :]) / len(reconstruction))
        expected.append(gradient / parts)
    assert factors[0] < 1e-3
    assert factors[-1] == 1
    assert torch.allclose(
        torch.cat(gradients), torch.tensor(factors, dtype=torch.float64)[:, None, None, None] * torch.cat(expected), rtol=1e-12
    )


@pytest.mark.parametrize("bound", [0.3, 0.8])
def test_the_bound_limits_the_rise_of_the_squared_error(bound: float) -> None:
    """All images share one reconstruction, and the adversarial gradient is a thousand times that of their squared error."""
    images = torch.randn(32, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    adversary = Adversary(patch(start=0.0, ramp=0.0, weight=0.9, bound=bound), Linear(1, 4, 4))
    adversary.begin_(0, 100)
    adversary.norms.copy_(torch.tensor([1000.0, 1.0]))
    decoded = images.mean(0, keepdim=True)
    least = float((images - decoded).square().mean())
    layer = nn.Conv2d(1, 1, 1).double()
    for _ in range(300):
        reconstructions = layer(torch.zeros_like(images)) * 0 + decoded
        losses = {"reconstruction": reconstructions.detach().square().mean() + 0 * layer.weight.sum()}
        gradient = ImageTerms([adversary], 50).losses(reconstructions, images, losses, layer).gradient
        assert gradient is not None
        decoded = decoded - ((2 * (decoded - images) / images.numel()) + gradient).sum(0, keepdim=True) * 4
    assert 1.01 * least < float((images - decoded).square().mean()) <= least / (1 - bound**2) * (1 + 1e-9)


@pytest.mark.parametrize("network", ["convolutional", "hierarchical"])
def test_image_losses_have_the_gradient_and_adaptive_weight_of_one_backward_pass(network: str) -> None:
    """Against one ordinary backward pass through the whole model."""
    torch.manual_seed(0)
    small = {"kind": network, "hidden_channels": 8, "residual_blocks": 1, "residual_channels": 4, "downsampling": 2}
    part = part_from("tokenizer.network", small)
    tokenizer = VQVAE(Tokenizer(code_dim=4, network=part), 8, 12, 3).double().train()
    images = torch.rand(3, 3, 8, 12, dtype=torch.float64) * 2 - 1
    perceptual = nn.L1Loss()
    adversary = Adversary(patch(start=0.0, ramp=0.0, weight=0.7, bound=1e6), PatchDiscriminator(3, 4, 1, "spectral").double())
    adversary.begin_(0, 100)
    adversary.norms.copy_(torch.tensor([2.0, 1.0]))
    layer = last_layer(tokenizer.decoder)

    output = tokenizer(images)
    terms = [PerceptualTerm(perceptual), adversary]
    result = ImageTerms(terms, step=5).losses(output.reconstruction, images, output.losses, tokenizer.decoder)
    total = sum(output.losses.values()) + result.surrogate(output.reconstruction)
    gradients = torch.autograd.grad(total, list(tokenizer.decoder.parameters()))
    _, statistics = adversary.discriminator_loss(images, output.reconstruction)

    output = tokenizer(images)
    others = sum(output.losses.values()) + perceptual(output.reconstruction, images)
    term = adversary.tokenizer_loss(output.reconstruction)
    expected = torch.autograd.grad(others + 0.7 * 2.0 * term, list(tokenizer.decoder.parameters()), retain_graph=True)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, reference, rtol=1e-9, atol=1e-12)
    assert torch.allclose(result.losses["adversarial"], 1.4 * term)
    adversary.norms.fill_(-1)
    adversary.update_(result.statistics | statistics, 1)
    norms = [torch.autograd.grad(value, layer, retain_graph=True)[0].norm() for value in (others, term)]
    assert float(adversary.weight(5)) == pytest.approx(0.7 * float(norms[0] / norms[1]), rel=1e-9)


def test_the_projected_discriminator_has_logits_of_each_size_and_reaches_the_image(resnet: Any) -> None:
    torch.manual_seed(0)
    discriminator = ProjectedDiscriminator(resnet.layers, [64, 64, 128, 256, 512], 8)
    images = torch.randn(2, 3, 40, 40, requires_grad=True)
    logits = discriminator(images)
    assert [tuple(logit.shape) for logit in logits] == [(2, 1, side, side) for side in (112, 56, 28, 14, 7)]
    trainable = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trainable) == 5 * (8 * 8 * 9 + 8 + 8 * 9 + 1)  # the heads alone
    gradients = torch.autograd.grad(sum(logit.mean() for logit in logits), [images, *trainable])
    assert all(bool(gradient.any()) for gradient in gradients)


def test_projected_discriminators_start_equal_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 trains the feature network and the others load it; all draw the same initial weights."""
    monkeypatch.setattr("stage1_vqvae.features.classifier._MIN_STEPS", 1)
    pixels = torch.randint(256, (4, 16, 16, 1), dtype=torch.uint8)
    source = ImageSource({TRAIN: ImageSplit(pixels, torch.tensor([0, 1, 0, 1]).numpy())}, ["a", "b"])
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        built = part_from("stage1.adversarial", {"kind": "projected", "channels": 4}).build(1, tmp_path, source, CPU, 0)
        states.append(built.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_images_too_small_for_a_patch_discriminator_are_refused(tmp_path: Path) -> None:
    source = ImageSource({TRAIN: ImageSplit(torch.zeros(1, 12, 16, 3, dtype=torch.uint8), None)}, None)
    assert patch(layers=2).build(3, tmp_path, source, CPU, 0)(torch.zeros(1, 3, 12, 16))[0].shape == (1, 1, 1, 2)
    with pytest.raises(UserError, match=r"stage1.adversarial.layers: expected at most 2 for images of 12x16, found 3"):
        patch(layers=3).build(3, tmp_path, source, CPU, 0)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("patch", {"channels": 48, "norm": "group"}, "stage1.adversarial.channels: expected a multiple of 32, found 48"),
        ("patch", {"layers": 0}, "stage1.adversarial.layers"),
        ("projected", {"start": 1.0}, "stage1.adversarial.start: expected 0 <= share < 1, found 1.0"),
        ("projected", {"bound": 0.0}, "stage1.adversarial.bound"),
        ("projected", {"network": "auto"}, "stage1.adversarial.network: expected one network by its name, found auto"),
        ("patch", {"weight": 1.0}, "stage1.adversarial.weight: expected at least 0, below 1, found 1.0"),
        ("patch", {"start": 0.9, "ramp": 0.1}, "stage1.adversarial.ramp: expected a share of which two fit after start 0.9, found 0.1"),
    ],
)
def test_invalid_fields_are_refused(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        part_from("stage1.adversarial", {"kind": kind, **fields})


def test_inception_as_perceptual_and_projected_network(inception_weights: Path, tmp_path: Path) -> None:
    """The distance of an image to itself is 0, there are logits of seven sizes, and the gradient reaches the image."""
    fields = {"network": "inception", "weights": str(inception_weights)}
    perceptual, projected = (
        part_from(f"stage1.{name}", {"kind": kind, **fields}) for name, kind in (("perceptual", "features"), ("adversarial", "projected"))
    )
    assert isinstance(perceptual, PerceptualPart)
    assert isinstance(projected, DiscriminatorPart)
    images, originals = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    distance = perceptual.build(tmp_path, NO_IMAGES, CPU, 0)
    assert distance is not None
    discriminator = projected.build(3, tmp_path, NO_IMAGES, CPU, 0)
    images.requires_grad_()
    value, logits = distance(images, originals), discriminator(images)
    assert [tuple(logit.shape[1:]) for logit in logits] == [(1, side, side) for side in (149, 147, 73, 71, 35, 17, 8)]
    assert value > 0
    for loss in (value, torch.stack([logit.mean() for logit in logits]).sum()):
        (gradient,) = torch.autograd.grad(loss, images)
        assert gradient.isfinite().all()
        assert (gradient != 0).double().mean() > 0.99
    with torch.no_grad():
        assert distance(originals, originals) == 0
