"""The project installed from its wheel, in a separate environment and used from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from configs.run_dir import COMMANDS, REPOSITORY, read_json
from tests.test_layering import SCRIPTS

PACKAGES = ("configs", "training", "stage1_vqvae", "stage2_prior", "pipelines")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in (*PACKAGES, "two_stage"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / name)
    return folder


def build(source: Path, kind: str, folder: Path) -> Path:
    """Build a wheel as pip does; warnings fail the build."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(folder)], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment with the wheel and its dependencies, but without this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # Packages of a folder added this way are importable, but an editable installation's finder in it is not active.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def run(environment: Path, cwd: Path, command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command_line = [str(environment / command), *map(str, arguments)]
    return subprocess.run(command_line, capture_output=True, text=True, cwd=cwd, env=variables, check=False)


def test_the_wheel_has_everything_in_one_package(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {package: [path for path in (REPOSITORY / package).rglob("*") if path.is_file()] for package in (*PACKAGES, "two_stage")}
    package_files = {str(path.relative_to(REPOSITORY)) for path in files.pop("two_stage")}
    moved = {f"two_stage/{path.relative_to(REPOSITORY)}" for paths in files.values() for path in paths}
    assert names == {name for name in package_files | moved if not name.endswith(".pyc")}


def test_an_editable_installation_is_a_plain_path(source: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build(source, "editable", tmp_path)) as editable:
        files = {name: editable.read(name).decode() for name in editable.namelist() if ".dist-info/" not in name}
    assert [text.strip() for text in files.values()] == [str(source)]


def test_every_script_is_a_command() -> None:
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(COMMANDS) == {str(path.relative_to(REPOSITORY)) for path in SCRIPTS}
    assert scripts == {f"two-stage-{name}": f"two_stage.console:{name.replace('-', '_')}" for name in COMMANDS.values()}


def test_our_top_level_names_are_not_installed(environment: Path, tmp_path: Path) -> None:
    for name in PACKAGES:
        done = run(environment, tmp_path, "python", "-c", f"import {name}")
        assert f"No module named '{name}'" in done.stderr
    done = run(environment, tmp_path, "python", "-c", "import sys, two_stage.stage2_prior.train; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not set(PACKAGES) & {name.partition(".")[0] for name in done.stdout.split()}


def test_installed_commands_keep_runs_in_the_working_directory(environment: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    done = run(environment, tmp_path, "two-stage-train-tokenizer", "--config", tiny_recipe, "--stage1.steps", 2)
    assert done.returncode == 0, done.stderr
    assert "next: two-stage-extract-codes" in done.stdout
    assert read_json(tmp_path / "runs/tiny/stage1/report.json")["steps"] == 2
    done = run(environment, tmp_path, "two-stage-extract-codes")
    assert done.returncode == 0, done.stderr
    assert "next: accelerate launch -m two_stage.stage2_prior.train" in done.stdout


def test_installed_recipes_are_found(environment: Path, tmp_path: Path) -> None:
    done = run(environment, tmp_path, "two-stage-train-tokenizer", "--config", "configs/cifar10.yaml", "--print-recipe")
    assert done.returncode == 0, done.stderr
    assert "uoft-cs/cifar10" in done.stdout
    shown = run(environment, tmp_path, "two-stage-sample", "--help").stdout
    assert "two-stage-sample --n 64" in shown
    assert "pipelines/" not in shown
    assert run(environment, tmp_path, "two-stage-sample").stderr.startswith("error: runs/digits: there is no such run")


def test_installed_commands_sample_from_a_copied_run(environment: Path, run_copy: Path, tmp_path: Path) -> None:
    done = run(environment, tmp_path, "two-stage-sample", "--run", run_copy, "--n", 2)
    assert done.returncode == 0, done.stderr
    line = f"from two_stage import Generator; Generator.from_pretrained({str(run_copy)!r}, device='cpu').sample(2)[1].save('1.png')"
    done = run(environment, tmp_path, "python", "-c", line)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "1.png").read_bytes() == (run_copy / "samples/000/images/00001.png").read_bytes()


def test_the_chain_starts_the_installed_scripts(environment: Path, tmp_path: Path) -> None:
    line = "from two_stage.pipelines.run import Step; print(Step('report', 'pipelines/report.py', []).command_line()[1])"
    done = run(environment, tmp_path, "python", "-c", line)
    (site,) = environment.parent.glob("lib/python*/site-packages")
    assert done.stdout.strip() == str(site / "two_stage/pipelines/report.py"), done.stderr
    assert Path(done.stdout.strip()).is_file()
