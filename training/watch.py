"""A watch over ranks: when one dies or hangs, the others end, with a line that names it."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from configs.run_dir import REPOSITORY

_TICK = 1.0  # second
_SILENT = 60
"""Ticks without a heartbeat after which a rank counts as dead. Ticks, not seconds: a rank that was stopped itself, by Ctrl-Z or a suspended
machine, has counted none."""
_LOST_PEER = 5
"""Ticks without a heartbeat after which a failed collective is blamed on a rank."""
_JOINING = 600.0
"""Seconds within which all ranks of a command must have joined."""
ENDED_FOR_ANOTHER = 70
"""Exit code of a rank that ends because another one died or hangs: EX_SOFTWARE of sysexits.h."""

_PACKAGES = ("training", "stage1_vqvae", "stage2_prior", "pipelines")

_progress = 0
_together = 0


def progressed(together: bool = False) -> None:
    """Count progress of this rank: every progress bar does, so that work for which the other ranks wait is no hang.

    `together`: at a point that all ranks pass equally often.
    """
    global _progress, _together
    _progress += 1
    _together += together


@contextmanager
def at_work() -> Iterator[None]:
    """Count progress while the block runs, for work that counts none itself."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(_TICK):
            progressed()

    threading.Thread(target=run, name="at work", daemon=True).start()
    try:
        yield
    finally:
        done.set()


class Heartbeat(NamedTuple):
    """Signs of life of a rank."""

    ticks: int = 0
    """Ticks since its start."""
    progress: int = 0
    """Counted progress."""
    together: int = 0
    """Progress at points that all ranks pass equally often."""
    waits: bool = False
    """Whether its stack shows a wait for other ranks."""
    place: str = "?"
    """Innermost line of this project on its stack."""
    left: bool = False
    """Whether it has detached from the others."""

    def encoded(self) -> str:
        """Return the heartbeat as text."""
        return json.dumps(self)


class Watch:
    """Threads of every rank that exchange heartbeats through a store of the first rank.

    A rank without a heartbeat for a minute is dead; if no rank makes progress for `timeout_minutes`, the one behind hangs.
    """

    def __init__(self, accelerator: Accelerator, timeout_minutes: float) -> None:
        self._rank, self._count = accelerator.process_index, accelerator.num_processes
        self._timeout = max(1, int(60 * timeout_minutes / _TICK))
        own = accelerator.is_main_process
        store = dist.TCPStore(_host(), 0, is_master=True, wait_for_workers=False) if own else None
        port = [store.port if store is not None else 0]
        broadcast_object_list(port)
        self._store = store or dist.TCPStore(_host(), port[0], is_master=False)
        self._store.set(str(self._rank), Heartbeat().encoded())
        self._store.set(f"name {self._rank}", f"process {self._rank} of {self._count} on {socket.gethostname()} (pid {os.getpid()})")
        accelerator.wait_for_everyone()
        self._names = [self._store.get(f"name {rank}").decode() for rank in range(self._count)]
        self._heartbeats = [Heartbeat()] * self._count
        self._silent = [0] * self._count
        self._still = 0
        self._main = threading.main_thread().ident
        self._done = threading.Event()
        self._received: list[Heartbeat] | None = None
        self._sender = threading.Thread(target=self._send, name="watch", daemon=True)
        self._sender.start()
        threading.Thread(target=self._listen, name="watch", daemon=True).start()

    def close(self) -> None:
        """Detach from the other ranks."""
        self._done.set()
        self._sender.join(10 * _TICK)

    def silent_peer(self) -> str | None:
        """Wait some seconds for missing heartbeats. Returns: the name of a silent rank; None if all live."""
        for _ in range(4 * _LOST_PEER):
            time.sleep(_TICK)
            if gone := [rank for rank, ticks in enumerate(self._silent) if ticks >= _LOST_PEER and rank != self._rank]:
                return self._names[gone[0]]
        return None

    def _send(self) -> None:
        """Send heartbeats, in a thread of its own: while the first rank is stopped, its store never answers."""
        ticks = 0
        while not self._done.wait(_TICK):
            ticks += 1
            waits, place = self._whereabouts()
            with suppress(RuntimeError):  # the first process has ended
                self._store.set(str(self._rank), Heartbeat(ticks, _progress, _together, waits, place).encoded())
                self._received = [
                    Heartbeat(*json.loads(answer)) for answer in self._store.multi_get([str(rank) for rank in range(self._count)])
                ]
        with suppress(RuntimeError):
            self._store.set(str(self._rank), Heartbeat(left=True).encoded())

    def _listen(self) -> None:
        while not self._done.wait(_TICK):
            received, self._received = self._received, None
            if received is None:
                self._silent[0] += 1
            else:
                self._update(received)
            if (why := self._fault()) is not None and not self._done.is_set():
                self._end(why)

    def _whereabouts(self) -> tuple[bool, str]:
        """Return whether this rank waits for others, and the innermost line of this project on its stack."""
        frame = sys._current_frames().get(self._main or 0)
        waits, place = False, "?"
        while frame is not None and place == "?":
            path = Path(frame.f_code.co_filename)
            waits = waits or "distributed" in path.parts
            if path.is_relative_to(REPOSITORY) and path.relative_to(REPOSITORY).parts[0] in _PACKAGES:
                place = f"{path.relative_to(REPOSITORY)}:{frame.f_lineno}"
            frame = frame.f_back
        return waits, place

    def _update(self, heartbeats: list[Heartbeat]) -> None:
        for rank, (heartbeat, before) in enumerate(zip(heartbeats, self._heartbeats, strict=True)):
            self._silent[rank] = 0 if heartbeat.left or heartbeat.ticks != before.ticks else self._silent[rank] + 1
        same = [heartbeat.progress for heartbeat in heartbeats] == [heartbeat.progress for heartbeat in self._heartbeats]
        self._still = self._still + 1 if same else 0
        self._heartbeats = heartbeats

    def _fault(self) -> str | None:
        gone = [self._names[rank] for rank, ticks in enumerate(self._silent) if ticks >= _SILENT]
        if gone:
            return f"{gone[0]} has died, or was stopped: nothing was heard of it for {_SILENT * _TICK:.0f} seconds"
        working = [rank for rank, heartbeat in enumerate(self._heartbeats) if not heartbeat.left]
        if self._still < self._timeout or len(working) < 2:
            return None
        hung = min(working, key=lambda rank: (self._heartbeats[rank].together, self._heartbeats[rank].waits))
        place = self._heartbeats[hung].place
        minutes = f"{self._timeout * _TICK / 60:g} minutes (compute.hang_timeout_minutes)"
        return f"{self._names[hung]} hangs at {place}: no process got on for {minutes}"

    def _end(self, why: str) -> None:
        living = [rank for rank, ticks in enumerate(self._silent) if ticks < _LOST_PEER and not self._heartbeats[rank].left]
        if living and living[0] == self._rank:
            print(f"error: {why}; all end. Go on with --resume", file=sys.stderr, flush=True)
        # The line comes first, before a launcher sees a rank end; the first rank, with the store, ends last.
        time.sleep(_TICK if self._rank > 0 else 4 * _TICK)
        os._exit(ENDED_FOR_ANOTHER)


@contextmanager
def joining(count: int) -> Iterator[None]:
    """End this process if the block, in which ranks join, takes too long: there are no heartbeats yet."""

    def end() -> None:
        found = f"found one missing, or stopped, after {_JOINING / 60:g} minutes"
        print(f"error: expected {count} processes to find one another, {found}; all end", file=sys.stderr, flush=True)
        os._exit(ENDED_FOR_ANOTHER)

    timer = threading.Timer(_JOINING, end)
    timer.daemon = True
    if count > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@cache
def end_with_the_launcher() -> None:
    """End this process when the launcher that started it ends; a training saves first. torchrun's processes have sessions of their own, so
    no signal reaches them.
    """
    launcher = os.getppid()

    def run() -> None:
        while os.getppid() == launcher:
            time.sleep(_TICK)
        print("error: the launcher of this process has ended, and so does it", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_SILENT * _TICK)
        os._exit(ENDED_FOR_ANOTHER)

    threading.Thread(target=run, name="launcher", daemon=True).start()


def _host() -> str:
    return os.environ.get("MASTER_ADDR", "127.0.0.1")
