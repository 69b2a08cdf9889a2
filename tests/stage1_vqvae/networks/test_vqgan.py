"""VQGAN's encoder and decoder; test_other_projects.py compares them with the public implementations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.parts import part_from
from configs.run_dir import RunDir
from configs.schema import Tokenizer
from stage1_vqvae.model import VQVAE, load_tokenizer
from stage1_vqvae.networks.vqgan import AttentionBlock, VQGANPart
from stage1_vqvae.train import main as train_tokenizer
from training.metrics_log import read_metrics

SMALL: dict[str, Any] = {"hidden_channels": 32, "residual_blocks": 1, "latent_channels": 8}


@pytest.mark.parametrize(("multipliers", "attention"), [([1], [1]), ([1, 2], []), ([1, 1, 2], [4]), ([1, 1, 1, 2], [2, 8])])
def test_shapes_for_any_downsampling_and_non_square_images(multipliers: list[int], attention: list[int]) -> None:
    part = VQGANPart(**SMALL, multipliers=multipliers, attention=attention)
    encoder, decoder = part.build(3, 5, 7)
    z = encoder(torch.randn(2, 3, 16, 24))
    assert part.downsampling == 2 ** (len(multipliers) - 1)
    assert z.shape == (2, 5, 16 // part.downsampling, 24 // part.downsampling)
    assert decoder(z).shape == (2, 7, 16, 24)
    for network, blocks in ((encoder, 1), (decoder, 2)):
        assert sum(isinstance(layer, AttentionBlock) for layer in network.modules()) == 1 + blocks * len(attention)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_channels": 48}, "a multiple of 32"),
        ({"multipliers": []}, "one number or more"),
        ({"attention": [32]}, "some of [1, 2, 4, 8, 16]"),
        ({"residual_blocks": 0}, "at least 1"),
    ],
)
def test_invalid_sizes_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        part_from("tokenizer.network", {"kind": "vqgan", **fields})
    assert message in str(error.value)


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = VQGANPart(**SMALL, multipliers=[1, 2], attention=[2], gradient_checkpointing=checkpointing)
        model = VQVAE(Tokenizer(code_dim=4, network=network), 8, 12, 3)
        sum(model(torch.rand(2, 3, 8, 12)).losses.values(), torch.zeros(())).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_training_lowers_the_loss_and_the_saved_tokenizer_decodes(tiny_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    network = ["--tokenizer.network", "vqgan", "--tokenizer.network.multipliers", "[1, 2]", "--tokenizer.network.attention", "[2]"]
    sizes = [f"--tokenizer.network.{name}={value}" for name, value in SMALL.items()]
    train_tokenizer(["--config", str(tiny_recipe), "--run", str(run), *network, *sizes, "--stage1.steps", "40"])
    losses = [record["mse"] for record in read_metrics(run / "stage1" / "metrics.jsonl") if record["split"] == "train"]
    assert losses[-1] < 0.85 * losses[0]
    tokenizer = load_tokenizer(RunDir(run))
    assert tokenizer.grids == [(4, 6)]
    images = torch.rand(3, 3, 8, 12) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(tokenizer.decode(tokenizer.encode(images)), tokenizer(images).reconstruction, atol=1e-6)
