"""Compiles guard.cpp, and loads it before torch is imported: everything else of a pretended device is Python (device.py)."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

LIBRARY = "PRETENDED_GUARD"
"""The environment variable that names the compiled library."""


def compiler() -> str | None:
    """The C++ compiler of this machine, if it has one."""
    return next((found for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (found := shutil.which(name))), None)


def build(folder: Path) -> Path:
    """The library, compiled into a folder within about a second. Errors: CalledProcessError, with what the compiler says."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations
    torch = Path(spec.submodule_search_locations[0])
    library = folder / "guard.so"
    headers = ["-I", str(torch / "include")]
    linked = ["-L", str(torch / "lib"), "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
    source = Path(__file__).with_name("guard.cpp")
    command = [str(compiler()), "-std=c++20", "-O0", "-shared", "-fPIC", *headers, str(source), "-o", str(library), *linked]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def load() -> ctypes.CDLL:
    """The library in this process, ahead of torch. Its path is in the environment (see `LIBRARY`)."""
    assert "torch" not in sys.modules, "expected tests.pretended.device to be imported before torch"
    return ctypes.CDLL(os.environ[LIBRARY], ctypes.RTLD_GLOBAL)
