"""Mistakes end in one line, printed by one process; any console encoding and a missing home folder are supported."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.data import Data
from configs.errors import UserError, listed, run_entry
from configs.run_dir import REPOSITORY, write_text
from stage1_vqvae.data.cache import cache_folder

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


def test_an_unknown_home_folder_gets_one_line(one_line_error: Callable[..., str]) -> None:
    def main(arguments: list[str]) -> None:
        Path(arguments[0]).expanduser()

    assert "~ in a path: expected a home folder" in one_line_error(main, "~nobody-of-that-name/pictures")


@pytest.mark.parametrize("ranks", ["01", "1"])
def test_an_error_is_printed_once_by_any_number_of_processes(ranks: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(_SCRIPT.format(repository=str(REPOSITORY)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--", tmp_path / "script.py", *ranks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: steps: expected more, found less") == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_names_can_be_printed_in_any_encoding(encoding: str, errors: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with Chinese letters and a byte that is not UTF-8 are printed, and written to files."""
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding, errors=errors))
    run_entry(lambda: print("wrote runs/\u4e2d\udce4 \u00e9", flush=True))
    text = printed.getvalue().decode(encoding)
    assert text.startswith("wrote runs/" + ("\u4e2d" if encoding == "utf-8" else "\\u4e2d"))
    assert ("\u00e9" if encoding != "ascii" else "\\xe9") in text
    write_text(tmp_path / "report.md", "runs/\u4e2d\udce4\n")
    assert (tmp_path / "report.md").read_bytes() == "runs/\u4e2d\\udce4\n".encode()


def test_the_cache_folder_needs_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run_entry(lambda: None)
    assert cache_folder(Data()).is_relative_to(tmp_path / "home/.cache")
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # so that monkeypatch restores it
    monkeypatch.delenv("XDG_CACHE_HOME")
    run_entry(lambda: None)
    assert not cache_folder(Data()).is_relative_to(tmp_path)
    assert cache_folder(Data()).is_relative_to(tempfile.gettempdir())


def test_long_messages_are_shortened_in_the_middle(one_line_error: Callable[..., str]) -> None:
    """The expected value stays at the start and the advice at the end."""

    def fail(_: list[str]) -> None:
        raise UserError(f"column: expected one of {'name, ' * 20_000} found none; name it by --data.image_column")

    line = one_line_error(fail)
    assert len(line) < 1100
    assert line.startswith("error: column: expected one of name, name")
    assert line.endswith("found none; name it by --data.image_column")
    assert listed(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
    assert listed(["a", "b"]) == "a, b"
    assert listed([]) == "none"
    assert len(listed(["x" * 5000] * 5000)) < 1000
