"""A pretended accelerator: tensors compute on the CPU and report that they are on `cuda:0`.

    install("cuda", devices=2)  # in a new process, before the project is imported (see tests/pretended/run.py)
    with Pretended() as log:
        x = torch.randn(3, device="cuda")
        x.sum().item()
    assert log.waits == {("item", "stage1_vqvae/train.py:300"): 1}

As on a GPU: operators raise on tensors of two devices; host waits and copies are counted with the project line that caused them, launches
and their bytes by operator; a thread starts at the first device; a captured graph may hold no wait and is replayed on the same tensors
(graphs.py). `mps` has no float64. Unlike torch's fake tensors these hold numbers, so entire commands run, with the CPU's results.

It does not model stream races, memory, time, missing operators or different rounding. Triton is unavailable.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from tests.pretended import guard

_GUARD = guard.load()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils import _pytree as tree  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

_ROOT = Path(__file__).parents[2]
_PACKAGES = tuple(f"{_ROOT / name}/" for name in ("training", "stage1_vqvae", "stage2_prior", "pipelines"))
_CPU = torch.device("cpu")

# Operators whose output shapes depend on values, so that the host waits for the device.
_SHAPED_BY_VALUES = {"nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "equal", "histc"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_COPYING = {"copy_", "_to_copy", "_foreach_copy_"}
# Operators that make or view a tensor without a launch.
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "_reshape_alias",
    "lift",
    "lift_fresh",
    "set_",
}
_INTEGERS_MISSING = {"mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot"}
_PRODUCTS = {*_INTEGERS_MISSING, "_foreach_mm", "linear", "convolution", "convolution_backward", "scaled_dot_product_attention"}


class Place(NamedTuple):
    """An event and the project line that caused it."""

    kind: str
    """Kind of wait (`item`, `nonzero`, `copy to the device`, ...) or direction of a copy."""
    line: str
    """The project line, such as `stage1_vqvae/train.py:300`, or `elsewhere`."""


@dataclass
class DeviceLog:
    """Waits, copies and launches on the pretended device."""

    waits: Counter[Place] = field(default_factory=Counter)
    """Waits of the host for the device."""
    copies: Counter[Place] = field(default_factory=Counter)
    """Copies from one device to another, blocking or not."""
    operators: Counter[str] = field(default_factory=Counter)
    """Launches by operator name."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Bytes read and written, by operator name."""

    @property
    def launches(self) -> int:
        """Number of all launches."""
        return self.operators.total()

    @property
    def launches_beside_products(self) -> int:
        """Number of launches other than matrix products, convolutions and attention."""
        return sum(count for name, count in self.operators.items() if name not in _PRODUCTS)


_logs: list[DeviceLog] = []


class OnDevice(torch.Tensor):
    """A tensor of a pretended device; `host` holds its numbers."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor, device: torch.device) -> OnDevice:
        if device.type == "mps" and host.dtype in (torch.float64, torch.complex128):
            kind = str(host.dtype).removeprefix("torch.")
            raise TypeError(
                f"Cannot convert a MPS Tensor to {kind} dtype as the MPS framework doesn't support {kind}. Please use float32 instead."
            )
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=device,
        )
        made.host = host.detach()
        return made

    # Modules use these to move their parameters in place.
    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["host"], self.device

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], device: torch.device, *_: Any) -> OnDevice:
        return OnDevice(inner["host"], device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: OnDevice) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.host = value.host

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"{self.host!r} on {self.device}"

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
        )

    __array__ = numpy


class Pretended(TorchDispatchMode):
    """Context in which tensors can be made on the device or moved there. Yields a `DeviceLog`."""

    def __enter__(self) -> DeviceLog:  # type: ignore[override]
        self._log = DeviceLog()
        _logs.append(self._log)
        # `torch.tensor(..., device="cuda")` makes a CPU tensor, which is then copied: here too.
        self._lifted = torch._C._only_lift_cpu_tensors()  # type: ignore[attr-defined]
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
        super().__enter__()
        return self._log

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifted)  # type: ignore[attr-defined]
        _logs.remove(self._log)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, kwargs or {})


def project_line() -> str:
    """The innermost line of the project's packages on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGES):
            return f"{name[len(str(_ROOT)) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


def waits(kind: str) -> None:
    """Record that the host waits for the device. Errors: RuntimeError within a capture."""
    if _capture.graph is not None:
        raise RuntimeError(f"{kind} at {project_line()}: operation not permitted when stream is capturing")
    if _logs:
        place = Place(kind, project_line())
        for log in _logs:
            log.waits[place] += 1


def _copied(tensor: Tensor, source: torch.device, target: torch.device, non_blocking: bool) -> None:
    to_host, from_host = target.type == "cpu", source.type == "cpu"
    kind = "copy from the device" if to_host else "copy to the device" if from_host else "copy between devices"
    if _logs:
        place = Place(kind, project_line())
        for log in _logs:
            log.copies[place] += 1
    if not non_blocking and (to_host or from_host):
        waits(kind)
    elif from_host and not tensor.is_pinned():
        waits(f"{kind} from memory that is not pinned")


def launched(name: str, tensors: list[Tensor]) -> None:
    if _logs:
        # An expanded tensor is read once.
        size = sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
        for log in _logs:
            log.operators[name] += 1
            log.bytes[name] += size


# --- the current graph capture (graphs.py)

_capture = SimpleNamespace(graph=None, device=None)


# --- operators


def _dispatched(func: Any, args: Any, kwargs: Any) -> Any:
    space, name = func._schema.name.split("::")
    flat = [x for x in tree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours, hosts = [x for x in flat if isinstance(x, OnDevice)], [x for x in flat if not isinstance(x, OnDevice)]
    target = _resolved(kwargs["device"]) if kwargs.get("device") is not None else None
    if target is None:
        target = ours[0].device if ours and not (name in _COPYING and not isinstance(tree.tree_leaves(args[0])[0], OnDevice)) else _CPU
    if not ours and target == _CPU and not kwargs.get("pin_memory"):
        if space == "c10d":
            _check_collective(name, args, hosts)
        return func(*args, **kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if kwargs.get("device") is not None:
        kwargs["device"] = _CPU
    if space == "c10d":
        _check_collective(name, args, hosts)
    else:
        _check_devices(func, name, args, ours, hosts)
        _check_waits(name, args, kwargs, flat, ours, target)
    host_arguments = tree.tree_map_only(Tensor, _host, (args, kwargs))
    if _capture.graph is not None:
        _capture.graph.save_overwritten(func._schema, *host_arguments)
    func = _STAND_INS.get(name, func)
    result = func(*host_arguments[0], **host_arguments[1])
    if target == _CPU:
        return result
    if name not in _FREE and space != "c10d" and not getattr(func, "is_view", False):
        if not (name in _COPYING and hosts):
            results = [x for x in tree.tree_leaves(result) if isinstance(x, Tensor)]
            launched(name, [x.host for x in ours] + [x for x in results if not any(x is y.host for y in ours)])
        if _capture.graph is not None:
            _record(name, func, *host_arguments, result, target)
    originals = {id(x.host): x for x in ours}

    def wrapped(x: Tensor) -> OnDevice:
        if id(x) not in originals:
            originals[id(x)] = OnDevice(x, target)
        return originals[id(x)]

    return tree.tree_map_only(Tensor, wrapped, result)


def _host(tensor: Tensor) -> Tensor:
    """Host tensor; scalars are copied while capturing."""
    if isinstance(tensor, OnDevice):
        return tensor.host
    return tensor.clone() if _capture.graph is not None and tensor.dim() == 0 else tensor


def _record(name: str, func: Any, args: Any, kwargs: Any, output: Any, target: torch.device) -> None:
    if target != _capture.device:
        raise RuntimeError(f"{name} on {target} at {project_line()}: the stream that is capturing is of {_capture.device}")
    _capture.graph.record(name, func, args, kwargs, output)


def _resolved(device: Any) -> torch.device:
    """A device with its number."""
    device = torch.device(device)
    return torch.device(device.type, _GUARD.current_device()) if device.type == _installed.kind and device.index is None else device


def _check_devices(func: Any, name: str, args: Any, ours: list[OnDevice], hosts: list[Tensor]) -> None:
    """Check that an operator's tensors are on one device. Errors: RuntimeError."""
    devices = {x.device for x in ours}
    if ours and name in _INTEGERS_MISSING and not (ours[0].is_floating_point() or ours[0].is_complex()):
        raise RuntimeError(f'"{name}" not implemented for {ours[0].dtype} on {ours[0].device} at {project_line()}')
    if name in _COPYING:
        return
    if hosts and name in _INDEXING and isinstance(args[0], OnDevice):
        indices = [x for x in tree.tree_leaves(args[1]) if isinstance(x, Tensor)]
        for index in indices:
            if not isinstance(index, OnDevice):
                _copied(index, _CPU, ours[0].device, non_blocking=False)
        hosts = [x for x in hosts if not any(x is index for index in indices)]
    # A 0-d host tensor is read as a number.
    if (ours and any(x.dim() > 0 or name in ("cat", "stack") for x in hosts)) or len(devices) > 1:
        shapes = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in (*ours, *hosts))
        raise RuntimeError(f"{func} at {project_line()}: Expected all tensors to be on the same device, but found {shapes}")


def _check_waits(name: str, args: Any, kwargs: Any, flat: list[Tensor], ours: list[OnDevice], target: torch.device) -> None:
    if name == "_local_scalar_dense":
        waits("item")
    elif name in _SHAPED_BY_VALUES:
        waits(name)
    elif name in _INDEXING:
        for mask in tree.tree_leaves(args[1]):
            if isinstance(mask, Tensor) and mask.dtype in (torch.bool, torch.uint8):
                waits("nonzero of a mask")
    elif name == "repeat_interleave" and kwargs.get("output_size") is None:
        waits(name)
    elif name == "_to_copy":
        source = args[0].device if isinstance(args[0], OnDevice) else _CPU
        if source != target:
            _copied(args[0], source, target, bool(kwargs.get("non_blocking")))
    elif name == "copy_":
        ends = [x.device if isinstance(x, OnDevice) else _CPU for x in args[:2]]
        if ends[0] != ends[1]:
            _copied(args[1], ends[1], ends[0], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
    elif name == "_foreach_copy_":
        for destination, value in zip(args[0], args[1], strict=True):
            if isinstance(destination, OnDevice) != isinstance(value, OnDevice):
                _copied(value, value.device, destination.device, bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))


def _batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float, epsilon: float) -> Any:
    outputs = torch.ops.aten.native_batch_norm(x, weight, bias, mean, variance, training, momentum, epsilon)
    return *outputs, x.new_empty(0, dtype=torch.uint8)


def _batch_norm_backward(x: Tensor, gradient: Tensor, weight: Any, *rest: Any) -> Any:
    mean, variance, saved_mean, saved_inverse, epsilon, _ = rest
    return torch.ops.aten.native_batch_norm_backward(
        gradient, x, weight, mean, variance, saved_mean, saved_inverse, True, epsilon, [True, True, True]
    )


# Replacements for operators without a CPU kernel, and for lazy views.
_STAND_INS = {
    "cudnn_batch_norm": _batch_norm,
    "cudnn_batch_norm_backward": _batch_norm_backward,
    "_conj": torch.ops.aten._conj_physical.default,
    "_neg_view": torch.ops.aten.neg.default,
}


class _Attention(torch.autograd.Function):
    """Attention as one launch, as on a GPU, computed by the CPU's attention."""

    @staticmethod
    def forward(ctx: Any, attend: Any, *tensors: OnDevice | None) -> OnDevice:  # type: ignore[override]
        inputs = [None if x is None else x.host.detach().requires_grad_(x.requires_grad) for x in tensors]
        with torch.enable_grad():
            output = attend(*inputs)
        ctx.inputs, ctx.output, ctx.device = inputs, output, next(x.device for x in tensors if x is not None)
        return OnDevice(output.detach(), ctx.device)

    @staticmethod
    def backward(ctx: Any, gradient: OnDevice) -> Any:  # type: ignore[override]
        differentiable = [x for x in ctx.inputs if x is not None and x.requires_grad]
        gradients = iter(torch.autograd.grad(ctx.output, differentiable, gradient.host))
        launched("scaled_dot_product_attention", [x.detach() for x in (*differentiable, *differentiable, gradient.host)])
        results = [OnDevice(next(gradients), ctx.device) if x is not None and x.requires_grad else None for x in ctx.inputs]
        return None, *results


_attention = F.scaled_dot_product_attention


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **options: Any) -> Tensor:
    tensors = [query, key, value, *([] if attn_mask is None else [attn_mask])]
    ours = [x for x in tensors if isinstance(x, OnDevice)]
    if not ours:
        return _attention(query, key, value, attn_mask, *rest, **options)
    _check_devices("scaled_dot_product_attention", "", (), ours, [x for x in tensors if not isinstance(x, OnDevice)])
    kind = ours[0].device.type
    if torch.is_autocast_enabled(kind):
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    if len({x.dtype for x in (query, key, value)}) > 1:
        raise RuntimeError(f"Expected query, key, and value to have the same dtype, but got {query.dtype}, {key.dtype}, {value.dtype}")

    def attend(*tensors: Any) -> Tensor:
        return _attention(*tensors, *rest, **options)

    inputs = (query, key, value, attn_mask)
    output = _Attention.apply(attend, *inputs) if torch.is_grad_enabled() else None
    if output is None:
        output = OnDevice(attend(*(None if x is None else x.host for x in inputs)), ours[0].device)  # type: ignore[attr-defined]
    launched("scaled_dot_product_attention", [x.host for x in (*inputs, output) if isinstance(x, OnDevice)])
    if _capture.graph is not None:
        hosts = [None if x is None else x.host for x in inputs]  # type: ignore[attr-defined]
        _record("scaled_dot_product_attention", attend, hosts, {}, output.host, output.device)  # type: ignore[attr-defined]
    return output  # type: ignore[no-any-return]


# --- collectives, by NCCL's rules (processes.py)

backends: dict[str, str] = {}
"""Backend whose rules apply, `nccl` or `gloo`, by name of the process group."""


def _check_collective(name: str, args: Any, hosts: list[Tensor]) -> None:
    """Check a collective's tensors. Errors: RuntimeError for a host tensor under NCCL."""
    groups = [x for x in args if isinstance(x, torch.ScriptObject)]
    names = [torch.distributed.ProcessGroup.unbox(x).group_name for x in groups if "ProcessGroup" in str(x._type())]
    if hosts and name != "barrier" and any(backends.get(group) == "nccl" for group in names):
        raise RuntimeError(f"{name} at {project_line()}: No backend type associated with device type cpu")


# --- replacements of torch's functions

_installed = SimpleNamespace(kind=None, devices=0)


def _pin(tensor: Tensor, *_: Any) -> Tensor:
    if isinstance(tensor, OnDevice):
        raise RuntimeError(f"cannot pin '{tensor.type()}' only dense CPU tensors can be pinned")
    pinned = tensor.clone()
    pinned.untyped_storage().is_pinned_here = True  # type: ignore[attr-defined]
    return pinned


def _is_pinned(tensor: Tensor, *_: Any) -> bool:
    return not isinstance(tensor, OnDevice) and getattr(tensor.untyped_storage(), "is_pinned_here", False)


_apply = torch.nn.Module._apply


def _moved(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """Move a module (`Module.to`), keeping each parameter the same object."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return _apply(module, *args, **kwargs)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _set_device(index: int) -> None:
    if not 0 <= index < _installed.devices:
        raise RuntimeError(f"invalid device ordinal {index}, of {_installed.devices}")
    _GUARD.set_current_device(index)


def _exchange_device(index: int) -> int:
    before: int = _GUARD.current_device()
    if index >= 0:
        _set_device(index)
    return before


def install(kind: str = "cuda", devices: int = 1) -> None:
    """Make torch see `devices` devices of a kind, `cuda` or `mps`, for the rest of this process.

    torch's Python code still checks its arguments: `torch.cuda.set_device("cuda")` is refused, as on a GPU.
    """
    assert kind in ("cuda", "mps")
    assert _installed.kind is None
    _installed.kind, _installed.devices = kind, devices
    _GUARD.install_guards()
    # Backward passes run in the caller's thread, where the project line is on the stack.
    torch.autograd.set_multithreading_enabled(False).__enter__()
    torch.nn.Module._apply = _moved  # type: ignore[method-assign]
    importlib.import_module("torch.optim.optimizer")._foreach_supported_types.append(OnDevice)  # as tensors of a GPU
    sys.modules["triton"] = None  # type: ignore[assignment]
    torch.Tensor.pin_memory, torch.Tensor.is_pinned = _pin, _is_pinned  # type: ignore[method-assign,assignment]
    F.scaled_dot_product_attention = _attend  # type: ignore[assignment]
    bindings = {
        "getDevice": lambda: _GUARD.current_device(),
        "setDevice": _set_device,
        "exchangeDevice": _exchange_device,
        "maybeExchangeDevice": _exchange_device,
        "getDeviceCount": lambda: devices,
        "synchronize": lambda *_: waits("synchronize"),
        "emptyCache": lambda: None,
        "memoryStats": lambda *_: {},
        "resetPeakMemoryStats": lambda *_: None,
        "isCurrentStreamCapturing": lambda: _capture.graph is not None,
    }
    accelerators = {
        "getAccelerator": lambda: torch.device(kind),
        "getDeviceIndex": bindings["getDevice"],
        "setDeviceIndex": _set_device,
        "exchangeDevice": _exchange_device,
        "maybeExchangeDevice": _exchange_device,
        "synchronizeDevice": bindings["synchronize"],
        "isAllocatorInitialized": lambda: False,
    }
    for name, binding in accelerators.items():
        setattr(torch._C, f"_accelerator_{name}", binding)
    torch.accelerator.device_count = lambda: devices  # type: ignore[assignment]
    torch.accelerator.is_available = lambda: True
    {"cuda": _install_cuda, "mps": _install_mps}[kind](bindings, devices)


def _install_cuda(bindings: dict[str, Any], devices: int) -> None:
    cuda = torch.cuda
    for name, binding in bindings.items():
        setattr(torch._C, f"_cuda_{name}", binding)
    properties = SimpleNamespace(name="pretended", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132)
    replacements: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "_exchange_device": _exchange_device,
        "_maybe_exchange_device": _exchange_device,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: devices,
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: properties.name,
        "get_device_properties": lambda *_: properties,
        "manual_seed": lambda *_: None,  # layers draw from the CPU's generator here
        "manual_seed_all": lambda *_: None,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda *_, **__: None,
    }
    for name, value in replacements.items():
        setattr(cuda, name, value)
    cuda.amp.common.amp_definitely_not_available = lambda: False  # type: ignore[assignment]
    from tests.pretended import graphs

    graphs.install()


def _install_mps(_: dict[str, Any], __: int) -> None:
    torch.backends.mps.is_available = torch.backends.mps.is_built = cache(lambda: True)  # type: ignore[assignment]
    replacements: dict[str, Any] = {
        "synchronize": lambda: waits("synchronize"),
        "empty_cache": lambda: None,
        "manual_seed": lambda _: None,
        "get_rng_state": lambda: torch.get_rng_state(),
        "set_rng_state": lambda _: None,
        "device_count": lambda: 1,
    }
    for name, value in replacements.items():
        setattr(torch.mps, name, value)
    torch.mps._get_default_mps_generator = lambda: torch.default_generator  # type: ignore[assignment]
