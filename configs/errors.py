"""User errors: one line that names the option or file, the expected value and the actual one."""

from __future__ import annotations

import atexit
import errno
import gc
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

# Error numbers of paths that cannot be read or written, which the user can correct.
_PATH_ERRORS = {
    errno.EACCES,
    errno.EEXIST,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    *([errno.EINVAL] if os.name == "nt" else []),  # a name with a colon or a question mark in it
}

_FIRST_RANK_SECONDS = 3.0
_LONGEST_MESSAGE, _LONGEST_REASON = 1000, 200  # characters
_MOST_LISTED, _LONGEST_NAME = 10, 60
_CUT = " [...] "
_CACHES = ("two-stage-image-generator", "huggingface", "torch")

EXPLANATIONS: list[Callable[[Exception], tuple[str, int] | None]] = []
"""Functions from an exception to its line and exit code, or None; packages that know more exceptions append theirs."""


class UserError(ValueError):
    """An error that the user can correct. `run_entry` prints its message without a traceback."""

    def __str__(self) -> str:
        return shortened(super().__str__())


def shortened(text: str, longest: int = _LONGEST_MESSAGE) -> str:
    """Shorten a text to one line of at most `longest` characters by cutting its middle: advice is at the end."""
    text = " ".join(text.split())
    if len(text) <= longest:
        return text
    head = longest * 2 // 3
    tail = longest - head - len(_CUT)
    return f"{text[:head]}{_CUT}{text[-tail:]}"


def brief(error: BaseException) -> str:
    """Return the first paragraph of another library's error in one short line; the name of its class if it has no message."""
    return shortened(str(error).strip().split("\n\n")[0], _LONGEST_REASON) or type(error).__name__


def listed(names: Iterable[object], most: int = _MOST_LISTED) -> str:
    """Join the first names of a list for a message: `a, b, c and 90 more`; `none` if it is empty."""
    short = [shortened(str(name), _LONGEST_NAME) for name in names]
    more = f" and {len(short) - most:,} more" if len(short) > most else ""
    return ", ".join(short[:most]) + more or "none"


def require(holds: bool, key: str, expected: str, value: object) -> None:
    """Errors: ValueError that names the recipe's key, unless `holds`."""
    if not holds:
        raise ValueError(f"{key}: expected {expected}, found {value}")


def require_text(key: str, value: object) -> None:
    """Errors: UserError that names the option or key, if a value is a blank text, which as a path would be the working directory."""
    if isinstance(value, str) and not value.strip():
        raise UserError(f"{key}: expected a value, found {value!r}")


def say(line: str) -> None:
    """Print a line on the main process; works before Accelerate is started."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def fail(message: str, code: int = 2) -> NoReturn:
    """Print an error line, once per machine, and exit with a code."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # The launcher ends the other ranks once one has failed: a rank alive after this has another error.
        time.sleep(_FIRST_RANK_SECONDS)
    print(f"error: {shortened(message)}", file=sys.stderr, flush=True)
    sys.exit(code)


def escape_unprintable() -> None:
    r"""Let standard output escape characters that its encoding lacks, as `\u4e2d`: a console in ASCII would fail at a run's name."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def set_cache_folder() -> None:
    """Set a temporary folder for caches (ours, torch's, `datasets`') where the home folder cannot be written, as in many containers.

    A read-only cache that has been filled stays in use.
    """
    if "XDG_CACHE_HOME" in os.environ:
        return
    usual = os.path.expanduser("~/.cache")
    try:
        Path(usual).expanduser().mkdir(parents=True, exist_ok=True)
        usable = os.access(usual, os.W_OK) or any(os.path.isdir(os.path.join(usual, name)) for name in _CACHES)
    except (OSError, RuntimeError):
        usable = False
    if not usable:
        user = os.getuid() if hasattr(os, "getuid") else "user"
        os.environ["XDG_CACHE_HOME"] = str(Path(tempfile.gettempdir(), f"two-stage-cache-{user}"))


def run_entry(main: Callable[[], None]) -> None:
    """Run a script's `main`; user errors and unusable paths end it with one line and exit code 2."""
    escape_unprintable()
    set_cache_folder()
    atexit.register(gc.freeze)  # otherwise the interpreter's last collection walks through PyTorch for a second
    try:
        main()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:  # outside training loops, which finish their step
        say("interrupted")
        sys.exit(130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _PATH_ERRORS:
            fail(f"{error.filename or 'the output'}: {error.strerror}")
        if isinstance(error, RuntimeError) and str(error).startswith("Could not determine home directory"):  # of Path.expanduser
            fail("~ in a path: expected a home folder (HOME, or of the user that it names), found none; write the path in full")
        for explain in EXPLANATIONS:
            if (explained := explain(error)) is not None:
                fail(*explained)
        raise
