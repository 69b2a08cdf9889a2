"""Loading the generator of a command line."""

from __future__ import annotations

from accelerate import Accelerator

from configs.cli import TRAIN_PRIOR, Command
from pipelines.generator import Generator
from stage2_prior.priors.prior_file import UNIFORM, finished_prior


def generator_of(command: Command, accelerator: Accelerator, prior: str | None) -> Generator:
    """Load the generator of the command's run and recipe, with the prior of that name, or the one last finished.

    Errors: UserError if there is no such prior; it says what to run first.
    """
    if prior != UNIFORM:
        prior = finished_prior(command.run, prior, command.next(TRAIN_PRIOR)).parent.name
    recipe = command.recipe
    return Generator.of_run(command.run, recipe.data, recipe.sampling, prior, accelerator=accelerator)
