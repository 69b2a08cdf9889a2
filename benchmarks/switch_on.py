"""Effect on reconstructions of switching a discriminator on, with and without the safeguards.

    python benchmarks/switch_on.py --config configs/cifar10_5min.yaml --data FOLDER
    python benchmarks/switch_on.py --config configs/cifar10_5min.yaml --data FOLDER --upsampling nearest

A tokenizer is trained without a discriminator for half of the steps, then continued in several ways from the same state. PSNR is of the
current weights, not their average, on validation images; Fréchet distances of reconstructions use a classifier that no training uses.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from configs.parts import as_dict, part_from
from configs.recipe_file import load_recipe
from configs.run_dir import RunDir
from configs.schema import Recipe
from pipelines.evaluation.distances import Reference
from stage1_vqvae.data.loader import Loader
from stage1_vqvae.data.pixels import to_model, to_uint8
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN, VALIDATION, ImageSource
from stage1_vqvae.features.classifier import CLASSIFIER
from stage1_vqvae.features.networks import feature_network
from stage1_vqvae.metrics import psnr, squared_errors
from stage1_vqvae.model import VQVAE
from stage1_vqvae.steps import TokenizerState, build_state, initialise_, take_step
from training.checkpoint import copied

_STEPS, _EVERY = 2400, 50
_AFTER = (200, 400)
_NO_BOUND = 1e9
WAYS: dict[str, dict[str, Any]] = {
    "no discriminator": {"kind": "none"},
    "as it is": {},
    "without the ramp": {"ramp": 0.0},
    "without the bound": {"bound": _NO_BOUND},
    "without either": {"ramp": 0.0, "bound": _NO_BOUND},
}


def evaluate(tokenizer: VQVAE, images: ImageSource, features: Any, reference: Reference | None) -> tuple[float, float]:
    """Compute PSNR on validation images and, optionally, the Fréchet distance of reconstructions to training images."""
    pixels = images.splits[VALIDATION].pixels[:1000]
    tokenizer.eval()
    with torch.no_grad():
        reconstructions = torch.cat([to_uint8(tokenizer(to_model(part)).reconstruction) for part in pixels.split(250)])
    tokenizer.train()
    distance = reference.frechet(features(reconstructions, 250, "", progress=False).vectors) if reference is not None else None
    return psnr(float(squared_errors(reconstructions, pixels).mean())), float("nan") if distance is None else distance


def with_way(recipe: Recipe, way: dict[str, Any], seed: int, base: dict[str, Any]) -> Recipe:
    """Build the recipe with one way's discriminator."""
    part = part_from("stage1.adversarial", way if "kind" in way else {**base, **way})
    return dataclasses.replace(recipe, stage1=dataclasses.replace(recipe.stage1, adversarial=part, steps=_STEPS, minutes=0.0, seed=seed))


def continued(state: TokenizerState, earlier: dict[str, Any]) -> TokenizerState:
    """Return a state that goes on from an earlier one without a discriminator."""
    state.load_state_dict({**state.state_dict(), **copied(earlier)})
    return state


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data", help="a local copy of its images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2, help="layers of the PatchGAN; 2: patches of 34 pixels")
    parser.add_argument("--channels", type=int, default=32, help="channels of the PatchGAN")
    parser.add_argument("--upsampling", choices=("transposed", "nearest"), help="the decoder's upsampling, instead of the recipe's")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = load_recipe(options.config)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=options.data or recipe.data.path))
    if options.upsampling:
        network = part_from("tokenizer.network", as_dict(recipe.tokenizer.network) | {"upsampling": options.upsampling})
        recipe = dataclasses.replace(recipe, tokenizer=dataclasses.replace(recipe.tokenizer, network=network))
    accelerator = Accelerator(cpu=True)
    images = load_images(recipe.data, (TRAIN, VALIDATION), progress=True)
    base = {"kind": "patch", "layers": options.layers, "channels": options.channels}
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder) / "run")
        features = feature_network(CLASSIFIER, None, Path(folder), images, accelerator.device)
        reference = Reference(features(images.splits[TRAIN].pixels, 250, TRAIN).vectors)
        columns = ["seed", "way", "PSNR at the start", f"lowest within {_AFTER[0]} steps", *(f"after {count}" for count in _AFTER)]
        columns += ["distance at the start", *(f"after {count}" for count in _AFTER), "highest weight", "least share kept"]
        print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
        for seed in range(options.seeds):
            seed_recipe = with_way(recipe, {"kind": "none"}, seed, base)
            loader = Loader(images.splits[TRAIN], recipe.data, seed_recipe.stage1, accelerator)
            trained = build_state(accelerator, run, seed_recipe, images)
            initialise_(accelerator, trained, loader, seed_recipe.stage1)
            trained.model.train()
            for step in range(_STEPS // 2):
                take_step(accelerator, trained, loader, seed_recipe.stage1, step)
            earlier = copied(trained.state_dict())
            first = evaluate(trained.tokenizer, images, features, reference)
            for name, way in WAYS.items():
                way_recipe = with_way(recipe, way, seed, base)
                trained = continued(build_state(accelerator, run, way_recipe, images), earlier)
                curve, distances, weight, least_share = [first[0]], [first[1]], 0.0, 1.0
                for step in range(_STEPS // 2, _STEPS // 2 + _AFTER[1]):
                    statistics = take_step(accelerator, trained, loader, way_recipe.stage1, step)
                    weight = max(weight, float(statistics.get("logged/adversarial_weight", torch.zeros(()))))
                    least_share = min(least_share, float(statistics.get("logged/adversarial_kept", torch.ones(()))))
                    steps_after = step + 1 - _STEPS // 2
                    if steps_after % _EVERY == 0:
                        result = evaluate(trained.tokenizer, images, features, reference if steps_after in _AFTER else None)
                        curve.append(result[0])
                        distances += [result[1]] if steps_after in _AFTER else []
                lowest = min(curve[: 1 + _AFTER[0] // _EVERY])
                after = [curve[count // _EVERY] for count in _AFTER]
                figures = [first[0], lowest, *after, *distances, weight, least_share]
                cells = [f"{figure:.3g}" if figure <= 1 else f"{figure:.2f}" for figure in figures]
                print(f"| {seed} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
