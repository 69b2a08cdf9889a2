"""Run commands in processes that faults can hit at any moment, and compare their results.

Processes are forked from one that has imported everything, so that hundreds of them take minutes.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open

from configs.errors import run_entry
from training import watch

Command = list[str]
"""A module and its arguments."""

_TIMEOUT = 120.0  # seconds per command
_SILENT_TICKS = 15  # ticks of 0.2 s without a sign of life, after which a process counts as lost


_JOINING_SECONDS = 20.0  # seconds


class Hung(AssertionError):
    """A command did not end in time."""


@dataclass
class Result:
    """Exit codes and output of a command's processes."""

    codes: list[int]
    """Exit codes; the negative number of a signal that killed the process."""
    output: str = ""
    """Standard output and error of all processes."""
    seconds: float = 0.0


@dataclass
class Fault:
    """A fault for a command's processes: a signal after some seconds, or SIGKILL at the nth file operation."""

    seconds: float | None = None
    signal: signal.Signals = signal.SIGKILL
    ranks: tuple[int, ...] | None = None
    """Ranks that are hit; None: all."""
    at_call: int | None = None
    late: dict[int, float] = field(default_factory=dict)
    """Seconds by which a rank starts late."""


def run(command: Command, folder: Path, processes: int = 1, fault: Fault | None = None) -> Result:
    """Run a command until all its processes have ended. Errors: Hung."""
    fault = fault or Fault()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outputs = [folder / f"output.{rank}" for rank in range(processes)]
    start = time.monotonic()
    children = [_fork(command, rank, processes, port, outputs[rank], fault) for rank in range(processes)]
    codes: dict[int, int] = {}
    hit = fault.seconds is None
    stopped: set[int] = set()
    while len(codes) < processes:
        elapsed = time.monotonic() - start
        if not hit and fault.seconds is not None and elapsed >= fault.seconds:
            hit = True
            for rank in range(processes):
                if rank not in codes and (fault.ranks is None or rank in fault.ranks):
                    os.kill(children[rank], fault.signal)
                    if fault.signal == signal.SIGSTOP:
                        stopped.add(rank)
        for rank, child in enumerate(children):
            if rank not in codes:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        if stopped and len(codes) + len(stopped) == processes:  # the others have ended: kill it, as a scheduler would
            for rank in stopped:
                os.kill(children[rank], signal.SIGKILL)
            stopped = set()
        if elapsed > _TIMEOUT:
            for rank in range(processes):
                if rank not in codes:
                    os.kill(children[rank], signal.SIGKILL)
                    os.waitpid(children[rank], 0)
            raise Hung(f"{' '.join(command)} by {processes}: " + "".join(path.read_text() for path in outputs)[-2000:])
        time.sleep(0.005)
    output = "".join(path.read_text(errors="replace") for path in outputs)
    return Result([codes[rank] for rank in range(processes)], output, time.monotonic() - start)


def _fork(command: Command, rank: int, processes: int, port: int, output: Path, fault: Fault) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        warnings.resetwarnings()  # as outside tests
        descriptor = os.open(output, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        if processes > 1:
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ.update({key: str(value) for key, value in {**environment, "RANK": rank, "LOCAL_RANK": rank}.items()})
            watch._TICK, watch._SILENT, watch._LOST_PEER, watch._JOINING = 0.2, _SILENT_TICKS, 5, _JOINING_SECONDS
        time.sleep(fault.late.get(rank, 0.0))
        if fault.at_call is not None and (fault.ranks is None or rank in fault.ranks):
            _die_at_call(fault.at_call)
        module, *arguments = command
        run_entry(lambda: importlib.import_module(module).main(arguments))
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    # As at the interpreter's exit, let writing threads finish.
    import threading

    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    os._exit(code)


def _die_at_call(number: int) -> None:
    """Make the process kill itself before its nth call that renames, syncs, makes or removes files."""
    remaining = [number]

    def counting(call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **keywords: object) -> object:
            remaining[0] -= 1
            if remaining[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **keywords)

        return wrapped

    for name in ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir"):
        setattr(os, name, counting(getattr(os, name)))


def damage(path: Path, rng: random.Random, kind: str) -> None:
    """Truncate a file or flip one of its bits at a random position."""
    content = bytearray(path.read_bytes())
    position = rng.randrange(len(content))
    if kind == "truncated":
        content = content[:position]
    else:
        content[position] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def contents(folder: Path, *patterns: str) -> dict[str, bytes | str]:
    """Read files of a folder by relative path: JSON without times, everything else as bytes."""
    files: dict[str, bytes | str] = {}
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                name = str(path.relative_to(folder))
                files[name] = timeless(path) if path.suffix == ".json" else path.read_bytes()
    return files


def timeless(path: Path) -> str:
    """Read JSON without the entries that differ between runs."""

    def without_times(value: object) -> object:
        if isinstance(value, dict):
            return {
                key: without_times(item) for key, item in value.items() if key not in ("minutes", "seconds", "environment", "time", "run")
            }
        return [without_times(item) for item in value] if isinstance(value, list) else value

    return json.dumps(without_times(json.loads(path.read_text())))


def is_whole(path: Path) -> bool:
    """Whether a safetensors file can be opened."""
    try:
        with safe_open(path, "pt"):
            return True
    except Exception:
        return False
