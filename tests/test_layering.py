"""Rules of the layout that import-linter (`make lint`) does not check."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from configs import spinning
from configs.data import TransformPart
from configs.parts import (
    FAMILIES,
    AdversarialPart,
    ConditionPart,
    NetworkPart,
    ObjectivePart,
    PerceptualPart,
    PriorPart,
    QuantizerPart,
    part_class,
)
from configs.run_dir import REPOSITORY

PACKAGES = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["root_packages"]
SCRIPTS = [
    path for package in PACKAGES for path in sorted((REPOSITORY / package).glob("*.py")) if '__name__ == "__main__"' in path.read_text()
]
FILES = [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]


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


def test_scripts_are_not_imported() -> None:
    scripts = {".".join(script.relative_to(REPOSITORY).with_suffix("").parts) for script in SCRIPTS}
    for path in FILES:
        assert not imported_modules(path) & scripts, path


def test_parts_of_recipes_exist_with_the_right_base_class() -> None:
    """The tables name classes by address: each is in the package of its family and has the expected base class."""
    bases = {
        "data.transform": ("data", TransformPart),
        "tokenizer.quantizer": ("quantizers", QuantizerPart),
        "tokenizer.network": ("networks", NetworkPart),
        "tokenizer.objective": ("objectives", ObjectivePart),
        "stage1.perceptual": ("objectives", PerceptualPart),
        "stage1.adversarial": ("objectives", AdversarialPart),
        "condition": ("conditions", ConditionPart),
        "prior": ("priors", PriorPart),
    }
    for family, kinds in FAMILIES.items():
        package, base = bases[family]
        for kind, address in kinds.items():
            assert address.split(".")[1] == package
            assert issubclass(part_class(family, kind), base)


def test_every_script_imports_spinning_before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP reads its settings when it is loaded; the user's settings win."""
    for script in SCRIPTS:
        imports = [node for node in ast.parse(script.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert [ast.unparse(node) for node in imports[:2]] == ["from __future__ import annotations", "from configs import spinning"], script
    for environment, expected in (
        ({}, str(spinning.SPIN_COUNT)),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
        ({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "8"}, "8"),
    ):
        monkeypatch.setattr(os, "environ", dict(environment))
        importlib.reload(spinning)
        assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_scripts_are_detected() -> None:
    names = {str(script.relative_to(REPOSITORY)) for script in SCRIPTS}
    assert names >= {"stage1_vqvae/train.py", "stage2_prior/extract_codes.py", "stage2_prior/train.py", "pipelines/sample.py"}


def test_configs_does_not_need_torch() -> None:
    modules = ", ".join(f"configs.{path.stem}" for path in (REPOSITORY / "configs").glob("*.py") if path.stem != "__init__")
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_neighbour_of_a_script_shadows_a_package() -> None:
    """A script's folder is first on sys.path, so a neighbour's name wins over a package of that name."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    neighbours = {path.stem for script in SCRIPTS for path in script.parent.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not (neighbours & taken) - {"__init__", "__pycache__"}


def test_only_tables_of_images_and_of_codes_import_datasets() -> None:
    owners = {path.name for path in FILES if any(module.split(".")[0] == "datasets" for module in imported_modules(path))}
    assert owners == {"tables.py", "columns.py", "readers.py", "listings.py", "streams.py", "exchange.py"}


def test_text_files_are_opened_with_an_encoding() -> None:
    """The system's default is not UTF-8 on Windows and in some locales."""
    for path in [*FILES, REPOSITORY / "setup.py", *(REPOSITORY / "benchmarks").rglob("*.py")]:
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant) and isinstance(argument.value, str)]
            opens = (
                isinstance(call.func, ast.Name) and name == "open" and not any("b" in mode for mode in [*modes, keywords.get("mode", "")])
            )
            is_text = (
                opens
                or (isinstance(call.func, ast.Attribute) and name in ("read_text", "write_text"))
                or keywords.get("text") == "True"
                or "universal_newlines" in keywords
            )
            assert not is_text or "encoding" in keywords, f"{path}:{call.lineno}: {ast.unparse(call)}"


def test_no_catch_all_module() -> None:
    assert not {path.stem for path in FILES} & {"utils", "util", "common", "helpers", "misc"}


def test_every_package_is_installed() -> None:
    listed = set(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert listed == {".".join(path.parent.relative_to(REPOSITORY).parts) for path in FILES if path.name == "__init__.py"}
