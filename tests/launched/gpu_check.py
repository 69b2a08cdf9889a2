"""The check of a GPU (`make gpu`) on a pretended one, at small sizes; its arguments are the check's."""

from __future__ import annotations

from benchmarks.gpu.check import main as check
from tests.pretended.device import Pretended


def main(arguments: list[str]) -> None:
    with Pretended():
        check(["--tiny", *arguments])
