"""Gradient estimators: what the decoder's gradient at the code's vector q tells the encoder at z.

Each keeps the value of q to the last bit, so that what is decoded in training is what the codes decode to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# A latent at the origin has no direction to turn from; its gradient must not become the whole step's.
_LEAST_NORM = 1e-6

Estimator = Callable[[Tensor, Tensor], Tensor]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, q: Tensor) -> Tensor:
        return q.view_as(q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, q: Tensor) -> Tensor:
        ctx.save_for_backward(z, q)
        return q.view_as(q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        z, q = ctx.saved_tensors
        z_unit, q_unit = F.normalize(z, dim=-1), F.normalize(q, dim=-1)
        middle = F.normalize(z_unit + q_unit, dim=-1)
        # R = I - 2 m m' + 2 q^ z^' turns z^ to q^; its transpose goes back.
        turned = gradient - 2 * middle * _dot(middle, gradient) + 2 * z_unit * _dot(q_unit, gradient)
        scale = q.norm(dim=-1, keepdim=True) / z.norm(dim=-1, keepdim=True).clamp(min=_LEAST_NORM)
        return scale * turned, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def straight_through(z: Tensor, q: Tensor) -> Tensor:
    """q, whose gradient passes to z unchanged (Bengio et al. 2013; van den Oord et al. 2017, section 3.2). Rows (N, D) both."""
    return _StraightThrough.apply(z, q)


def rotation(z: Tensor, q: Tensor) -> Tensor:
    """q, whose gradient passes to z as if q = (|q| / |z|) R z with R, the rotation of z onto q, held constant.

    Fifty et al. 2024, "Restructuring Vector Quantization with the Rotation Trick", equation 4. Rows (N, D) both.
    """
    return _Rotation.apply(z, q)


ESTIMATORS: dict[str, Estimator] = {"straight_through": straight_through, "rotation": rotation}
