"""A wheel holds all packages under one name, so that `configs` and `pipelines` do not stand beside other projects' in site-packages.

In a checkout, and installed with `-e`, they keep their own names, which the commands `python pipelines/sample.py` and so on need.
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
    """Moves the packages that were built into ROOT, and their imports with them."""

    def run(self) -> None:
        """Build, then move."""
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
