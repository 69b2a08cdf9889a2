"""Stage 2: train a prior over the extracted codes.

    accelerate launch stage2_prior/train.py
    accelerate launch stage2_prior/train.py --prior.kind pixelcnn
    accelerate launch stage2_prior/train.py --name small --prior.layers 4 --prior.width 256
    accelerate launch stage2_prior/train.py --resume
    accelerate launch stage2_prior/train.py --level 1
    accelerate launch stage2_prior/train.py --level 2 --prior.kind pixelcnn

Writes priors/NAME into the run: prior.safetensors with the weights of the best validation, the likelihood report, metrics,
checkpoints, a graph. With --level, a prior of that level of codes alone, given the levels above, in priors/NAME/levelN; once every
level has its own, of whatever kinds, they are joined to a prior of all of them in priors/NAME.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

import dataclasses
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.cli import EXTRACT_CODES, SAMPLE, SECTIONS, TRAIN_PRIOR, load_recipe, parse, recipe_dict
from configs.errors import UserError, run_entry, say
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
from stage2_prior.likelihood.bits import bits, measure
from stage2_prior.likelihood.tables import likelihood_report, turned_at, write_report
from stage2_prior.priors.prior_file import (
    UNIFORM,
    PriorHeader,
    build_prior,
    check_tokenizer,
    read_prior_header,
    save_prior,
)
from stage2_prior.steps import Begun, begun, best_weights, take_step
from training.batching import check_divides
from training.budget import TimeLeft, fitting_steps
from training.checkpoint import Checkpoints
from training.metrics_log import MetricsLog, read_metrics
from training.optimizer import load_moments_, moments
from training.processes import asked_to_shard, finish, start, summed
from training.progress import progress_bar
from training.randomness import derived_seed
from training.resumption import (
    Stage,
    accumulation_advice,
    add_resume_options,
    check_resumable,
    memory_advice,
    nothing_to_do,
)
from training.schedule import scheduled_rate
from training.sharding import whole
from training.stopping import GracefulStop, check_finite
from training.weights_file import fingerprint

_OWN_SECTIONS = ("condition", "prior", "stage2")
_ADVICE = "lower --stage2.lr and go on with --resume"
# The name of priors of single levels, if they are given none.
_LEVELWISE = "levelwise"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    command = parse(__doc__, ("condition", "prior", "stage2", "compute"), argv, begun_in=_begun_in, options=_options)
    run, recipe = command.run, command.recipe
    command.need_tokenizer()
    if not (run.codes / TRAIN).is_dir():
        raise UserError(f"{run}: its codes have not been extracted; run first: {command.next(EXTRACT_CODES)}")
    level = command.options.level
    name = _name(command.options.name, level, recipe.prior.kind)
    sha256 = fingerprint(run.tokenizer)
    folder = _folder(run, name)
    joined = folder.parent / "prior.safetensors" if level is not None else None
    may_change = [*keys_that_may_change(recipe, _OWN_SECTIONS), *(section for section in SECTIONS if section not in _OWN_SECTIONS)]
    done = nothing_to_do(_found(run, name, recipe, sha256), recipe, command.options.resume, may_change)
    if done and (joined is None or joined.exists()):
        say(f"next: {command.next(SAMPLE)}")
        return
    training, validation = CodeStore(run.codes / TRAIN, sha256), CodeStore(run.codes / VALIDATION, sha256)
    if level is not None and not 1 <= level <= len(training.manifest.grids):
        raise UserError(f"--level: expected 1 to {len(training.manifest.grids)}, the levels of codes from the coarsest on, found {level}")
    condition = training.manifest.condition_of_prior(recipe.condition)
    if level is not None and not done:
        check_levels(run, name, condition)  # joining, which takes all of one condition, comes at the end
    stores = {TRAIN: training, VALIDATION: validation}
    if run.begun(folder):
        check_codes(run, name, recipe, stores, command.options.accept_changed_data)
    accelerator = start(recipe.compute, str(folder / "tensorboard"), oom_hint(recipe))
    stop = GracefulStop(accelerator, command.options.stop_after)
    check_divides("stage2", recipe.stage2.batch_size, recipe.stage2.accumulation, accelerator.num_processes)
    missing = None
    if accelerator.is_main_process:
        for store in (training, validation):
            store.verify()  # a code that has changed since would be learned like any other
    with run.lock():
        if not done:
            if recipe.stage2.minutes > 0 and not run.begun(folder):
                recipe = within_budget(accelerator, run, name, recipe, training, validation)
                accelerator.free_memory()  # of the rehearsal
            if accelerator.is_main_process:
                run.record(program(), command.arguments, recipe_dict(recipe))
                write_json(folder / CODES, codes_record(stores))
                if joined is not None:
                    joined.unlink(missing_ok=True)  # of this level's former weights
            accelerator.wait_for_everyone()
            train(accelerator, run, name, recipe, training, validation, command.options.resume, stop)
        if level is not None:
            missing = join_levels(accelerator, run, name, training, validation)
    following = command.next(SAMPLE) if missing is None else f"{command.next(TRAIN_PRIOR)} --level {missing}{_named(name)}"
    say(f"next: {following}")
    finish(accelerator)


def check_codes(run: RunDir, name: str, recipe: Recipe, stores: Mapping[str, CodeStore], accept: bool) -> None:
    """Errors: UserError if a prior that has begun cannot go on with the codes that are there, or they are of other data (see
    `check_unchanged`).
    """
    where, current, recorded = run.show(run.prior(name)), codes_record(stores), read_record(run.prior(name) / CODES)
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
    check_unchanged(run.prior(name) / CODES, current, where, accept, "another with --name NAME")


def oom_hint(recipe: Recipe) -> str:
    """Advice appended to an out-of-memory error: options that `--resume` takes."""
    config = recipe.stage2
    ways = accumulation_advice("stage2", config.batch_size, config.accumulation)
    if not config.gradient_checkpointing:
        ways.append("--stage2.gradient_checkpointing true, which keeps fewer activations")
    if not recipe.compute.sharded and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        ways.append("--compute.sharded true, which shares weights out over the processes")
    return memory_advice(ways, "another with --name NAME")


def _options(parser: Any) -> None:
    parser.add_argument("--name", type=str, help=f"name of the prior in the run (default: its kind; with --level, {_LEVELWISE})")
    parser.add_argument("--level", type=int | None, help="train a prior of this level alone, 1 for the coarsest, given those above")
    add_resume_options(parser)


def _name(name: str | None, level: int | None, kind: str) -> str:
    """The name of a prior: as typed, or its kind; of a level's, `NAME/levelN`."""
    return (name or kind) if level is None else f"{name or _LEVELWISE}/level{level}"


def _named(name: str) -> str:
    """The options that say which prior `_name` is of, without its level."""
    whole = name.partition("/")[0]
    return "" if whole == _LEVELWISE else f" --name {whole}"


def _folder(run: RunDir, name: str) -> Path:
    """The prior's folder in the run. Errors: UserError for a name that cannot be one."""
    whole, _, level = name.partition("/level")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", whole) or whole == UNIFORM:
        raise UserError(f"--name: expected letters, digits, '_', '-' and '.', and not {UNIFORM}, found {whole}")
    if level and (run.prior(whole) / "recipe.yaml").exists():
        raise UserError(f"--name {whole}: expected a name for priors of single levels, found that of a prior of all levels")
    if not level and any(run.prior(whole).glob("level*")):
        raise UserError(f"--name {whole}: expected a name for a prior of all levels, found that of priors of single levels")
    return run.prior(name)


def _begun_in(run: RunDir, name: str | None, level: str | None) -> Path:
    """The folder in which training goes on, if it was begun."""
    return _folder(
        run, _name(name, int(level) if level is not None and level.isdecimal() else None, name or load_recipe(run.recipe).prior.kind)
    )


def _found(run: RunDir, name: str, recipe: Recipe, sha256: str) -> Stage:
    """What there is of the prior in the run. Errors: UserError if it was trained on another tokenizer's codes."""
    folder = run.prior(name)
    header = read_prior_header(folder / "prior.safetensors") if (folder / "prior.safetensors").exists() else None
    if header is not None:
        check_tokenizer(run.show(folder), header["tokenizer_sha256"], sha256)
    begun_with = folder / "recipe.yaml"
    return Stage(
        where=run.show(folder),
        name="this prior",
        section="stage2",
        elsewhere="another with --name NAME",
        recipe=load_recipe(begun_with) if begun_with.exists() else recipe,
        begun=run.begun(folder),
        checkpointed=run.checkpointed(folder),
        finished_after=header["steps"] if header is not None else None,
    )


def train(
    accelerator: Accelerator,
    run: RunDir,
    name: str,
    recipe: Recipe,
    training: CodeStore,
    validation: CodeStore,
    resume: bool,
    stop: GracefulStop,
) -> None:
    """Train the prior from its first step, or from the last checkpoint.

    Errors: UserError for a foreign checkpoint, or a loss that is not finite.
    """
    config, folder = recipe.stage2, run.prior(name)
    began = time.monotonic()
    processes = accelerator.num_processes

    # --- model, optimiser, and where they left off
    prior, model, optimizer, average = build(accelerator, run, recipe, training, _level_of(name))
    parameters = sum(parameter.numel() for parameter in prior.parameters())
    names = prior.condition.class_names
    condition = f"{len(names)} classes" if names else f"condition {prior.condition.kind}"
    say(f"prior {name}: {parameters / 1e6:.1f} M parameters, {prior.layout.length} tokens an image, {condition}")
    for line in prior.training_warnings():
        say(line)
    loader = CodeLoader(training, prior.condition, config, accelerator, prior.num_draws)
    sharded = asked_to_shard(accelerator, recipe.compute)
    checkpoints = Checkpoints(folder / "checkpoints", "stage 2", config.keep_checkpoints, accelerator, sharded)
    first_step, minutes_before = 0, 0.0
    best: dict[str, Any] = {"step": 0, "bits": float("inf"), "weights": None}

    def weights() -> dict[str, Any]:
        return {"model": prior.state_dict(), "average": average.state_dict(), "optimizer": moments(prior, optimizer.optimizer)}

    state = checkpoints.load_latest({**weights(), "best": {"weights": best_weights(average.model)}}) if resume else None
    if state is not None:
        where = run.show(checkpoints.paths()[-1])
        check_tokenizer(where, state["tokenizer_sha256"], training.manifest.tokenizer_sha256)
        prior.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        load_moments_(prior, optimizer.optimizer, state["optimizer"])
        if accelerator.scaler is not None and state["scaler"] is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        first_step, minutes_before, best = state["step"], state["minutes"], state["best"]
        check_resumable(first_step, config.steps)
        say(f"{run.show(folder)}: going on after step {first_step}")

    if accelerator.is_main_process:
        write_yaml(folder / "recipe.yaml", recipe_dict(recipe))

    def minutes() -> float:
        return minutes_before + (time.monotonic() - began) / 60

    def save(step: int, score: float | None) -> None:
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        noted = {"best": best, "minutes": minutes(), "tokenizer_sha256": training.manifest.tokenizer_sha256}
        checkpoints.save(step, {**weights(), "scaler": scaler, **noted}, score)

    if recipe.compute.tracker:
        accelerator.init_trackers("stage2")
    log = MetricsLog(folder / "metrics.jsonl", accelerator, first_step)
    accelerator.wait_for_everyone()
    validations = [record for record in read_metrics(log.path) if record["split"] == "validation"]
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    since = time.monotonic()
    size, main = config.batch_size, accelerator.is_main_process
    every, micro_batch = torch.arange(len(validation)), size // (processes * config.accumulation)
    bar = progress_bar(config.steps * size, "stage 2", "img", initial=first_step * size, shown=main)
    left = TimeLeft("stage 2", first_step, config.steps)
    model.train()
    with bar, stop, checkpoints:
        for step in range(first_step, config.steps):
            # --- one step, and what it leaves
            step_loss, norm = take_step(accelerator, model, optimizer, loader, config, step)
            average.update_()
            losses.append(step_loss)
            norms.append(norm)
            bar.update(size)

            # --- what is noted, checked and kept
            done = step + 1
            if main and (outlook := left.line(done)) is not None:
                bar.write(outlook)
            finished = done == config.steps
            stopping = stop.requested(last=finished)
            due_checkpoint = finished or stopping or done % config.checkpoint_interval == 0
            due_validation = finished or done % config.validation_interval == 0
            if due_checkpoint or due_validation or done % config.log_interval == 0:
                means = summed(accelerator, {"losses": torch.stack(losses)})["losses"] / processes
                terms = [{"loss": loss, "gradient_norm": norm} for loss, norm in zip(means, norms, strict=True)]
                check_finite(terms, done - len(losses) + 1, _ADVICE)
                train_bits = bits(float(means.mean()))
                speed = len(losses) * size / (time.monotonic() - since)
                noted = {"images_per_second": speed, "lr": scheduled_rate(config, step)}
                log.write(done, "train", {"bits_per_token": train_bits, "gradient_norm": float(torch.stack(norms).mean()), **noted})
                bar.set_postfix(bits=f"{train_bits:.3f}", best=f"{best['bits']:.3f}", refresh=False)
                losses, norms, since = [], [], time.monotonic()
            if due_validation:
                found = measure(accelerator, average.model, validation, every, micro_batch).mean
                values = {"bits_per_token": found, "train_bits_per_token": train_bits}
                log.write(done, "validation", values)
                validations.append({"step": done, **values})
                if found < best["bits"]:
                    best = {"step": done, "bits": found, "weights": best_weights(average.model)}
                turned = turned_at(validations)
                if turned is not None:
                    bar.clear()
                    say(
                        f"warning: validation rises while training falls since step {turned} ({best['bits']:.3f} bits a token "
                        f"there, {found:.3f} now): the prior learns its images by heart; the weights of step {best['step']} are kept"
                    )
                model.train()
                since = time.monotonic()
            checkpoints.check()
            if due_checkpoint:
                save(done, found if due_validation else None)
            if stopping:
                bar.close()
                checkpoints.wait()
                of_all, _, of = name.partition("/level")
                which = f"--name {of_all}" + (f" --level {of}" if of else "")
                which += " --compute.sharded true" if recipe.compute.sharded else ""
                say(f"stopped after step {done} and saved; go on with: {TRAIN_PRIOR} --resume --run {run.path} {which}")
                finish(accelerator)
                sys.exit(stop.exit_code)

    # --- the result
    if best["weights"] is None:  # resumed after the last step, before any validation
        best = {"step": first_step, "bits": None, "weights": best_weights(average.model)}
    average.model.load_state_dict(best["weights"])
    likelihood = likelihood_report(accelerator, average.model, training, validation, micro_batch, validations)
    result = whole(accelerator, best["weights"])
    if accelerator.is_main_process:
        known = prior.condition.kind == "none" or config.condition_dropout > 0
        measured = config.steps, likelihood["validation"]
        header = PriorHeader.of(recipe.prior, prior.condition, training.manifest, known, *measured, _level_of(name))
        report = {"steps": config.steps, "best_step": best["step"], "minutes": minutes(), "parameters": parameters}
        write_results(run, folder, result, header, report, likelihood)


def _level_of(name: str) -> int | None:
    """The level, from 0 on, that `_name` names; None: all."""
    level = name.partition("/level")[2]
    return int(level) - 1 if level else None


def build(accelerator: Accelerator, run: RunDir, recipe: Recipe, training: CodeStore, level: int | None) -> Begun:
    """The prior with its first weights, its optimiser and its average."""
    config = recipe.stage2
    torch.manual_seed(derived_seed(config.seed, "weights"))
    try:
        prior = build_prior(recipe.prior, training.manifest.condition_of_prior(recipe.condition), training.manifest, level)
    except ValueError as error:  # of fields that do not fit the levels there are
        raise UserError(str(error)) from None
    prior.initialise_from(load_tokenizer(run).quantizer.code_vectors()[prior.levels])
    return begun(accelerator, prior, config, recipe.compute)


def within_budget(accelerator: Accelerator, run: RunDir, name: str, recipe: Recipe, training: CodeStore, validation: CodeStore) -> Recipe:
    """The recipe with as many steps as fit its minutes, by a rehearsal that leaves no trace."""
    config, began = recipe.stage2, time.monotonic()
    prior, model, optimizer, average = build(accelerator, run, recipe, training, _level_of(name))
    if accelerator.is_main_process:
        write_yaml(run.prior(name) / "recipe.yaml", recipe_dict(recipe))  # a rehearsal may be interrupted
    loader, every = CodeLoader(training, prior.condition, config, accelerator, prior.num_draws), torch.arange(len(validation))
    micro_batch = config.batch_size // (accelerator.num_processes * config.accumulation)

    def step(number: int) -> None:
        model.train()
        take_step(accelerator, model, optimizer, loader, config, number)

    found = fitting_steps(
        accelerator,
        "stage 2",
        config,
        began,
        began,
        [(1.0, step)],
        lambda: measure(accelerator, average.model, validation, every, micro_batch),
        passes_at_end=2,  # the likelihood report: of the validation images, and of as many training images
    )
    return dataclasses.replace(recipe, stage2=found)


def write_results(
    run: RunDir, folder: Path, weights: dict[str, Tensor], header: PriorHeader, report: dict[str, Any], likelihood: dict[str, Any]
) -> None:
    """Reports, pictures, and last the prior, whose presence says that it is finished."""
    write_json(folder / "report.json", report)
    write_report(folder, str(folder.relative_to(run.priors)), likelihood)
    references = {name: likelihood[name] for name in ("unigram", "uniform")}
    training_graph(folder / "training.png", read_metrics(folder / "metrics.jsonl"), ("bits_per_token",), references)
    save_prior(folder / "prior.safetensors", weights, header)
    at_most = "" if likelihood["exact"] else "at most "
    learned = f"learned prior {at_most}{likelihood['validation']:.3f} (step {report['best_step']})"
    print(f"validation bits a token: {learned}, unigram {likelihood['unigram']:.3f}, uniform {likelihood['uniform']:.3f}")
    raw, indices, coded = likelihood["bits_per_image"].values()
    ratio = f"ratio {compression_ratio(raw, coded):.1f}"
    print(f"an image: {raw} bits raw, {indices:.0f} as indices, {at_most}{coded:.0f} under the prior; {ratio}")
    print(f"wrote {run.show(folder / 'prior.safetensors')}; beside it likelihood.md, likelihood.png, training.png")


if __name__ == "__main__":
    run_entry(main)
