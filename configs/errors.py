"""A user's mistake: one line that says where, what was expected and what was found."""

from __future__ import annotations

import errno
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

# What the file system answers when the user's place to write to (or read from) is at fault, not our code.
_PLACE_AT_FAULT = {
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

_SECONDS_FOR_THE_FIRST = 3.0
_LONGEST_MESSAGE, _LONGEST_REASON = 1000, 200  # characters
_MOST_LISTED, _LONGEST_NAME = 10, 60
_CUT = " [...] "
_CACHES = ("two-stage-image-generator", "huggingface", "torch")

EXPLANATIONS: list[Callable[[Exception], tuple[str, int] | None]] = []
"""What packages that know more know of exceptions that are nobody's mistake: the line to say and the exit code; or None."""


class UserError(ValueError):
    """Something the user can put right. `run_entry` shows its message alone, without a traceback."""

    def __str__(self) -> str:
        return shortened(super().__str__())


def shortened(text: str, longest: int = _LONGEST_MESSAGE) -> str:
    """A text in one line of at most `longest` characters; a longer one loses its middle, since what helps stands at the end."""
    text = " ".join(text.split())
    if len(text) <= longest:
        return text
    head = longest * 2 // 3
    tail = longest - head - len(_CUT)
    return f"{text[:head]}{_CUT}{text[-tail:]}"


def brief(error: BaseException) -> str:
    """The reason that another library gives (its first paragraph) in one short line; the name of its class if it gives none."""
    return shortened(str(error).strip().split("\n\n")[0], _LONGEST_REASON) or type(error).__name__


def listed(names: Iterable[object], most: int = _MOST_LISTED) -> str:
    """The first names of a list in a message: `a, b, c and 90 more`; `none` of an empty one."""
    each = [shortened(str(name), _LONGEST_NAME) for name in names]
    more = f" and {len(each) - most:,} more" if len(each) > most else ""
    return ", ".join(each[:most]) + more or "none"


def require(holds: bool, key: str, expected: str, found: object) -> None:
    """Errors: ValueError that names the recipe's key, if a value cannot work."""
    if not holds:
        raise ValueError(f"{key}: expected {expected}, found {found}")


def require_text(key: str, value: object) -> None:
    """Errors: UserError that names the option or key, if a value is an empty or blank text, which as a path is the working directory."""
    if isinstance(value, str) and not value.strip():
        raise UserError(f"{key}: expected a value, found {value!r}")


def say(line: str) -> None:
    """Print a line, once, by the main process; for what is said before Accelerate runs."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one line (once a machine, so that eight processes do not say it eight times) and exit with that code."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # The launcher ends the others once one has failed: who is alive after this has something to say that no other said.
        time.sleep(_SECONDS_FOR_THE_FIRST)
    print(f"error: {shortened(message)}", file=sys.stderr, flush=True)
    sys.exit(code)


def print_anything() -> None:
    r"""Let standard output take every character: one that its encoding lacks is printed as `\u4e2d`.

    Consoles in cp1252 or ASCII would end a finished training at the name of its run.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def have_a_cache() -> None:
    """Name a folder for caches (ours, torch's, `datasets`') where the user has no home folder that can be written, as in many containers:
    they would fail, or fill a folder called `~` in the working directory. One that was filled for a user who may only read it is left.
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
    """Run a script's `main`; user errors and unusable places end it with one line and exit code 2."""
    print_anything()
    have_a_cache()
    try:
        main()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:  # training loops finish their step instead; elsewhere nothing is half written
        say("interrupted")
        sys.exit(130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _PLACE_AT_FAULT:
            fail(f"{error.filename or 'the output'}: {error.strerror}")
        if isinstance(error, RuntimeError) and str(error).startswith("Could not determine home directory"):  # of Path.expanduser
            fail("~ in a path: expected a home folder (HOME, or of the user that it names), found none; write the path in full")
        for explain in EXPLANATIONS:
            if (explained := explain(error)) is not None:
                fail(*explained)
        raise
