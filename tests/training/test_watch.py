"""Two processes without a launcher: if one is lost, the other ends soon and says why."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from configs.run_dir import REPOSITORY
from training.watch import ENDED_FOR_ANOTHER

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@contextmanager
def two_ranks(*arguments: object) -> Iterator[list[subprocess.Popen[str]]]:
    """Start two ranks, as a cluster's command does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", "tests/launched/one_of_two.py", *map(str, arguments)]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **environment, "PYTHONPATH": str(REPOSITORY), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(("fault", "victim"), [("die", 1), ("hang", 1), ("stop", 0)])  # tests/faults has the others
def test_the_surviving_rank_ends_and_names_the_lost_one(fault: str, victim: int) -> None:
    with two_ranks(fault, victim) as processes:
        survivor = processes[1 - victim]
        survivor.wait(120)
        if fault == "hang":  # either rank may report it
            processes[victim].wait(60)
            assert processes[victim].returncode == ENDED_FOR_ANOTHER
        printed = "".join(process.communicate()[1] for process in ((processes[0], processes[1]) if fault == "hang" else (survivor,)))
        lines = [line for line in printed.splitlines() if line.startswith("error: ")]
        name = rf"process {victim} of 2 on {re.escape(socket.gethostname())} \(pid {processes[victim].pid}\)"
        assert survivor.returncode == ENDED_FOR_ANOTHER, printed
        assert len(lines) == 1, printed
        assert re.match(rf"error: {name} (has died|hangs at)", lines[0])
        assert ("hangs" in lines[0]) == (fault == "hang")
        assert "Traceback" not in printed


def test_a_rank_may_continue_after_the_other_is_done() -> None:
    with two_ranks("run", 0) as processes:
        for process in processes:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            assert "is done" in out
            assert "error" not in err


def test_a_missing_rank_is_reported() -> None:
    with two_ranks("never come", 1) as processes:
        _, printed = processes[0].communicate(timeout=120)
        assert processes[0].returncode == ENDED_FOR_ANOTHER
        assert "expected 2 processes to find one another" in printed


def test_workers_end_with_their_launcher() -> None:
    """Torchrun starts them in separate sessions, so no signal reaches them."""
    launcher = psutil.Popen(
        [*TORCHRUN, "tests/launched/one_of_two.py", "go on", "0"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert launcher.stdout is not None
    met = ""
    while met.count("they have met") < 2:
        met += launcher.stdout.readline()
    workers = [child for child in launcher.children(recursive=True) if "one_of_two.py" in " ".join(child.cmdline())]
    assert len(workers) == 2
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    for process in alive:
        process.kill()
    launcher.stdout.close()
    assert not alive
