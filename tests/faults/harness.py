"""Commands in processes of their own that can be hit at any moment, and what shows that they came to no harm.

Processes are forked from one that has everything imported, so that hundreds of them take minutes.
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

_PATIENCE = 120.0  # seconds that a command may take
_SILENT = 15  # ticks of a fifth of a second after which a process counts as gone


_JOINING = 20.0  # seconds


class Hung(AssertionError):
    """A command that went on for ever."""


@dataclass
class Ended:
    """How a command's processes ended."""

    codes: list[int]
    """Exit codes; of a signal, its number below zero."""
    said: str = ""
    """What they printed, both streams."""
    seconds: float = 0.0


@dataclass
class Blow:
    """What hits a command's processes: at a moment from its start, or at the nth time that one renames, syncs or removes something."""

    seconds: float | None = None
    signal: signal.Signals = signal.SIGKILL
    ranks: tuple[int, ...] | None = None
    """None: all."""
    at_call: int | None = None
    late: dict[int, float] = field(default_factory=dict)
    """Seconds by which a process begins later."""


def run(command: Command, folder: Path, processes: int = 1, blow: Blow | None = None) -> Ended:
    """Run a command to its end, whatever that is. Errors: Hung."""
    blow = blow or Blow()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [folder / f"said.{rank}" for rank in range(processes)]
    began = time.monotonic()
    children = [_fork(command, rank, processes, port, outputs[rank], blow) for rank in range(processes)]
    codes: dict[int, int] = {}
    hit = blow.seconds is None
    stopped: set[int] = set()
    while len(codes) < processes:
        elapsed = time.monotonic() - began
        if not hit and blow.seconds is not None and elapsed >= blow.seconds:
            hit = True
            for rank in range(processes):
                if rank not in codes and (blow.ranks is None or rank in blow.ranks):
                    os.kill(children[rank], blow.signal)
                    if blow.signal == signal.SIGSTOP:
                        stopped.add(rank)
        for rank, child in enumerate(children):
            if rank not in codes:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        if stopped and len(codes) + len(stopped) == processes:  # the others have ended: as a scheduler would, end it
            for rank in stopped:
                os.kill(children[rank], signal.SIGKILL)
            stopped = set()
        if elapsed > _PATIENCE:
            for rank in range(processes):
                if rank not in codes:
                    os.kill(children[rank], signal.SIGKILL)
                    os.waitpid(children[rank], 0)
            raise Hung(f"{' '.join(command)} by {processes}: " + "".join(path.read_text() for path in outputs)[-2000:])
        time.sleep(0.005)
    said = "".join(path.read_text(errors="replace") for path in outputs)
    return Ended([codes[rank] for rank in range(processes)], said, time.monotonic() - began)


def _fork(command: Command, rank: int, processes: int, port: int, output: Path, blow: Blow) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        warnings.resetwarnings()  # as for users, not as in tests
        descriptor = os.open(output, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        if processes > 1:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ.update({key: str(value) for key, value in {**place, "RANK": rank, "LOCAL_RANK": rank}.items()})
            watch._TICK, watch._SILENT, watch._LOST_PEER, watch._JOINING = 0.2, _SILENT, 5, _JOINING
        time.sleep(blow.late.get(rank, 0.0))
        if blow.at_call is not None and (blow.ranks is None or rank in blow.ranks):
            _die_at_call(blow.at_call)
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
    # As at the interpreter's end: what is still being written, is.
    import threading

    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    os._exit(code)


def _die_at_call(number: int) -> None:
    """SIGKILL before the call of that number that changes what files are called, or makes them last."""
    left = [number]

    def dying(call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*given: object, **named: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given, **named)

        return wrapped

    for name in ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))


def damage(path: Path, draw: random.Random, how: str) -> None:
    """Truncate a file, or flip one of its bits, at random."""
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    if how == "truncated":
        content = content[:place]
    else:
        content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def contents(folder: Path, *patterns: str) -> dict[str, bytes | str]:
    """Files by their paths in a folder: JSON without times, everything else byte for byte."""
    found: dict[str, bytes | str] = {}
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                name = str(path.relative_to(folder))
                found[name] = timeless(path) if path.suffix == ".json" else path.read_bytes()
    return found


def timeless(path: Path) -> str:
    """JSON without what is another at every run."""

    def kept(value: object) -> object:
        if isinstance(value, dict):
            return {key: kept(inner) for key, inner in value.items() if key not in ("minutes", "seconds", "environment", "time", "run")}
        return [kept(inner) for inner in value] if isinstance(value, list) else value

    return json.dumps(kept(json.loads(path.read_text())))


def is_whole(path: Path) -> bool:
    """Whether a safetensors file can be opened."""
    try:
        with safe_open(path, "pt"):
            return True
    except Exception:
        return False
