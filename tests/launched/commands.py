"""Run several commands one after another in the same processes, since starting takes longer than any of them here.

torchrun ... tests/launched/commands.py pipelines.sample ARGUMENTS [NEXT pipelines.complete ARGUMENTS ...]
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from accelerate import Accelerator

from configs.errors import run_entry
from training import processes

NEXT = "NEXT"


def commands(words: list[str]) -> list[list[str]]:
    """Split a list of words at NEXT."""
    groups: list[list[str]] = [[]]
    for word in words:
        if word == NEXT:
            groups.append([])
        else:
            groups[-1].append(word)
    return groups


@contextmanager
def staying_joined() -> Iterator[None]:
    """Keep the process group from command to command and destroy it at the end: a group that is left when a process exits may abort it."""
    wait_for_gloo = processes.wait_for_gloo
    processes.wait_for_gloo = lambda: None
    Accelerator.end_training = Accelerator.wait_for_everyone  # type: ignore[method-assign]
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        wait_for_gloo()


def main() -> None:
    from plots import leave_blank  # a script's folder is first on sys.path

    leave_blank()
    with staying_joined():
        for module, *arguments in commands(sys.argv[1:]):
            importlib.import_module(module).main(arguments)


if __name__ == "__main__":
    run_entry(main)
