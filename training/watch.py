"""Processes that look after one another: one that has died or hangs ends the others, with a line that names it."""

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
"""Ticks without a sign of life after which a process counts as gone. Ticks, not seconds: whoever was stopped himself, by Ctrl-Z or a
suspended machine, has seen none go by."""
_LOST_PEER = 5
"""The same for whoever asks because a collective has failed."""
_JOINING = 600.0
"""Seconds in which all processes of a command have to have found one another."""
ENDED_FOR_ANOTHER = 70
"""Exit code of a process that ends because another one died or hangs: EX_SOFTWARE of sysexits.h."""

_PACKAGES = ("training", "stage1_vqvae", "stage2_prior", "pipelines")

_progress = 0
_together = 0


def progressed(together: bool = False) -> None:
    """Note that this process has got somewhere: every progress bar does, so that work of one for which the others wait is no hang.

    `together`: to a point to which all processes come equally often.
    """
    global _progress, _together
    _progress += 1
    _together += together


@contextmanager
def at_work() -> Iterator[None]:
    """While something is done that shows no progress of its own, however long it takes."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(_TICK):
            progressed()

    threading.Thread(target=run, name="at work", daemon=True).start()
    try:
        yield
    finally:
        done.set()


class Sign(NamedTuple):
    """What a process tells the others."""

    ticks: int = 0
    """How many it has lived."""
    progress: int = 0
    """How often it got somewhere."""
    together: int = 0
    """How often to a point to which all come equally often."""
    waits: bool = False
    """Whether it is waiting for others, as far as its stack shows."""
    place: str = "?"
    """The line of this project that it is at."""
    left: bool = False
    """Whether it needs nobody any more."""

    def encoded(self) -> str:
        """As text."""
        return json.dumps(self)


class Watch:
    """A thread of every process that tells the others that it lives, and how far it has got, and listens to theirs.

    What is known of a process is a `Sign`, in a store of the first one's. One that has said nothing for a minute is gone; if none gets
    anywhere for `patience`, the one that is behind hangs.
    """

    def __init__(self, accelerator: Accelerator, patience: float) -> None:
        """`patience`: minutes."""
        self._rank, self._count = accelerator.process_index, accelerator.num_processes
        self._patience = max(1, int(60 * patience / _TICK))
        own = accelerator.is_main_process
        store = dist.TCPStore(_host(), 0, is_master=True, wait_for_workers=False) if own else None
        port = [store.port if store is not None else 0]
        broadcast_object_list(port)
        self._store = store or dist.TCPStore(_host(), port[0], is_master=False)
        self._store.set(str(self._rank), Sign().encoded())
        self._store.set(f"name {self._rank}", f"process {self._rank} of {self._count} on {socket.gethostname()} (pid {os.getpid()})")
        accelerator.wait_for_everyone()
        self._names = [self._store.get(f"name {rank}").decode() for rank in range(self._count)]
        self._signs = [Sign()] * self._count
        self._silent = [0] * self._count
        self._still = 0
        self._main = threading.main_thread().ident
        self._done = threading.Event()
        self._heard: list[Sign] | None = None
        self._talking = threading.Thread(target=self._talk, name="watch", daemon=True)
        self._talking.start()
        threading.Thread(target=self._listen, name="watch", daemon=True).start()

    def close(self) -> None:
        """This process needs nobody any more, and nobody needs it."""
        self._done.set()
        self._talking.join(10 * _TICK)

    def silent_peer(self) -> str | None:
        """Another process that has said nothing for some seconds, waiting for that; None if all live."""
        for _ in range(4 * _LOST_PEER):
            time.sleep(_TICK)
            if gone := [rank for rank, ticks in enumerate(self._silent) if ticks >= _LOST_PEER and rank != self._rank]:
                return self._names[gone[0]]
        return None

    def _talk(self) -> None:
        """In a thread of its own, since a first process that was stopped leaves it without an answer for ever."""
        ticks = 0
        while not self._done.wait(_TICK):
            ticks += 1
            waits, place = self._whereabouts()
            with suppress(RuntimeError):  # the first process has ended
                self._store.set(str(self._rank), Sign(ticks, _progress, _together, waits, place).encoded())
                self._heard = [Sign(*json.loads(answer)) for answer in self._store.multi_get([str(rank) for rank in range(self._count)])]
        with suppress(RuntimeError):
            self._store.set(str(self._rank), Sign(left=True).encoded())

    def _listen(self) -> None:
        while not self._done.wait(_TICK):
            heard, self._heard = self._heard, None
            if heard is None:
                self._silent[0] += 1
            else:
                self._note(heard)
            if (why := self._fault()) is not None and not self._done.is_set():
                self._end(why)

    def _whereabouts(self) -> tuple[bool, str]:
        """Whether this process waits for others, and the innermost line of this project that it is at."""
        frame = sys._current_frames().get(self._main or 0)
        waits, place = False, "?"
        while frame is not None and place == "?":
            path = Path(frame.f_code.co_filename)
            waits = waits or "distributed" in path.parts
            if path.is_relative_to(REPOSITORY) and path.relative_to(REPOSITORY).parts[0] in _PACKAGES:
                place = f"{path.relative_to(REPOSITORY)}:{frame.f_lineno}"
            frame = frame.f_back
        return waits, place

    def _note(self, signs: list[Sign]) -> None:
        for rank, (sign, before) in enumerate(zip(signs, self._signs, strict=True)):
            self._silent[rank] = 0 if sign.left or sign.ticks != before.ticks else self._silent[rank] + 1
        same = [sign.progress for sign in signs] == [sign.progress for sign in self._signs]
        self._still = self._still + 1 if same else 0
        self._signs = signs

    def _fault(self) -> str | None:
        gone = [self._names[rank] for rank, ticks in enumerate(self._silent) if ticks >= _SILENT]
        if gone:
            return f"{gone[0]} has died, or was stopped: nothing was heard of it for {_SILENT * _TICK:.0f} seconds"
        working = [rank for rank, sign in enumerate(self._signs) if not sign.left]
        if self._still < self._patience or len(working) < 2:
            return None
        hung = min(working, key=lambda rank: (self._signs[rank].together, self._signs[rank].waits))
        place = self._signs[hung].place
        return f"{self._names[hung]} hangs at {place}: no process got on for {self._patience * _TICK / 60:g} minutes (compute.hang_timeout_minutes)"

    def _end(self, why: str) -> None:
        living = [rank for rank, ticks in enumerate(self._silent) if ticks < _LOST_PEER and not self._signs[rank].left]
        if living and living[0] == self._rank:
            print(f"error: {why}; all end. Go on with --resume", file=sys.stderr, flush=True)
        # First the line is said, before a launcher sees one of them end; last the store goes.
        time.sleep(_TICK if self._rank > 0 else 4 * _TICK)
        os._exit(ENDED_FOR_ANOTHER)


@contextmanager
def joining(count: int) -> Iterator[None]:
    """While processes look for one another: who waits for too long ends, for of the others nothing can be heard yet."""

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
    """End this process when the launcher that started it does: torchrun's processes have sessions of their own, so that nothing else would
    tell them, and would wait for one another for as long as they are patient. A training saves first.
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
