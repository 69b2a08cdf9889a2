"""Progress bars."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm import tqdm

from training.watch import progressed

_WORTH_SHOWING = 5.0  # seconds


class _Bar(tqdm):
    """A bar, shown or not, that counts as progress of its rank."""

    def update(self, n: float | None = 1) -> bool | None:
        progressed()
        return super().update(n)


def progress_bar(total: int, description: str, unit: str, *, initial: int = 0, shown: bool = True, within: bool = False) -> Any:
    """Create a tqdm bar that counts `unit`s, shown by the first rank; into a file or pipe it writes a line every ten seconds.

    `within`: a bar inside another one's step; it appears after five seconds, and is cleared at its end.
    """
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return _Bar(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        unit_scale=True,
        disable=not shown or os.environ.get("RANK", "0") != "0",
        delay=_WORTH_SHOWING if within else 0.0,
        leave=not within,
        mininterval=interval,
        maxinterval=interval,
    )
