"""AdamW with its weight decay where it belongs, and Muon for a network's hidden matrices."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

# Of Muon's moving average of gradients, and its rate as a multiple of AdamW's: a step of unit singular values is a larger one
# than a step of unit entries divided by their spread.
_MOMENTUM, _MUON_RATE = 0.95, 10.0
_WITH_KERNELS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: nn.Module, lr: float, weight_decay: float, beta2: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) that decays kernels and matrices; not biases, gains, embeddings, codebooks."""
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, _WITH_KERNELS)}
    parameters = trainable(model)
    groups = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2))


def muon(model: nn.Module, lr: float, weight_decay: float, beta2: float) -> Muon:
    """Muon for the linear maps of a model's layers, AdamW as in `adamw` for all else: embeddings, gains, and its `head`, the map to
    logits, which Muon's authors leave to AdamW.
    """
    fused: dict[int, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "head" not in name.split("."):
            # Of three maps in one, each is a matrix of its own.
            fused.setdefault(3 if name.endswith("qkv") else 1, []).append(module.weight)
    hidden = {id(weight) for weights in fused.values() for weight in weights}
    others = adamw(model, lr, weight_decay, beta2).param_groups
    groups = [{**group, "params": [weight for weight in group["params"] if id(weight) not in hidden]} for group in others]
    groups += [{"params": weights, "weight_decay": weight_decay, "matrices": count} for count, weights in fused.items()]
    return Muon(groups, lr=lr, betas=(0.9, beta2))


class Muon(torch.optim.AdamW):
    """Steps of hidden matrices are their gradients' moving averages with all singular values set to about 1; AdamW for the rest.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". A group with `matrices` m holds weights of m
    square or oblong matrices one above another. In the weights' own precision, unlike torch.optim.Muon, whose bfloat16 products
    have no kernel on most CPUs.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            if "matrices" in group:
                self._step_of_matrices(group)
        return super().step(closure)

    def _step_of_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for weight in group["params"]:
            if weight.grad is not None:
                by_shape.setdefault(weight.shape, []).append((weight, weight.grad))
                weight.grad = None  # AdamW's own step passes over it
        for shape, alike in by_shape.items():
            ahead = torch.stack([self._looked_ahead(*pair) for pair in alike])
            rows = shape[0] // group["matrices"]
            rate = group["lr"] * _MUON_RATE * max(1, rows / shape[1]) ** 0.5
            updates = orthogonalised(ahead.view(-1, rows, shape[1])).view(ahead.shape)
            for (weight, _), update in zip(alike, updates, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _looked_ahead(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """The gradient's moving average as it would be after another such gradient (Nesterov)."""
        state = self.state[weight]
        if not state:
            # AdamW expects a step wherever there is a state.
            state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(weight)
        state["step"] += 1
        return gradient.lerp(state["exp_avg"].lerp_(gradient, 1 - _MOMENTUM), _MOMENTUM)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices (N, r, c) with their singular vectors and all singular values brought to between about 0.7 and 1.2.

    Five steps of the quintic Newton-Schulz iteration with Muon's coefficients, which rise fastest from small singular values.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide else x.mT


def clip_(accelerator: Accelerator, model: nn.Module, clip_norm: float) -> Tensor:
    """Scale a model's gradients, averaged over the processes, down to a norm of `clip_norm`, where it is larger; 0 = leave them.

    Returns their norm before (), which is not finite if one of them is not; but 0 in fp16, whose scaler leaves out steps of such gradients.
    """
    norm: Any = accelerator.clip_grad_norm_(model.parameters(), clip_norm if clip_norm > 0 else float("inf"))
    found = torch.as_tensor(norm, device=accelerator.device).detach()
    return found if accelerator.scaler is None else found.nan_to_num(0.0, 0.0)


@torch.no_grad()
def forget_rows_(optimizer: torch.optim.Optimizer, parameter: Tensor, rows: Tensor) -> None:
    """Zero the moments of a parameter's rows (a mask or indices): what moved elsewhere has no momentum."""
    for moment in optimizer.state.get(parameter, {}).values():
        if moment.shape == parameter.shape:
            moment[rows] = 0
