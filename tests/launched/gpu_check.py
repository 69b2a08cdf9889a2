"""Run the GPU check (`make gpu`) on a pretended GPU at small sizes."""

from __future__ import annotations

from benchmarks.gpu.check import main as check
from tests.pretended.device import Pretended


def main(arguments: list[str]) -> None:
    with Pretended():
        check(["--tiny", *arguments])
