"""The convolutional encoder and decoder, the VQ-VAE built from them, and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file

from configs.errors import UserError
from configs.parts import as_dict, part_from
from configs.run_dir import RunDir
from configs.schema import Tokenizer
from stage1_vqvae.model import VQVAE, load_tokenizer, save_tokenizer
from stage1_vqvae.networks.convolutional import ConvolutionalPart, Decoder, Encoder, ResidualBlock
from stage1_vqvae.objectives.pixels import BinaryCrossEntropy, SquaredError
from training.weights_file import fingerprint, load_weights, save_weights


def vqvae(
    height: int = 8, width: int = 12, channels: int = 3, quantizer: str = "ema", objective: str = "mse", downsampling: int = 4
) -> VQVAE:
    config = Tokenizer(
        code_dim=4,
        quantizer=part_from("tokenizer.quantizer", {"kind": quantizer, "num_codes": 16}),
        network=ConvolutionalPart(hidden_channels=16, residual_channels=8, downsampling=downsampling),
        objective=part_from("tokenizer.objective", {"kind": objective}),
    )
    return VQVAE(config, height, width, channels)


@pytest.mark.parametrize("upsampling", ["transposed", "nearest"])
@pytest.mark.parametrize("downsampling", [1, 2, 4, 8])
@pytest.mark.parametrize("blocks", [0, 2])
def test_shapes_for_any_power_of_two_and_non_square_images(
    downsampling: int, blocks: int, upsampling: Literal["transposed", "nearest"]
) -> None:
    images = torch.randn(2, 3, 16, 24)
    z = Encoder(3, 5, 16, downsampling, blocks, 8)(images)
    assert z.shape == (2, 5, 16 // downsampling, 24 // downsampling)
    assert Decoder(5, 3, 16, downsampling, blocks, 8, upsampling)(z).shape == images.shape


@pytest.mark.parametrize("kind", ["convolutional", "hierarchical"])
@pytest.mark.parametrize(("upsampling", "checkerboard"), [("transposed", True), ("nearest", False)])
def test_transposed_convolutions_leave_a_checkerboard_and_nearest_upsampling_does_not(
    kind: str, upsampling: str, checkerboard: bool
) -> None:
    torch.manual_seed(0)
    sizes = {"kind": kind, "hidden_channels": 16, "residual_channels": 8, "downsampling": 4, "upsampling": upsampling}
    _, decoder = part_from("tokenizer.network", sizes).build(3, 5, 3)
    vectors = [torch.ones(1, 5, side, side, dtype=torch.float64) for side in ([24] if kind == "convolutional" else [12, 24])]
    with torch.no_grad():
        inside = decoder.double()(*vectors)[..., 44:52, 44:52]  # not reached by padding
    spread = float(inside.std((2, 3)).max() / inside.abs().max())
    assert spread > 1e-3 if checkerboard else spread < 1e-12


def test_a_residual_block_does_not_change_its_input() -> None:
    x = torch.randn(2, 16, 4, 4)
    before = x.clone()
    block = ResidualBlock(16, 8)
    torch.nn.init.zeros_(block.layers[-1].weight)
    torch.nn.init.zeros_(block.layers[-1].bias)
    assert torch.equal(block(x), before)
    assert torch.equal(x, before)


@pytest.mark.parametrize("quantizer", ["ema", "gradient"])
@pytest.mark.parametrize("objective", ["mse", "bce"])
@pytest.mark.parametrize("channels", [1, 3])
def test_encode_then_decode_equals_forward(quantizer: str, objective: str, channels: int) -> None:
    model = vqvae(channels=channels, quantizer=quantizer, objective=objective).eval()
    images = torch.rand(2, channels, 8, 12) * 2 - 1
    output = model(images)
    codes = model.encode(images)
    assert [grid.shape for grid in codes] == [(2, *grid) for grid in model.grids] == [(2, 2, 3)]
    assert torch.equal(codes[0], output.codes[0])
    assert torch.equal(model.decode(codes), output.reconstruction)
    assert output.reconstruction.shape == images.shape


def test_reconstruction_gradients_reach_encoder_and_decoder() -> None:
    model = vqvae()
    model(torch.randn(2, 3, 8, 12)).losses["reconstruction"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()
    model(torch.randn(2, 3, 8, 12)).losses["commitment"].backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    assert all(parameter.grad is None for parameter in model.decoder.parameters())


def test_losses_of_known_images() -> None:
    images = torch.tensor([[[[-1.0, 1.0]]]])
    assert SquaredError((1, 1, 2)).losses(torch.tensor([[[[0.0, 1.0]]]]), images)["reconstruction"].item() == pytest.approx(0.5)
    chance = torch.tensor([[[[0.25, 0.75]]]])
    expected = -(torch.log(torch.tensor(0.75)) * 2) / 2
    assert BinaryCrossEntropy((1, 1, 2)).losses(torch.logit(chance), images)["reconstruction"].item() == pytest.approx(expected.item())


def test_bce_reconstructions_are_probabilities_as_pixels() -> None:
    output = vqvae(objective="bce", channels=1).eval()(torch.randn(1, 1, 8, 12).sign()).reconstruction
    assert float(output.detach().abs().max()) < 1


def test_the_tokenizer_file_is_self_contained(tmp_path: Path) -> None:
    model = vqvae(quantizer="gradient", downsampling=2).eval()
    run = RunDir(tmp_path)
    save_tokenizer(run.tokenizer, model, 7)
    loaded = load_tokenizer(run)
    assert loaded.config == model.config
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(loaded(images).reconstruction, model(images).reconstruction)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    first = fingerprint(run.tokenizer)
    with torch.no_grad():
        model.quantizer.codebook.weight[0] += 1
    save_tokenizer(run.tokenizer, model, 7)
    assert fingerprint(run.tokenizer) != first


MALFORMED: dict[str, Any] = {
    "a list": [1],
    "nested without end": None,
    "without config": {"kind": "tokenizer", "format": 3, "image_shape": [3, 8, 12]},
    "of half a config": {"kind": "tokenizer", "format": 3, "image_shape": [3, 8, 12], "config": {"code_dim": 4}},
    "of no shape": {"kind": "tokenizer", "format": 3, "image_shape": "large", "config": as_dict(vqvae().config)},
    "of other weights": {"kind": "tokenizer", "format": 3, "image_shape": [3, 8, 12], "config": as_dict(vqvae().config)},
}


@pytest.mark.parametrize("content", MALFORMED)
def test_malformed_headers_are_refused(content: str, tmp_path: Path) -> None:
    header = "[" * 100_000 if MALFORMED[content] is None else json.dumps(MALFORMED[content])
    run = RunDir(tmp_path)
    save_file({"encoder.0.weight": torch.zeros(2)}, run.tokenizer, {"header": header})
    with pytest.raises(UserError, match=r"^\S*tokenizer\.safetensors: expected ") as error:
        load_tokenizer(run)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "another kind"])
def test_files_that_are_not_a_tokenizer_are_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.safetensors"
    if damage == "another kind":
        save_weights(path, {"a": torch.zeros(1)}, {"kind": "prior"})
    elif damage != "missing":
        save_tokenizer(path, vqvae(), 7)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"GIF89a" * 100)
    with pytest.raises(UserError, match=r"tokenizer\.safetensors: expected the weights of a tokenizer, found"):
        load_weights(path, "tokenizer")
