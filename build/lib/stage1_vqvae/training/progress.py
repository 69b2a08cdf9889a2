"""The progress bar of every command."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, description: str, unit: str, *, initial: int = 0, shown: bool = True) -> Any:
    """A tqdm bar counting `unit`s; into a file or pipe it writes a line every ten seconds, not ten a second."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        unit_scale=True,
        disable=not shown,
        mininterval=interval,
        maxinterval=interval,
    )
