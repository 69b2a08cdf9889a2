"""ViT-VQGAN's encoder and decoder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from configs.parts import part_from
from configs.run_dir import RunDir
from configs.schema import Tokenizer
from stage1_vqvae.model import VQVAE, load_tokenizer
from stage1_vqvae.networks.vit import Decoder, Encoder, ViTPart
from stage1_vqvae.train import main as train_tokenizer
from training.metrics_log import read_metrics

SMALL: dict[str, Any] = {"layers": 2, "width": 24, "heads": 3}


def randomised_weights(network: Encoder | Decoder) -> dict[str, Tensor]:
    """Randomise all weights, in float64, so that each of them has an effect."""
    network.double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.4)
    return dict(network.named_parameters())


def reference_rotation(x: Tensor, height: int, width: int) -> Tensor:
    """Apply rotary positions to (B, heads, T, d) by complex exponentials: half of the pairs by row, half by column."""
    quarter = x.shape[-1] // 4
    waves = 100.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.stack([torch.cat([row * waves, column * waves]) for row in range(height) for column in range(width)])
    pairs = torch.complex(x[..., 0::2], x[..., 1::2]) * torch.exp(1j * angles)
    return torch.stack([pairs.real, pairs.imag], -1).flatten(-2)


def reference_network(grid: Tensor, weights: dict[str, Tensor], heads: int, layers: int) -> Tensor:
    """Compute (B, h, w, C) -> (B, h, w, C') step by step, as both networks do with tokens."""
    _, height, width, _ = grid.shape

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"])

    x = linear(grid.flatten(1, 2), "tokens")
    for number in range(layers):
        block = f"blocks.{number}"
        qkv = linear(norm(x, f"{block}.attention_norm"), f"{block}.attention.qkv").chunk(3, -1)
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv)
        query, key = (reference_rotation(F.layer_norm(part, part.shape[-1:]), height, width) for part in (query, key))
        shares = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        x = x + linear((shares @ value).transpose(1, 2).flatten(2), f"{block}.attention.out")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.mlp_norm"), f"{block}.mlp.hidden")), f"{block}.mlp.out")
    return linear(linear(norm(x, "norm"), "head.hidden").tanh(), "head.out").unflatten(1, (height, width))


@pytest.mark.parametrize("grad", [True, False])
def test_encoder_and_decoder_equal_the_reference(grad: bool) -> None:
    """With the same weights at several grid shapes, with and without autograd."""
    encoder, decoder = ViTPart(**SMALL, downsampling=2).build(3, 5, 4)
    encoder_weights, decoder_weights = randomised_weights(encoder), randomised_weights(decoder)
    for height, width in ((3, 3), (2, 5), (4, 1)):
        images = torch.randn(2, 3, 2 * height, 2 * width, dtype=torch.float64)
        latents = torch.randn(2, 5, height, width, dtype=torch.float64)
        # A strided convolution's patches have their channels first.
        rows = F.unfold(images, 2, stride=2).view(2, 3, 4, height, width).permute(0, 3, 4, 2, 1).flatten(3)
        pixels = (
            reference_network(latents.movedim(1, -1), decoder_weights, 3, 2).unflatten(-1, (4, 4)).transpose(3, 4).flatten(3).movedim(-1, 1)
        )
        with torch.set_grad_enabled(grad):
            encoded, decoded = encoder(images), decoder(latents)
        torch.testing.assert_close(encoded, reference_network(rows, encoder_weights, 3, 2).movedim(-1, 1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(decoded, F.pixel_shuffle(pixels, 2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("patch", [1, 3, 4])
def test_shapes_for_any_patch_and_channels_last_memory(patch: int) -> None:
    part = ViTPart(**SMALL, downsampling=patch)
    encoder, decoder = part.build(3, 5, 7)
    latents = encoder(torch.randn(2, 3, 12, 24))
    outputs = decoder(latents)
    assert latents.shape == (2, 5, 12 // patch, 24 // patch)
    assert outputs.shape == (2, 7, 12, 24)
    for tensor in (latents, outputs):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_every_latent_depends_on_every_pixel() -> None:
    encoder, _ = ViTPart(**SMALL, downsampling=2).build(1, 2, 1)
    randomised_weights(encoder)
    images = torch.randn(1, 1, 4, 6, dtype=torch.float64)
    slopes = torch.autograd.functional.jacobian(encoder, images).abs().sum((0, 1))
    assert slopes.min() > 0


@pytest.mark.parametrize(
    ("fields", "key", "message"),
    [
        ({"downsampling": 0}, "tokenizer.network.downsampling", "at least 1"),
        ({"layers": 0}, "tokenizer.network.layers", "at least 1"),
        ({"heads": 0}, "tokenizer.network.heads", "at least 1"),
        ({"width": 0}, "tokenizer.network.width", "a multiple of 4 x 8 heads"),
        ({"width": 24, "heads": 4}, "tokenizer.network.width", "a multiple of 4 x 4 heads"),
    ],
)
def test_invalid_sizes_are_refused(fields: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        part_from("tokenizer.network", {"kind": "vit", **fields})
    assert str(error.value).startswith(f"{key}: expected {message}")


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = ViTPart(**SMALL, downsampling=4, gradient_checkpointing=checkpointing)
        model = VQVAE(Tokenizer(code_dim=4, network=network), 8, 12, 3)
        sum(model(torch.rand(2, 3, 8, 12)).losses.values(), torch.zeros(())).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_compiles_to_one_graph() -> None:
    """Without graph breaks or warnings."""
    encoder, _ = ViTPart(**SMALL, downsampling=4).build(3, 5, 3)
    images = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(torch.compile(encoder, backend="eager", fullgraph=True)(images), encoder(images))


def test_mixed_precision_is_close_to_full_precision() -> None:
    """Compares latents and the gradient of each weight."""
    torch.manual_seed(0)
    encoder, _ = ViTPart(**SMALL, downsampling=4).build(3, 5, 3)
    images, results = torch.randn(2, 3, 8, 12), []
    for mixed in (False, True):
        network = copy.deepcopy(encoder)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            latents = network(images).float()
        latents.square().mean().backward()
        results.append([latents, *(parameter.grad for parameter in network.parameters())])
    for full, rough in zip(*results, strict=True):
        assert (rough - full).norm() < 0.05 * full.norm()


def test_training_lowers_the_loss_and_the_saved_tokenizer_decodes(tiny_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    network = ["--tokenizer.network", "vit", "--tokenizer.network.downsampling", "2"]
    sizes = [f"--tokenizer.network.{name}={value}" for name, value in SMALL.items()]
    train_tokenizer(["--config", str(tiny_recipe), "--run", str(run), *network, *sizes, "--stage1.steps", "40"])
    losses = [record["mse"] for record in read_metrics(run / "stage1" / "metrics.jsonl") if record["split"] == "train"]
    assert losses[-1] < 0.5 * losses[0]
    tokenizer = load_tokenizer(RunDir(run))
    assert tokenizer.grids == [(4, 6)]
    images = torch.rand(3, 3, 8, 12) * 2 - 1
    assert torch.allclose(tokenizer.decode(tokenizer.encode(images)), tokenizer(images).reconstruction, atol=1e-6)
