"""Prefetching: two keys ahead, errors at their key, no thread left behind; a reader of steps that restarts at any step."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from training.prefetch import StepReader, read_ahead


def test_the_next_two_keys_are_prefetched() -> None:
    started = [threading.Event() for _ in range(6)]

    def read(number: int) -> int:
        started[number].set()
        return number * number

    stream = read_ahead(read, range(6), ahead=True)
    assert next(stream) == 0
    assert started[1].wait(5)
    assert started[2].wait(5)
    assert not started[3].wait(0.1)
    assert list(stream) == [1, 4, 9, 16, 25]


@pytest.mark.parametrize("ahead", [True, False])
def test_reading_errors_are_raised_at_their_key(ahead: bool) -> None:
    def read(number: int) -> int:
        if number == 2:
            raise UserError("no image")
        return number

    stream = read_ahead(read, range(6), ahead)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(UserError, match="no image"):
        next(stream)


def test_closing_the_stream_ends_its_thread_without_waiting_for_it() -> None:
    """The garbage collector may close it in a thread that holds locks of `threading`, which joining another thread takes."""
    before, release, reading = set(threading.enumerate()), threading.Event(), threading.Event()  # an earlier test's thread may still end

    def started() -> set[threading.Thread]:
        return set(threading.enumerate()) - before

    def read(number: int) -> int:
        if number:
            reading.set()
            release.wait(60)
        return number

    stream = read_ahead(read, itertools.count(), ahead=True)
    assert next(stream) == 0
    assert reading.wait(5)
    closing = threading.Thread(target=stream.close, daemon=True)  # type: ignore[attr-defined]
    closing.start()
    closing.join(5)
    assert not closing.is_alive()
    assert started()
    release.set()
    end = time.monotonic() + 5
    while started() and time.monotonic() < end:
        time.sleep(0.01)
    assert not started()


@pytest.mark.parametrize("ahead", [True, False])
def test_a_step_reader_restarts_when_called_out_of_order(ahead: bool) -> None:
    def read(key: tuple[int, int]) -> tuple[Tensor, ...]:
        return (torch.tensor(key),)

    reader = StepReader(read, 3, torch.device("cpu"), ahead)
    keys = [(0, 1), (0, 2), (1, 0), (4, 2), (5, 0), (0, 0), (0, 0)]
    assert [tuple(reader.at(*key)[0].tolist()) for key in keys] == keys
    assert reader.waited() > 0
    assert reader.waited() == 0
