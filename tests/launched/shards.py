"""Save checkpoints of a small network sharded over the processes, with errors on the last rank.

torchrun ... tests/launched/shards.py FOLDER
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from configs.errors import UserError, run_entry
from configs.schema import Compute
from training.checkpoint import Checkpoints
from training.optimizer import OptimizerState, adamw
from training.processes import finish, start
from training.sharding import gathered, local_tensor, shard_


def net() -> nn.Sequential:
    """Build a network whose tensors do not divide evenly over two or three ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(3, 8), nn.Linear(8, 5), nn.Linear(5, 1, bias=False))


def main() -> None:
    folder = Path(sys.argv[1])
    accelerator = start(Compute(threads=1))
    model = net()
    shard_(accelerator, model, [model[1]])
    optimizer = adamw(model, 1e-2, 0.1, beta2=0.95)
    checkpoints = Checkpoints(folder, "stage 2", 2, accelerator, sharded=True)
    last = accelerator.process_index == accelerator.num_processes - 1

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "optimizer": OptimizerState(model, optimizer).state_dict()}
        checkpoints.save(step, {**state, "best": {"step": step, "bits": float("inf")}})

    for step in (1, 2, 3):
        model(torch.arange(4) % 3).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        save(step)
    checkpoints.wait()
    expected = gathered(accelerator, model.state_dict())
    if accelerator.is_main_process:
        torch.save(expected, folder / "expected.pt")
    say(accelerator, "on the disk", sorted(path.name for path in folder.glob("step-*")))

    sync = os.fsync
    if last:
        os.fsync = full  # type: ignore[assignment]
    save(4)
    try:
        checkpoints.wait()
    except OSError as error:
        say(accelerator, "full", error)
    os.fsync = sync

    with torch.no_grad():
        if last:
            local_tensor(model[1].weight)[0] = float("nan")
    try:
        save(5)
    except UserError as error:
        say(accelerator, "broken", error)
    finish(accelerator)


def full(_: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def say(accelerator: Accelerator, label: str, value: object) -> None:
    # One write per line: print writes the newline separately, and other ranks may interleave.
    sys.stdout.write(f"{accelerator.process_index} {label}: {value}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    run_entry(main)
