"""Gradient estimators: how the decoder's gradient at a code's vector q reaches the latent z.

All of them return q to the last bit, so that training decodes exactly what the codes decode to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# Lower bound of |z| in a divisor: a latent near the origin must not dominate the step's gradient.
_SMALLEST_NORM = 1e-6

Estimator = Callable[[Tensor, Tensor], Tensor]
"""From latents z and their codes' vectors q, rows (N, D) both, to q with a gradient path to z."""


def straight_through(z: Tensor, q: Tensor) -> Tensor:
    """Return q and pass its gradient to z unchanged (Bengio et al. 2013; van den Oord et al. 2017, section 3.2)."""
    return q + (z - z.detach())


def rotation(z: Tensor, q: Tensor) -> Tensor:
    """Return q and pass its gradient to z as if q were (|q| / |z|) R z, with R, the rotation of z onto q, held constant.

    Fifty et al. 2024, "Restructuring Vector Quantization with the Rotation Trick", equation 4.
    """
    with torch.no_grad():
        z_unit, q_unit = F.normalize(z, dim=-1), F.normalize(q, dim=-1)
        middle = F.normalize(z_unit + q_unit, dim=-1)
        scale = q.norm(dim=-1, keepdim=True) / z.norm(dim=-1, keepdim=True).clamp(min=_SMALLEST_NORM)
    scaled = scale * z
    # R = I - 2 m m' + 2 q^ z^'
    rotated = 2 * q_unit * _dot(z_unit, scaled) - 2 * middle * _dot(middle, scaled) + scaled
    return straight_through(rotated, q)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


ESTIMATORS: dict[str, Estimator] = {"straight_through": straight_through, "rotation": rotation}
