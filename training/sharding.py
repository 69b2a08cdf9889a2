"""Weights shared out over processes: each holds a part of every tensor, and a layer is whole only while it is that layer's turn.

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", stage 3; by torch's `fully_shard` (FSDP2).
Accelerate's own sharding is not used: it takes no processes on a CPU, where all of this is tested.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from configs.errors import UserError

Model = TypeVar("Model", bound=nn.Module)


def shard_(accelerator: Accelerator, model: nn.Module, units: Sequence[nn.Module], learns: bool = True) -> None:
    """Share a model's weights out over all processes, along their first axis, and move them to their devices.

    In bf16 the units' weights are sent as such, and gradients in float32; what is in no unit stays in float32, as with autocast, which
    differs in that the units' norms see their input in bf16 here. A model that does not learn stays in float32, for exact
    likelihoods.

    Args:
        accelerator: of the processes.
        model: whole, and equal on all of them; its forward pass is what gathers.
        units: parts of it that are gathered one at a time.
        learns: whether it is in training, when what is in no unit stays whole from its forward pass to its backward pass.
    Errors: UserError for fp16, whose scaler knows nothing of shards.
    """
    if accelerator.mixed_precision == "fp16":
        raise UserError("compute.mixed_precision: expected no or bf16 with compute.sharded, found fp16")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    sent = torch.bfloat16 if learns and accelerator.mixed_precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=sent, reduce_dtype=torch.float32 if sent else None, cast_forward_inputs=False)
    compiler = accelerator.state.dynamo_plugin
    for unit in units:
        if learns and compiler.backend.value != "NO":
            unit.compile(**compiler.to_kwargs())
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=None if learns else True)
    if not learns:
        return
    forward = model.forward

    def under_autocast(*given: Any, **named: Any) -> Any:
        with accelerator.autocast():
            return forward(*given, **named)

    model.forward = under_autocast


def without_weights(model: Model) -> Model:
    """A copy of a model that takes no memory for its weights, and does not learn: to be shared out, and then to be given some."""
    memo: dict[int, Any] = {id(weight): nn.Parameter(weight.detach().to("meta"), requires_grad=False) for weight in model.parameters()}
    return copy.deepcopy(model, memo)


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory; all of one that is not shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(accelerator: Accelerator, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors gathered, one after another, on the CPU of the main process; none on the others. All must call it."""
    found = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if accelerator.is_main_process:
            found[name] = full.detach().cpu()
    return found


def shared_out_as(state: Any, into: Any) -> Any:
    """A state of whole tensors, those of them shared out that are in a state of the same structure."""
    if isinstance(state, Mapping) and isinstance(into, Mapping):
        return {key: shared_out_as(value, into.get(key)) for key, value in state.items()}
    if isinstance(state, Tensor) and isinstance(into, DTensor) and not isinstance(state, DTensor):
        # Every process has the whole: none has to be sent anything.
        part = distribute_tensor(state.to(into.device), into.device_mesh, into.placements, src_data_rank=None)
        return part.clone()  # or torch 2.9 would keep the whole, of which this is a view
    return state
