"""The project as a user has it who installed it without `-e`: from the wheel, with a checkout and without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from configs.run_dir import REPOSITORY, read_json

PACKAGES = ("configs", "stage1_vqvae", "stage2_prior", "pipelines")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the wheel is built from."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in PACKAGES:
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def installed(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, in place of site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), str(checkout)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site-packages")
    return folder / "site-packages"


def run(arguments: list[object], installed: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def test_the_wheel_holds_all_modules_and_all_that_lies_beside_them(installed: Path) -> None:
    def files(root: Path) -> set[str]:
        found = [path for name in PACKAGES for path in (root / name).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        return {str(path.relative_to(root)) for path in found}

    assert files(installed) == files(REPOSITORY)


def test_without_a_checkout_runs_lie_in_the_working_directory(installed: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    done = run(["-m", "stage1_vqvae.train", "--config", tiny_recipe, "--stage1.steps", 2], installed, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "tiny" / "tokenizer.safetensors").exists()
    assert not (installed / "runs").exists()
    assert "next: python -m stage2_prior.extract_codes" in done.stdout
    assert read_json(tmp_path / "runs" / "tiny" / "stage1" / "report.json")["steps"] == 2


def test_without_a_checkout_the_wheels_own_recipes_are_found(installed: Path, tmp_path: Path) -> None:
    done = run(["-m", "stage1_vqvae.train", "--config", "configs/cifar10.yaml", "--print-recipe"], installed, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "uoft-cs/cifar10" in done.stdout


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_checkouts_script_keeps_runs_in_the_checkout(installed: Path, checkout: Path, tmp_path: Path, where: str) -> None:
    """Its modules are the installed ones, but it is from there that the user works."""
    done = run([checkout / "stage1_vqvae" / "doctor.py"], installed, checkout if where == "inside" else tmp_path)
    assert done.returncode == 2
    assert f"error: {'runs/digits' if where == 'inside' else checkout / 'runs' / 'digits'}: there is no such run" in done.stderr


def test_a_checkouts_chain_is_of_its_own_scripts(installed: Path, checkout: Path, tmp_path: Path) -> None:
    """So that its steps look for runs where it does itself."""
    started = "from pipelines.run import Step; print(Step('report', 'pipelines/report.py', []).started()[1])"
    done = run(["-c", f"import sys; sys.argv[0] = {str(checkout / 'pipelines' / 'run.py')!r}; {started}"], installed, tmp_path)
    assert done.stdout.strip() == str(checkout / "pipelines" / "report.py"), done.stderr
