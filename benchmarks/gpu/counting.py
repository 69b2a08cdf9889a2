"""Count operations, bytes moved, launches and peak memory of a training step, on tensors without data.

    with Dataless(), Counting() as counted:
        step()
    counted.seconds(CARDS["H100 SXM, 80 GB"])

Operators are counted as eager PyTorch launches them: each reads its inputs and writes its outputs once. Not counted: a library's workspace,
fragmentation, caches on the chip.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

LAUNCH_SECONDS = 6e-6
"""Assumed host time to launch one eager operator."""
_PRODUCTS_REACHED, _BANDWIDTH_REACHED = 0.6, 0.8
"""Assumed shares of a data sheet's peaks that large operators reach."""


@dataclass(frozen=True)
class Card:
    """Rates that a GPU reaches."""

    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes per second between memory and chip."""
    half: float
    """FLOP/s of dense bf16 matrix products that accumulate in float32."""
    single: float
    """FLOP/s of dense TF32 matrix products."""

    @classmethod
    def from_data_sheet(cls, memory: float, bandwidth: float, half: float, single: float) -> Card:
        """Build a card from the peak rates of its data sheet, times the shares that large operators are assumed to reach."""
        return cls(memory, _BANDWIDTH_REACHED * bandwidth, _PRODUCTS_REACHED * half, _PRODUCTS_REACHED * single)


# NVIDIA's data sheets; for the GeForce the figures with float32 accumulation, half of the advertised ones.
CARDS = {
    "RTX 4090, 24 GB": Card.from_data_sheet(24e9, 1008e9, 165e12, 82.6e12),
    "H100 SXM, 80 GB": Card.from_data_sheet(80e9, 3350e9, 989e12, 494e12),
}


@dataclass
class Counted:
    """Operators and memory of one step."""

    operators: list[tuple[float, float, bool]] = field(default_factory=list)
    """Per launched operator: FLOPs, bytes read and written, whether it has 16-bit inputs."""
    held: int = 0
    """Bytes of live tensors."""
    peak: int = 0
    """Peak bytes of live tensors."""

    @property
    def launches(self) -> int:
        """Number of operators that launch a kernel."""
        return len(self.operators)

    @property
    def flops(self) -> float:
        """FLOPs of matrix products and convolutions."""
        return sum(flops for flops, _, _ in self.operators)

    @property
    def traffic(self) -> float:
        """Bytes read and written by all operators."""
        return sum(size for _, size, _ in self.operators)

    def seconds(self, card: Card) -> float:
        """Compute the step's time on a card: the sum of the operators' roofline times, at least the host's time to launch them."""
        rates = {True: card.half, False: card.single}
        busy = sum(max(flops / rates[half], size / card.bandwidth) for flops, size, half in self.operators)
        return max(busy, self.launches * LAUNCH_SECONDS)


class Dataless(FakeTensorMode):
    """Mode in which tensors have shapes and dtypes but no data."""

    def __deepcopy__(self, memo: Any) -> Dataless:
        """Return the mode itself: tensors of a copied model belong to the same one."""
        return self


class Counting(TorchDispatchMode):
    """Mode that counts all operators called in it."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = Counted()
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def __enter__(self) -> Counted:  # type: ignore[override]
        super().__enter__()
        return self.counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and count it unless its outputs are views of its inputs."""
        if func is torch.ops.aten._local_scalar_dense.default:
            # There is no data: host random numbers and step counters.
            return 1 if args[0].dtype != torch.bool else True
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in (*inputs, *outputs):
            self._hold(tensor)
        if not func.is_view and func.namespace not in _NO_OPERATORS and func._schema.name not in _FREE:
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=out) if count is not None else 0
            half = any(x.dtype in (torch.bfloat16, torch.float16) for x in inputs)
            self.counted.operators.append((flops, sum(map(_bytes, (*inputs, *outputs))), half))
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._alive:
            return
        self._alive.add(storage)
        size = storage.nbytes()
        self.counted.held += size
        self.counted.peak = max(self.counted.peak, self.counted.held)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.counted.held -= size


# Queries of a tensor's properties, and profiler marks.
_NO_OPERATORS = {"prim", "profiler"}
_FREE = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::detach",
    "aten::_unsafe_view",
    "aten::lift_fresh",
}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
