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
from configs.cli import load_recipe
from configs.run_dir import REPOSITORY
from configs.schema import Compute, DiscriminatorPart, Recipe
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
def as_on_a_gpu() -> Iterator[None]:
    """Tensors without data are the CPU's here, but take the paths that a GPU's take."""
    with (
        warnings.catch_warnings(),
        # Not by `return_value`, which keeps what it is asked with: all activations.
        mock.patch.object(group_norm, "on_accelerator", _yes),
        mock.patch.object(vqgan, "on_accelerator", _yes),
        mock.patch.object(steps, "fused_on", _yes),
        mock.patch.object(steps, "products_on", _bfloat16),
        # Everything is made where it is to be, and the mode keeps references that torch's exchange of parameters refuses.
        mock.patch.object(nn.Module, "to", lambda module, *_, **__: module),
    ):
        # Asked by torch itself of tensors without data.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


def counted_step(accelerator: Accelerator, recipe: Recipe, stage: int, name: str, adversarial: bool = True) -> tuple[Step, Counted]:
    """A step after the first one, which alone makes the optimizer's state."""
    with as_on_a_gpu(), Dataless(), Counting() as counted:
        step = tokenizer_step(accelerator, recipe, adversarial) if stage == 1 else prior_step(accelerator, recipe, NUM_CLASSES.get(name, 0))
        step.take()
        counted.operators.clear()
        counted.peak = counted.held
        step.take()
    return step, counted


def cost(accelerator: Accelerator, name: str, stage: int, card: Card) -> Cost | None:
    """The cost of a stage; None if not even one image at a time fits the card."""
    accumulation = 1
    while True:
        own = recipe_for(name, stage, accumulation)
        loop = getattr(own, f"stage{stage}")
        step, counted = counted_step(accelerator, own, stage, name)
        if counted.peak <= _USABLE * card.memory:
            break
        accumulation *= 2
        if accumulation > loop.batch_size:
            return None
    seconds = counted.seconds(card) * loop.steps
    if stage == 1 and isinstance(own.stage1.adversarial, DiscriminatorPart):
        alone = counted_step(accelerator, own, stage, name, adversarial=False)[1].seconds(card) * loop.steps
        seconds = own.stage1.adversarial.start * alone + (1 - own.stage1.adversarial.start) * seconds
    return Cost(step.parameters, accumulation, counted.peak, counted.seconds(card) / loop.batch_size, seconds / 3600)


def recipe_for(name: str, stage: int, accumulation: int) -> Recipe:
    """A recipe with one GPU's share of the stage's batch, in so many micro-steps."""
    recipe, section = load_recipe(REPOSITORY / "configs" / f"{name}.yaml"), f"stage{stage}"
    loop = getattr(recipe, section)
    own = dataclasses.replace(loop, batch_size=loop.batch_size // _GPUS.get(name, 1), accumulation=accumulation)
    return dataclasses.replace(recipe, **{section: own})


def row(name: str, stage: int, card_name: str, found: Cost | None) -> str:
    """A line of the table."""
    gpus = _GPUS.get(name, 1)
    card = f"{gpus} x {card_name}" if gpus > 1 else card_name
    if found is None:
        return f"| `{name}` | {stage} | | {card} | does not fit | | | |"
    cells = (
        f"`{name}`",
        str(stage),
        f"{found.parameters / 1e6:,.1f} M",
        card,
        str(found.accumulation),
        f"{found.memory / 1e9:.1f} GB",
        f"{1000 * found.seconds_per_image:.2f} s",
        f"{found.hours:.1f} h" if found.hours >= 1 else f"{60 * found.hours:.0f} min",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    options = parser.parse_args()
    accelerator = start(Compute(mixed_precision="bf16"))
    accelerator.device_placement = False
    print("| recipe | stage | parameters | card | `accumulation` | memory a GPU | 1,000 images a GPU | in all |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in options.recipes:
        for stage in (1, 2):
            for card_name, card in CARDS.items():
                print(row(name, stage, card_name, cost(accelerator, name, stage, card)), flush=True)


if __name__ == "__main__":
    main()
