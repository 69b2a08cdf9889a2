"""Exported graphs that several test files read: tracing them takes longer than most tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from configs.run_dir import new_folder, write_json
from pipelines import Generator
from pipelines.exporting.folder import export_graphs
from stage2_prior.train import main as train_prior
from tests.pipelines.exported_page import export_other


def filled_once(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """Return a folder that the first worker which needs it fills for all workers."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with FileLock(root / f"{name}.lock"):
        if not (root / name).exists():
            with new_folder(root / name) as folder:
                fill(folder)
    return root / name


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> Path:
    """Folder with `run`, whose prior depends on the label (or the run named by RUN), and its `graphs` with their model.json."""

    def fill(folder: Path) -> None:
        run = shutil.copytree(os.environ.get("RUN", finished_run), folder / "run")
        if "RUN" not in os.environ:
            train_prior(["--run", str(run), "--name", "longer", "--stage2.steps", "60"])
        (folder / "graphs").mkdir()
        generator = Generator.from_pretrained(run, device="cpu", precision="float32")
        write_json(folder / "graphs" / "model.json", export_graphs(generator, folder / "graphs"))

    return filled_once(tmp_path_factory, "exported", fill)


@pytest.fixture(scope="session")
def exported_other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs of `other_tokenizer` and `other_prior`, and the entries for their model.json."""
    return filled_once(tmp_path_factory, "exported other", export_other)
