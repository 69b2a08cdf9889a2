"""Loading the generator of a command line."""

from __future__ import annotations

import dataclasses

import torch
from accelerate import Accelerator

from configs.cli import TRAIN_PRIOR, Command
from configs.schema import Recipe, Sampling
from pipelines.generator import Generator
from stage2_prior.priors.prior_file import UNIFORM, finished_prior


def generator_of(command: Command, accelerator: Accelerator, prior: str | None) -> Generator:
    """Load the generator of the command's run and recipe, with the prior of that name, or the one last finished.

    Errors: UserError if there is no such prior; it says what to run first.
    """
    if prior != UNIFORM:
        prior = finished_prior(command.run, prior, command.next(TRAIN_PRIOR)).parent.name
    recipe = command.recipe
    return Generator.of_run(command.run, recipe.data, command_sampling(recipe, accelerator.device), prior, accelerator=accelerator)


def command_sampling(recipe: Recipe, device: torch.device) -> Sampling:
    """The recipe's sampling section; without mixed precision on a GPU, float32 instead of the default bfloat16."""
    exact = recipe.compute.mixed_precision == "no" and recipe.sampling.precision is None and device.type == "cuda"
    return dataclasses.replace(recipe.sampling, precision="float32") if exact else recipe.sampling
