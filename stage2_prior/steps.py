"""Training state of the prior, and one optimizer step."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from configs.schema import Compute, Stage2
from stage2_prior.codes.loader import CodeLoader
from stage2_prior.muon import muon
from stage2_prior.priors.contract import Prior
from training.averaging import WeightAverage
from training.optimizer import adamw, clip_, fused_on
from training.processes import asked_to_shard
from training.randomness import seed_layers
from training.schedule import scheduled_rate, set_learning_rate
from training.sharding import shard_, without_weights


class Begun(NamedTuple):
    """What is trained."""

    prior: Prior
    model: Any
    """The same as the processes train it together."""
    optimizer: Any
    average: WeightAverage[Prior]


def begun(accelerator: Accelerator, prior: Prior, config: Stage2, compute: Compute) -> Begun:
    """A prior and what is trained with it, shared out over the processes if they are asked to."""
    for module in prior.modules():
        if isinstance(module, Prior):
            module.checkpointing = config.gradient_checkpointing
    sharded = asked_to_shard(accelerator, compute)
    averaged = without_weights(prior) if sharded else None
    if averaged is not None:
        shard_(accelerator, prior, prior.fsdp_modules())
        shard_(accelerator, averaged, averaged.fsdp_modules(), learns=False)
        register_fsdp_forward_method(averaged, "nats")  # it gathers, as a forward pass does
        averaged.load_state_dict({name: weight.clone() for name, weight in prior.state_dict().items()}, assign=True)
    else:
        prior.to(accelerator.device)
    fused = fused_on(accelerator.device)
    if config.optimizer == "muon":
        several = accelerator.num_processes > 1
        products = products_on(accelerator)
        optimizer: Any = muon(prior, config.lr, config.weight_decay, 0.95, fused, products, replicated=several and not sharded)
    else:
        optimizer = adamw(prior, config.lr, config.weight_decay, 0.95, fused)
    # Copied before the prior is prepared: a prepared copy would run under autocast, which likelihoods must not.
    average = WeightAverage(prior, config.weight_average, shared=(), copied=averaged)
    model, optimizer = (prior, accelerator.prepare(optimizer)) if sharded else accelerator.prepare(prior, optimizer)
    return Begun(prior, model, optimizer, average)


def products_on(accelerator: Accelerator) -> torch.dtype | None:
    """Dtype of Muon's products: bf16 if the network trains in bf16, on CUDA only (a CPU is slower in bf16); None: the weights' own."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cuda" else None


def best_weights(model: Prior) -> dict[str, Tensor]:
    """A copy of a model's weights: on the CPU, but where they are shared out and small."""
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    return {name: weight.clone() if isinstance(weight, DTensor) else weight.to("cpu", copy=True) for name, weight in weights.items()}


def take_step(accelerator: Accelerator, model: Any, optimizer: Any, loader: CodeLoader, config: Stage2, step: int) -> tuple[Tensor, Tensor]:
    """Take one optimizer step: forward, loss, backward, clip, update.

    Returns: this rank's loss (), nats per token, and the norm () of the gradient over all ranks before clipping.
    """
    set_learning_rate(optimizer, scheduled_rate(config, step))
    step_loss = torch.zeros((), device=accelerator.device)
    for micro_step in range(config.accumulation):
        batch = loader.batch(step, micro_step)
        seed_layers(config.seed, step, micro_step, accelerator.process_index)
        last = micro_step == config.accumulation - 1
        with nullcontext() if last else accelerator.no_sync(model):
            loss = model(*batch) / config.accumulation
            accelerator.backward(loss)
        step_loss += loss.detach()
    norm = clip_(accelerator, model, config.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return step_loss, norm
