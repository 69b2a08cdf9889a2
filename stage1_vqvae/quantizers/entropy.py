"""The entropy regulariser: each latent sure of its code, all codes used alike.

With p(k | z) = softmax_k(-|z - e_k|^2 / t): the mean entropy of p(. | z) less the entropy of its mean over the batch
(Jansen et al. 2020, equation 3; Yu et al. 2023, "Language Model Beats Diffusion", equation 5). The N x K
probabilities are never held whole: they are recomputed, block by block, in the backward pass.
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
    """Mean entropy of a latent's soft assignment less the entropy of the mean assignment, in nats.

    The second is not linear in the batch, so the mean assignment is first averaged over the processes, each of which
    holds as many rows, by a collective that passes gradients: all together then descend the global batch's entropy.
    (That of a micro-step, with accumulation, which is why a recipe may not have both.)

    Args:
        rows: latents (N, d).
        vectors: of the codes (K, d).
        temperature: t, in squared units of the latents.
    """
    mean_assignment, mean_entropy = _SoftAssignment.apply(rows, vectors, temperature)
    mean_assignment = average_over_ranks(mean_assignment)
    # A code so far from all latents that its share is zero has an entropy of infinite slope; nothing may be told to reach it.
    logarithm = mean_assignment.clamp(min=torch.finfo(rows.dtype).tiny).log()
    return mean_entropy + (mean_assignment * logarithm).sum()


def average_over_ranks(tensor: Tensor) -> Tensor:
    """The mean over the processes, with gradients; as given on one process. All of them must call it."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    return _SumOverProcesses.apply(tensor) / dist.get_world_size()


class _SumOverProcesses(torch.autograd.Function):
    """Each process's term reaches every process's sum, so its gradient is the sum of theirs."""

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
    """rows (N, d), vectors (K, d) -> the mean over rows of p, (K,), and of p's entropy; zeros without rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, vectors: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, vectors)
        ctx.temperature = temperature
        return _soft_assignment(rows, vectors, temperature)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_assignment: Tensor, to_entropy: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, vectors = ctx.saved_tensors
        gradients = _soft_assignment_gradients(rows, vectors, ctx.temperature, to_assignment, to_entropy, ctx.needs_input_grad[1])
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
    "two_stage::soft_assignment_gradients(Tensor rows, Tensor vectors, float temperature, Tensor to_assignment, Tensor to_entropy, "
    "bool learned) -> (Tensor, Tensor)",
    fake=lambda rows, vectors, *_: (torch.empty_like(rows), torch.empty_like(vectors)),
)
def _soft_assignment_gradients(
    rows: Tensor, vectors: Tensor, temperature: float, to_assignment: Tensor, to_entropy: Tensor, learned: bool
) -> tuple[Tensor, Tensor]:
    """Gradients at rows and vectors, given those at both results of `_soft_assignment`; zeros at vectors unless `learned`."""
    to_rows, to_vectors = torch.empty_like(rows), torch.zeros_like(vectors)
    size, count = block_rows(vectors), max(1, len(rows))
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        log_p = _log_assignment(block, vectors, temperature)
        p = log_p.exp()
        to_p = to_assignment - to_entropy * (log_p + 1)
        # Backward of the softmax, times the factor 2 / t from the distances.
        to_logits = (p * (to_p - (p * to_p).sum(1, keepdim=True))).mul_(2 / (temperature * count))
        torch.mm(to_logits, vectors, out=to_rows[start : start + size])
        if learned:
            to_vectors += to_logits.T @ block - vectors * to_logits.sum(0)[:, None]
    # The gradients at a row's logits sum to zero, so the |z|^2 term contributes nothing.
    return to_rows, to_vectors


def _log_assignment(rows: Tensor, vectors: Tensor, temperature: float) -> Tensor:
    """log p(k | z), (N, K); |z|^2 is the same for all k and left out."""
    with ieee_float32(rows.device):  # a small temperature magnifies what TF32 would round off
        logits = torch.addmm(vectors.square().sum(1), rows, vectors.T, alpha=-2).mul_(-1 / temperature)
    return logits.log_softmax(1)
