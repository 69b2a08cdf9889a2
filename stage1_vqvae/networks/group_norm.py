"""Group normalisation with SiLU for channels-last feature maps, and the convolution after it.

Wu & He 2018, "Group Normalization". On a GPU torch's operator supports channels-first layout only, and under autocast float32 only: it
transposes and casts its input, and keeps float32 copies of input and output for the backward pass. Here statistics are float32, feature
maps keep their dtype and layout, and the backward pass needs only the input and each group's mean and reciprocal standard deviation. The
Triton kernels are in group_norm_kernels.py; the PyTorch versions below are their fallback and reference. CPUs use torch's own operator,
which is fast there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from training.devices import on_accelerator
from training.kernels import Kernel
from training.precision import full_precision


class GroupNorm(nn.GroupNorm):
    """Group normalisation of (B, C, H, W), followed by SiLU if `silu`. On an accelerator the result is channels last in memory."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-6, silu: bool = False) -> None:
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape; on an accelerator in x's dtype, also under autocast."""
        if on_accelerator(x.device):
            return group_norm(x, self.weight, self.bias, self.num_groups, self.eps, self.silu)[0]
        normed = super().forward(x)
        # In place, autograd would keep a copy of what it needs of the input.
        return F.silu(normed, inplace=not normed.requires_grad) if self.silu else normed


def normed_convolution(x: Tensor, norm: GroupNorm, convolution: nn.Conv2d) -> Tensor:
    """convolution(norm(x)); on an accelerator only x is kept, and the convolution's input is recomputed in the backward pass.

    The recomputation costs one extra write.
    """
    if not on_accelerator(x.device):
        return convolution(norm(x))
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and x.dtype != torch.float64 else x.dtype
    weight, bias = convolution.weight, convolution.bias
    assert bias is not None
    if weight.dtype != dtype:  # the casts of autocast and the layout change of cuDNN, in one pass
        weight, bias = weight.to(dtype=dtype, memory_format=torch.channels_last), bias.to(dtype)
    geometry = (convolution.stride, convolution.padding, convolution.dilation)
    return _NormedConvolution.apply(x.to(dtype), norm.weight, norm.bias, norm.num_groups, norm.eps, norm.silu, weight, bias, geometry)


class _NormedConvolution(torch.autograd.Function):
    """Convolution that recomputes its normalised input in the backward pass: half the activation memory of a residual block."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        groups: int,
        eps: float,
        silu: bool,
        weight: Tensor,
        bias: Tensor,
        geometry: tuple[tuple[int, ...], ...],
    ) -> Tensor:
        normed, mean, rstd = group_norm(x, norm_weight, norm_bias, groups, eps, silu)
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, weight)
        ctx.silu, ctx.geometry = silu, geometry
        return torch.ops.aten.convolution(normed, weight, bias, *geometry, False, (0, 0), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, mean, rstd, weight = ctx.saved_tensors
        rest = ([weight.shape[0]], *ctx.geometry, False, (0, 0), 1)
        # The input gradient depends on the input's shape only, and x has that shape.
        grad_normed = torch.ops.aten.convolution_backward(gradient, x, weight, *rest, (True, False, False))[0]
        grad_x, grad_norm_weight, grad_norm_bias, normed = group_norm_backward(grad_normed, x, norm_weight, norm_bias, mean, rstd, ctx.silu)
        del grad_normed
        _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(gradient, normed, weight, *rest, (False, True, True))
        return grad_x, grad_norm_weight, grad_norm_bias, None, None, None, grad_weight, grad_bias, None


@torch.library.custom_op("two_stage::group_norm", mutates_args=())
def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each group of channels of each image by its mean and variance, then scale, shift, and apply SiLU if `silu`.

    A custom operator, so torch.compile keeps it as one node. No double backward.

    Args:
        x: (B, C, H, W), float64 too.
        weight, bias: (C,).
        groups: a divisor of C.
        eps: added to the variance.
    Returns: y of x's shape and dtype, channels last in memory; mean and reciprocal deviation (B, groups), float32 at least.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    result = None
    if _use_kernel(_forward_kernel, x):
        result = _forward_kernel(x, weight, bias, groups, eps, silu)
    return plain_group_norm(x, weight, bias, groups, eps, silu) if result is None else result


@torch.library.custom_op("two_stage::group_norm_backward", mutates_args=())
def group_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients at x, weight and bias, given the gradient at `group_norm`'s y; and y, recomputed.

    Args:
        gradient: (B, C, H, W).
        mean, rstd: as `group_norm` returned them.
    """
    x, gradient = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, gradient))
    result = None
    if _use_kernel(_backward_kernel, x):
        result = _backward_kernel(gradient, x, weight, bias, mean, rstd, silu)
    return plain_group_norm_backward(gradient, x, weight, bias, mean, rstd, silu) if result is None else result


@group_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[0], groups, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x, memory_format=torch.channels_last), statistics, torch.empty_like(statistics)


@group_norm_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.channels_last)
    return torch.empty_like(y), torch.empty_like(weight), torch.empty_like(bias), y


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _, silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.silu = silu


def _backward(ctx: Any, gradient: Tensor, *_: object) -> tuple[Tensor | None, ...]:
    return (*group_norm_backward(gradient, *ctx.saved_tensors, ctx.silu)[:3], None, None, None)


group_norm.register_autograd(_backward, setup_context=_setup_context)


def plain_group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`group_norm` in PyTorch operators, without autograd."""
    rows = full_precision(_grouped(x, groups))
    variance, mean = torch.var_mean(rows, (1, 3), correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    y = (rows - mean).mul_(rstd).mul_(weight.view(groups, -1)).add_(bias.view(groups, -1))
    return _ungrouped(F.silu(y, inplace=True) if silu else y, x), mean[:, 0, :, 0].clone(), rstd[:, 0, :, 0].clone()


def plain_group_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`group_norm_backward` in PyTorch operators."""
    groups = mean.shape[1]
    mean, rstd = (statistic[:, None, :, None] for statistic in (mean, rstd))
    gain = weight.view(groups, -1)
    normed = (full_precision(_grouped(x, groups)) - mean).mul_(rstd)
    y = (normed * gain).add_(bias.view(groups, -1))
    grad_y = full_precision(_grouped(gradient, groups))
    if silu:
        grad_y = torch.ops.aten.silu_backward(grad_y, y)
        F.silu(y, inplace=True)
    y = _ungrouped(y, x)
    grad_bias, grad_weight = grad_y.sum((0, 1)), (grad_y * normed).sum((0, 1))
    grad_x = grad_y * gain
    mean_term, deviation_term = (term.mean((1, 3), keepdim=True) for term in (grad_x, grad_x * normed))
    grad_x = grad_x.sub_(mean_term).sub_(normed.mul_(deviation_term)).mul_(rstd)
    return _ungrouped(grad_x, x), grad_weight.flatten().to(weight), grad_bias.flatten().to(bias), y


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(B, C, H, W) as (B, H W, groups, C / groups), without a copy if channels are last in memory."""
    return x.movedim(1, -1).flatten(1, 2).unflatten(-1, (groups, -1))


def _ungrouped(rows: Tensor, like: Tensor) -> Tensor:
    """Inverse of `_grouped`, with the shape and dtype of `like`, channels last in memory."""
    batch, channels, height, width = like.shape
    return rows.to(like.dtype).view(batch, height, width, channels).movedim(-1, 1)


def _load_forward() -> Callable[..., Any]:
    from stage1_vqvae.networks.group_norm_kernels import launch_group_norm

    return launch_group_norm


def _load_backward() -> Callable[..., Any]:
    from stage1_vqvae.networks.group_norm_kernels import launch_group_norm_backward

    return launch_group_norm_backward


_forward_kernel = Kernel("group normalisation", _load_forward)
_backward_kernel = Kernel("the gradient of group normalisation", _load_backward)


def _use_kernel(kernel: Kernel, x: Tensor) -> bool:
    return x.dtype != torch.float64 and x.numel() > 0 and kernel.usable(x.device)
