"""A user's mistake: one line that says where, what was expected and what was found."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
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
}

_SECONDS_FOR_THE_FIRST = 3.0

EXPLANATIONS: list[Callable[[Exception], tuple[str, int] | None]] = []
"""What packages that know more know of exceptions that are nobody's mistake: the line to say and the exit code; or None."""


class UserError(ValueError):
    """Something the user can put right. `run_entry` shows its message alone, without a traceback."""


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
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def run_entry(main: Callable[[], None]) -> None:
    """Run a script's `main`; user errors and unusable places end it with one line and exit code 2."""
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
        for explain in EXPLANATIONS:
            if (explained := explain(error)) is not None:
                fail(*explained)
        raise
