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
    square or oblong matrices one above another.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        fused: bool | None = None,
        products: torch.dtype | None = None,
        replicated: bool = False,
    ) -> None:
        """Args:
        params: groups of parameters.
        lr: AdamW's rate; matrices have ten times that.
        betas: AdamW's.
        fused: AdamW's.
        products: precision of the orthogonalisation's matrix products, such as torch.bfloat16, Jordan's own; None: the weights', as most
            CPUs are fastest with. Moving averages, norms and weights keep theirs.
        replicated: whether all processes hold the same weights and gradients: each then orthogonalises its share of the matrices, and sends
            it to the others. (Of sharded weights, DTensors, each does its share in any case.)
        """
        super().__init__(params, lr=lr, betas=betas, fused=fused)
        # AdamW's kernel can itself leave out a step of fp16 whose gradients are not finite; matrices cannot: the scaler leaves it out.
        self._step_supports_amp_scaling = False
        self._products, self._replicated = products, replicated

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            if "matrices" in group:
                self._step_of_matrices(group)
        return super().step(closure)

    def _step_of_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for weight in group["params"]:
            if weight.grad is not None:
                by_shape.setdefault(weight.shape, []).append(weight)
        for shape, alike in by_shape.items():
            rows = shape[0] // group["matrices"]
            rate = group["lr"] * _RATE * max(1, rows / shape[1]) ** 0.5
            updates = self._orthogonalised(torch.stack(self._looked_ahead(alike)), alike[0], rows)
            own = [own_part(weight) for weight in alike]
            torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(own, list(updates), alpha=-rate)

    def _orthogonalised(self, weights: Tensor, like: Tensor, rows: int) -> Tensor:
        """Weights (N, R, c) of matrices of so many rows, one above another, orthogonalised; of parameters like that one."""
        if isinstance(like, DTensor):
            return _orthogonalised_in_turn(weights, like, rows, self._products)
        by_rows = _orthogonalised_together if self._replicated else _orthogonalised_by_rows
        return by_rows(weights, rows, self._products)

    def _looked_ahead(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The gradients' moving averages as they would be after another such gradient (Nesterov): this process's part of them."""
        for weight in weights:
            if not self.state[weight]:
                # AdamW expects a step wherever there is a state.
                self.state[weight].update(step=torch.zeros(()), exp_avg=torch.zeros_like(weight))
            self.state[weight]["step"] += 1
        averages = [own_part(self.state[weight]["exp_avg"]) for weight in weights]
        gradients = [own_part(weight.grad) for weight in weights if weight.grad is not None]
        for weight in weights:
            weight.grad = None  # AdamW's own step passes over it
        torch._foreach_lerp_(averages, gradients, 1 - _MOMENTUM)
        return list(torch._foreach_lerp(gradients, averages, _MOMENTUM))


def orthogonalised(matrices: Tensor, products: torch.dtype | None = None) -> Tensor:
    """Matrices (N, r, c) with their singular vectors and all singular values brought to between about 0.7 and 1.2, in the precision of the
    `products`; None: the matrices' own.

    Five steps of the quintic Newton-Schulz iteration with Muon's coefficients, which rise fastest from small singular values.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = (x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]).to(products or x.dtype)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide else x.mT


def _orthogonalised_by_rows(weights: Tensor, rows: int, products: torch.dtype | None) -> Tensor:
    """Weights (N, R, c) of matrices of so many rows, one above another."""
    return orthogonalised(weights.view(-1, rows, weights.shape[2]), products).reshape(weights.shape)


def _orthogonalised_together(weights: Tensor, rows: int, products: torch.dtype | None) -> Tensor:
    """The same of weights that all processes hold: each does its share of the matrices, and all get all. What is sent is rounded to the
    products' precision already.
    """
    matrices = weights.view(-1, rows, weights.shape[2])
    processes, rank = dist.get_world_size(), dist.get_rank()
    share = -(-len(matrices) // processes)  # of the last ones less, or nothing
    own = orthogonalised(matrices[rank * share : (rank + 1) * share], products)
    sent = own.new_zeros(share, *matrices.shape[1:])
    sent[: len(own)] = own
    found = sent.new_empty(processes * share, *matrices.shape[1:])
    dist.all_gather_into_tensor(found, sent)
    return found[: len(matrices)].view(weights.shape)


def _orthogonalised_in_turn(parts: Tensor, like: DTensor, rows: int, products: torch.dtype | None) -> Tensor:
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
    updates = _orthogonalised_by_rows(torch.cat(taken, 1), rows, products)
    back = _exchanged(list(updates.split(heights, 1)), [(count, heights[rank], columns) for count in counts], mesh)
    found = updates.new_empty(parts.shape)
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
