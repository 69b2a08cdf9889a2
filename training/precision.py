"""Numeric precision: mixed precision of the networks, TF32, and code that always uses full float32."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

_MATMUL = torch.backends.cuda.matmul
_CONV: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
_CPU_MATMUL: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]

Float32 = Literal["tf32", "ieee"]
"""Precision of float32 matrix products and convolutions on CUDA: TF32 (10 mantissa bits) or IEEE (23)."""


class Precision(NamedTuple):
    """Precision settings of a command."""

    networks: str | None
    """Accelerate's `mixed_precision` for training; None: the launcher's."""
    float32: Float32 | None
    """float32 mode on the GPU; None: leave torch's default (the GPU has no TF32)."""
    line: str | None
    """Log line naming the choice and the option that changes it; None: no choice."""


def resolve_precision(mixed_precision: str | None, launcher: str | None, device: str, bf16: bool) -> Precision:
    """Resolve the precision settings of a command.

    Args:
        mixed_precision: `compute.mixed_precision`.
        launcher: ACCELERATE_MIXED_PRECISION, as `accelerate launch` sets it. "no" counts as unset, since it is also the launcher's default.
        device: device type.
        bf16: whether the device computes in bf16. The first GPUs with bf16 (NVIDIA's sm_80) were also the first with TF32.
    """
    if device != "cuda":
        return Precision(mixed_precision, None, None)
    change = "--compute.mixed_precision"
    if mixed_precision == "no":
        return Precision("no", "ieee", f"precision: full float32; {change} {'bf16' if bf16 else 'fp16'} is faster")
    networks = mixed_precision or (None if launcher == "no" else launcher) or ("bf16" if bf16 else "no")
    if not bf16:
        chosen, other = ("float32", "fp16 is faster") if networks == "no" else (f"training in {networks}", "no is exact")
        return Precision(networks, None, f"precision: {chosen}, on a GPU without bf16 and TF32; {change} {other}")
    rest = "other float32 products in TF32, nearest-code search and likelihoods in full float32"
    return Precision(networks, "tf32", f"precision: training in {networks}, {rest}; {change} no is exact")


def set_float32(kind: Float32) -> None:
    """Set the precision of float32 matrix products and convolutions on CUDA for this process."""
    cpu_precision = _CPU_MATMUL.fp32_precision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # deprecated in torch 2.9
        # torch.compile still reads this setting, and raises if only the newer ones below were set (pytorch issue 166387).
        torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    _CPU_MATMUL.fp32_precision = cpu_precision  # the line above also sets the CPU's products, which stay exact
    _MATMUL.fp32_precision = kind
    _CONV.fp32_precision = kind  # torch's own default is TF32


class AutocastTarget(nn.Module):
    """Wrapper for Accelerate to prepare instead of the model: it patches this `forward` for autocast.

    The model's own `forward`, which validation calls and weight averages copy, stays in the weights' precision.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        """Run the model's forward pass."""
        return self.model(*inputs)


def full_precision(x: Tensor) -> Tensor:
    """Convert x to float32 if it is narrower; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _IeeeBlocks:
    """Count of active full-float32 blocks in all threads, since torch's settings are per process."""

    def __init__(self) -> None:
        self._lock, self._count = threading.Lock(), 0
        self._outside: tuple[str, str] = ("none", "none")

    def enter(self) -> None:
        with self._lock:
            if self._count == 0:
                self._outside = _MATMUL.fp32_precision, _CONV.fp32_precision
                _MATMUL.fp32_precision = _CONV.fp32_precision = "ieee"
            self._count += 1

    def leave(self) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0:
                _MATMUL.fp32_precision, _CONV.fp32_precision = self._outside


_BLOCKS = _IeeeBlocks()


@contextmanager
def ieee_float32(device: torch.device) -> Iterator[None]:
    """Use full float32 for matrix products and convolutions on CUDA, even where TF32 is allowed; affects all threads meanwhile."""
    if device.type != "cuda":
        yield
        return
    _BLOCKS.enter()
    try:
        yield
    finally:
        _BLOCKS.leave()
