"""Slices of rows: batches, and a step's batch divided over ranks and micro-steps."""

from __future__ import annotations

from configs.errors import UserError


def batches(count: int, size: int) -> list[slice]:
    """Divide 0..count into slices of `size`, the last one shorter."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def share_of_step(batch_size: int, accumulation: int, micro_step: int, processes: int, rank: int) -> slice:
    """Return one rank's slice of a step's batch in one micro-step. The batch must divide evenly (`check_divides`)."""
    parts = accumulation * processes
    assert batch_size % parts == 0
    size = batch_size // parts
    start = (micro_step * processes + rank) * size
    return slice(start, start + size)


def most_processes(batch_size: int, accumulation: int, devices: int) -> int:
    """Return the largest number of processes, up to `devices`, that divides a step's batch evenly."""
    return max(processes for processes in range(1, devices + 1) if processes == 1 or batch_size % (accumulation * processes) == 0)


def next_accumulation(batch_size: int, accumulation: int, processes: int) -> int | None:
    """Return the next number of micro-steps that divides every rank's share of a step evenly; None: a micro-step is one image already."""
    share = batch_size // processes
    return next((parts for parts in range(accumulation + 1, share + 1) if share % parts == 0), None)


def check_divides(section: str, batch_size: int, accumulation: int, processes: int) -> None:
    """Errors: UserError if a step's batch does not divide evenly."""
    parts = accumulation * processes
    if batch_size % parts:
        shares = f"{processes} processes x {accumulation} micro-steps"
        fewer = f"--num_processes {most_processes(batch_size, accumulation, processes)}"
        raise UserError(
            f"{section}.batch_size: expected a multiple of {parts} ({shares}), found {batch_size}; or launch with accelerate launch {fewer}"
        )
