"""What is exported, diffusers loads, and computes the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configs.run_dir import RunDir
from stage1_vqvae.export_tokenizer import main as export_tokenizer
from stage1_vqvae.model import load_tokenizer
from stage1_vqvae.train import main as train_tokenizer


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_diffusers_computes_the_same(metric: str, tiny_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    network = {"kind": "vqgan", "hidden_channels": 32, "residual_blocks": 1, "latent_channels": 8}
    network |= {"multipliers": "[1, 2, 1]", "attention": "[2]"}
    options = [f"--tokenizer.network.{name}={value}" for name, value in network.items()]
    options += ["--tokenizer.quantizer.metric", metric, "--stage1.steps", "3"]
    train_tokenizer(["--config", str(tiny_recipe), "--run", str(run), *options])
    export_tokenizer(["--run", str(run), "--to", "diffusers", "--output", str(tmp_path / "theirs")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        from diffusers import VQModel

        theirs = VQModel.from_pretrained(tmp_path / "theirs").eval()
    ours, images = load_tokenizer(RunDir(run)), torch.rand(4, 3, 8, 12) * 2 - 1
    with torch.no_grad():
        codes = ours.encode(images)
        latents = theirs.encode(images).latents
        found = theirs.quantize(latents)[2][2].view(4, 2, 3)
        assert torch.equal(found, codes[0])
        assert len(found.unique()) > 2
        assert torch.allclose(theirs.decode(latents).sample, ours.decode(codes), atol=1e-5)


def test_what_diffusers_does_not_know_is_refused(run_copy: Path, tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    there = ["--run", run_copy, "--output", tmp_path / "theirs"]
    assert "expected vqgan" in one_line_error(export_tokenizer, *there)
    assert "expected diffusers" in one_line_error(export_tokenizer, *there, "--to", "nobody")
    assert not (tmp_path / "theirs").exists()
    assert "expected a folder that does not exist yet" in one_line_error(export_tokenizer, "--run", run_copy, "--output", run_copy)
