"""The rules that hold the house up."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from configs.run_dir import REPOSITORY

# Each package may import those before it.
ORDER = ["configs", "stage1_vqvae", "stage2_prior", "pipelines"]
SCRIPTS = [
    path for package in ORDER for path in sorted((REPOSITORY / package).glob("*.py")) if '__name__ == "__main__"' in path.read_text()
]
FILES = [path for package in ORDER for path in sorted((REPOSITORY / package).rglob("*.py"))]


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.add(node.module or "")
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(REPOSITORY).parts[0]
    later = ORDER[ORDER.index(package) + 1 :]
    assert not [module for module in imported_modules(path) if module.split(".")[0] in later]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_nobody_imports_a_script(path: Path) -> None:
    scripts = {".".join(script.relative_to(REPOSITORY).with_suffix("").parts) for script in SCRIPTS}
    assert not imported_modules(path) & scripts


def test_there_are_scripts() -> None:
    names = {str(script.relative_to(REPOSITORY)) for script in SCRIPTS}
    assert names >= {"stage1_vqvae/train.py", "stage2_prior/extract_codes.py", "stage2_prior/train.py", "pipelines/sample.py"}


def test_configs_does_not_need_torch() -> None:
    modules = ", ".join(f"configs.{path.stem}" for path in (REPOSITORY / "configs").glob("*.py") if path.stem != "__init__")
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_file_beside_a_script_hides_a_package() -> None:
    """A script's folder is first on sys.path, so a neighbour's name wins over a package of that name."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    own = {path.stem for script in SCRIPTS for path in script.parent.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not (own & taken) - {"__init__", "__pycache__"}


def test_only_images_imports_datasets() -> None:
    owners = {path.name for path in FILES if any(module.split(".")[0] == "datasets" for module in imported_modules(path))}
    assert owners == {"images.py"}


def test_no_catch_all_module() -> None:
    assert not {path.stem for path in FILES} & {"utils", "util", "common", "helpers", "misc"}


def test_every_package_is_installed() -> None:
    listed = set(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert listed == {".".join(path.parent.relative_to(REPOSITORY).parts) for path in FILES if path.name == "__init__.py"}
