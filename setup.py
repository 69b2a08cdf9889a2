"""Builds a wheel that holds all packages inside `two_stage`, so that names like `configs` stay free in site-packages.

In a checkout, and installed with `-e`, the packages keep their own names: `python pipelines/sample.py` imports `configs`. So the wheel's
build moves them and rewrites their imports.
"""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = "two_stage"
PACKAGES = ("configs", "training", "stage1_vqvae", "stage2_prior", "pipelines")
IMPORT = re.compile(rf"^(\s*from )(?=({'|'.join(PACKAGES)})\b)", re.MULTILINE)


class UnderOneName(build_py):
    """Move the built packages into ROOT and rewrite their imports."""

    def run(self) -> None:
        """Build the packages, then move them unless the installation is editable."""
        super().run()
        if self.editable_mode:
            return
        built = Path(self.build_lib)
        for package in PACKAGES:
            shutil.rmtree(built / ROOT / package, ignore_errors=True)  # of an earlier build
            shutil.move(built / package, built / ROOT / package)
        for path in (built / ROOT).rglob("*.py"):
            path.write_text(IMPORT.sub(rf"\g<1>{ROOT}.", path.read_text(encoding="utf-8")), encoding="utf-8")


setup(cmdclass={"build_py": UnderOneName})
