"""Stage 1 against a plain VQ-VAE on CIFAR-10 in equal minutes, and an ablation of each difference.

    python benchmarks/five_minutes.py --data FOLDER              (a local copy of CIFAR-10 as parquet; without it, the Hub)
    python benchmarks/five_minutes.py --data FOLDER --seeds 3 --ablate

Ours is configs/cifar10_5min.yaml, trained by its own command. The plain one has the most copied quantizer, loss and settings, those of
github.com/zalandoresearch/pytorch-vq-vae (one-hot moving averages, decay 0.99, a random normal codebook, squared error over the data's
variance, Adam at 1e-3, batches of 128), with the same network for as long as ours took. Errors are of the test split's 8-bit pixels
scaled to [0, 1].
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.recipe_file import load_recipe
from configs.run_dir import REPOSITORY, RunDir, read_json
from stage1_vqvae.data.pixels import to_model, to_uint8
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import ImageSplit
from stage1_vqvae.metrics import perplexity, squared_errors, usage
from stage1_vqvae.model import load_tokenizer
from stage1_vqvae.networks.convolutional import Decoder, Encoder
from training.batching import batches

_RECIPE = REPOSITORY / "configs" / "cifar10_5min.yaml"
_K, _D = 512, 64
# Settings undone, at a quarter of the recipe's steps; so is the run they are compared with.
ABLATIONS: dict[str, list[str]] = {
    "all of it": [],
    "no restarts": ["--tokenizer.quantizer.restart_below", "0"],
    "random start, no restarts, decay 0.99": [
        *(
            "--tokenizer.quantizer.initialisation",
            "random",
            "--tokenizer.quantizer.restart_below",
            "0",
            "--tokenizer.quantizer.decay",
            "0.99",
        ),
    ],
    "constant rate, no weight average": ["--stage1.final_lr_share", "1", "--stage1.weight_average", "0"],
    "batches of 128": ["--stage1.batch_size", "128"],
}


class Result(NamedTuple):
    """Test-split figures of one training run, and its minutes."""

    mse: float
    usage: float
    perplexity: float
    minutes: float

    def cells(self) -> str:
        """Format the figures as cells of a Markdown row."""
        return f"{self.mse:.5f} | {self.usage:.1%} | {self.perplexity:.0f} | {self.minutes:.1f}"


@torch.no_grad()
def evaluate(reconstruct: Callable[[Tensor], tuple[Tensor, Tensor]], test: ImageSplit, minutes: float) -> Result:
    """Compute error and codebook use over the test split."""
    total, counts = 0.0, torch.zeros(_K)
    for part in batches(len(test), 500):
        pixels = test.pixels[part]
        reconstruction, codes = reconstruct(to_model(pixels))
        total += float(squared_errors(to_uint8(reconstruction), pixels).sum())
        counts += torch.bincount(codes.flatten(), minlength=_K)
    return Result(total / len(test), usage(counts), perplexity(counts), minutes)


def ours(data: str | None, test: ImageSplit, steps: int, seed: int, overrides: list[str]) -> Result:
    """Train by the command of stage 1, in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        source = ["--data.path", data] if data else []
        schedule = ["--stage1.steps", str(steps), "--stage1.validation_interval", str(steps), "--stage1.checkpoint_interval", str(steps)]
        command = [
            sys.executable,
            str(REPOSITORY / "stage1_vqvae/train.py"),
            "--config",
            str(_RECIPE),
            "--run",
            f"{folder}/run",
            "--compute.threads",
            "2",
        ]
        subprocess.run([*command, *source, *schedule, "--stage1.seed", str(seed), *overrides], check=True, stdout=subprocess.DEVNULL)
        run = RunDir(Path(folder) / "run")
        tokenizer = load_tokenizer(run)
        minutes = read_json(run.stage1 / "report.json")["minutes"]

    def reconstruct(images: Tensor) -> tuple[Tensor, Tensor]:
        output = tokenizer(images)
        return output.reconstruction, output.codes[0]

    return evaluate(reconstruct, test, minutes)


class PlainVQVAE(nn.Module):
    """The most copied VQ-VAE: its forward pass updates the moving averages, and it stores the smoothed cluster sizes.

    Encoder and decoder use pixels in [-1/2, 1/2].
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(3, _D, 128, 4, 2, 32), Decoder(_D, 3, 128, 4, 2, 32)
        self.register_buffer("codebook", torch.randn(_K, _D))
        self.register_buffer("size", torch.zeros(_K))
        self.register_buffer("total", torch.randn(_K, _D))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return reconstructions (B, C, H, W) in [-1, 1], codes (B, h, w) and the commitment loss ()."""
        z = self.encoder(images / 2).movedim(1, -1)
        flat = z.reshape(-1, _D)
        distances = flat.square().sum(1, keepdim=True) + self.codebook.square().sum(1) - 2 * flat @ self.codebook.T
        one_hot = F.one_hot(distances.argmin(1), _K).float()
        if self.training:
            with torch.no_grad():
                self.size.mul_(0.99).add_(one_hot.sum(0), alpha=0.01)
                n = self.size.sum()
                self.size.copy_((self.size + 1e-5) / (n + _K * 1e-5) * n)
                self.total.mul_(0.99).add_(one_hot.T @ flat, alpha=0.01)
                self.codebook.copy_(self.total / self.size[:, None])
        q = (one_hot @ self.codebook).view(z.shape)
        commitment = F.mse_loss(z, q.detach())
        q = z + (q - z).detach()
        return 2 * self.decoder(q.movedim(-1, 1)), one_hot.argmax(1), commitment


def plain(training: ImageSplit, test: ImageSplit, minutes: float, seed: int) -> Result:
    """Train the plain VQ-VAE for so many minutes and compute its figures."""
    torch.manual_seed(seed)
    model = PlainVQVAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    variance = float((training.pixels[:].double() / 255).var())
    start = time.monotonic()
    while time.monotonic() - start < 60 * minutes:
        images = to_model(training.pixels[torch.randint(len(training), (128,))])
        reconstruction, _, commitment = model(images)
        # Squared error on [-1, 1] is four times that on [0, 1], whose variance it is.
        loss = F.mse_loss(reconstruction, images) / (4 * variance) + 0.25 * commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return evaluate(lambda images: model(images)[:2], test, minutes)


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with CIFAR-10 as parquet; without it, the Hub's uoft-cs/cifar10")
    parser.add_argument("--seeds", type=int, default=1, help="runs of ours and of the plain one each, alternated; 0 = none")
    parser.add_argument("--ablate", action="store_true", help="also the ablation, of a quarter of the steps each")
    options = parser.parse_args()
    torch.set_num_threads(2)
    recipe = load_recipe(_RECIPE)
    source = load_images(dataclasses.replace(recipe.data, path=options.data), ("train", "test"))
    training, test = source.splits["train"], source.splits["test"]
    config = recipe.stage1
    print("| model | seed | test MSE | usage | perplexity | minutes |\n| --- | --- | --- | --- | --- | --- |", flush=True)
    pairs = []
    for seed in range(options.seeds):
        mine = ours(options.data, test, config.steps, seed, [])
        print(f"| ours | {seed} | {mine.cells()} |", flush=True)
        theirs = plain(training, test, mine.minutes, seed)
        print(f"| plain | {seed} | {theirs.cells()} |", flush=True)
        pairs.append((mine.mse, theirs.mse))
    if pairs:
        medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
        ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        print(f"\nmedians: ours {medians[0]:.5f}, plain {medians[1]:.5f}; median ratio {ratio:.3f}\n", flush=True)
    if options.ablate:
        print("| undone | test MSE | usage | perplexity | minutes |\n| --- | --- | --- | --- | --- |", flush=True)
        for name, overrides in ABLATIONS.items():
            larger = int(overrides[-1]) // config.batch_size if "--stage1.batch_size" in overrides else 1
            result = ours(options.data, test, config.steps // 4 // larger, 0, overrides)
            print(f"| {name} | {result.cells()} |", flush=True)


if __name__ == "__main__":
    main()
