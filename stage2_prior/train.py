"""Stage 2: train a prior over the extracted codes.

    accelerate launch stage2_prior/train.py
    accelerate launch stage2_prior/train.py --prior.kind pixelcnn
    accelerate launch stage2_prior/train.py --name small --prior.layers 4 --prior.width 256
    accelerate launch stage2_prior/train.py --resume
    accelerate launch stage2_prior/train.py --level 1
    accelerate launch stage2_prior/train.py --level 2 --prior.kind pixelcnn

Writes priors/NAME into the run: prior.safetensors with the weights of the best validation, the likelihood report, metrics,
checkpoints, a graph. With --level, a prior of that level of codes alone, conditioned on the levels above, in priors/NAME/levelN; once
every level has one, of whatever kind, they are joined to a prior of all levels in priors/NAME.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

import dataclasses
import os
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.cli import EXTRACT_CODES, SAMPLE, TRAIN_PRIOR, parse
from configs.errors import UserError, run_entry, say
from configs.prior_name import LEVELWISE, PriorName
from configs.recipe_file import SECTIONS, load_recipe, recipe_dict
from configs.run_dir import RunDir, program, write_json, write_yaml
from configs.schema import Recipe, keys_that_may_change
from stage1_vqvae.data.record import changes, check_unchanged, read_record
from stage1_vqvae.data.splits import TRAIN, VALIDATION
from stage1_vqvae.metrics import compression_ratio
from stage1_vqvae.model import load_tokenizer
from stage1_vqvae.plots import training_graph
from stage2_prior.codes.loader import CodeLoader
from stage2_prior.codes.record import CODES, codes_record
from stage2_prior.codes.store import CodeStore
from stage2_prior.joining import check_levels, join_levels
from stage2_prior.likelihood.bits import measure
from stage2_prior.likelihood.tables import likelihood_report, write_report
from stage2_prior.priors.prior_file import PriorHeader, build_prior, check_tokenizer, read_prior_header, save_prior
from stage2_prior.recorder import PriorRecorder
from stage2_prior.steps import PriorState, take_step
from training.batching import check_divides
from training.budget import fitting_steps
from training.checkpoint import Checkpoints
from training.metrics_log import read_metrics
from training.processes import finish, start
from training.randomness import derived_seed
from training.resumption import Stage, accumulation_advice, add_resume_options, memory_advice, nothing_to_do
from training.schedule import due_after
from training.sharding import gathered
from training.stopping import GracefulStop
from training.weights_file import fingerprint

_OWN_SECTIONS = ("condition", "prior", "stage2")


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    command = parse(__doc__, ("condition", "prior", "stage2", "compute"), argv, training_folder=_training_folder, options=_options)
    run, recipe = command.run, command.recipe
    command.need_tokenizer()
    if not (run.codes / TRAIN).is_dir():
        raise UserError(f"{run}: its codes have not been extracted; run first: {command.next(EXTRACT_CODES)}")
    level = command.options.level
    name = PriorName.from_options(command.options.name, level, recipe.prior.kind)
    name.check_free(run)
    sha256, folder = fingerprint(run.tokenizer), name.folder(run)
    joined = name.at_level(None).folder(run) / "prior.safetensors" if level is not None else None
    may_change = [*keys_that_may_change(recipe, _OWN_SECTIONS), *(section for section in SECTIONS if section not in _OWN_SECTIONS)]
    done = nothing_to_do(_stage_on_disk(run, name, recipe, sha256), recipe, command.options.resume, may_change)
    if done and (joined is None or joined.exists()):
        say(f"next: {command.next(SAMPLE)}")
        return
    training, validation = CodeStore(run.codes / TRAIN, sha256), CodeStore(run.codes / VALIDATION, sha256)
    if level is not None and not 1 <= level <= len(training.manifest.grids):
        raise UserError(f"--level: expected 1 to {len(training.manifest.grids)}, the levels of codes from the coarsest on, found {level}")
    condition = training.manifest.condition_of_prior(recipe.condition)
    if level is not None and not done:
        check_levels(run, name, condition)  # early: levels are joined at the end
    stores = {TRAIN: training, VALIDATION: validation}
    if run.started(folder):
        check_codes(run, name, recipe, stores, command.options.accept_changed_data)
    accelerator = start(recipe.compute, str(folder / "tensorboard"), oom_hint(recipe))
    stop = GracefulStop(accelerator, command.options.stop_after)
    check_divides("stage2", recipe.stage2.batch_size, recipe.stage2.accumulation, accelerator.num_processes)
    missing = None
    if accelerator.is_main_process:
        for store in (training, validation):
            store.verify()  # a damaged code would be learned like any other
    with run.lock():
        if not done:
            if recipe.stage2.minutes > 0 and not run.started(folder):
                recipe = within_budget(accelerator, run, name, recipe, training, validation)
                accelerator.free_memory()  # of the rehearsal
            if accelerator.is_main_process:
                run.record(program(), command.arguments, recipe_dict(recipe))
                write_json(folder / CODES, codes_record(stores))
                if joined is not None:
                    joined.unlink(missing_ok=True)  # joined from this level's earlier weights
            accelerator.wait_for_everyone()
            train(accelerator, run, name, recipe, training, validation, command.options.resume, stop)
        if level is not None:
            missing = join_levels(accelerator, run, name, training, validation)
    following = command.next(SAMPLE) if missing is None else f"{command.next(TRAIN_PRIOR)} {name.at_level(missing).options()}"
    say(f"next: {following}")
    finish(accelerator)


def check_codes(run: RunDir, name: PriorName, recipe: Recipe, stores: Mapping[str, CodeStore], accept: bool) -> None:
    """Errors: UserError if a started prior cannot continue with the present codes, or they are of other data (see `check_unchanged`)."""
    where, current, recorded = run.show(name.folder(run)), codes_record(stores), read_record(name.folder(run) / CODES)
    if not recorded:
        return
    was, now = recorded[TRAIN], current[TRAIN]
    check_tokenizer(where, was["tokenizer_sha256"], now["tokenizer_sha256"])
    another = "train another with --name NAME"
    if was["augmentation"] != now["augmentation"]:
        as_before = f"{EXTRACT_CODES} --overwrite --run {shlex.quote(str(run))} --extraction.augmentation {was['augmentation']}"
        raise UserError(
            f"{where}: expected codes of augmentation {was['augmentation']}, with which its training began, found {now['augmentation']}; "
            f"extract them so again ({as_before}), or {another}"
        )
    if recipe.condition.kind != "none" and was["condition"] != now["condition"]:
        what = "; ".join(changes(recorded, current)) or str(now["condition"])
        raise UserError(f"{where}: expected codes of the condition that its training began with, found {what}; {another}")
    check_unchanged(name.folder(run) / CODES, current, where, accept, "another with --name NAME")


def oom_hint(recipe: Recipe) -> str:
    """Return advice appended to an out-of-memory error: options that `--resume` accepts."""
    config = recipe.stage2
    ways = accumulation_advice("stage2", config.batch_size, config.accumulation)
    if not config.gradient_checkpointing:
        ways.append("--stage2.gradient_checkpointing true, which keeps fewer activations")
    if not recipe.compute.sharded and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        ways.append("--compute.sharded true, which shards weights over the processes")
    return memory_advice(ways, "another with --name NAME")


def _options(parser: Any) -> None:
    parser.add_argument("--name", type=str, help=f"name of the prior in the run (default: its kind; with --level, {LEVELWISE})")
    parser.add_argument("--level", type=int | None, help="train a prior of this level alone, 1 for the coarsest, given those above")
    add_resume_options(parser)


def _training_folder(run: RunDir, name: str | None, level: str | None) -> Path:
    """Return the prior's folder, in which a started training continues."""
    number = int(level) if level is not None and level.isdecimal() else None
    prior = PriorName.from_options(name, number, name or load_recipe(run.recipe).prior.kind)
    prior.check_free(run)
    return prior.folder(run)


def _stage_on_disk(run: RunDir, name: PriorName, recipe: Recipe, sha256: str) -> Stage:
    """Read what the run holds of the prior. Errors: UserError if it was trained on another tokenizer's codes."""
    folder = name.folder(run)
    header = read_prior_header(folder / "prior.safetensors") if (folder / "prior.safetensors").exists() else None
    if header is not None:
        check_tokenizer(run.show(folder), header["tokenizer_sha256"], sha256)
    own_recipe = folder / "recipe.yaml"
    return Stage(
        where=run.show(folder),
        name="this prior",
        section="stage2",
        elsewhere="another with --name NAME",
        recipe=load_recipe(own_recipe) if own_recipe.exists() else recipe,
        started=run.started(folder),
        has_checkpoint=run.has_checkpoint(folder),
        finished_after=header["steps"] if header is not None else None,
    )


def train(
    accelerator: Accelerator,
    run: RunDir,
    name: PriorName,
    recipe: Recipe,
    training: CodeStore,
    validation: CodeStore,
    resume: bool,
    stop: GracefulStop,
) -> None:
    """Train the prior from its first step, or from the last checkpoint.

    Errors: UserError for a foreign checkpoint, or a loss that is not finite.
    """
    config, folder = recipe.stage2, name.folder(run)
    rows, micro_batch = torch.arange(len(validation)), config.batch_size // (accelerator.num_processes * config.accumulation)

    # --- the training state, from the last checkpoint or new
    state = build(accelerator, run, recipe, training, name.index)
    prior, average, best = state.prior, state.average, state.best
    parameters = sum(parameter.numel() for parameter in prior.parameters())
    names = prior.condition.class_names
    condition = f"{len(names)} classes" if names else f"condition {prior.condition.kind}"
    say(f"prior {name}: {parameters / 1e6:.1f} M parameters, {prior.layout.length} tokens per image, {condition}")
    for line in prior.training_warnings():
        say(line)
    loader = CodeLoader(training, prior.condition, config, accelerator, prior.num_draws)
    checkpoints = Checkpoints(folder / "checkpoints", "stage 2", config.keep_checkpoints, accelerator, state.sharded)
    if resume:
        state.resume(checkpoints, config.steps, run.show(folder))

    if accelerator.is_main_process:
        write_yaml(folder / "recipe.yaml", recipe_dict(recipe))
    recorder = PriorRecorder(accelerator, folder, config, state)
    state.model.train()
    with recorder, stop, checkpoints:
        for step in range(state.step, config.steps):
            loss, norm = take_step(accelerator, state, loader, config, step)
            state.step = step + 1
            stopping = stop.requested(last=state.step == config.steps)
            due = due_after(state.step, config, stopping)
            recorder.record(state.step, loss, norm, due)
            if due.validation:
                validation_bits = measure(accelerator, average.model, validation, rows, micro_batch).mean
                if validation_bits < best.bits:
                    best.replace_(state.step, validation_bits, average.model)
                recorder.validated(state.step, validation_bits)
                state.model.train()
            checkpoints.check()
            if due.checkpoint:
                checkpoints.save(state.step, state.state_dict(), validation_bits if due.validation else None)
            if stopping:
                checkpoints.wait()
                options = f"{name.options()} --compute.sharded true" if recipe.compute.sharded else name.options()
                recorder.exit_stopped(state.step, f"{TRAIN_PRIOR} --resume --run {run.path} {options}", stop.exit_code)

    # --- the result
    if best.step == 0:  # resumed after the last step, before any validation
        best.replace_(state.step, best.bits, average.model)
    average.model.load_state_dict(best.weights)
    likelihood = likelihood_report(accelerator, average.model, training, validation, micro_batch, recorder.validations)
    result = gathered(accelerator, best.weights)
    if accelerator.is_main_process:
        known = prior.condition.kind == "none" or config.condition_dropout > 0
        measured = config.steps, likelihood["validation"]
        header = PriorHeader.of(recipe.prior, prior.condition, training.manifest, known, *measured, name.index)
        report = {"steps": config.steps, "best_step": best.step, "minutes": state.minutes(), "parameters": parameters}
        write_results(run, folder, result, header, report, likelihood)


def build(accelerator: Accelerator, run: RunDir, recipe: Recipe, training: CodeStore, level: int | None) -> PriorState:
    """Build the training state of a prior with its first weights."""
    torch.manual_seed(derived_seed(recipe.stage2.seed, "weights"))
    try:
        prior = build_prior(recipe.prior, training.manifest.condition_of_prior(recipe.condition), training.manifest, level)
    except ValueError as error:  # for fields that do not fit the levels
        raise UserError(str(error)) from None
    prior.initialise_from(load_tokenizer(run).quantizer.code_vectors()[prior.levels])
    return PriorState(accelerator, prior, recipe.stage2, recipe.compute)


def within_budget(
    accelerator: Accelerator, run: RunDir, name: PriorName, recipe: Recipe, training: CodeStore, validation: CodeStore
) -> Recipe:
    """Return the recipe with as many steps as fit its minutes, by a rehearsal that leaves no trace."""
    config, start = recipe.stage2, time.monotonic()
    state = build(accelerator, run, recipe, training, name.index)
    if accelerator.is_main_process:
        write_yaml(name.folder(run) / "recipe.yaml", recipe_dict(recipe))  # a rehearsal may be interrupted
    loader, rows = CodeLoader(training, state.prior.condition, config, accelerator, state.prior.num_draws), torch.arange(len(validation))
    micro_batch = config.batch_size // (accelerator.num_processes * config.accumulation)

    def step(number: int) -> None:
        state.model.train()
        take_step(accelerator, state, loader, config, number)

    section = fitting_steps(
        accelerator,
        "stage 2",
        config,
        start,
        start,
        [(1.0, step)],
        lambda: measure(accelerator, state.average.model, validation, rows, micro_batch),
        passes_at_end=2,  # the likelihood report: of the validation images, and of as many training images
    )
    return dataclasses.replace(recipe, stage2=section)


def write_results(
    run: RunDir, folder: Path, weights: dict[str, Tensor], header: PriorHeader, report: dict[str, Any], likelihood: dict[str, Any]
) -> None:
    """Write reports and pictures, and last the prior, whose presence marks the stage as finished."""
    write_json(folder / "report.json", report)
    write_report(folder, str(folder.relative_to(run.priors)), likelihood)
    references = {name: likelihood[name] for name in ("unigram", "uniform")}
    training_graph(folder / "training.png", read_metrics(folder / "metrics.jsonl"), ("bits_per_token",), references)
    save_prior(folder / "prior.safetensors", weights, header)
    at_most = "" if likelihood["exact"] else "at most "
    learned = f"learned prior {at_most}{likelihood['validation']:.3f} (step {report['best_step']})"
    print(f"validation bits per token: {learned}, unigram {likelihood['unigram']:.3f}, uniform {likelihood['uniform']:.3f}")
    raw, indices, coded = likelihood["bits_per_image"].values()
    ratio = f"ratio {compression_ratio(raw, coded):.1f}"
    print(f"an image: {raw} bits raw, {indices:.0f} as indices, {at_most}{coded:.0f} under the prior; {ratio}")
    print(f"wrote {run.show(folder / 'prior.safetensors')}; beside it likelihood.md, likelihood.png, training.png")


if __name__ == "__main__":
    run_entry(main)
