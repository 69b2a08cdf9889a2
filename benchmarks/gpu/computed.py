"""Compute the cost of the GPU recipes on a card of 24 GB and one of 80 GB: memory, time per 1,000 images, time in all. Not measured.

    python -m benchmarks.gpu.computed
    python -m benchmarks.gpu.computed --recipes photos

Each recipe's own training step is counted on tensors without data (counting.py); a card's data sheet and two assumed shares of it turn the
counts into time. A step that does not fit is taken in as few micro-steps as make it fit (`accumulation`).
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from accelerate import Accelerator
from torch import nn

from benchmarks.gpu.counting import CARDS, Card, Counted, Counting, Dataless
from benchmarks.gpu.steps import NUM_CLASSES, Step, prior_step, tokenizer_step
from configs.parts import DiscriminatorPart
from configs.recipe_file import load_recipe
from configs.run_dir import REPOSITORY
from configs.schema import Compute, Recipe
from stage1_vqvae.networks import group_norm, vqgan
from stage2_prior import steps
from training.processes import start

RECIPES = ("cifar10", "imagefolder", "photos", "imagenet256", "imagenet256_vit")
_GPUS = {"imagenet256": 8, "imagenet256_vit": 8}
"""GPUs that a recipe is meant for, where they are several."""
_USABLE = 0.9
"""Share of a card's memory that a step may take: the rest is for libraries' workspaces and fragments."""


class Cost(NamedTuple):
    """Cost of one stage of a recipe on one card."""

    parameters: int
    accumulation: int
    memory: float
    """Bytes at a step's worst moment."""
    seconds_per_image: float
    hours: float
    """Duration of the whole stage on the recipe's GPUs."""


def _yes(_: object) -> bool:
    return True


def _bfloat16(_: object) -> torch.dtype:
    return torch.bfloat16


@contextmanager
def accelerator_paths() -> Iterator[None]:
    """Make tensors without data, which are on the CPU, take the accelerator paths."""
    with (
        warnings.catch_warnings(),
        # Not by `return_value`, which keeps its arguments: all activations.
        mock.patch.object(group_norm, "on_accelerator", _yes),
        mock.patch.object(vqgan, "on_accelerator", _yes),
        mock.patch.object(steps, "fused_on", _yes),
        mock.patch.object(steps, "products_on", _bfloat16),
        # Everything is created on its device, and the mode holds references that swapping parameters refuses.
        mock.patch.object(nn.Module, "to", lambda module, *_, **__: module),
    ):
        # torch itself triggers it on tensors without data.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


def counted_step(accelerator: Accelerator, recipe: Recipe, stage: int, name: str, adversarial: bool = True) -> tuple[Step, Counted]:
    """Count a step after the first, which creates the optimizer's state."""
    with accelerator_paths(), Dataless(), Counting() as counted:
        step = tokenizer_step(accelerator, recipe, adversarial) if stage == 1 else prior_step(accelerator, recipe, NUM_CLASSES.get(name, 0))
        step.take()
        counted.operators.clear()
        counted.peak = counted.held
        step.take()
    return step, counted


def cost(accelerator: Accelerator, name: str, stage: int, card: Card) -> Cost | None:
    """Compute the cost of a stage; None if not even one image at a time fits the card."""
    accumulation = 1
    while True:
        recipe = recipe_for(name, stage, accumulation)
        loop = getattr(recipe, f"stage{stage}")
        step, counted = counted_step(accelerator, recipe, stage, name)
        if counted.peak <= _USABLE * card.memory:
            break
        accumulation *= 2
        if accumulation > loop.batch_size:
            return None
    seconds = counted.seconds(card) * loop.steps
    if stage == 1 and isinstance(recipe.stage1.adversarial, DiscriminatorPart):
        alone = counted_step(accelerator, recipe, stage, name, adversarial=False)[1].seconds(card) * loop.steps
        seconds = recipe.stage1.adversarial.start * alone + (1 - recipe.stage1.adversarial.start) * seconds
    return Cost(step.parameters, accumulation, counted.peak, counted.seconds(card) / loop.batch_size, seconds / 3600)


def recipe_for(name: str, stage: int, accumulation: int) -> Recipe:
    """Load a recipe with one GPU's share of the stage's batch, in `accumulation` micro-steps."""
    recipe, section = load_recipe(REPOSITORY / "configs" / f"{name}.yaml"), f"stage{stage}"
    loop = getattr(recipe, section)
    stage_section = dataclasses.replace(loop, batch_size=loop.batch_size // _GPUS.get(name, 1), accumulation=accumulation)
    return dataclasses.replace(recipe, **{section: stage_section})


def row(name: str, stage: int, card_name: str, cost: Cost | None) -> str:
    """Format a row of the table."""
    gpus = _GPUS.get(name, 1)
    card = f"{gpus} x {card_name}" if gpus > 1 else card_name
    if cost is None:
        return f"| `{name}` | {stage} | | {card} | does not fit | | | |"
    cells = (
        f"`{name}`",
        str(stage),
        f"{cost.parameters / 1e6:,.1f} M",
        card,
        str(cost.accumulation),
        f"{cost.memory / 1e9:.1f} GB",
        f"{1000 * cost.seconds_per_image:.2f} s",
        f"{cost.hours:.1f} h" if cost.hours >= 1 else f"{60 * cost.hours:.0f} min",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    options = parser.parse_args()
    accelerator = start(Compute(mixed_precision="bf16"))
    accelerator.device_placement = False
    print("| recipe | stage | parameters | card | `accumulation` | memory per GPU | 1,000 images per GPU | in all |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in options.recipes:
        for stage in (1, 2):
            for card_name, card in CARDS.items():
                print(row(name, stage, card_name, cost(accelerator, name, stage, card)), flush=True)


if __name__ == "__main__":
    main()
