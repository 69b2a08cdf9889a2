"""Devices: by their number, of a thread, and what to do without float64 where a device has none.

All of it is said by `torch.accelerator`, so that it holds of any: CUDA's GPUs, Apple's, Intel's.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

_CPU = torch.device("cpu")
# They work in the memory of the host.
_SHARING_MEMORY = ("cpu", "mps")
_WITH_FLOAT64 = ("cpu", "cuda", "meta")


def numbered(device: torch.device) -> torch.device:
    """A device with its number: `cuda` is the GPU that this thread is at, which to another thread may be another one."""
    if device.type == "cpu" or device.index is not None:
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())


def work_on(device: torch.device) -> None:
    """Make a device the calling thread's own. A new thread is at the first device, of which every process would take memory by asking for
    anything.
    """
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor from which the device copies by itself while the host goes on. `work_on` comes first in a thread of one's own."""
    return tensor if device.type in _SHARING_MEMORY else tensor.pin_memory()


@cache
def widest_float(device: torch.device) -> torch.dtype:
    """float64; float32 of a device that has none: Apple's, and some of Intel's."""
    if device.type in _WITH_FLOAT64:
        return torch.float64
    try:
        torch.ones((), dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def float64_device(device: torch.device) -> torch.device:
    """Where to compute in float64 what comes from a device: there, or on the CPU."""
    return device if widest_float(device) == torch.float64 else _CPU


def as_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64: on its own device, or on the CPU if that has none."""
    return tensor.to(float64_device(tensor.device)).double()  # in this order: not even a copy may be asked of such a device


def float64_copy(model: Model) -> Model:
    """A copy of a model in float64: on its own device, or on the CPU if that has none."""
    device = next(model.parameters()).device
    return copy.deepcopy(model).to(float64_device(device)).double()
