"""Compile guard.cpp and load it before torch is imported; the rest of a pretended device is Python (device.py)."""

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
    """Return the path of a C++ compiler, if there is one."""
    return next((path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (path := shutil.which(name))), None)


def build(folder: Path) -> Path:
    """Compile the library into a folder, in about a second. Errors: CalledProcessError with the compiler's output."""
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
    """Load the library, before torch. Its path is in the environment (see `LIBRARY`)."""
    assert "torch" not in sys.modules, "expected tests.pretended.device to be imported before torch"
    return ctypes.CDLL(os.environ[LIBRARY], ctypes.RTLD_GLOBAL)
