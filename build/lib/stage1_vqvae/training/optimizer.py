"""AdamW with its weight decay where it belongs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_WITH_KERNELS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def adamw(model: nn.Module, lr: float, weight_decay: float, beta2: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) that decays kernels and matrices; not biases, gains, embeddings, codebooks."""
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, _WITH_KERNELS)}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2))


@torch.no_grad()
def forget_rows_(optimizer: torch.optim.Optimizer, parameter: Tensor, rows: Tensor) -> None:
    """Zero the moments of a parameter's rows (a mask or indices): what moved elsewhere has no momentum."""
    for moment in optimizer.state.get(parameter, {}).values():
        if moment.shape == parameter.shape:
            moment[rows] = 0
