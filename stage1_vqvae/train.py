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
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from configs.cli import EXTRACT_CODES, SECTIONS, TRAIN_TOKENIZER, load_recipe, parse, recipe_dict
from configs.data import in_file_order
from configs.errors import UserError, run_entry, say
from configs.run_dir import RunDir, program, write_json, write_yaml
from configs.schema import DiscriminatorPart, Recipe, Stage1, keys_that_may_change
from stage1_vqvae.data.loader import Loader, crops_vary
from stage1_vqvae.data.record import Record, check_unchanged
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN, VALIDATION, ImageSource
from stage1_vqvae.data.variants import VARIANTS
from stage1_vqvae.model import VQVAE, load_tokenizer
from stage1_vqvae.monitoring.health import CollapseWatch
from stage1_vqvae.monitoring.validation import (
    Judgement,
    check_equal_codebooks,
    save_grids,
    save_health,
    save_reconstructions,
    validate,
    write_results,
)
from stage1_vqvae.monitoring.window import Window
from stage1_vqvae.objectives.adversarial import Adversary
from stage1_vqvae.objectives.image_terms import pull
from stage1_vqvae.quantizers.codebook import codebook_names
from stage1_vqvae.quantizers.contract import added, level_counts
from stage1_vqvae.quantizers.initialisation import place_by_kmeans_, vectors_for
from stage1_vqvae.quantizers.restart import Restart
from training.averaging import WeightAverage
from training.batching import check_divides
from training.budget import TimeLeft, fitting_steps, keeping_scale
from training.checkpoint import Checkpoints
from training.metrics_log import MetricsLog
from training.optimizer import adamw, clip_, fused_on, load_state_, trainable
from training.precision import AutocastTarget
from training.processes import average_gradients_, finish, start, summed
from training.progress import progress_bar
from training.randomness import derived_seed, seed_layers
from training.resumption import (
    Stage,
    accumulation_advice,
    add_resume_options,
    check_resumable,
    memory_advice,
    nothing_to_do,
)
from training.schedule import scheduled_rate, set_learning_rate
from training.stopping import GracefulStop
from training.weights_file import read_header

_OWN_SECTIONS = ("data", "tokenizer", "stage1", "evaluation", "compute")
_ADVICE = "lower --stage1.lr and go on with --resume"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    command = parse(__doc__, tuple(SECTIONS), argv, starts_run=True, begun_in=lambda run, *_: run.stage1, options=_options)
    run, recipe, resume = command.run, command.recipe, command.options.resume
    found = _found(run, recipe)
    if found.checkpointed and found.finished_after is None and in_file_order(found.recipe.data) != in_file_order(recipe.data):
        raise UserError(f"{run}: its recipe is fixed, but asked for was another order, by data.stream and data.decode; train another run")
    if nothing_to_do(found, recipe, resume, keys_that_may_change(recipe, _OWN_SECTIONS)):
        say(f"next: {command.next(EXTRACT_CODES)}")
        return
    if recipe.data.decode == "once" and crops_vary(recipe.data.transform, VARIANTS[recipe.stage1.augmentation]):
        crops = f"data.transform {recipe.data.transform.kind} and stage1.augmentation {recipe.stage1.augmentation}"
        raise UserError(f"data.decode: expected each_time with {crops}, which crop an image in several ways, found once")
    accelerator = start(recipe.compute, str(run.stage1 / "tensorboard"), oom_hint(recipe))
    stop = GracefulStop(accelerator, command.options.stop_after)
    check_divides("stage1", recipe.stage1.batch_size, recipe.stage1.accumulation, accelerator.num_processes)
    # Before the run's folder is made: images that cannot be read should leave no trace.

    def check(record: Record) -> None:
        if found.begun:
            check_unchanged(run.data, record, str(run), command.options.accept_changed_data)

    images = load_images(recipe.data, (TRAIN, VALIDATION), progress=accelerator.is_main_process, announce=True, check=check)
    objective = recipe.tokenizer.objective.build((recipe.data.channels, recipe.data.height, recipe.data.width))
    for split in images.splits.values():
        objective.check(split.pixels)
    with run.lock():
        if not run.begun(run.stage1):
            began = time.monotonic()
            if accelerator.is_main_process:
                forget_networks(run.stage1)
                write_yaml(run.recipe, recipe_dict(recipe))  # a folder without one is no run, and what comes now may be interrupted
            if recipe.stage1.minutes > 0:
                recipe = within_budget(accelerator, run, recipe, images, began)
                accelerator.free_memory()  # of the rehearsal
        if accelerator.is_main_process:
            write_yaml(run.recipe, recipe_dict(recipe))
            write_json(run.data, images.record)
            run.record(program(), command.arguments, recipe_dict(recipe))
            if images.skipped:
                write_json(run.stage1 / "skipped.json", images.skipped)
            else:
                (run.stage1 / "skipped.json").unlink(missing_ok=True)  # of images that have been repaired
        accelerator.wait_for_everyone()
        train(accelerator, run, recipe, images, resume, stop)
        say(f"next: {command.next(EXTRACT_CODES)}")


def _options(parser: Any) -> None:
    add_resume_options(parser)


def _found(run: RunDir, recipe: Recipe) -> Stage:
    """What there is of stage 1 in the run."""
    return Stage(
        where=str(run),
        name="stage 1",
        section="stage1",
        elsewhere="another with --run NAME",
        recipe=load_recipe(run.recipe) if run.exists() else recipe,
        begun=run.begun(run.stage1),
        checkpointed=run.checkpointed(run.stage1),
        finished_after=read_header(run.tokenizer, "tokenizer")["steps"] if run.tokenizer.exists() else None,
    )


def oom_hint(recipe: Recipe) -> str:
    """Advice appended to an out-of-memory error: options that `--resume` takes."""
    config, network = recipe.stage1, recipe.tokenizer.network
    whole_batch = recipe.tokenizer.quantizer.needs_whole_batch
    ways = [] if whole_batch else accumulation_advice("stage1", config.batch_size, config.accumulation)
    if whole_batch:
        ways.append("more processes (accelerate launch --num_processes N)")
    if not getattr(network, "gradient_checkpointing", True):
        ways.append("--tokenizer.network.gradient_checkpointing true, which keeps fewer activations")
    return memory_advice(ways, "another with --run NAME")


class Models(NamedTuple):
    """What stage 1 trains, and by what it judges images; all processes have the same."""

    tokenizer: VQVAE
    model: Any
    """The tokenizer as the processes train it together."""
    optimizer: Any
    perceptual: nn.Module | None
    adversary: Adversary | None
    its_optimizer: torch.optim.Optimizer | None


def train(accelerator: Accelerator, run: RunDir, recipe: Recipe, images: ImageSource, resume: bool, stop: GracefulStop) -> None:
    """Train the tokenizer from its first step, or from the last checkpoint.

    Errors: UserError for a foreign checkpoint, or a loss that is not finite.
    """
    config = recipe.stage1
    began = time.monotonic()
    processes = accelerator.num_processes
    validation = images.splits[VALIDATION]

    # --- models, optimisers, and where they left off
    checkpoints = Checkpoints(run.stage1 / "checkpoints", "stage 1", config.keep_checkpoints, accelerator)
    state = checkpoints.load_latest() if resume else None
    if discriminator_comes(config, state) and (config.minutes == 0 or state is not None):  # a time budget has been rehearsed already
        rehearse(accelerator, run, recipe, images)
        accelerator.free_memory()
    models = build(accelerator, run, recipe, images)
    tokenizer, model, optimizer, _, adversary, its_optimizer = models
    loader = Loader(images.splits[TRAIN], recipe.data, config, accelerator)
    if state is None:
        begin(accelerator, tokenizer, loader, config)
    average = WeightAverage(tokenizer, config.weight_average, shared=codebook_names(tokenizer)) if config.weight_average > 0 else None
    judged = average.model if average is not None else tokenizer
    first_step, minutes_before = 0, 0.0
    judgement: Judgement | None = None
    if state is not None:
        tokenizer.load_state_dict(state["model"])
        load_state_(optimizer, state["optimizer"])
        if average is not None:
            average.load_state_dict(state["average"])
        if adversary is not None and its_optimizer is not None:
            adversary.load_state_dict(state["adversary"]["model"])
            load_state_(its_optimizer, state["adversary"]["optimizer"])
        if accelerator.scaler is not None and state["scaler"] is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        first_step, minutes_before = state["step"], state["minutes"]
        check_resumable(first_step, config.steps)
        say(f"{run}: going on after step {first_step}")

    def minutes() -> float:
        return minutes_before + (time.monotonic() - began) / 60

    def save(step: int, score: float | None) -> None:
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        state = {"model": tokenizer.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler}
        state["average"] = average.state_dict() if average is not None else None
        if adversary is not None and its_optimizer is not None:
            state["adversary"] = {"model": adversary.state_dict(), "optimizer": its_optimizer.state_dict()}
        checkpoints.save(step, {**state, "minutes": minutes()}, score)

    if accelerator.is_main_process:
        run.stage1.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    if recipe.compute.tracker:
        accelerator.init_trackers("stage1")
    log = MetricsLog(run.stage1 / "metrics.jsonl", accelerator, first_step)
    window = Window()
    loader.waited()  # before the first step, for k-means
    watch, warning = CollapseWatch(tokenizer.quantizer, recipe.tokenizer), None
    parts = processes * config.accumulation
    # Shapes are the same in every step: let cuDNN benchmark its convolution kernels in the first one.
    torch.backends.cudnn.benchmark = True
    size, main = config.batch_size, accelerator.is_main_process
    bar = progress_bar(config.steps * size, "stage 1", "img", initial=first_step * size, shown=main)
    left = TimeLeft("stage 1", first_step, config.steps)
    model.train()
    with bar, stop, checkpoints:
        for step in range(first_step, config.steps):
            # --- one step, and what it leaves
            statistics = take_step(accelerator, models, loader, config, step)
            if average is not None:
                average.update_()
            losses = {name.removeprefix("loss/"): value / parts for name, value in statistics.items() if name.startswith("loss/")}
            beside = {name.removeprefix("noted/"): value / parts for name, value in statistics.items() if name.startswith("noted/")}
            window.add(
                level_counts(statistics),
                losses,
                **beside,
                # Squared error on [-1, 1] is four times that on [0, 1].
                mse=statistics["squared_error"] / parts / 4,
                restarted=statistics["restarted"],
                gradient_norm=statistics["gradient_norm"],
            )
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
                values, counts = window.close(done - window.steps, size, _ADVICE, loader.waited())
                former, warning = warning, watch.warning(counts)
                if warning is not None and former is None and main:
                    bar.write(f"step {done}: {warning}")
                noted = {} if warning is None else {"warning": warning}
                log.write(done, "train", {**values, "lr": scheduled_rate(config, step), **noted})
                bar.set_postfix(loss=f"{values['loss']:.4f}", psnr=f"{values['psnr']:.2f}", usage=f"{values['usage']:.0%}", refresh=False)
            if due_validation:
                check_equal_codebooks(accelerator, tokenizer, done)
                judgement = validate(accelerator, judged, validation, size // parts)
                log.write(done, "validation", judgement.metrics)
                if main:
                    save_health(run, judged, judgement.counts, done, processes)
                    save_reconstructions(run, judged, validation, done, accelerator.device)
                    save_grids(run, judged, validation, accelerator.device)
                model.train()
                window.restart_clock()
            checkpoints.check()
            if due_checkpoint:
                save(done, judgement.metrics["loss"] if due_validation and judgement is not None else None)
            if stopping:
                bar.close()
                checkpoints.wait()
                say(f"stopped after step {done} and saved; go on with: {TRAIN_TOKENIZER} --resume --run {run.path}")
                finish(accelerator)
                sys.exit(stop.exit_code)

    # --- the result
    if judgement is None:  # resumed after the last step
        judgement = validate(accelerator, judged, validation, size // parts)
    if main:
        write_results(run, judged, config.steps, minutes(), judgement)
    finish(accelerator)


def build(accelerator: Accelerator, run: RunDir, recipe: Recipe, images: ImageSource) -> Models:
    """The tokenizer with its first weights, its optimiser, and what judges its images, on every process the same.

    Errors: UserError if weights that the recipe asks for are missing or do not fit.
    """
    config, data = recipe.stage1, recipe.data
    torch.manual_seed(derived_seed(config.seed, "weights"))
    tokenizer = VQVAE(recipe.tokenizer, data.height, data.width, data.channels)
    if config.trained == "decoder":
        tokenizer.encoder.requires_grad_(False)
        tokenizer.quantizer.requires_grad_(False)
    fused = fused_on(accelerator.device)
    model, optimizer = accelerator.prepare(AutocastTarget(tokenizer), adamw(tokenizer, config.lr, config.weight_decay, 0.99, fused))
    adversary, its_optimizer = None, None
    perceptual, discriminator = judges(accelerator, run, recipe, images)
    if isinstance(config.adversarial, DiscriminatorPart) and discriminator is not None:
        # The gradients at the last layer walk a part of the graph before all of it is: a compiled one must not reuse its memory.
        torch._functorch.config.donated_buffer = False
        adversary = Adversary(config.adversarial, discriminator, config.steps)
        its_optimizer = torch.optim.AdamW(trainable(discriminator), config.lr, betas=(0.5, 0.9), weight_decay=0.0, fused=fused)
    return Models(tokenizer, model, optimizer, perceptual, adversary, its_optimizer)


def judges(accelerator: Accelerator, run: RunDir, recipe: Recipe, images: ImageSource) -> tuple[nn.Module | None, nn.Module | None]:
    """The perceptual term and the discriminator, on every process the same. Networks of features that they need are made on the spot,
    unless the run has them.

    Errors: UserError if weights that the recipe asks for are missing or do not fit.
    """
    config, features = recipe.stage1, derived_seed(recipe.stage1.seed, "features")
    with accelerator.main_process_first():  # which trains what is made on the spot
        perceptual = config.perceptual.build(run.stage1, images, accelerator.device, features)
        torch.manual_seed(derived_seed(config.seed, "discriminator"))
        return perceptual, config.adversarial.build(recipe.data.channels, run.stage1, images, accelerator.device, features)


def take_step(accelerator: Accelerator, models: Models, loader: Loader, config: Stage1, step: int) -> dict[str, Tensor]:
    """One step of training: forward, loss, backward, clip, step; then the codebooks' own update and restarts, and the discriminator's step.

    Returns the statistics of the whole batch, summed over its parts: those of the quantizer, `loss/NAME`, `noted/NAME`, `squared_error`;
    how many codes were `restarted`, and the `gradient_norm` before clipping.
    """
    tokenizer, model, optimizer, perceptual, adversary, its_optimizer = models
    processes, rank, size = accelerator.num_processes, accelerator.process_index, config.batch_size
    judging = adversary if adversary is not None and adversary.begin_(step) else None
    learns_codes = config.trained == "all"
    set_learning_rate(optimizer, scheduled_rate(config, step))
    restart = Restart(tokenizer.quantizer, config.seed, step, size) if learns_codes and restarts_after(step, config) else None
    # A discriminator's loss has no scaler of its own, so fp16 is not for it.
    autocast = nullcontext if accelerator.mixed_precision == "fp16" else accelerator.autocast
    statistics: dict[str, Tensor] = {}
    for micro_step in range(config.accumulation):
        images = loader.images(step, micro_step)
        seed_layers(config.seed, step, micro_step, rank)
        last = micro_step == config.accumulation - 1
        with nullcontext() if last else accelerator.no_sync(model):
            output = model(images, loader.uniforms(step, micro_step)) if tokenizer.objective.draws else model(images)
            loss, losses = torch.stack(list(output.losses.values())).sum(), dict(output.losses)
            found = dict(output.statistics)
            if perceptual is not None or judging is not None:
                with autocast():
                    pulled = pull(output.reconstruction, images, losses, tokenizer.decoder, perceptual, judging, step)
                loss = loss + (output.reconstruction * pulled.gradient).sum()
                losses, found = losses | pulled.losses, found | pulled.statistics
            accelerator.backward(loss / config.accumulation)
        found |= {f"loss/{name}": value.detach() for name, value in losses.items()}
        found["squared_error"] = (output.reconstruction.detach() - images).square().mean()
        if judging is not None:
            with autocast():
                its_loss, of_it = judging.discriminator_loss(images, output.reconstruction)
            (its_loss / config.accumulation).backward()
            found |= {**of_it, "noted/discriminator": its_loss.detach(), "noted/adversarial_weight": judging.weight(step)}
        if restart is not None:
            found |= restart.candidates(output.latents, loader.share(micro_step).start, len(images))
        statistics = added([statistics, found])
    norm = clip_(accelerator, model, config.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    statistics = summed(accelerator, statistics)
    if learns_codes:
        tokenizer.quantizer.update_(statistics)
    restarted = restart.apply_(statistics, optimizer) if restart is not None else 0
    if judging is not None and its_optimizer is not None:
        average_gradients_(accelerator, judging.discriminator)
        set_learning_rate(its_optimizer, judging.part.lr_share * scheduled_rate(config, step))
        its_optimizer.step()
        its_optimizer.zero_grad()
        judging.update_(statistics, processes * config.accumulation)
    return {**statistics, "restarted": torch.as_tensor(restarted), "gradient_norm": norm}


def within_budget(accelerator: Accelerator, run: RunDir, recipe: Recipe, images: ImageSource, began: float) -> Recipe:
    """The recipe with as many steps as fit its minutes since `began`, by a rehearsal that leaves no trace."""
    config, validation = recipe.stage1, images.splits[VALIDATION]
    judges(accelerator, run, recipe, images)  # makes networks of features, which training then finds
    building = time.monotonic()
    models = build(accelerator, run, recipe, images)
    loader = Loader(images.splits[TRAIN], recipe.data, config, accelerator)
    begin(accelerator, models.tokenizer, loader, config)
    micro_batch = config.batch_size // (accelerator.num_processes * config.accumulation)

    def step(models: Models, number: int) -> None:
        models.model.train()
        take_step(accelerator, models, loader, config, number)

    start = config.adversarial.start if isinstance(config.adversarial, DiscriminatorPart) else 1.0
    kinds = [
        (start, lambda number: step(models._replace(adversary=None), number)),
        (1 - start, lambda number: step(with_discriminator(models), number)),
    ]
    found = fitting_steps(
        accelerator,
        "stage 1",
        config,
        began,
        building,
        [kind for kind in kinds if kind[0] > 0],
        lambda: validate(accelerator, models.tokenizer, validation, micro_batch),
    )
    return dataclasses.replace(recipe, stage1=found)


def with_discriminator(models: Models) -> Models:
    """The models of a rehearsal, whose discriminator takes part from the first step on."""
    assert models.adversary is not None
    models.adversary.begun.fill_(0)
    return models


def discriminator_comes(config: Stage1, state: dict[str, Any] | None) -> bool:
    """Whether a discriminator begins after steps without it, of a training from its first step or from a checkpoint's state."""
    if not isinstance(config.adversarial, DiscriminatorPart):
        return False
    first_step, begun = (0, False) if state is None else (state["step"], int(state["adversary"]["model"]["begun"]) >= 0)
    return not begun and config.adversarial.start * config.steps > first_step


def rehearse(accelerator: Accelerator, run: RunDir, recipe: Recipe, images: ImageSource) -> None:
    """Take one step with the discriminator, and throw it away: if the memory is not enough for it, that shows at once and not when the
    discriminator begins.
    """
    config = recipe.stage1
    models = build(accelerator, run, recipe, images)
    shared = codebook_names(models.tokenizer)
    average = WeightAverage(models.tokenizer, config.weight_average, shared) if config.weight_average > 0 else None
    models.model.train()
    with keeping_scale(accelerator):
        take_step(accelerator, with_discriminator(models), Loader(images.splits[TRAIN], recipe.data, config, accelerator), config, 0)
    del average  # it only took the memory that it will take


def begin_with(tokenizer: VQVAE, run: RunDir) -> None:
    """Give the tokenizer the weights of another run's. Errors: UserError, naming the first that does not fit."""
    weights, own = load_tokenizer(run).state_dict(), tokenizer.state_dict()
    for name, weight in own.items():
        if name not in weights or weights[name].shape != weight.shape:
            found = "none" if name not in weights else f"one of {list(weights[name].shape)}"
            raise UserError(f"--init-from {run}: expected a weight {name} of {list(weight.shape)}, found {found}")
    tokenizer.load_state_dict({name: weights[name] for name in own})


def forget_networks(folder: Path) -> None:
    """Remove networks that terms have made, of a stage that left nothing else: they may be of another recipe."""
    for path in folder.glob("*.safetensors"):
        path.unlink()


def restarts_after(step: int, config: Stage1) -> bool:
    """Whether dead codes restart after this step: not in the last tenth, so that the decoder knows every code in the end."""
    return (step + 1) % config.restart_interval == 0 and step + 1 <= 0.9 * config.steps


@torch.no_grad()
def begin(accelerator: Accelerator, tokenizer: VQVAE, loader: Loader, config: Stage1) -> None:
    """What a training begins with, the same on all processes: another run's tokenizer; or codebooks placed by k-means of the untrained
    encoder's latents of the first batches, where the recipe says so.

    Errors: UserError for another run's tokenizer that is missing or does not fit.
    """
    if config.init_from is not None:
        begin_with(tokenizer, RunDir.named(config.init_from))
        return
    if not tokenizer.config.quantizer.starts_by_kmeans:
        return
    tokenizer.eval()
    rank = accelerator.process_index

    def agree(tensor: Tensor) -> Tensor:
        return summed(accelerator, {"": tensor * (rank == 0)})[""]

    level = 0
    for grid, quantizer in enumerate(tokenizer.quantizers):  # those above are placed: a grid's latents depend on them
        (height, width), level = tokenizer.grids[level], level + len(quantizer.num_codes)
        placeable = [codebook for codebook in quantizer.codebooks() if codebook.placeable]
        if not placeable:
            continue
        wanted = max(vectors_for(codebook.num_codes) for codebook in placeable)
        batches = []
        steps = -(-wanted // (config.batch_size * height * width))
        for step in range(steps):
            for micro_step in range(config.accumulation):
                batches.append(tokenizer.latents(loader.images(step, micro_step), grid))
        place_by_kmeans_(quantizer, batches, steps, config.seed, accelerator.gather, agree)


if __name__ == "__main__":
    run_entry(main)
