"""What a command computes in: the precision of its networks, and what float32 is on a GPU; and the places that are exact in any case."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

_MATMUL = torch.backends.cuda.matmul
_CONV: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
_CPU_MATMUL: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]

Float32 = Literal["tf32", "ieee"]
"""What a GPU's float32 matrix products and convolutions are computed in: TF32, which keeps 10 bits of a factor's 23, or all of them."""


class Precision(NamedTuple):
    """What a command computes in."""

    networks: str | None
    """What networks in training take under autocast, as Accelerate names it; None: what the launcher says."""
    float32: Float32 | None
    """What float32 is on the GPU; None: torch's defaults, of a device on which the two do not differ."""
    line: str | None
    """For the log: what was chosen, and how to choose otherwise; None: there was no choice."""


def resolve_precision(asked: str | None, launcher: str | None, device: str, bf16: bool) -> Precision:
    """The precision of a command.

    Args:
        asked: `compute.mixed_precision`.
        launcher: what `accelerate launch` handed on (ACCELERATE_MIXED_PRECISION). "no" is also what it hands on if nobody said anything, so
            that it counts as nothing.
        device: type of the device.
        bf16: whether the device computes in bf16. The first GPUs with it (NVIDIA's sm_80) were the first with TF32.
    """
    if device != "cuda":
        return Precision(asked, None, None)
    change = "--compute.mixed_precision"
    if asked == "no":
        return Precision("no", "ieee", f"precision: full float32, as asked; {change} {'bf16' if bf16 else 'fp16'} is faster")
    networks = asked or (None if launcher == "no" else launcher) or ("bf16" if bf16 else "no")
    if not bf16:
        chosen, other = ("float32", "fp16 is faster") if networks == "no" else (f"training in {networks}", "no is exact")
        return Precision(networks, None, f"precision: {chosen}, on a GPU without bf16 and TF32; {change} {other}")
    rest = "other float32 products in TF32, nearest-code search and likelihoods in full float32"
    return Precision(networks, "tf32", f"precision: training in {networks}, {rest}; {change} no is exact")


def set_float32(kind: Float32) -> None:
    """Let this process's float32 matrix products and convolutions on CUDA be computed so from here on."""
    on_cpu = _CPU_MATMUL.fp32_precision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch 2.9 calls it old
        # torch.compile still asks by this name, and raises where only the newer ones below were set (pytorch issue 166387).
        torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    _CPU_MATMUL.fp32_precision = on_cpu  # it names the CPU's products too, which stay exact
    _MATMUL.fp32_precision = kind
    _CONV.fp32_precision = kind  # torch's own default is TF32


def full_precision(x: Tensor) -> Tensor:
    """float32, whatever autocast made of it; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def ieee_float32(device: torch.device) -> Iterator[None]:
    """Full float32 matrix products and convolutions on CUDA, even where TF32 is allowed."""
    if device.type != "cuda":
        yield
        return
    before = _MATMUL.fp32_precision, _CONV.fp32_precision
    _MATMUL.fp32_precision = _CONV.fp32_precision = "ieee"
    try:
        yield
    finally:
        _MATMUL.fp32_precision, _CONV.fp32_precision = before
