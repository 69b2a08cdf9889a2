"""Run a program on pretended devices, in a new process.

    python tests/pretended/run.py cuda 2 tests.pretended.chain ARGUMENTS ...

The fixture `pretended` of tests/conftest.py compiles the library and starts this script. A program is a module with `main(arguments)`.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).parents[2]


def main() -> None:
    kind, devices, program, *arguments = sys.argv[1:]
    # Not an installed package of that name.
    sys.modules["tests"] = ModuleType("tests")
    sys.modules["tests"].__path__ = [str(_ROOT / "tests")]
    sys.path[0] = str(_ROOT)
    from tests.pretended import device

    device.install(kind, int(devices))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from tests.pretended import processes

        processes.install()
    importlib.import_module(program).main(arguments)


if __name__ == "__main__":
    main()
