"""Several processes on pretended GPUs: gloo instead of NCCL, with NCCL's rule that host tensors are refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d

from tests.pretended import device as pretended


class Replicated(nn.Module):
    """Averages gradients after a backward pass, instead of DistributedDataParallel, whose C++ needs a real GPU's events."""

    def __init__(self, module: nn.Module, *_: Any, **__: Any) -> None:
        super().__init__()
        self.module, self._averages, self._queued = module, True, False
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._queue)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self._averages = False
        try:
            yield
        finally:
            self._averages = True

    def _queue(self, _: Tensor) -> None:
        if self._averages and not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._average)

    def _average(self) -> None:
        self._queued = False
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()


def install() -> None:
    """Replace NCCL by gloo with NCCL's rules; call before accelerate is imported."""
    init_gloo, new_group, barrier = dist.init_process_group, dist.new_group, dist.barrier

    def init_process_group(backend: str | None = None, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        init_gloo("gloo", *args, **kwargs)
        world = dist.group.WORLD
        assert world is not None
        pretended.backends[world.group_name] = backend or "nccl"

    def new_gloo_group(ranks: Any = None, timeout: Any = None, backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        group = new_group(ranks, timeout, "gloo", *args, **kwargs)
        pretended.backends[group.group_name] = backend or "nccl"
        return group

    def device_of(group: Any = None) -> torch.device:
        """Device of the group's tensors."""
        name = (group or dist.group.WORLD).group_name
        return torch.device("cpu" if pretended.backends[name] == "gloo" else f"cuda:{torch.cuda.current_device()}")

    def all_gather_into_tensor(output: Tensor, tensor: Tensor, group: Any = None, async_op: bool = False) -> None:
        """Gather also 0-d tensors, which gloo rejects."""
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor, group)
        output.view(-1).copy_(torch.cat([part.flatten() for part in parts]))

    def wait_for_all(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        pretended.waits("barrier")
        return barrier(group, async_op)

    nn.parallel.DistributedDataParallel = Replicated  # type: ignore[assignment,misc]
    replacements: dict[str, Any] = {
        "init_process_group": init_process_group,
        "new_group": new_gloo_group,
        "all_gather_into_tensor": all_gather_into_tensor,
        "barrier": wait_for_all,
    }
    for name, value in replacements.items():
        setattr(dist, name, value)
        setattr(c10d, name, value)
    c10d._get_object_coll_device = lambda group=None: device_of(group).type
    c10d._get_pg_default_device = device_of
