"""A mistake is told in one line, whoever of the processes finds it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.run_dir import REPOSITORY

_SCRIPT = """
import os, sys, time
sys.path.insert(0, {repository!r})
from configs.errors import UserError, run_entry

def main():
    if os.environ["RANK"] in sys.argv[1:]:
        raise UserError("steps: expected more, found less")
    time.sleep(60)

run_entry(main)
"""


def test_a_home_that_nobody_has_is_told_in_one_line(one_line_error: Callable[..., str]) -> None:
    def main(arguments: list[str]) -> None:
        Path(arguments[0]).expanduser()

    assert "expected paths with a home directory that is known for `~`" in one_line_error(main, "~nobody-of-that-name/pictures")


@pytest.mark.parametrize("ranks", ["01", "1"])
def test_it_is_said_once_by_any_number_of_processes(ranks: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(_SCRIPT.format(repository=str(REPOSITORY)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--", tmp_path / "script.py", *ranks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: steps: expected more, found less") == 1
