"""Device helpers: explicit indices, per-thread current device, pinned memory, memory layout, CPU fallback for float64.

Uses `torch.accelerator`, so it covers CUDA, MPS and XPU.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

_CPU = torch.device("cpu")
# Device types that share the host's memory.
_SHARING_MEMORY = ("cpu", "mps")
_WITH_FLOAT64 = ("cpu", "cuda", "meta")


def on_accelerator(device: torch.device) -> bool:
    """Whether the device is an accelerator: neither a CPU nor `meta`."""
    return device.type not in ("cpu", "meta")


def channels_last_on_accelerator(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in channels-last layout, the fastest for convolutions on an accelerator; unchanged on a CPU."""
    return images.contiguous(memory_format=torch.channels_last) if on_accelerator(images.device) else images


def numbered(device: torch.device) -> torch.device:
    """The device with an explicit index: plain `cuda` means this thread's current GPU, which differs between threads."""
    if device.type == "cpu" or device.index is not None:
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())


def set_current_device(device: torch.device) -> None:
    """Make `device` the calling thread's current device; new threads start on device 0 and would allocate there."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)


def wait_for(device: torch.device) -> None:
    """Synchronize with the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy of a CPU tensor in pinned memory, for asynchronous transfer; the tensor itself where device and host share memory.

    In a new thread call `set_current_device` first.
    """
    return tensor if device.type in _SHARING_MEMORY else tensor.pin_memory()


@cache
def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices without it (MPS, some XPU)."""
    if device.type in _WITH_FLOAT64:
        return torch.float64
    try:
        torch.ones((), dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def float64_device(device: torch.device) -> torch.device:
    """Device for float64 work: this one if it has float64, otherwise the CPU."""
    # The first condition for torch.compile, which warns of cached functions.
    return device if device.type in _WITH_FLOAT64 or widest_float(device) == torch.float64 else _CPU


def as_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on its device if that has float64, otherwise on the CPU."""
    return tensor.to(float64_device(tensor.device)).double()  # move first: such a device cannot convert either


def float64_copy(model: Model) -> Model:
    """Copy of a model in float64, on its device if that has float64, otherwise on the CPU."""
    device = next(model.parameters()).device
    return copy.deepcopy(model).to(float64_device(device)).double()
