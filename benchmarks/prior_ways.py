"""Priors in equal minutes over one tokenizer's codes: kinds and fields, alone and together.

    python benchmarks/prior_ways.py --run runs/cifar10_hour --minutes 8 --output FOLDER
    python benchmarks/prior_ways.py --run runs/NAME --minutes 4 --output FOLDER --only recipe best --seeds 0 1 2
    python benchmarks/prior_ways.py --run runs/cifar10_hour --minutes 8 --output FOLDER --masks recipe any

A way is a set of settings that replace the recipe's, by name, in the YAML file `--ways`: of `prior`, of `stage2`, and of `sampling` a list,
each of which gives a row. First a training step of each way is timed, alternating, by one thread on the idle machine. As many steps as then
fit the minutes are trained, two ways at a time with a thread each, so that other work on the machine changes no result. Priors that the
output folder has are not trained again.

The table has validation bits per token and, of 1,000 samples whose labels take turns, Fréchet distance and recall by each network of
`--features`, the share that the evaluation's classifier finds in their class, and the codes per second that all cores draw. With --masks,
bits per missing code of the validation images instead, for several masks; without names after `--features`, bits alone.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor

from configs.parts import as_dict
from configs.recipe_file import load_recipe
from configs.run_dir import REPOSITORY, RunDir, read_json
from configs.schema import Recipe, Stage2, prior_from
from pipelines.evaluation.distances import Reference, neighbourhoods
from pipelines.generator import Generator
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN, VALIDATION
from stage1_vqvae.features.classifier import load_classifier, predict_labels
from stage1_vqvae.features.networks import feature_network
from stage1_vqvae.pictures import grid_scale, image_grid, save_png
from stage2_prior.codes.loader import CodeLoader
from stage2_prior.codes.store import CodeStore
from stage2_prior.priors.prior_file import build_prior
from stage2_prior.priors.stepwise import StepwisePrior, code_losses
from stage2_prior.priors.transformer import Transformer
from stage2_prior.steps import PriorState, take_step
from training.weights_file import fingerprint

_SAMPLES, _SHOWN = 1000, 40
_BITS = 1 / 0.6931471805599453
Way = dict[str, Any]


def way_recipe(recipe: Recipe, way: Way) -> Recipe:
    """Return the recipe with a way's prior and training."""
    prior = prior_from({**({} if "kind" in way.get("prior", {}) else as_dict(recipe.prior)), **way.get("prior", {})})
    return dataclasses.replace(recipe, prior=prior, stage2=dataclasses.replace(recipe.stage2, **way.get("stage2", {})))


def step_seconds(run: RunDir, recipes: dict[str, Recipe], rounds: int = 5, steps: int = 3) -> dict[str, float]:
    """Measure a training step of each recipe by one thread: medians of alternated rounds, in seconds."""
    torch.set_num_threads(1)
    accelerator, store = Accelerator(cpu=True), CodeStore(run.codes / TRAIN, fingerprint(run.tokenizer))
    trained: dict[str, tuple[PriorState, CodeLoader, Stage2]] = {}
    for name, recipe in recipes.items():
        prior = build_prior(recipe.prior, store.manifest.condition_of_prior(recipe.condition), store.manifest)
        state = PriorState(accelerator, prior.train(), recipe.stage2, recipe.compute)
        loader = CodeLoader(store, prior.condition, recipe.stage2, accelerator, prior.num_draws)
        trained[name] = state, loader, recipe.stage2
    seconds: dict[str, list[float]] = {name: [] for name in recipes}
    for number in range(rounds + 1):
        for name, (state, loader, section) in trained.items():
            start = time.monotonic()
            for step in range(steps):
                take_step(accelerator, state, loader, section, step)
            seconds[name] += [(time.monotonic() - start) / steps] if number else []  # the first round warms up
    return {name: statistics.median(times) for name, times in seconds.items()}


def train(run: RunDir, folder: Path, way: Way, section: Stage2, seed: int) -> None:
    """Train a way's prior in a copy of the run, unless it is there."""
    if (folder / "priors/way/prior.safetensors").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run.path, folder, ignore=shutil.ignore_patterns("priors", "checkpoints", "samples", "evaluations"))
    settings = {f"prior.{key}": value for key, value in way.get("prior", {}).items()}
    settings |= {f"stage2.{key}": value for key, value in way.get("stage2", {}).items()}
    interval = max(1, section.steps // 20)
    settings |= {"stage2.steps": section.steps, "stage2.minutes": 0, "stage2.seed": seed, "stage2.validation_interval": interval}
    settings |= {"compute.threads": 1, "stage2.checkpoint_interval": section.steps}
    options = [
        text for key, value in settings.items() for text in (f"--{key}", json.dumps(value) if isinstance(value, list) else str(value))
    ]
    command = [sys.executable, str(REPOSITORY / "stage2_prior/train.py"), "--run", str(folder), "--name", "way", *options]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


class Judge:
    """Compares samples with the training images, by several networks."""

    def __init__(self, run: RunDir, recipe: Recipe, features: list[str]) -> None:
        self.images = load_images(recipe.data, (TRAIN, VALIDATION), progress=True)
        cpu, pixels = torch.device("cpu"), self.images.splits[TRAIN].pixels
        self.networks = {name: feature_network(name, None, run.path, self.images, cpu) for name in features}
        self.vectors = {name: network(pixels, 250, TRAIN).vectors for name, network in self.networks.items()}
        self.references = {name: Reference(vectors) for name, vectors in self.vectors.items()}
        self.classifier = load_classifier(run.path, self.images, cpu) if self.images.splits[TRAIN].labels is not None else None

    def figures(self, pixels: Tensor, labels: list[str]) -> dict[str, float]:
        """Compute distance and recall by each network, and the share of images in their class."""
        figures: dict[str, float] = {}
        for name, network in self.networks.items():
            vectors = network(pixels, 250, "samples", progress=False).vectors
            figures[f"distance, {name}"] = self.references[name].frechet(vectors) or float("nan")
            figures[f"recall, {name}"] = neighbourhoods({"samples": vectors}, self.vectors[name], 0)["sets"]["samples"]["recall"]
        if self.classifier is not None and labels:
            found = predict_labels(self.classifier, pixels, 250).tolist()
            matches = [self.classifier.label_names[index] == label for index, label in zip(found, labels, strict=True)]
            figures["in class"] = sum(matches) / len(matches)
        return figures


@torch.no_grad()
def missing_bits(folder: Path, validation: CodeStore, most: int = 500) -> dict[str, float]:
    """Compute the mean bits of missing codes of validation images: given all kept ones where the prior can, or those before each."""
    generator = Generator.from_pretrained(folder, prior="way", device="cpu", precision="float32")
    prior, header = generator.prior, generator.header
    assert isinstance(prior, StepwisePrior)
    assert header is not None
    rows = torch.arange(min(most, len(validation)))
    codes, stored = validation.codes(rows), validation.condition_for(header.condition)
    condition, figures = None if stored is None else stored[rows], dict[str, float]()
    layout, chance = prior.layout, torch.rand(len(rows), prior.layout.length, generator=torch.Generator().manual_seed(0))
    (height, width), *_ = layout.grids
    row, column = torch.arange(layout.length) // width, torch.arange(layout.length) % width
    inner = (row >= height // 4) & (row < height - height // 4) & (column >= width // 4) & (column < width - width // 4)
    masks = {f"{share} % at random": chance < share / 100 for share in (25, 50, 75)}
    masks |= {"lower half": row >= height // 2, "upper half": row < height // 2, "centre": inner}
    for name, mask in masks.items():
        missing = mask.expand(len(rows), -1)
        if isinstance(prior, Transformer) and prior.completes_any_mask:
            order = layout.order_by(missing + torch.arange(layout.length) / layout.length)
            nats = torch.cat(code_losses(prior.logits(codes, condition, order=order), codes), 1)
        else:
            nats = prior.nats(codes, condition)
        figures[name] = float(nats[missing].mean()) * _BITS
    return figures


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run whose codes are extracted")
    parser.add_argument("--output", type=Path, required=True, help="folder for priors and samples")
    parser.add_argument("--ways", type=Path, default=REPOSITORY / "benchmarks/prior_ways.yaml")
    parser.add_argument("--only", nargs="*", help="names of ways; by default, all")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--features", nargs="*", default=["classifier", "rotation"])
    parser.add_argument("--masks", nargs="*", default=[], help="ways whose completions are measured instead")
    options = parser.parse_args()
    run, output = RunDir(options.run.resolve()), options.output.resolve()
    recipe, ways = load_recipe(run.recipe), yaml.safe_load(options.ways.read_text(encoding="utf-8"))
    names = options.only or options.masks or list(ways)
    recipes = {name: way_recipe(recipe, ways[name] or {}) for name in names}
    output.mkdir(parents=True, exist_ok=True)
    known = read_json(output / "seconds.json") if (output / "seconds.json").exists() else {}
    if not all(name in known for name in names):
        known |= step_seconds(run, recipes)
        (output / "seconds.json").write_text(json.dumps(known), encoding="utf-8")
    jobs = []
    for seed in options.seeds:
        for name in names:
            section = dataclasses.replace(recipes[name].stage2, steps=max(1, int(options.minutes * 60 / known[name])))
            jobs.append((name, seed, output / f"{name.replace(' ', '_')}-{seed}", section))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(train, run, folder, ways[name] or {}, section, seed) for name, seed, folder, section in jobs]
        for job in concurrent.futures.as_completed(waiting):
            job.result()
    if options.masks:
        validation = CodeStore(run.codes / VALIDATION, fingerprint(run.tokenizer))
        table = [(name, seed, missing_bits(folder, validation)) for name, seed, folder, _ in jobs]
        print_table(table)
        return
    if not options.features:
        print_table([(name, seed, likelihood_figures(folder)) for name, seed, folder, _ in jobs])
        return
    judge, table = Judge(run, recipe, options.features), []
    for name, seed, folder, _ in jobs:
        for number, settings in enumerate((ways[name] or {}).get("sampling", [{}])):
            kept = folder / f"figures{number}.json"
            if not kept.exists():
                kept.write_text(json.dumps(measured(folder, settings, judge)), encoding="utf-8")
            shown = ", ".join(f"{key} {value}" for key, value in settings.items())
            table.append((f"{name}: {shown}" if shown else name, seed, read_json(kept)))
    print_table(table)


def measured(folder: Path, settings: dict[str, Any], judge: Judge) -> dict[str, float]:
    """Draw samples of a trained prior, and keep a picture of them; return one row of the table."""
    torch.set_num_threads(os.cpu_count() or 1)
    generator, start = Generator.from_pretrained(folder, prior="way", device="cpu", precision="float32"), time.monotonic()
    drawn = generator.draw(_SAMPLES, **settings)
    pixels = drawn.pixels
    seconds = time.monotonic() - start
    classes = generator.label_names
    labels = [classes[number % len(classes)] for number in range(_SAMPLES)] if classes else []
    number = len(list(folder.glob("samples*.png")))
    save_png(folder / f"samples{number}.png", image_grid(pixels[:_SHOWN], len(classes) or 10), grid_scale(pixels.shape[1]))
    return (
        likelihood_figures(folder) | judge.figures(pixels, labels) | {"codes/s": int(sum(level.numel() for level in drawn.codes) / seconds)}
    )


def likelihood_figures(folder: Path) -> dict[str, float]:
    """Return the steps and validation bits of a way's training."""
    likelihood, report = (read_json(folder / f"priors/way/{name}.json") for name in ("likelihood", "report"))
    batch = load_recipe(folder / "priors/way/recipe.yaml").stage2.batch_size
    return {"samples/step": batch, "steps": report["steps"], "best step": report["best_step"], "bits": likelihood["validation"]}


def print_table(table: list[tuple[str, int, dict[str, float]]]) -> None:
    """Print a row per way and seed."""
    columns = list(dict.fromkeys(key for *_, figures in table for key in figures))
    print(f"| way | seed | {' | '.join(columns)} |\n|{' --- |' * (2 + len(columns))}")
    for name, seed, figures in table:
        cells = [f"{figures[key]:,}" if isinstance(figures.get(key), int) else f"{figures.get(key, float('nan')):.3f}" for key in columns]
        print(f"| {name} | {seed} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
