"""Muon: steps of a network's hidden matrices with all singular values alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from stage1_vqvae.training.sharding import own_part

# Of the moving average of gradients, and the rate as a multiple of AdamW's: a step of unit singular values is a larger one than a step of
# unit entries divided by their spread.
_MOMENTUM, _RATE = 0.95, 10.0


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
            rate = group["lr"] * _RATE * max(1, rows / shape[1]) ** 0.5
            like = alike[0][0]
            updates = _orthogonalised_in_turn(ahead, like, rows) if isinstance(like, DTensor) else _orthogonalised_by_rows(ahead, rows)
            for (weight, _), update in zip(alike, updates, strict=True):
                own_part(weight).mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _looked_ahead(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """The gradient's moving average as it would be after another such gradient (Nesterov): this process's part of it."""
        state = self.state[weight]
        if not state:
            # AdamW expects a step wherever there is a state.
            state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(weight)
        state["step"] += 1
        average, new = own_part(state["exp_avg"]), own_part(gradient)
        return new.lerp(average.lerp_(new, 1 - _MOMENTUM), _MOMENTUM)


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


def _orthogonalised_by_rows(weights: Tensor, rows: int) -> Tensor:
    """Weights (N, R, c) of matrices of so many rows, one above another."""
    return orthogonalised(weights.view(-1, rows, weights.shape[2])).view(weights.shape)


def _orthogonalised_in_turn(parts: Tensor, like: DTensor, rows: int) -> Tensor:
    """The same of weights of which each process has some rows, (N, own rows, c): every process gets its share of the weights whole, and
    sends the others their rows of what becomes of them. A process computes and sends an N-th part of what all weights would take.
    """
    mesh, columns = like.device_mesh, like.shape[1]
    processes, rank = mesh.size(), mesh.get_local_rank()
    a_process = -(-like.shape[0] // processes)  # torch.chunk's rule: the last ones may have fewer rows, or none
    heights = [max(0, min(a_process, like.shape[0] - number * a_process)) for number in range(processes)]
    counts = [len(range(number, len(parts), processes)) for number in range(processes)]
    given = [parts[number::processes] for number in range(processes)]
    taken = _exchanged(given, [(counts[rank], height, columns) for height in heights], mesh)
    updates = _orthogonalised_by_rows(torch.cat(taken, 1), rows)
    back = _exchanged(list(updates.split(heights, 1)), [(count, heights[rank], columns) for count in counts], mesh)
    found = torch.empty_like(parts)
    for number, piece in enumerate(back):
        found[number::processes] = piece
    return found


def _exchanged(given: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], mesh: Any) -> list[Tensor]:
    """What the processes give to this one, of those shapes, for what it gives to each of them."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    sent = torch.cat([tensor.flatten() for tensor in given])
    taken = sent.new_empty(sum(sizes))
    dist.all_to_all_single(taken, sent, sizes, [tensor.numel() for tensor in given], mesh.get_group())
    return [piece.view(shape) for piece, shape in zip(taken.split(sizes), shapes, strict=True)]
