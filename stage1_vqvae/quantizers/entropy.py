"""The entropy regulariser: confident assignments, evenly used codes.

With p(k | z) = softmax_k(-|z - e_k|^2 / t): the mean entropy of p(. | z) minus the entropy of its mean over the batch
(Jansen et al. 2020, equation 3; Yu et al. 2023, "Language Model Beats Diffusion", equation 5). The N x K probabilities are computed
block by block, and again in the backward pass, so memory does not grow with N x K. That is what the hand-written gradient is for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from stage1_vqvae.quantizers.search import block_rows
from training.kernels import operator
from training.precision import ieee_float32


def entropy_loss(rows: Tensor, vectors: Tensor, temperature: float) -> Tensor:
    """Compute the mean entropy of the latents' soft assignments minus the entropy of the mean assignment, in nats.

    The second entropy is not linear in the batch, so the mean assignment is averaged over ranks by a differentiable collective: the
    loss is that of the global batch. It cannot be summed over micro-steps, so recipes with accumulation are refused.

    Args:
        rows: latents (N, d).
        vectors: codebook (K, d).
        temperature: t, in squared units of the latents.
    """
    mean_assignment, mean_entropy = _SoftAssignment.apply(rows, vectors, temperature)
    mean_assignment = average_over_ranks(mean_assignment)
    # x log x has infinite slope at 0: a code too far from all latents must not get an infinite gradient.
    logarithm = mean_assignment.clamp(min=torch.finfo(rows.dtype).tiny).log()
    return mean_entropy + (mean_assignment * logarithm).sum()


def average_over_ranks(tensor: Tensor) -> Tensor:
    """Average over ranks, with gradients. A collective: all ranks must call it."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    return _SumOverProcesses.apply(tensor) / dist.get_world_size()


class _SumOverProcesses(torch.autograd.Function):
    """Differentiable all-reduce: each rank's tensor enters every rank's sum, so its gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class _SoftAssignment(torch.autograd.Function):
    """Rows (N, d) and vectors (K, d) to the means over rows of p, (K,), and of p's entropy; zeros for an empty batch."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, vectors: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, vectors)
        ctx.temperature = temperature
        return _soft_assignment(rows, vectors, temperature)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_assignment: Tensor, grad_entropy: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, vectors = ctx.saved_tensors
        gradients = _soft_assignment_gradients(rows, vectors, ctx.temperature, grad_assignment, grad_entropy, ctx.needs_input_grad[1])
        return *gradients, None


@operator(
    "two_stage::soft_assignment(Tensor rows, Tensor vectors, float temperature) -> (Tensor, Tensor)",
    fake=lambda rows, vectors, temperature: (vectors.new_empty(vectors.shape[0]), rows.new_empty(())),
)
def _soft_assignment(rows: Tensor, vectors: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    mean_assignment, mean_entropy = vectors.new_zeros(len(vectors)), rows.new_zeros(())
    for block in rows.split(block_rows(vectors)):
        log_p = _log_assignment(block, vectors, temperature)
        p = log_p.exp()
        mean_assignment += p.sum(0)
        mean_entropy -= p.mul_(log_p).sum()
    count = max(1, len(rows))
    return mean_assignment / count, mean_entropy / count


@operator(
    "two_stage::soft_assignment_gradients(Tensor rows, Tensor vectors, float temperature, Tensor grad_assignment, Tensor grad_entropy, "
    "bool learned) -> (Tensor, Tensor)",
    fake=lambda rows, vectors, *_: (torch.empty_like(rows), torch.empty_like(vectors)),
)
def _soft_assignment_gradients(
    rows: Tensor, vectors: Tensor, temperature: float, grad_assignment: Tensor, grad_entropy: Tensor, learned: bool
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `_soft_assignment` at rows and vectors; zeros at vectors unless `learned`."""
    grad_rows, grad_vectors = torch.empty_like(rows), torch.zeros_like(vectors)
    size, count = block_rows(vectors), max(1, len(rows))
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        log_p = _log_assignment(block, vectors, temperature)
        p = log_p.exp()
        grad_p = grad_assignment - grad_entropy * (log_p + 1)
        # Backward of the softmax, times the factor 2 / t from the distances.
        grad_logits = (p * (grad_p - (p * grad_p).sum(1, keepdim=True))).mul_(2 / (temperature * count))
        torch.mm(grad_logits, vectors, out=grad_rows[start : start + size])
        if learned:
            grad_vectors += grad_logits.T @ block - vectors * grad_logits.sum(0)[:, None]
    # The gradients at a row's logits sum to zero, so the |z|^2 term contributes nothing.
    return grad_rows, grad_vectors


def _log_assignment(rows: Tensor, vectors: Tensor, temperature: float) -> Tensor:
    """Compute log p(k | z), (N, K); |z|^2 is the same for all k and cancels."""
    with ieee_float32(rows.device):  # a small temperature would magnify TF32's rounding errors
        logits = torch.addmm(vectors.square().sum(1), rows, vectors.T, alpha=-2).mul_(-1 / temperature)
    return logits.log_softmax(1)
