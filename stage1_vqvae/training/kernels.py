"""Triton kernels, what serves in their place on machines where they cannot be launched, and operators that a compiler leaves whole.

Triton compiles a kernel at its first launch, for which it needs a C compiler and Python's headers; slim containers have neither. The
modules that hold kernels import Triton at their top, so they are imported on first use only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import wraps
from textwrap import shorten
from typing import Any, TypeVar

import torch
from torch._subclasses import FakeTensor

from configs.errors import say

# It comes with torch's CUDA builds.
_TRITON = importlib.util.find_spec("triton") is not None
# Characters of an error's text in a warning of one line; a compiler's command line alone has hundreds.
_LONGEST_REASON = 160


Function = TypeVar("Function", bound=Callable[..., Any])


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Function], Function]:
    """Decorator: make a function one operator of the graphs that `torch.compile` traces, which then has no break inside it.

    For what a compiler cannot follow (a kernel that may be given up, precisions that are set for a while) or should not copy into its
    graph (a loop over blocks). Gradients do not pass: call it without them, or inside an `autograd.Function`. Otherwise the function is
    called as it is, since an operator's dispatch takes some 25 us on a CPU.

    Args:
        schema: the operator's name and signature, as "two_stage::nearest_codes(Tensor vectors, Tensor codebook) -> Tensor".
        fake: takes the same arguments; returns empty tensors of the results' shapes, dtypes and devices.
    """
    name, parenthesis, signature = schema.partition("(")

    def decorate(function: Function) -> Function:
        registered = torch.library.custom_op(name, function, mutates_args=(), schema=parenthesis + signature)
        registered.register_fake(fake)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            # Of fake tensors, which have shapes and no data, a kernel could only be given up.
            traced = torch.compiler.is_compiling() or any(isinstance(argument, FakeTensor) for argument in arguments)
            return registered(*arguments) if traced else function(*arguments)

        return call  # type: ignore[return-value]

    return decorate


class Kernel:
    """A kernel that is given up at its first failed launch, with one line that says so.

    nearest = Kernel("the nearest-code search", _load_nearest)
    codes = nearest(vectors, codebook) if nearest.usable(vectors.device) else None
    if codes is None:
        codes = ...  # the plain lines
    """

    def __init__(self, name: str, load: Callable[[], Callable[..., Any]]) -> None:
        """`name`: for the line that is printed. `load`: imports and returns the function that launches the kernel."""
        self.name = name
        self._load = load
        self._launch: Callable[..., Any] | None = None
        self._failed = False

    def usable(self, device: torch.device) -> bool:
        """Whether a launch on that device is worth trying."""
        return device.type == "cuda" and _TRITON and not self._failed

    def __call__(self, *arguments: Any) -> Any | None:
        """The kernel's result; None if it cannot be launched on this machine.

        Errors: those of the GPU itself (out of memory, a broken context), for which plain lines would be no remedy.
        """
        try:
            if self._launch is None:
                self._launch = self._load()
            return self._launch(*arguments)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        # Without a compiler it is RuntimeError or FileNotFoundError, without Python's headers CalledProcessError, without a driver
        # AssertionError or RuntimeError; and Triton has its own for what does not compile or takes too much shared memory.
        except Exception as error:
            self._failed = True
            reason = shorten(f"{type(error).__name__}: {error}", _LONGEST_REASON)
            needs = "Triton needs a C compiler and Python's headers"
            say(f"warning: {self.name} goes on without its Triton kernel, more slowly ({reason}); {needs}")
            return None
