"""Triton kernels with a PyTorch fallback, and custom operators that torch.compile keeps as one node.

Triton compiles a kernel at its first launch, for which it needs a C compiler and Python's headers; slim containers have neither. The
modules of the kernels import Triton at the top, so they are themselves imported on first use only.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from functools import wraps
from textwrap import shorten
from typing import Any, ClassVar, TypeVar

import torch
from torch._subclasses import FakeTensor

from configs.errors import UserError, brief, say

# Part of torch's CUDA builds.
_TRITON = importlib.util.find_spec("triton") is not None
# Characters of the error shown in the warning; a compiler's command line alone has hundreds.
_LONGEST_REASON = 160


Function = TypeVar("Function", bound=Callable[..., Any])


def operator(schema: str, fake: Callable[..., Any], exported: Callable[..., Any] | None = None) -> Callable[[Function], Function]:
    """Decorator: register a function as a custom operator, so that torch.compile does not break the graph at it.

    For code that the compiler cannot trace (a kernel with a fallback, temporary precision settings) or should not unroll (a loop over
    blocks). Without autograd: call it under `no_grad` or inside an `autograd.Function`. Outside torch.compile the plain function is
    called, since dispatching an operator takes about 25 us on a CPU.

    Args:
        schema: the operator's name and signature, as "two_stage::nearest_codes(Tensor vectors, Tensor codebook) -> Tensor".
        fake: takes the same arguments; returns empty tensors of the results' shapes, dtypes and devices.
        exported: takes the same arguments; traced in place of the operator into exported graphs, which have no custom operators.
    """
    name, parenthesis, signature = schema.partition("(")

    def decorate(function: Function) -> Function:
        registered = torch.library.custom_op(name, function, mutates_args=(), schema=parenthesis + signature)
        registered.register_fake(fake)

        @wraps(function)
        def call(*arguments: Any) -> Any:
            if exported is not None and torch.compiler.is_exporting():
                return exported(*arguments)
            # Fake tensors have no data: launching on them would fail and disable the kernel.
            traced = torch.compiler.is_compiling() or any(isinstance(argument, FakeTensor) for argument in arguments)
            return registered(*arguments) if traced else function(*arguments)

        return call  # type: ignore[return-value]

    return decorate


def check_compiler(device: torch.device) -> None:
    """Compile a small function, so that a missing compiler is reported before anything is written.

    Errors: UserError if torch.compile does not work on this machine; it needs a C++ compiler and Python's headers, on a GPU Triton too.
    """
    try:
        # A random size: a function in torch's cache would need no compiler.
        values = torch.zeros(random.SystemRandom().randrange(2, 1 << 20), device=device)
        torch.compile(lambda tensor: tensor + 1, dynamic=False)(values)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of dynamo, inductor, Triton, or the compiler's own exit code
        needs = "expected a C++ compiler and Python's headers (g++, python3-dev), without which torch.compile makes nothing"
        raise UserError(f"compute.compile: {needs}, found: {brief(error)}; leave it away, or --compute.compile false") from None


class Kernel:
    """A Triton kernel that is disabled at its first failed launch, with a one-line warning.

    nearest = Kernel("the nearest-code search", _load_nearest)
    codes = nearest(vectors, codebook) if nearest.usable(vectors.device) else None
    if codes is None:
        codes = ...  # the PyTorch fallback
    """

    disabled: ClassVar[list[str]] = []
    """Names of the kernels that could not be launched in this process."""

    def __init__(self, name: str, load: Callable[[], Callable[..., Any]]) -> None:
        """`name`: shown in the warning. `load`: imports and returns the function that launches the kernel."""
        self.name = name
        self._load = load
        self._launch: Callable[..., Any] | None = None
        self._failed = False

    def usable(self, device: torch.device) -> bool:
        """Whether to try this kernel on the device."""
        return device.type == "cuda" and _TRITON and not self._failed

    def __call__(self, *arguments: Any) -> Any | None:
        """The kernel's result; None if it cannot be launched on this machine.

        Errors: those of the GPU itself (out of memory, a broken context), which the fallback would not cure.
        """
        try:
            if self._launch is None:
                self._launch = self._load()
            return self._launch(*arguments)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        # RuntimeError or FileNotFoundError without a compiler, CalledProcessError without Python's headers, AssertionError or RuntimeError
        # without a driver; Triton's own errors for code that does not compile or needs too much shared memory.
        except Exception as error:
            self._failed = True
            self.disabled.append(self.name)
            reason = shorten(f"{type(error).__name__}: {error}", _LONGEST_REASON)
            needs = "Triton needs a C compiler and Python's headers"
            say(f"warning: Triton kernel for {self.name} unavailable, using slower PyTorch operators ({reason}); {needs}")
            return None
