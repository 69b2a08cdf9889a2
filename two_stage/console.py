"""The scripts as console commands: `two-stage-sample` is `python pipelines/sample.py`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from configs.errors import run_entry
from configs.run_dir import COMMANDS, ROOT


def __getattr__(name: str) -> Callable[[], None]:
    """The function of a command, by its name without the prefix, underscores for hyphens."""
    scripts = {command.replace("-", "_"): script for script, command in COMMANDS.items()}
    if name not in scripts:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def command() -> Any:
        module = ROOT + scripts[name].removesuffix(".py").replace("/", ".")
        run_entry(lambda: importlib.import_module(module).main())

    return command
