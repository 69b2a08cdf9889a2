"""Run scripts in processes forked from a server that has already imported PyTorch, which saves seconds per start.

A script sees what `python SCRIPT` or `torchrun SCRIPT` gives it: its folder first on sys.path, the environment, the working directory and
its arguments. Variables that PyTorch reads on import (OMP_NUM_THREADS) are the server's.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

PRELOADED = ["torch._dynamo", "torch.distributed.tensor", "torchvision", "matplotlib.figure"]
"""Modules that take long to import; neither the project's nor ones that read the environment on import (huggingface_hub)."""
_FORKED = "__forked__"


def server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_script(
    path: Path, arguments: Sequence[str], cwd: Path, processes: int = 1, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a script in one process, or in several as `torchrun` does, and wait for it.

    Returns the exit code (for several processes 1 if any fails, as torchrun) and the output.
    Errors: subprocess.TimeoutExpired, once all its processes are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output_files = Path(folder, "stdout"), Path(folder, "stderr")
        for file in output_files:
            file.touch()
        port = free_port()
        started = []
        for rank in range(processes):
            rank_environment = {} if processes == 1 else torchrun_environment(rank, processes, port)
            request = (str(path), list(arguments), str(cwd), {**os.environ, **rank_environment}, *map(str, output_files))
            # By this file's path: in the server `tests` may be a dependency's package.
            started.append(server().Process(target=runpy.run_path, args=(__file__, {"request": request}, _FORKED)))
            started[-1].start()
        try:
            codes = _exit_codes(started, time.monotonic() + timeout)
        except TimeoutError:
            raise subprocess.TimeoutExpired(str(path), timeout, *(file.read_text() for file in output_files)) from None
        code = codes[0] if processes == 1 else int(any(codes))
        return subprocess.CompletedProcess([str(path), *arguments], code, *(file.read_text() for file in output_files))


def torchrun_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """Return the variables by which torchrun gives a process its rank."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
    return {**{name: str(number) for name, number in numbers.items()}, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _exit_codes(started: Sequence[ForkServerProcess], deadline: float) -> list[int]:
    """Wait for all processes; once one fails, the others are ended. Errors: TimeoutError at the deadline, once all are killed."""
    failed = False
    while any(process.exitcode is None for process in started):
        if time.monotonic() > deadline:
            for process in started:
                process.kill()
                process.join()
            raise TimeoutError
        if not failed and any(process.exitcode for process in started):
            failed = True
            for process in started:
                process.terminate()
            deadline = min(deadline, time.monotonic() + 30)
        for process in started:
            process.join(0.05)
    return [process.exitcode or 0 for process in started]


def _as_main(path: str, arguments: list[str], cwd: str, environment: Mapping[str, str], stdout: str, stderr: str) -> None:
    for stream, file in ((sys.stdout, stdout), (sys.stderr, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    sys.argv = [path, *arguments]
    sys.path[:] = [os.path.dirname(path), *filter(None, sys.path)]
    runpy.run_path(path, run_name="__main__")


if __name__ == _FORKED:
    _as_main(*globals()["request"])
