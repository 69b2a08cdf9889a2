"""Stage 1: train the tokenizer (VQ-VAE) on a data set's images.

    accelerate launch stage1_vqvae/train.py
    accelerate launch stage1_vqvae/train.py --config configs/cifar10.yaml
    accelerate launch stage1_vqvae/train.py --run my_digits --stage1.lr 3e-4
    accelerate launch stage1_vqvae/train.py --resume

Writes tokenizer.safetensors, metrics, checkpoints and pictures into the run. It fixes the run's recipe, for stage 2 too.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

import dataclasses
import time

import torch
from accelerate import Accelerator

from configs.cli import EXTRACT_CODES, TRAIN_TOKENIZER, parse
from configs.data import in_file_order
from configs.errors import UserError, run_entry, say
from configs.recipe_file import SECTIONS, load_recipe, recipe_dict
from configs.run_dir import RunDir, program, write_json, write_yaml
from configs.schema import Recipe, Stage1, keys_that_may_change
from stage1_vqvae.data.loader import Loader, crops_vary
from stage1_vqvae.data.record import Record, check_unchanged
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN, VALIDATION, ImageSource
from stage1_vqvae.data.variants import VARIANTS
from stage1_vqvae.monitoring.recorder import TokenizerRecorder
from stage1_vqvae.monitoring.validation import ValidationResult, check_equal_codebooks, validate, write_results
from stage1_vqvae.objectives.image_terms import LossTerm
from stage1_vqvae.steps import TokenizerState, build_state, build_terms, delete_feature_networks, initialise_, take_step
from training.batching import check_divides
from training.budget import fitting_steps
from training.checkpoint import Checkpoints
from training.processes import finish, start
from training.resumption import Stage, accumulation_advice, add_resume_options, memory_advice, nothing_to_do
from training.schedule import due_after
from training.stopping import GracefulStop
from training.weights_file import read_header

_OWN_SECTIONS = ("data", "tokenizer", "stage1", "evaluation", "compute")


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    command = parse(__doc__, tuple(SECTIONS), argv, starts_run=True, training_folder=lambda run, *_: run.stage1, options=add_resume_options)
    run, recipe, resume = command.run, command.recipe, command.options.resume
    stage = _stage_on_disk(run, recipe)
    if stage.has_checkpoint and stage.finished_after is None and in_file_order(stage.recipe.data) != in_file_order(recipe.data):
        raise UserError(f"{run}: its recipe is fixed, but asked for was another order, by data.stream and data.decode; train another run")
    if nothing_to_do(stage, recipe, resume, keys_that_may_change(recipe, _OWN_SECTIONS)):
        say(f"next: {command.next(EXTRACT_CODES)}")
        return
    if recipe.data.decode == "once" and crops_vary(recipe.data.transform, VARIANTS[recipe.stage1.augmentation]):
        crops = f"data.transform {recipe.data.transform.kind} and stage1.augmentation {recipe.stage1.augmentation}"
        raise UserError(f"data.decode: expected each_time with {crops}, which crop an image in several ways, found once")
    accelerator = start(recipe.compute, str(run.stage1 / "tensorboard"), oom_hint(recipe))
    stop = GracefulStop(accelerator, command.options.stop_after)
    check_divides("stage1", recipe.stage1.batch_size, recipe.stage1.accumulation, accelerator.num_processes)
    # Before the run's folder is created: images that cannot be read leave no trace.

    def check(record: Record) -> None:
        if stage.started:
            check_unchanged(run.data, record, str(run), command.options.accept_changed_data)

    images = load_images(recipe.data, (TRAIN, VALIDATION), progress=accelerator.is_main_process, announce=True, check=check)
    objective = recipe.tokenizer.objective.build((recipe.data.channels, recipe.data.height, recipe.data.width))
    for split in images.splits.values():
        objective.check(split.pixels)
    with run.lock():
        if not run.started(run.stage1):
            start_time = time.monotonic()
            if accelerator.is_main_process:
                delete_feature_networks(run.stage1)
                write_yaml(run.recipe, recipe_dict(recipe))  # makes the folder a run, also if what follows is interrupted
            if recipe.stage1.minutes > 0:
                recipe = within_budget(accelerator, run, recipe, images, start_time)
                accelerator.free_memory()  # of the rehearsal
        if accelerator.is_main_process:
            write_yaml(run.recipe, recipe_dict(recipe))
            write_json(run.data, images.record)
            run.record(program(), command.arguments, recipe_dict(recipe))
            if images.skipped:
                write_json(run.stage1 / "skipped.json", images.skipped)
            else:
                (run.stage1 / "skipped.json").unlink(missing_ok=True)  # from before images were repaired
        accelerator.wait_for_everyone()
        train(accelerator, run, recipe, images, resume, stop)
        say(f"next: {command.next(EXTRACT_CODES)}")


def _stage_on_disk(run: RunDir, recipe: Recipe) -> Stage:
    """Read what the run holds of stage 1."""
    return Stage(
        where=str(run),
        name="stage 1",
        section="stage1",
        elsewhere="another with --run NAME",
        recipe=load_recipe(run.recipe) if run.exists() else recipe,
        started=run.started(run.stage1),
        has_checkpoint=run.has_checkpoint(run.stage1),
        finished_after=read_header(run.tokenizer, "tokenizer")["steps"] if run.tokenizer.exists() else None,
    )


def oom_hint(recipe: Recipe) -> str:
    """Return advice appended to an out-of-memory error: options that `--resume` accepts."""
    config, network = recipe.stage1, recipe.tokenizer.network
    whole_batch = recipe.tokenizer.quantizer.needs_whole_batch
    ways = [] if whole_batch else accumulation_advice("stage1", config.batch_size, config.accumulation)
    if whole_batch:
        ways.append("more processes (accelerate launch --num_processes N)")
    if not getattr(network, "gradient_checkpointing", True):
        ways.append("--tokenizer.network.gradient_checkpointing true, which keeps fewer activations")
    return memory_advice(ways, "another with --run NAME")


def train(accelerator: Accelerator, run: RunDir, recipe: Recipe, images: ImageSource, resume: bool, stop: GracefulStop) -> None:
    """Train the tokenizer from its first step, or from the last checkpoint.

    Errors: UserError for a foreign checkpoint, or a loss that is not finite.
    """
    config, training, validation = recipe.stage1, images.splits[TRAIN], images.splits[VALIDATION]
    micro_batch = config.batch_size // (accelerator.num_processes * config.accumulation)

    # --- the training state, from the last checkpoint or new
    state = build_state(accelerator, run, recipe, images)
    loader = Loader(training, recipe.data, config, accelerator)
    checkpoints = Checkpoints(run.stage1 / "checkpoints", "stage 1", config.keep_checkpoints, accelerator)
    resumed = resume and state.resume(checkpoints, config.steps, str(run))
    if not resumed:
        initialise_(accelerator, state, loader, config)
    if config.minutes == 0 or resumed:  # otherwise the time budget has been rehearsed
        rehearse(accelerator, state, loader, config)

    recorder = TokenizerRecorder(accelerator, run, recipe, state.tokenizer, loader, state.step)
    result: ValidationResult | None = None
    # Shapes are the same in every step: let cuDNN benchmark its convolution kernels in the first one.
    torch.backends.cudnn.benchmark = True
    state.model.train()
    with recorder, stop, checkpoints:
        for step in range(state.step, config.steps):
            statistics = take_step(accelerator, state, loader, config, step)
            state.step = step + 1
            stopping = stop.requested(last=state.step == config.steps)
            due = due_after(state.step, config, stopping)
            recorder.record(state.step, statistics, due)
            if due.validation:
                check_equal_codebooks(accelerator, state.tokenizer, state.step)
                result = validate(accelerator, state.result, validation, micro_batch)
                recorder.validated(state.step, result, state.result, validation)
                state.model.train()
            checkpoints.check()
            if due.checkpoint:
                score = result.metrics["loss"] if due.validation and result is not None else None
                checkpoints.save(state.step, state.state_dict(), score)
            if stopping:
                checkpoints.wait()
                recorder.exit_stopped(state.step, f"{TRAIN_TOKENIZER} --resume --run {run.path}", stop.exit_code)

    # --- the result
    if result is None:  # resumed after the last step
        result = validate(accelerator, state.result, validation, micro_batch)
    if accelerator.is_main_process:
        write_results(run, state.result, config.steps, state.minutes(), result)
    finish(accelerator)


def within_budget(accelerator: Accelerator, run: RunDir, recipe: Recipe, images: ImageSource, start: float) -> Recipe:
    """Return the recipe with as many steps as fit its minutes since `start`, by a rehearsal that leaves no trace."""
    config, validation = recipe.stage1, images.splits[VALIDATION]
    build_terms(accelerator, run, recipe, images)  # trains networks of features, which the training then finds
    building = time.monotonic()
    state = build_state(accelerator, run, recipe, images)
    loader = Loader(images.splits[TRAIN], recipe.data, config, accelerator)
    initialise_(accelerator, state, loader, config)
    micro_batch = config.batch_size // (accelerator.num_processes * config.accumulation)
    terms, last_start = state.terms, last_first_step(state, config)

    def take(number: int, active: list[LossTerm]) -> None:
        state.terms = active
        state.model.train()
        take_step(accelerator, state, loader, config, number)

    share = last_start / config.steps
    kinds = [
        (share, lambda number: take(number, [term for term in terms if term.first_step(config.steps) == 0])),
        (1 - share, lambda number: take(last_start + number, terms)),
    ]
    section = fitting_steps(
        accelerator,
        "stage 1",
        config,
        start,
        building,
        [kind for kind in kinds if kind[0] > 0],
        lambda: validate(accelerator, state.tokenizer, validation, micro_batch),
    )
    return dataclasses.replace(recipe, stage1=section)


def last_first_step(state: TokenizerState, config: Stage1) -> int:
    """Return the step from which all loss terms take part."""
    return max((term.first_step(config.steps) for term in state.terms), default=0)


def rehearse(accelerator: Accelerator, state: TokenizerState, loader: Loader, config: Stage1) -> None:
    """Take one step with all loss terms, and undo it, if some start later: a lack of memory for them shows at once."""
    step = last_first_step(state, config)
    if state.step < step < config.steps:
        state.model.train()
        with state.preserved():
            take_step(accelerator, state, loader, config, step)


if __name__ == "__main__":
    run_entry(main)
