"""Sharded weights: every rank holds a shard of every tensor, and a layer's weights are gathered only while that layer runs.

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", stage 3; by torch's `fully_shard` (FSDP2).
Accelerate's own sharding is not used: it takes no processes on a CPU, where all of this is tested.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from configs.errors import UserError

# Torch's modules of shards take a second to import, so functions that shard import them, and no other command does.
if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Model = TypeVar("Model", bound=nn.Module)


def shard_(accelerator: Accelerator, model: nn.Module, units: Sequence[nn.Module], trained: bool = True) -> None:
    """Shard a model's weights over all ranks, along their first axis, and move them to the ranks' devices.

    In bf16 the units' weights are sent as such, and gradients in float32; weights in no unit stay in float32, as with autocast, which
    differs in that the units' norms see their input in bf16 here. A model that is not trained stays in float32, for exact likelihoods.

    Args:
        accelerator: of the ranks.
        model: unsharded, and equal on all ranks; its forward pass gathers.
        units: submodules that are gathered one at a time.
        trained: whether it is trained; weights in no unit then stay gathered from the forward pass to the backward pass.
    Errors: UserError for fp16, whose gradient scaler does not support shards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if accelerator.mixed_precision == "fp16":
        raise UserError("compute.mixed_precision: expected no or bf16 with compute.sharded, found fp16")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    sent = torch.bfloat16 if trained and accelerator.mixed_precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=sent, reduce_dtype=torch.float32 if sent else None, cast_forward_inputs=False)
    compiler = accelerator.state.dynamo_plugin
    for unit in units:
        if trained and compiler.backend.value != "NO":
            unit.compile(**compiler.to_kwargs())
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=None if trained else True)
    if not trained:
        return
    forward = model.forward

    def under_autocast(*given: Any, **named: Any) -> Any:
        with accelerator.autocast():
            return forward(*given, **named)

    model.forward = under_autocast


def without_weights(model: Model) -> Model:
    """Copy a model with weights on `meta`, without gradients: to be sharded before it gets its weights."""
    memo: dict[int, Any] = {id(weight): nn.Parameter(weight.detach().to("meta"), requires_grad=False) for weight in model.parameters()}
    return copy.deepcopy(model, memo)


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Return whether a tensor is a shard of a larger one; without importing DTensor, since there are none before somebody has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, sharing its memory; an unsharded tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gathered(accelerator: Accelerator, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather tensors, one after another, to the CPU of the main process; the other ranks, which must call it too, get none."""
    unsharded = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if is_sharded(tensor) else tensor
        if accelerator.is_main_process:
            unsharded[name] = full.detach().cpu()
    return unsharded


def sharded_like(state: Any, into: Any) -> Any:
    """Shard those tensors of a state whose counterparts in `into`, a state of the same structure, are sharded."""
    if isinstance(state, Mapping) and isinstance(into, Mapping):
        return {key: sharded_like(value, into.get(key)) for key, value in state.items()}
    if isinstance(state, Tensor) and is_sharded(into) and not is_sharded(state):
        from torch.distributed.tensor import distribute_tensor

        # Every rank has the whole tensor, so nothing has to be sent.
        part = distribute_tensor(state.to(into.device), into.device_mesh, into.placements, src_data_rank=None)
        return part.clone()  # otherwise torch 2.9 keeps the whole tensor, of which this is a view
    return state
