"""AdamW with weight decay on matrices only; gradient clipping and optimizer states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.sharding import is_sharded, sharded_like

_WITH_KERNELS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
_FUSED_ON = ("cuda", "xpu", "mps")


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def fused_on(device: torch.device) -> bool | None:
    """Return AdamW's `fused` for a device: True where the kernel exists; None (torch's default) on a CPU, where it rounds differently."""
    return True if device.type in _FUSED_ON else None


def adamw(model: nn.Module, lr: float, weight_decay: float, beta2: float, fused: bool | None = None) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov & Hutter 2019) that decays kernels and matrices; not biases, gains, embeddings, codebooks.

    `fused`: see `fused_on`.
    """
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, _WITH_KERNELS)}
    parameters = trainable(model)
    groups = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=fused)


def clip_(accelerator: Accelerator, model: nn.Module, clip_norm: float) -> Tensor:
    """Clip a model's gradients, averaged over the ranks, to a norm of `clip_norm`; 0 = no clipping.

    Returns: their norm () before, not finite if one of them is not; but then 0 in fp16, whose scaler skips such steps.
    """
    norm: Any = accelerator.clip_grad_norm_(model.parameters(), clip_norm if clip_norm > 0 else float("inf"))
    total = (norm.full_tensor() if is_sharded(norm) else torch.as_tensor(norm, device=accelerator.device)).detach()
    return total if accelerator.scaler is None else total.nan_to_num(0.0, 0.0)


@torch.no_grad()
def forget_rows_(optimizer: torch.optim.Optimizer, parameter: Tensor, rows: Tensor) -> None:
    """Zero the moments of a parameter's rows where the mask (K,) is true: a replaced row has no momentum."""
    for moment in optimizer.state.get(parameter, {}).values():
        if moment.shape == parameter.shape:
            moment.masked_fill_(rows.view(-1, *[1] * (moment.dim() - 1)), 0)


class OptimizerState:
    """An optimizer's state by parameter name, for checkpoints; its tensors are sharded like the parameters."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the state of every trained parameter; before the first step zeros of the same shapes."""
        optimizer = self._optimizer
        if not optimizer.state:
            rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = 0.0
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
                for parameter in group["params"]:
                    optimizer.state[parameter]["step"].zero_()
        return {
            name: dict(optimizer.state[parameter]) for name, parameter in self._model.named_parameters() if parameter in optimizer.state
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load what `state_dict` returned, of whole tensors or of tensors sharded like the parameters."""
        parameters = dict(self._model.named_parameters())
        fused = {id(parameter): group["fused"] for group in self._optimizer.param_groups for parameter in group["params"]}
        for name, entries in state.items():
            parameter = parameters[name]
            moments = {key: entry for key, entry in entries.items() if entry.shape == parameter.shape}
            moved = {key: sharded_like(moment.to(parameter.device), parameter) for key, moment in moments.items()}
            if fused[id(parameter)] and "exp_avg_sq" in entries:  # the fused AdamW kernel reads the step count on the device
                moved["step"] = entries["step"].to(parameter.device)
            self._optimizer.state[parameter] = {**entries, **moved}
