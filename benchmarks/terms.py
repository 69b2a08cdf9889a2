"""Stage 1 in equal minutes: squared error alone, plus a perceptual term, plus a discriminator.

    python benchmarks/terms.py --config configs/photos_cpu.yaml --data FOLDER --minutes 20 --features classifier --output FOLDER

The terms are the recipe's; further options are passed to `train.py`. Networks that a term trains first count among its minutes.
Reconstructions of the validation images are compared with the training images by `--features`, which should be other than training's.
Also writes an image: originals, and below them the reconstructions of each way.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from configs.recipe_file import load_recipe
from configs.run_dir import REPOSITORY, RunDir
from pipelines.evaluation.distances import Reference
from stage1_vqvae.data.pixels import to_model, to_uint8
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN, VALIDATION
from stage1_vqvae.features.networks import feature_network
from stage1_vqvae.metrics import psnr, squared_errors, ssim_per_image
from stage1_vqvae.model import load_tokenizer
from stage1_vqvae.pictures import grid_scale, image_grid, save_png
from training.weights_file import read_header

_SHOWN = 20
_NONE = ["--stage1.perceptual", "none"], ["--stage1.adversarial", "none"]
WAYS = {
    "squared error": [*_NONE[0], *_NONE[1]],
    "+ perceptual": _NONE[1],
    "+ perceptual + adversarial": [],
}


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data", help="folder of images, if the recipe names none")
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--features", nargs="+", required=True, help="networks of the Fréchet distances")
    parser.add_argument("--output", type=Path, required=True, help="folder for runs and picture; existing runs are not trained again")
    options, more = parser.parse_known_args()
    torch.set_num_threads(options.threads)
    runs = {name: RunDir((options.output / f"run{number}").resolve()) for number, name in enumerate(WAYS)}
    for name, run in runs.items():
        source = ["--data.path", options.data] if options.data else []
        command = [sys.executable, str(REPOSITORY / "stage1_vqvae/train.py"), "--config", str(options.config), "--run", str(run)]
        command += ["--stage1.minutes", str(options.minutes), "--compute.threads", str(options.threads), *source, *WAYS[name]]
        command += _options_for(more, WAYS[name])
        if not run.tokenizer.exists():
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    images = load_images(load_recipe(runs["squared error"].recipe).data, (TRAIN, VALIDATION), progress=True)
    pixels = images.splits[VALIDATION].pixels[:]
    networks = {name: feature_network(name, None, options.output, images, torch.device("cpu")) for name in options.features}
    references = {name: Reference(network(images.splits[TRAIN].pixels, 250, TRAIN).vectors) for name, network in networks.items()}
    pictures_by_way = {"real images": pixels}
    for name, run in runs.items():
        tokenizer = load_tokenizer(run)
        with torch.no_grad():
            pictures_by_way[name] = torch.cat([to_uint8(tokenizer(to_model(part)).reconstruction) for part in pixels.split(250)])
    distances = [f"{distance} ({name})" for name in networks for distance in ("Fréchet distance", "kernel distance x 1000")]
    print(f"| {len(pixels)} images | steps | PSNR | SSIM | {' | '.join(distances)} |\n|{' --- |' * (4 + len(distances))}")
    for name, pictures in pictures_by_way.items():
        steps = f"{read_header(runs[name].tokenizer, 'tokenizer')['steps']:,}" if name in runs else "-"
        quality = f"{psnr(float(squared_errors(pictures, pixels).mean())):.2f} | {float(ssim_per_image(pictures, pixels).mean()):.3f}"
        cells = []
        for network, reference in references.items():
            vectors = networks[network](pictures, 250, name, progress=False).vectors
            kernel = reference.kernel(vectors, 0)
            cells += [f"{reference.frechet(vectors):.3g}", "-" if kernel is None else f"{1000 * kernel.mean:.3g}"]
        print(f"| {name} | {steps} | {quality if name in runs else '- | -'} | {' | '.join(cells)} |")
    shown = torch.arange(0, len(pixels), max(1, len(pixels) // _SHOWN))[:_SHOWN]
    grid = image_grid(torch.cat([pictures[shown] for pictures in pictures_by_way.values()]), len(shown))
    save_png(options.output / "terms.png", grid, grid_scale(pixels.shape[1]))


def _options_for(options: list[str], way: list[str]) -> list[str]:
    """Return the options for `train.py`, without those of a term that the way does not have."""
    pairs = zip(options[::2], options[1::2], strict=True)
    return [part for pair in pairs if not pair[0].startswith(tuple(f"{term}." for term in way[::2])) for part in pair]


if __name__ == "__main__":
    main()
