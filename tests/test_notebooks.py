"""Every notebook of the documentation runs without errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.run_dir import REPOSITORY


@pytest.mark.parametrize("path", sorted((REPOSITORY / "docs").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path: Path, finished_run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jupyter", "execute", str(path), f"--output={tmp_path / 'executed.ipynb'}"]
    environment = {**os.environ, "RUN": str(finished_run)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "image/png" in (tmp_path / "executed.ipynb").read_text()
