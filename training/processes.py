"""Starting the processes of a command, and adding up over them."""

from __future__ import annotations

import importlib.util
import os
import time
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env
from torch import Tensor, nn

from configs.errors import EXPLANATIONS, UserError, say
from configs.schema import Compute
from training.devices import numbered, widest_float
from training.kernels import check_compiler
from training.launcher import check_launcher
from training.precision import resolve_precision, set_float32
from training.watch import ENDED_FOR_ANOTHER, Watch, end_with_the_launcher, joining

_COMPILER = "inductor"
_LETTING_GO = 0.5  # seconds; without, 5 of 34 small commands on a busy machine ended so, with it 0 of 30
# With another process, in hours: one host may have its images decoded when another begins to. Who hangs is found out earlier (watch.py).
_PATIENCE = 2.0
SMALLER_BATCHES = "take fewer images at once (--batch_size N)"
"""Advice on a full memory of commands that have this option."""
_FEWER_IMAGES = "give it fewer images"
_WORDS_OF_LOST_PEERS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


class _Command:
    """What this process's command has begun with."""

    watch: Watch | None = None
    lighter = _FEWER_IMAGES
    launched_sharded = False
    precision: str | None = None
    """Last precision line printed, so that it is printed once."""


def start(compute: Compute, logging_dir: str | None = None, lighter: str = _FEWER_IMAGES) -> Accelerator:
    """The Accelerator of a command, with this process's share of the cores. Several processes look after one another from here on, until
    `finish`.

    Args:
        compute: the recipe's.
        logging_dir: for trackers.
        lighter: what to say of how the command would take less memory, if that is out.

    Launchers set OMP_NUM_THREADS=1 where nobody set it, which would leave most cores idle on a CPU. Buffers are not
    broadcast by DDP: the quantizers themselves keep the codebooks of all processes equal. On a GPU the precision is chosen here, and
    printed (precision.py). Autocast covers what is prepared: training. Validation, extraction and decoding run in float32 with TF32
    products (likelihoods without): they take a small part of a run's time, and all later commands read their results.
    """
    patience = timedelta(hours=max(_PATIENCE, compute.hang_timeout_minutes / 30))
    on_cpu = not torch.accelerator.is_available()
    if compute.tracker is not None and importlib.util.find_spec(compute.tracker) is None:
        raise UserError(
            f"compute.tracker {compute.tracker}: expected the package {compute.tracker}, found none; pip install {compute.tracker}"
        )
    # Accelerate's to mend: what it passes on for us has another name since torch 2.14.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    accelerator_device = torch.accelerator.current_accelerator()
    device = "cpu" if on_cpu or accelerator_device is None or parse_flag_from_env("ACCELERATE_USE_CPU") else accelerator_device.type
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if device == "cpu" and (compute.mixed_precision or launcher) == "fp16":
        where = "compute.mixed_precision" if compute.mixed_precision else "ACCELERATE_MIXED_PRECISION"
        raise UserError(f"{where}: expected no or bf16 on a CPU, found fp16")
    bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = resolve_precision(compute.mixed_precision, launcher, device, bf16)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_the_launcher()
    _Command.lighter = lighter
    # Accelerate shards whatever is prepared, and nothing on a CPU: what is sharded is ours to say (sharding.py).
    _Command.launched_sharded = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true" or _Command.launched_sharded
    launched_threads = check_launcher(_Command.launched_sharded)
    threads = compute.threads or launched_threads or share_of_cores()
    with joining(launched):
        try:
            accelerator = Accelerator(
                # Accelerate joins the processes of a launcher on a machine without accelerators only if told so.
                cpu=on_cpu,
                mixed_precision=precision.networks,
                log_with=compute.tracker,
                dynamo_backend=_COMPILER if compute.compile else None,
                project_dir=logging_dir,
                kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=patience)],
            )
        except (ValueError, ImportError, NotImplementedError) as error:  # of a setting that it refuses itself
            raise UserError(f"Accelerate: {error}") from None
        if accelerator.num_processes != launched:
            # They would all train on the same data and write the same files.
            raise UserError(
                f"WORLD_SIZE: expected processes that find each other, found {launched} launched, {accelerator.num_processes} joined"
            )
        accelerator.state.device = numbered(accelerator.device)  # a single process has plain `cuda`; threads and comparisons need an index
        if compute.compile and logging_dir is not None:  # only trainings compile, and log
            check_compiler(accelerator.device)
        if precision.float32 is not None:
            set_float32(precision.float32)  # after Accelerate, which allows TF32 where it compiles
        if precision.line is not None and precision.line != _Command.precision:
            say(precision.line)
            _Command.precision = precision.line
        torch.set_num_threads(threads)
        # What a process found in the run before this line, all found: nobody writes into it earlier.
        accelerator.wait_for_everyone()
        if accelerator.num_processes > 1 and _Command.watch is None:
            _Command.watch = Watch(accelerator, compute.hang_timeout_minutes)
    return accelerator


def asked_to_shard(accelerator: Accelerator, compute: Compute) -> bool:
    """Whether several processes are to share out what they train: as the recipe says, or the launcher."""
    asked = _Command.launched_sharded if compute.sharded is None else compute.sharded
    return asked and accelerator.num_processes > 1


def finish(accelerator: Accelerator) -> None:
    """Let go of the other processes, once all are here: each may end, or go on alone for as long as it takes."""
    accelerator.wait_for_everyone()  # a launcher that sees one of them end may end the others
    accelerator.end_training()
    if _Command.watch is not None:
        _Command.watch.close()
        _Command.watch = None
    if accelerator.num_processes > 1:
        let_go()


def let_go() -> None:
    """Give gloo's threads the time to let go of their last collectives, for which they need the interpreter: one that has ended meanwhile
    ends such a thread, and with it the process (SIGABRT).
    """
    time.sleep(_LETTING_GO)


def _out_of_memory(error: Exception) -> tuple[str, int] | None:
    """In one line, with what takes less."""
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if not on_cpu and not isinstance(error, MemoryError | torch.OutOfMemoryError):
        return None
    return f"out of memory ({str(error).splitlines()[0] if str(error) else 'of this machine'}); {_Command.lighter}", 2


def _lost_peer(error: Exception) -> tuple[str, int] | None:
    """Which process was lost, if a collective failed for that."""
    failed = isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS_OF_LOST_PEERS)
    if not failed or _Command.watch is None:
        return None
    peer = _Command.watch.silent_peer()
    return None if peer is None else (f"{peer} has died; all end. Go on with --resume", ENDED_FOR_ANOTHER)


EXPLANATIONS.extend((_out_of_memory, _lost_peer))


def share_of_cores() -> int:
    """The cores that are this process's, of those that it may use: the processes of a machine share them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def average_gradients_(accelerator: Accelerator, module: nn.Module) -> None:
    """Give all processes the mean of their gradients, by one collective: for a module that nobody has prepared."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    if accelerator.num_processes == 1 or not gradients:
        return
    flat: Any = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def summed(accelerator: Accelerator, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor's sum over the processes, by one collective; as given on one process.

    Every process must call it with the same names and shapes.
    """
    if accelerator.num_processes == 1:
        return dict(tensors)
    device = accelerator.device
    flat = torch.cat([tensor.detach().to(device, widest_float(device)).flatten() for tensor in tensors.values()])
    parts: Any = accelerator.reduce(flat, "sum").split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view_as(tensor).to(tensor) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}
