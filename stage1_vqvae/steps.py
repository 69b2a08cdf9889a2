"""Training state of the tokenizer, how it starts, and one training step."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import UserError
from configs.parts import DiscriminatorPart
from configs.run_dir import RunDir
from configs.schema import Recipe, Stage1
from stage1_vqvae.data.loader import Loader
from stage1_vqvae.data.splits import ImageSource
from stage1_vqvae.model import VQVAE, TokenizerOutput, load_tokenizer
from stage1_vqvae.objectives.adversarial import Adversary
from stage1_vqvae.objectives.image_terms import Autocast, ImageLosses, ImageTerms, LossTerm, PerceptualTerm
from stage1_vqvae.quantizers.codebook import codebook_names
from stage1_vqvae.quantizers.contract import sum_by_name
from stage1_vqvae.quantizers.initialisation import kmeans_vectors, place_by_kmeans_
from stage1_vqvae.quantizers.restart import Restart
from training.averaging import WeightAverage
from training.optimizer import OptimizerState, adamw, clip_, fused_on
from training.precision import AutocastTarget
from training.processes import summed
from training.randomness import derived_seed, seed_layers
from training.schedule import scheduled_rate, set_learning_rate
from training.state import TrainState


class TokenizerState(TrainState):
    """Training state of the tokenizer: model, optimizer, weight average and loss terms on images; equal on every rank."""

    def __init__(self, accelerator: Accelerator, tokenizer: VQVAE, config: Stage1, terms: list[LossTerm]) -> None:
        super().__init__(accelerator)
        self.tokenizer = self.register("model", tokenizer)
        self.terms = terms
        optimizer = adamw(tokenizer, config.lr, config.weight_decay, 0.99, fused_on(accelerator.device))
        self.register("optimizer", OptimizerState(tokenizer, optimizer))
        self.model: Any = accelerator.prepare(AutocastTarget(tokenizer))
        """The tokenizer as all ranks train it together."""
        self.optimizer: Any = accelerator.prepare(optimizer)
        self.average: WeightAverage[VQVAE] | None = None
        if config.average_decay > 0:
            self.average = self.register("average", WeightAverage(tokenizer, config.average_decay, shared=codebook_names(tokenizer)))
        for term in terms:
            if entries := term.stateful():
                self.register(term.name, entries)
        # The terms' own losses have no gradient scaler, so fp16 is not for them.
        self._autocast: Autocast = nullcontext if accelerator.mixed_precision == "fp16" else accelerator.autocast

    @property
    def result(self) -> VQVAE:
        """The tokenizer that is validated and written: the averaged one, where there is an average."""
        return self.tokenizer if self.average is None else self.average.model

    def terms_of_step(self, step: int, steps: int) -> ImageTerms:
        """Return the loss terms on images that take part in this step of `steps`."""
        return ImageTerms([term for term in self.terms if term.begin_(step, steps)], step, self._autocast)

    def update_average_(self) -> None:
        """Update the weight average, if there is one, after an optimizer step."""
        if self.average is not None:
            self.average.update_()


def build_state(accelerator: Accelerator, run: RunDir, recipe: Recipe, images: ImageSource) -> TokenizerState:
    """Build the training state with its first weights.

    Errors: UserError if weights that the recipe asks for are missing or do not fit.
    """
    config, data = recipe.stage1, recipe.data
    torch.manual_seed(derived_seed(config.seed, "weights"))
    tokenizer = VQVAE(recipe.tokenizer, data.height, data.width, data.channels)
    if config.trained == "decoder":
        tokenizer.encoder.requires_grad_(False)
        tokenizer.quantizer.requires_grad_(False)
    tokenizer.to(accelerator.device)
    return TokenizerState(accelerator, tokenizer, config, build_terms(accelerator, run, recipe, images))


def build_terms(accelerator: Accelerator, run: RunDir, recipe: Recipe, images: ImageSource) -> list[LossTerm]:
    """Build the loss terms on images. Networks of features that they need are trained first, unless the run has them.

    Errors: UserError if weights that the recipe asks for are missing or do not fit.
    """
    config, features = recipe.stage1, derived_seed(recipe.stage1.seed, "features")
    with accelerator.main_process_first():  # which trains networks of features
        perceptual = config.perceptual.build(run.stage1, images, accelerator.device, features)
        torch.manual_seed(derived_seed(config.seed, "discriminator"))
        discriminator = config.adversarial.build(recipe.data.channels, run.stage1, images, accelerator.device, features)
    terms: list[LossTerm] = [] if perceptual is None else [PerceptualTerm(perceptual)]
    if isinstance(config.adversarial, DiscriminatorPart) and discriminator is not None:
        terms.append(Adversary(config.adversarial, discriminator))
    return terms


def delete_feature_networks(folder: Path) -> None:
    """Delete networks of features from the folder of a stage that has left nothing else: they may be another recipe's."""
    for path in folder.glob("*.safetensors"):
        path.unlink()


def take_step(accelerator: Accelerator, state: TokenizerState, loader: Loader, config: Stage1, step: int) -> dict[str, Tensor]:
    """Take one training step: forward, loss, backward, clip, optimizer step; then codebooks, restarts, loss terms and weight average.

    Returns: statistics summed over micro-batches and ranks (the quantizer's, `loss/NAME`, `logged/NAME`, `squared_error`); the number of
    codes `restarted`, and the `gradient_norm` before clipping.
    """
    tokenizer, model, optimizer, rate = state.tokenizer, state.model, state.optimizer, scheduled_rate(config, step)
    terms = state.terms_of_step(step, config.steps)
    restart = Restart(tokenizer.quantizer, config.seed, step, config.batch_size, due=restarts_after(step, config))
    statistics: dict[str, Tensor] = {}
    set_learning_rate(optimizer, rate)
    for micro_step in range(config.accumulation):
        images = loader.images(step, micro_step)
        uniforms = [loader.uniforms(step, micro_step)] if tokenizer.objective.draws else []
        seed_layers(config.seed, step, micro_step, accelerator.process_index)
        with nullcontext() if micro_step + 1 == config.accumulation else accelerator.no_sync(model):
            output = model(images, *uniforms)
            extra = terms.losses(output.reconstruction, images, output.losses, tokenizer.decoder)
            loss = torch.stack(list(output.losses.values())).sum() + extra.surrogate(output.reconstruction)
            accelerator.backward(loss / config.accumulation)
        own = terms.backward_own_losses(images, output.reconstruction, config.accumulation)
        candidates = restart.candidates(output.latents, loader.share(micro_step).start, len(images))
        statistics = sum_by_name([statistics, own, candidates, _statistics(output, extra, images)])
    norm = clip_(accelerator, model, config.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    statistics = summed(accelerator, statistics)
    if config.trained == "all":
        tokenizer.quantizer.update_(statistics)
    restarted = restart.apply_(statistics, optimizer)
    terms.step(accelerator, rate, statistics, accelerator.num_processes * config.accumulation)
    state.update_average_()
    return {**statistics, "restarted": torch.as_tensor(restarted), "gradient_norm": norm}


def _statistics(output: TokenizerOutput, extra: ImageLosses, images: Tensor) -> dict[str, Tensor]:
    """Return what is summed over micro-batches: the quantizer's and the terms' statistics, every loss term, the mean squared error."""
    losses = {f"loss/{name}": loss.detach() for name, loss in {**output.losses, **extra.losses}.items()}
    squared_error = (output.reconstruction.detach() - images).square().mean()
    return {**output.statistics, **extra.statistics, **losses, "squared_error": squared_error}


def restarts_after(step: int, config: Stage1) -> bool:
    """Return whether dead codes restart after this step: not in the last tenth, so that the decoder knows every code in the end."""
    return config.trained == "all" and (step + 1) % config.restart_interval == 0 and step + 1 <= 0.9 * config.steps


@torch.no_grad()
def initialise_(accelerator: Accelerator, state: TokenizerState, loader: Loader, config: Stage1) -> None:
    """Give a new training its start, the same on every rank: another run's weights; or codebooks placed by k-means of the untrained
    encoder's latents of the first batches, where the recipe says so.

    Errors: UserError for another run's tokenizer that is missing or does not fit.
    """
    if config.init_from is not None:
        copy_weights_(state.tokenizer, RunDir.named(config.init_from))
    elif state.tokenizer.config.quantizer.starts_by_kmeans:
        _place_codebooks_(accelerator, state.tokenizer, loader, config)
    if state.average is not None:
        state.average.restart_()


def copy_weights_(tokenizer: VQVAE, run: RunDir) -> None:
    """Copy the weights of another run's tokenizer. Errors: UserError, naming the first that does not fit."""
    weights, current = load_tokenizer(run).state_dict(), tokenizer.state_dict()
    for name, weight in current.items():
        if name not in weights or weights[name].shape != weight.shape:
            found = "none" if name not in weights else f"one of {list(weights[name].shape)}"
            raise UserError(f"--init-from {run}: expected a weight {name} of {list(weight.shape)}, found {found}")
    tokenizer.load_state_dict({name: weights[name] for name in current})


def _place_codebooks_(accelerator: Accelerator, tokenizer: VQVAE, loader: Loader, config: Stage1) -> None:
    """Place every codebook by k-means of the latents of the first training batches."""
    tokenizer.eval()

    def from_main(tensor: Tensor) -> Tensor:
        return summed(accelerator, {"": tensor * accelerator.is_main_process})[""]

    for grid, quantizer in enumerate(tokenizer.quantizers):  # coarse to fine: a grid's latents depend on the codebooks above
        height, width = tokenizer.latent_grids[grid]
        placeable = [codebook for codebook in quantizer.codebooks() if codebook.placeable]
        if not placeable:
            continue
        num_vectors = max(kmeans_vectors(codebook.num_codes) for codebook in placeable)
        steps = -(-num_vectors // (config.batch_size * height * width))
        batches = [
            tokenizer.latents(loader.images(step, micro_step), grid) for step in range(steps) for micro_step in range(config.accumulation)
        ]
        place_by_kmeans_(quantizer, batches, steps, config.seed, accelerator.gather, from_main)
