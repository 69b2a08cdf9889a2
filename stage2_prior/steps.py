"""What is trained of a prior, and a step of it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from configs.schema import Compute, Stage2
from stage1_vqvae.quantizers.contract import Codes
from stage1_vqvae.training.averaging import WeightAverage
from stage1_vqvae.training.batching import share_of_step
from stage1_vqvae.training.optimizer import adamw, clip_, muon
from stage1_vqvae.training.processes import asked_to_shard
from stage1_vqvae.training.randomness import DataOrder, generator, seed_layers
from stage1_vqvae.training.schedule import scheduled_rate, set_learning_rate
from stage1_vqvae.training.sharding import shard_, without_weights
from stage2_prior.codes.store import CodeStore
from stage2_prior.priors.contract import AutoregressivePrior, code_losses


class Begun(NamedTuple):
    """What is trained."""

    prior: AutoregressivePrior
    model: Any
    """The same as the processes train it together."""
    optimizer: Any
    average: WeightAverage[AutoregressivePrior]


def begun(accelerator: Accelerator, prior: AutoregressivePrior, config: Stage2, compute: Compute) -> Begun:
    """A prior and what is trained with it, shared out over the processes if they are asked to."""
    for module in prior.modules():
        if isinstance(module, AutoregressivePrior):
            module.checkpointing = config.gradient_checkpointing
    sharded = asked_to_shard(accelerator, compute)
    averaged = without_weights(prior) if sharded else None
    if averaged is not None:
        shard_(accelerator, prior, prior.units())
        shard_(accelerator, averaged, averaged.units(), learns=False)
        averaged.load_state_dict({name: weight.clone() for name, weight in prior.state_dict().items()}, assign=True)
    optimizer = {"adamw": adamw, "muon": muon}[config.optimizer](prior, config.lr, config.weight_decay, beta2=0.95)
    model, optimizer = (prior, accelerator.prepare(optimizer)) if sharded else accelerator.prepare(prior, optimizer)
    return Begun(prior, model, optimizer, WeightAverage(prior, config.weight_average, shared=(), copied=averaged))


def best_weights(model: AutoregressivePrior) -> dict[str, Tensor]:
    """A copy of a model's weights: on the CPU, but where they are shared out and small."""
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    return {name: weight.clone() if isinstance(weight, DTensor) else weight.to("cpu", copy=True) for name, weight in weights.items()}


def take_step(
    accelerator: Accelerator, model: Any, optimizer: Any, training: CodeStore, order: DataOrder, config: Stage2, step: int
) -> tuple[Tensor, Tensor]:
    """One step of training: forward, loss, backward, clip, step. Returns this process's loss (), nats a token, and the norm () of all
    processes' gradient before clipping.
    """
    processes, rank = accelerator.num_processes, accelerator.process_index
    prior = accelerator.unwrap_model(model, keep_torch_compile=False)
    set_learning_rate(optimizer, scheduled_rate(config, step))
    rows = order.batch(step)
    step_loss = torch.zeros((), device=accelerator.device)
    for micro_step in range(config.accumulation):
        share = share_of_step(config.batch_size, config.accumulation, micro_step, processes, rank)
        codes, *given = training_codes(accelerator, prior.num_classes, training, rows, share, config, step)
        seed_layers(config.seed, step, micro_step, rank)
        last = micro_step == config.accumulation - 1
        with nullcontext() if last else accelerator.no_sync(model):
            loss = torch.cat(code_losses(model(codes, *given), codes[prior.levels]), 1).mean() / config.accumulation
            accelerator.backward(loss)
        step_loss += loss.detach()
    norm = clip_(accelerator, model, config.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return step_loss, norm


def training_codes(
    accelerator: Accelerator, num_classes: int, training: CodeStore, rows: Tensor, share: slice, config: Stage2, step: int
) -> tuple[Codes, Tensor | None, Tensor]:
    """This micro-step's codes (b, h, w) a level, labels and variants (b,): which variant and whose label is hidden is drawn for
    (seed, step, number in the batch).
    """
    variants = torch.randint(training.manifest.variants, rows.shape, generator=generator(config.seed, "variants", step))[share]
    codes = tuple(level.to(accelerator.device) for level in training.codes(rows[share], variants))
    variants = variants.to(accelerator.device)
    if num_classes == 0 or training.labels is None:
        return codes, None, variants
    hidden = torch.rand(rows.shape, generator=generator(config.seed, "label dropout", step)) < config.label_dropout
    return codes, training.labels[rows[share]].masked_fill(hidden[share], num_classes).to(accelerator.device), variants
