"""Muon: an optimizer that orthogonalises the updates of hidden matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.optimizer import adamw
from training.sharding import is_sharded, local_tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Momentum, and the learning rate as a multiple of AdamW's: Muon's updates have unit singular values, and so much smaller entries than
# AdamW's, which are of order 1.
_MOMENTUM, _RATE = 0.95, 10.0


class Muon(torch.optim.AdamW):
    """Muon for hidden matrices: updates are momentum with all singular values set to about 1. AdamW for all other parameters.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". A group with `matrices` m holds weights of m
    square or rectangular matrices stacked along rows.
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
        """Muon over parameter groups.

        Args:
            params: parameter groups; those with `matrices` take Muon's steps, all others AdamW's.
            lr: AdamW's learning rate; Muon's is ten times as high.
            betas: passed to AdamW.
            fused: passed to AdamW.
            products: dtype of the Newton-Schulz products, e.g. torch.bfloat16 (Jordan's choice); None: the weights' dtype, which is
                fastest on most CPUs. Moving averages, norms and weights keep the weights' dtype.
            replicated: whether all ranks hold the same weights and gradients; each rank then orthogonalises its share of the matrices,
                followed by an all-gather. (Sharded weights, DTensors, are always divided among the ranks.)
        """
        super().__init__(params, lr=lr, betas=betas, fused=fused)
        # Fused AdamW can itself skip an fp16 step with non-finite gradients; Muon's part cannot, so the gradient scaler must skip it.
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
        for shape, same_shape in by_shape.items():
            rows = shape[0] // group["matrices"]
            rate = group["lr"] * _RATE * max(1, rows / shape[1]) ** 0.5
            updates = self._orthogonalise(torch.stack(self._nesterov_momentum(same_shape)), same_shape[0], rows)
            shards = [local_tensor(weight) for weight in same_shape]
            torch._foreach_mul_(shards, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(shards, list(updates), alpha=-rate)

    def _orthogonalise(self, weights: Tensor, like: Tensor, rows: int) -> Tensor:
        """Orthogonalise stacked weights (N, R, c), each a column of `rows`-high matrices; `like` is one of the parameters."""
        if is_sharded(like):
            return _orthogonalise_sharded(weights, like, rows, self._products)
        orthogonalise = _orthogonalise_replicated if self._replicated else _orthogonalise_stacked
        return orthogonalise(weights, rows, self._products)

    def _nesterov_momentum(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Nesterov momentum: the moving averages after one more step of the same gradients; this rank's shards."""
        for weight in weights:
            if not self.state[weight]:
                # AdamW expects `step` in every state.
                self.state[weight].update(step=torch.zeros(()), exp_avg=torch.zeros_like(weight))
            self.state[weight]["step"] += 1
        averages = [local_tensor(self.state[weight]["exp_avg"]) for weight in weights]
        gradients = [local_tensor(weight.grad) for weight in weights if weight.grad is not None]
        for weight in weights:
            weight.grad = None  # so that AdamW's step skips it
        torch._foreach_lerp_(averages, gradients, 1 - _MOMENTUM)
        return list(torch._foreach_lerp(gradients, averages, _MOMENTUM))


def orthogonalised(matrices: Tensor, products: torch.dtype | None = None) -> Tensor:
    """Orthogonalise matrices (N, r, c): same singular vectors, all singular values brought to between about 0.7 and 1.2.

    Five steps of the quintic Newton-Schulz iteration with Muon's coefficients, which raise small singular values fastest.
    `products`: dtype of the products and of the result; None: the matrices' own.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = (x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]).to(products or x.dtype)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide else x.mT


def _orthogonalise_stacked(weights: Tensor, rows: int, products: torch.dtype | None) -> Tensor:
    """Orthogonalise weights (N, R, c), each a column of `rows`-high matrices."""
    return orthogonalised(weights.view(-1, rows, weights.shape[2]), products).reshape(weights.shape)


def _orthogonalise_replicated(weights: Tensor, rows: int, products: torch.dtype | None) -> Tensor:
    """Orthogonalise replicated weights: each rank does its share, then all-gather in the products' dtype."""
    matrices = weights.view(-1, rows, weights.shape[2])
    processes, rank = dist.get_world_size(), dist.get_rank()
    share = -(-len(matrices) // processes)  # the last ranks get fewer matrices, or none
    local = orthogonalised(matrices[rank * share : (rank + 1) * share], products)
    sent = local.new_zeros(share, *matrices.shape[1:])  # ranks with fewer matrices send zeros behind them
    sent[: len(local)] = local
    gathered = sent.new_empty(processes * share, *matrices.shape[1:])
    dist.all_gather_into_tensor(gathered, sent)
    return gathered[: len(matrices)].view(weights.shape)


def _orthogonalise_sharded(parts: Tensor, like: DTensor, rows: int, products: torch.dtype | None) -> Tensor:
    """Orthogonalise sharded weights, (N, own rows, c) on each rank, by two all-to-alls.

    The first gives each rank its share of the weights in full, the second returns the rows of the results. With P ranks, each computes
    and sends 1/P of what all weights would take.
    """
    mesh, columns = like.device_mesh, like.shape[1]
    processes, rank = mesh.size(), mesh.get_local_rank()
    a_process = -(-like.shape[0] // processes)  # torch.chunk's rule: the last ones may have fewer rows, or none
    heights = [max(0, min(a_process, like.shape[0] - number * a_process)) for number in range(processes)]
    counts = [len(range(number, len(parts), processes)) for number in range(processes)]
    given = [parts[number::processes] for number in range(processes)]
    taken = _exchanged(given, [(counts[rank], height, columns) for height in heights], mesh)
    updates = _orthogonalise_stacked(torch.cat(taken, 1), rows, products)
    back = _exchanged(list(updates.split(heights, 1)), [(count, heights[rank], columns) for count in counts], mesh)
    result = updates.new_empty(parts.shape)
    for number, piece in enumerate(back):
        result[number::processes] = piece
    return result


def _exchanged(given: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], mesh: Any) -> list[Tensor]:
    """What the processes give to this one, of those shapes, for what it gives to each of them."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    sent = torch.cat([tensor.flatten() for tensor in given])
    taken = sent.new_empty(sum(sizes))
    dist.all_to_all_single(taken, sent, sizes, [tensor.numel() for tensor in given], mesh.get_group())
    return [piece.view(shape) for piece, shape in zip(taken.split(sizes), shapes, strict=True)]


def muon(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    beta2: float,
    fused: bool | None = None,
    products: torch.dtype | None = None,
    replicated: bool = False,
    embedding_lr: float | None = None,
) -> Muon:
    """Muon for the linear maps of a model's layers, AdamW as in `adamw` for all else: embeddings, gains, and its `head`, the map to
    logits, which Muon's authors leave to AdamW. `products`, `replicated`: see `Muon`. `embedding_lr`: learning rate of embeddings and
    head; None: `lr`.
    """
    stacked: dict[int, list[Tensor]] = {}
    embeddings: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or "head" in name.split("."):
            embeddings.update(map(id, module.parameters(recurse=False)))
        elif isinstance(module, nn.Linear):
            # Of three maps in one, each is a matrix of its own.
            stacked.setdefault(3 if name.endswith("qkv") else 1, []).append(module.weight)
    hidden = {id(weight) for weights in stacked.values() for weight in weights}
    groups: list[dict[str, Any]] = []
    for group in adamw(model, lr, weight_decay, beta2).param_groups:
        others = [weight for weight in group["params"] if id(weight) not in hidden]
        for of_embeddings, rate in ((False, lr), (True, lr if embedding_lr is None else embedding_lr)):
            params = [weight for weight in others if (id(weight) in embeddings) == of_embeddings]
            groups.append({**group, "params": params, "lr": rate, "lr_multiple": rate / lr})
    groups += [{"params": weights, "weight_decay": weight_decay, "matrices": count} for count, weights in stacked.items()]
    return Muon(groups, lr=lr, betas=(0.9, beta2), fused=fused, products=products, replicated=replicated)
