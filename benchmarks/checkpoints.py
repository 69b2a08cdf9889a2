"""Cost of checkpoints in training: blocks of steps that begin with a save, alternated with blocks that do not.

    python benchmarks/checkpoints.py --config configs/cifar10_hour.yaml --data CIFAR10

A save copies the state and returns; the rest of its cost is the writing thread, which runs beside the following steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from configs.recipe_file import load_recipe
from configs.run_dir import RunDir
from stage1_vqvae.data.loader import Loader
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN
from stage1_vqvae.steps import build_state, initialise_, take_step
from training.checkpoint import Checkpoints


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data", help="a local data set")
    parser.add_argument("--steps", type=int, default=25, help="steps per block")
    parser.add_argument("--blocks", type=int, default=9)
    options = parser.parse_args()
    accelerator, recipe = Accelerator(cpu=not torch.accelerator.is_available()), load_recipe(options.config)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=options.data or recipe.data.path))
    images = load_images(recipe.data, [TRAIN], progress=True)
    with tempfile.TemporaryDirectory() as folder:
        state = build_state(accelerator, RunDir(Path(folder)), recipe, images)
        loader = Loader(images.splits[TRAIN], recipe.data, recipe.stage1, accelerator)
        initialise_(accelerator, state, loader, recipe.stage1)
        checkpoints = Checkpoints(Path(folder) / "checkpoints", "stage 1", 2, accelerator)
        state.model.train()
        seconds: dict[bool, list[float]] = {False: [], True: []}
        copying: list[float] = []
        step = 0
        for block in range(2 * options.blocks + 2):
            saves = bool(block % 2)
            start = time.perf_counter()
            if saves:
                checkpoints.save(step, state.state_dict())
                copying.append(time.perf_counter() - start)
            for _ in range(options.steps):
                take_step(accelerator, state, loader, recipe.stage1, step)
                step += 1
            seconds[saves].append(time.perf_counter() - start)
            checkpoints.wait()
        size = checkpoints.paths()[-1].stat().st_size
    without = statistics.median(seconds[False][1:])
    cost = statistics.median(saving - bare for saving, bare in zip(seconds[True][1:], seconds[False][1:], strict=True))
    interval = recipe.stage1.checkpoint_interval
    share = cost / (interval * without / options.steps)
    took, copied = without / options.steps * 1e3, statistics.median(copying) * 1e3
    print(f"step: {took:.1f} ms; checkpoint: {size / 1e6:.1f} MB, copied in {copied:.1f} ms")
    print(f"a checkpoint costs {cost * 1e3:.0f} ms in total, {share:.3%} of the {interval} steps between two of them")


if __name__ == "__main__":
    main()
