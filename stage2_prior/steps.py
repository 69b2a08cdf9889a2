"""Training state of the prior, and one optimizer step."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from configs.schema import Compute, Stage2
from stage2_prior.codes.loader import CodeLoader
from stage2_prior.muon import muon
from stage2_prior.priors.contract import Prior
from training.averaging import WeightAverage
from training.optimizer import OptimizerState, adamw, clip_, fused_on
from training.processes import asked_to_shard
from training.randomness import seed_layers
from training.schedule import scheduled_rate, set_learning_rate
from training.sharding import is_sharded, shard_, without_weights
from training.state import TrainState


class BestWeights:
    """Weights of the lowest validation loss so far."""

    def __init__(self, model: nn.Module) -> None:
        self.step = 0
        """Step of that validation; 0 before the first one."""
        self.bits = float("inf")
        """Its bits per token."""
        self.weights = _copied_weights(model)

    def replace_(self, step: int, bits: float, model: nn.Module) -> None:
        """Keep a copy of a model's weights in place of the earlier ones."""
        self.step, self.bits, self.weights = step, bits, _copied_weights(model)

    def state_dict(self) -> dict[str, Any]:
        """Return step, bits and weights."""
        return {"step": self.step, "bits": self.bits, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.step, self.bits, self.weights = state["step"], state["bits"], state["weights"]


def _copied_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy a model's weights: to the CPU, but sharded ones, which are small, on their devices."""
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    return {name: weight.clone() if is_sharded(weight) else weight.to("cpu", copy=True) for name, weight in weights.items()}


class PriorState(TrainState):
    """Training state of a prior: model, optimizer, weight average and the best weights so far; sharded or equal on every rank."""

    def __init__(self, accelerator: Accelerator, prior: Prior, config: Stage2, compute: Compute) -> None:
        """Shard the prior over the ranks if `compute` or the launcher says so."""
        super().__init__(accelerator)
        for module in prior.modules():
            if isinstance(module, Prior):
                module.checkpointing = config.gradient_checkpointing
        self.sharded = asked_to_shard(accelerator, compute)
        averaged = without_weights(prior) if self.sharded else None
        if averaged is not None:
            from torch.distributed.fsdp import register_fsdp_forward_method  # see training/sharding.py

            shard_(accelerator, prior, prior.fsdp_modules())
            shard_(accelerator, averaged, averaged.fsdp_modules(), trained=False)
            register_fsdp_forward_method(averaged, "nats")  # which gathers weights as a forward pass does
            averaged.load_state_dict({name: weight.clone() for name, weight in prior.state_dict().items()}, assign=True)
        else:
            prior.to(accelerator.device)
        fused = fused_on(accelerator.device)
        if config.optimizer == "muon":
            replicated = accelerator.num_processes > 1 and not self.sharded
            products = products_on(accelerator)
            optimizer: Any = muon(prior, config.lr, config.weight_decay, 0.95, fused, products, replicated, config.embedding_lr)
        else:
            optimizer = adamw(prior, config.lr, config.weight_decay, 0.95, fused)
        self.prior = self.register("model", prior)
        self.register("optimizer", OptimizerState(prior, optimizer))
        # Copied before the prior is prepared: a prepared copy would run under autocast, which likelihoods must not.
        self.average = self.register("average", WeightAverage(prior, config.average_decay, shared=(), copied=averaged))
        self.best = self.register("best", BestWeights(self.average.model))
        self.model: Any = prior if self.sharded else accelerator.prepare(prior)
        """The prior as all ranks train it together."""
        self.optimizer: Any = accelerator.prepare(optimizer)


def products_on(accelerator: Accelerator) -> torch.dtype | None:
    """Return the dtype of Muon's products: bf16 where the network trains in bf16 on CUDA (a CPU is slower in bf16); None: the weights'."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cuda" else None


def take_step(accelerator: Accelerator, state: PriorState, loader: CodeLoader, config: Stage2, step: int) -> tuple[Tensor, Tensor]:
    """Take one training step: forward, loss, backward, clip, optimizer step, weight average.

    Returns: this rank's loss (), nats per token, and the norm () of the gradient over all ranks before clipping.
    """
    model, optimizer = state.model, state.optimizer
    step_loss = torch.zeros((), device=accelerator.device)
    set_learning_rate(optimizer, scheduled_rate(config, step))
    for micro_step in range(config.accumulation):
        batch = loader.batch(step, micro_step)
        seed_layers(config.seed, step, micro_step, accelerator.process_index)
        with nullcontext() if micro_step + 1 == config.accumulation else accelerator.no_sync(model):
            loss = model(*batch) / config.accumulation
            accelerator.backward(loss)
        step_loss += loss.detach()
    norm = clip_(accelerator, model, config.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    state.average.update_()
    return step_loss, norm
