"""A command's ranks: start, end, errors that only they see, and sums over them."""

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
_GLOO_GRACE = 0.5  # seconds; without, 5 of 34 small commands on a busy machine aborted at their end, with it 0 of 30
# Hours, because one host may have decoded its images when another begins to. watch.py finds hung ranks earlier.
_COLLECTIVE_TIMEOUT = 2.0
SMALLER_BATCHES = "take fewer images at once (--batch_size N)"
"""Out-of-memory advice of commands that have this option."""
_FEWER_IMAGES = "give it fewer images"
_LOST_PEER_WORDS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


class _Command:
    """State of this process's command."""

    watch: Watch | None = None
    oom_hint = _FEWER_IMAGES
    launched_sharded = False
    precision: str | None = None
    """Last precision line printed, so that it is printed once."""


def start(compute: Compute, logging_dir: str | None = None, oom_hint: str = _FEWER_IMAGES) -> Accelerator:
    """Start a command's ranks. Returns their Accelerator, with this rank's share of the cores. Until `finish`, ranks watch one another.

    Args:
        compute: the recipe's section.
        logging_dir: folder of trackers.
        oom_hint: advice appended to an out-of-memory error.

    Launchers set OMP_NUM_THREADS=1 where nobody set it, which would leave most cores idle on a CPU. DDP does not broadcast buffers: the
    quantizers themselves keep the codebooks of all ranks equal. On a GPU the precision is chosen here, and printed (precision.py).
    Autocast covers what is prepared: training. Validation, extraction and decoding run in float32 with TF32 products (likelihoods
    without): they take a small part of a run's time, and all later commands read their results.
    """
    timeout = timedelta(hours=max(_COLLECTIVE_TIMEOUT, compute.hang_timeout_minutes / 30))
    on_cpu = not torch.accelerator.is_available()
    if compute.tracker is not None and importlib.util.find_spec(compute.tracker) is None:
        raise UserError(
            f"compute.tracker {compute.tracker}: expected the package {compute.tracker}, found none; pip install {compute.tracker}"
        )
    # Accelerate's own use of a name that torch 2.14 deprecates.
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
    _Command.oom_hint = oom_hint
    # Accelerate would shard whatever is prepared, and nothing on a CPU; sharding.py decides instead.
    _Command.launched_sharded = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true" or _Command.launched_sharded
    launched_threads = check_launcher(_Command.launched_sharded)
    threads = compute.threads or launched_threads or share_of_cores()
    with joining(launched):
        try:
            accelerator = Accelerator(
                # Without it Accelerate does not join a launcher's processes on a machine without accelerators.
                cpu=on_cpu,
                mixed_precision=precision.networks,
                log_with=compute.tracker,
                dynamo_backend=_COMPILER if compute.compile else None,
                project_dir=logging_dir,
                kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=timeout)],
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
        # Before this line every rank sees the run as it was: no rank writes into it earlier.
        accelerator.wait_for_everyone()
        if accelerator.num_processes > 1 and _Command.watch is None:
            _Command.watch = Watch(accelerator, compute.hang_timeout_minutes)
    return accelerator


def asked_to_shard(accelerator: Accelerator, compute: Compute) -> bool:
    """Return whether several ranks shard the prior that they train: as the recipe says, otherwise as the launcher says."""
    asked = _Command.launched_sharded if compute.sharded is None else compute.sharded
    return asked and accelerator.num_processes > 1


def finish(accelerator: Accelerator) -> None:
    """Wait for all ranks, then detach from them: each may end, or go on alone for as long as it takes."""
    accelerator.wait_for_everyone()  # a launcher that sees one of them end may end the others
    accelerator.end_training()
    if _Command.watch is not None:
        _Command.watch.close()
        _Command.watch = None
    if accelerator.num_processes > 1:
        wait_for_gloo()


def wait_for_gloo() -> None:
    """Give gloo's threads time to finish their last collectives: a thread that outlives the interpreter aborts the process (SIGABRT)."""
    time.sleep(_GLOO_GRACE)


def _out_of_memory(error: Exception) -> tuple[str, int] | None:
    """Return the line and exit code of an out-of-memory error; None for any other."""
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if not on_cpu and not isinstance(error, MemoryError | torch.OutOfMemoryError):
        return None
    return f"out of memory ({str(error).splitlines()[0] if str(error) else 'of this machine'}); {_Command.oom_hint}", 2


def _lost_peer(error: Exception) -> tuple[str, int] | None:
    """Return the line and exit code of a collective that failed because a rank died; None for any other error."""
    failed = isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST_PEER_WORDS)
    if not failed or _Command.watch is None:
        return None
    peer = _Command.watch.silent_peer()
    return None if peer is None else (f"{peer} has died; all end. Go on with --resume", ENDED_FOR_ANOTHER)


EXPLANATIONS.extend((_out_of_memory, _lost_peer))


def share_of_cores() -> int:
    """Return this process's share of the cores, which the processes of a machine divide among them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def average_gradients_(accelerator: Accelerator, module: nn.Module) -> None:
    """Average a module's gradients over all ranks, by one collective: for modules outside DDP."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    if accelerator.num_processes == 1 or not gradients:
        return
    flat: Any = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def summed(accelerator: Accelerator, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum each tensor over all ranks, by one collective.

    Every rank must call it with the same names and shapes.
    """
    if accelerator.num_processes == 1:
        return dict(tensors)
    device = accelerator.device
    flat = torch.cat([tensor.detach().to(device, widest_float(device)).flatten() for tensor in tensors.values()])
    parts: Any = accelerator.reduce(flat, "sum").split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view_as(tensor).to(tensor) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}
