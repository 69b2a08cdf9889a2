"""A sharded checkpoint: a folder to which every rank writes its shards.

The files are safetensors, by `torch.distributed.checkpoint`, so that reading them executes nothing; every shard says where in its tensor
it belongs, so that any number of ranks can read them, one included. checkpoint.json has the plain values, and each file's sha256.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from configs.errors import UserError
from configs.run_dir import read_summed_json, sync, write_summed_json
from training.checkpoint_file import DamagedCheckpoint, check_kind
from training.weights_file import fingerprint

if TYPE_CHECKING:
    from torch.distributed.checkpoint import CheckpointException

_LIST = "checkpoint.json"
_TIMEOUT = timedelta(hours=2)
# Key that stands for a tensor in checkpoint.json.
_TENSOR = "tensor"


def shards_group() -> dist.ProcessGroup:
    """Create a process group of all ranks for writing beside the training, with a timeout for slow disks."""
    group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def write_shards(path: Path, state: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Write every rank's shards of a state of CPU tensors and plain values; the folder gets its name when all of it is on the disk.

    All ranks must call it, with a group that nothing else uses meanwhile. Errors: OSError with the folder's name, on all of them.
    """
    temporary = path.with_name(f"{path.name}.tmp-0")

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def end() -> None:
        write_summed_json(temporary / _LIST, {**_without_tensors(state), "sha256": sums})
        shutil.rmtree(path, ignore_errors=True)  # of a training that was since resumed from an earlier step
        os.replace(temporary, path)
        sync(path.parent)

    try:
        _on_rank_0(group, begin)
        sums = _written(temporary, dict(_tensors(state)), group)
        _on_rank_0(group, end)
    except OSError as error:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        # ENOSPC carries no name; the user needs to know which disk is full.
        raise OSError(error.errno, error.strerror, str(path)) from error


def _written(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, str]:
    """Write every rank's shards. Returns: the sha256 of every file by name. Errors: OSError, on all ranks."""
    import torch.distributed.checkpoint as dcp  # takes a second

    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True), process_group=group)
    except dcp.CheckpointException as failed:
        raise _first(failed) from None
    found: list[Any] = [None] * dist.get_world_size()
    # File names contain the rank, counted from 1.
    files = sorted(folder.glob(f"shard-{dist.get_rank() + 1:05d}-*.safetensors"))
    own: dict[str, str] | OSError
    try:
        for file in files:
            sync(file)  # what torch 2.9 leaves in a buffer comes after its own
        own = {file.name: fingerprint(file) for file in files}
    except OSError as error:
        own = error
    dist.all_gather_object(found, own, group=group)
    for failed_or_sums in found:
        if isinstance(failed_or_sums, OSError):
            raise failed_or_sums
    return {name: sha256 for sums in found for name, sha256 in sums.items()}


def check_shards(path: Path, stage: str, process: int, processes: int) -> None:
    """Verify this rank's share of a checkpoint's files; all ranks together verify all of them.

    Errors: DamagedCheckpoint; UserError for another stage's checkpoint.
    """
    content = _list(path, stage)
    for name, written in list(content["sha256"].items())[process::processes]:
        if not (path / name).is_file():
            raise DamagedCheckpoint(f"expected {name}, found nothing")
        if fingerprint(path / name) != written:
            raise DamagedCheckpoint(f"expected {name} as it was written, found another than its sha256 was of")


def read_shards(path: Path, stage: str, into: dict[str, Any]) -> dict[str, Any]:
    """Read what `write_shards` wrote for a stage, each tensor into the one of the same name in `into`, sharded like it.

    All ranks must call it. Errors: UserError for another stage's checkpoint, or for tensors that `into` lacks.
    """
    import torch.distributed.checkpoint as dcp  # takes a second

    content, tensors = _list(path, stage), dict(_tensors(into))
    wanted = {name: tensors.get(name) for name in _names_of_tensors(content)}
    if missing := [name for name, tensor in wanted.items() if tensor is None]:
        raise UserError(f"{path}: expected the tensors of this training, found {missing[0]}")
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be with one process
        try:
            dcp.load(wanted, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=alone)
        except dcp.CheckpointException as failed:
            raise _first(failed) from None
    del content["sha256"]
    return _with_tensors(content, wanted)


def _list(path: Path, stage: str) -> dict[str, Any]:
    try:
        content = read_summed_json(path / _LIST)
    except UserError as damage:
        raise DamagedCheckpoint(f"expected {_LIST} ({damage})") from damage
    check_kind(path, content, stage)
    return content


def _tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of nested dictionaries, named by their joined keys."""
    for key, value in state.items():
        inside = f"{name}/{key}" if name else key
        if isinstance(value, Tensor):
            yield inside, value
        elif isinstance(value, dict):
            yield from _tensors(value, inside)


def _without_tensors(state: Any, name: str = "") -> Any:
    """Replace the tensors of nested dictionaries by their names."""
    if isinstance(state, Tensor):
        return {_TENSOR: name}
    if isinstance(state, dict):
        return {key: _without_tensors(value, f"{name}/{key}" if name else key) for key, value in state.items()}
    return state


def _names_of_tensors(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        if content.keys() == {_TENSOR}:
            yield content[_TENSOR]
        else:
            for value in content.values():
                yield from _names_of_tensors(value)


def _with_tensors(content: Any, tensors: dict[str, Any]) -> Any:
    """The inverse of `_without_tensors`."""
    if not isinstance(content, dict):
        return content
    if content.keys() == {_TENSOR}:
        return tensors[content[_TENSOR]]
    return {key: _with_tensors(value, tensors) for key, value in content.items()}


def _first(failed: CheckpointException) -> BaseException:
    """Return the failure of the first rank that has one."""
    return next(iter(failed.failures.values()))[0]


def _on_rank_0(group: dist.ProcessGroup, work: Callable[[], None]) -> None:
    """Run `work` on rank 0. Errors: its OSError, on all ranks."""
    failed: list[OSError | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except OSError as error:
            failed = [error]
    dist.broadcast_object_list(failed, src=0, group=group)
    if failed[0] is not None:
        raise failed[0]
