"""Tables in Markdown, with cells escaped: labels and file names may contain anything."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# Underscores inside words are plain; at their edges they mark emphasis.
_SPECIAL = re.compile(r"[\\|<&`*]|\](?=[\[(])|(?<![^\W_])_+|_+(?![^\W_])")


def escaped(text: str) -> str:
    """Escape a text for Markdown, table cells included: special characters are escaped, line breaks become spaces."""
    return _SPECIAL.sub(lambda match: "".join(f"\\{character}" for character in match[0]), " ".join(text.split("\n")))


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table with a header and rows of cells."""
    return [_row(map(escaped, columns)), _row(["---"] * len(columns)), *(_row(map(escaped, row)) for row in rows)]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
