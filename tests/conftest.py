"""Shared fixtures: a folder of pictures, a tiny recipe, a finished run, ways to start scripts."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from matplotlib.figure import Figure
from PIL import Image

from configs.run_dir import REPOSITORY
from tests.launched import plots
from tests.launched.forked import run_script
from tests.pretended import guard

os.environ.setdefault("HF_HUB_OFFLINE", "1")

Script = Callable[..., subprocess.CompletedProcess[str]]
Pretended = Callable[..., subprocess.CompletedProcess[str]]

# Files that start first: one that forks, which a process that has run autograd's threads cannot; and those that take a minute or more, so
# that no worker ends up running one alone.
FIRST = (
    "test_faults.py",
    "test_ranks.py",
    "test_pretended_gpu.py",
    "test_two_processes.py",
    "test_app.py",
    "test_export_web.py",
    "test_run.py",
    "test_train.py",
    "test_resume.py",
    "test_evaluate.py",
    "test_extending.py",
    "test_watch.py",
    "test_installed.py",
    "test_priors.py",
    "test_coder.py",
    "test_hierarchies.py",
)

# Non-square, so that height and width cannot be swapped unnoticed: 8x12 pixels, 2x3 codes.
TINY = {
    "data": {"height": 8, "width": 12, "channels": 3, "validation_share": 0.25},
    "tokenizer": {
        "code_dim": 4,
        "quantizer": {"num_codes": 16},
        "network": {"hidden_channels": 16, "residual_channels": 8, "residual_blocks": 1},
    },
    "stage1": {
        "steps": 60,
        "batch_size": 8,
        "lr": 3e-3,
        "warmup_steps": 2,
        "log_interval": 10,
        "validation_interval": 30,
        "checkpoint_interval": 30,
        "restart_interval": 3,
        "augmentation": "horizontal_flip",
    },
    "extraction": {"batch_size": 7, "shard_rows": 8},
    "prior": {"layers": 2, "width": 16, "heads": 2, "dropout": 0.1},
    "stage2": {
        "optimizer": "muon",
        "steps": 8,
        "batch_size": 8,
        "lr": 1e-2,
        "warmup_steps": 2,
        "log_interval": 2,
        "validation_interval": 4,
        "checkpoint_interval": 4,
        "condition_dropout": 0.3,
    },
    # Tests run in parallel, and work this small gains nothing from a second thread.
    "compute": {"threads": 1},
}


class Killed(BaseException):
    """Stands for SIGKILL: no exception handler of a command catches it."""


def failing(error: BaseException) -> Callable[..., None]:
    """Return a function that always raises `error`."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def write_pictures(folder: Path, count: int = 24, size: tuple[int, int] = (12, 8)) -> None:
    """Write `count` pictures for each of two labels: colour gradients along one axis or the other, from fixed seeds."""
    for label, name in enumerate(("across", "down")):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            colours = np.random.default_rng((label, number)).uniform(0, 255, (2, 3))
            ramp = np.linspace(0, 1, size[label])[:, None] * (colours[1] - colours[0]) + colours[0]
            pixels = np.broadcast_to(ramp[None] if label == 0 else ramp[:, None], (size[1], size[0], 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:03d}.png")


def check_names_no_place(*roots: Path) -> None:
    """Check that no file of these folders contains a path of this machine: temporary files, code, Python, the home folder."""
    files = [path for root in roots for path in (root.rglob("*") if root.is_dir() else [root]) if path.is_file()]
    assert files
    places = [str(Path(tempfile.gettempdir(), "pytest-of")), str(REPOSITORY), sys.prefix, str(Path.home())]
    for file in files:
        content = file.read_bytes()
        assert not [place for place in places if len(place) > 5 and place.encode() in content], file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def pytest_collection_finish() -> None:
    """Exclude imported modules from garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": {**TINY["data"], "path": str(pictures)}}))
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    """A run with tokenizer, codes and prior. Never write into it: take `run_copy`."""
    from stage1_vqvae.train import main as train_tokenizer
    from stage2_prior.extract_codes import main as extract_codes
    from stage2_prior.train import main as train_prior

    run = tmp_path_factory.mktemp("runs") / "finished"
    train_tokenizer(["--config", str(tiny_recipe), "--run", str(run)])
    extract_codes(["--run", str(run)])
    train_prior(["--run", str(run)])
    return run


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of FID's Inception in its published format, with random weights that keep features in the range of pixels."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object, **__: object) -> None:
            pass

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    weights = Untrained("untrained", ["2048"], feature_extractor_weights_path=str(folder / "empty.pth")).state_dict()
    draws = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if name.endswith("conv.weight") or name == "fc.weight":
            weight.normal_(std=(2 / weight[0].numel()) ** 0.5, generator=draws)
        elif name.endswith("bn.bias"):
            weight.normal_(std=0.1, generator=draws)
    torch.save(weights, folder / "weights.pth")
    return folder / "weights.pth"


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture(scope="session", autouse=True)
def _temporary_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep decoded images of tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_rendering() -> Iterator[None]:
    """Do not render plots, except in tests that use `rendered`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Figure, "savefig", plots.save_blank)
        yield


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Render plots."""
    monkeypatch.setattr(Figure, "savefig", plots.savefig)


@pytest.fixture(autouse=True)
def _fresh_accelerate_state() -> None:
    """Reset Accelerate's singletons before each test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()
    torch.manual_seed(0)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def script() -> Script:
    """Run a script of the repository in one new process or several."""

    def run(
        path: str, *arguments: object, processes: int = 1, cwd: Path = REPOSITORY, threads: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        options = [] if threads is None else ["--compute.threads", str(threads)]
        return run_script(REPOSITORY / path, [*map(str, arguments), *options], cwd, processes)

    return run


@pytest.fixture(scope="session")
def pretended(tmp_path_factory: pytest.TempPathFactory) -> Pretended:
    """Run a module's `main(arguments)` on pretended devices (tests/pretended/device.py) in new processes:
    `pretended("cuda", 2, "tests.pretended.chain", ...)`.
    """
    if guard.compiler() is None:
        pytest.skip("a pretended device needs a C++ compiler, which this machine does not have")
    environment = {**os.environ, guard.LIBRARY: str(guard.build(tmp_path_factory.mktemp("guard")))}

    def run(kind: str, devices: int, program: str, *arguments: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--"]
        words = [str(REPOSITORY / "tests/pretended/run.py"), kind, str(devices), program, *map(str, arguments)]
        command = [sys.executable, *(torchrun if processes > 1 else []), *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=300, check=False, env=environment)

    return run


@pytest.fixture
def one_line_error(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a script's `main`, which must exit with code 2 and one line on standard error; return the line."""
    from configs.errors import run_entry

    def run(main: Callable[[list[str]], None], *arguments: object) -> str:
        with pytest.raises(SystemExit) as exit_info:
            run_entry(lambda: main([str(argument) for argument in arguments]))
        captured = [
            line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line and "examples/s]" not in line
        ]
        assert exit_info.value.code == 2
        assert len(captured) == 1, captured
        assert captured[0].startswith("error: ")
        return captured[0]

    return run
