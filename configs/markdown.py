"""Tables in Markdown, whatever is in their cells: labels and names of files are the user's own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# Underscores inside words are plain; at their edges they would make what is between them bold.
_SPECIAL = re.compile(r"[\\|<&`*]|\](?=[\[(])|(?<![^\W_])_+|_+(?![^\W_])")


def escaped(text: str) -> str:
    """A text as Markdown shows it, in a cell of a table too: special characters are escaped, and line breaks become blanks."""
    return _SPECIAL.sub(lambda found: "".join(f"\\{character}" for character in found[0]), " ".join(text.split("\n")))


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table: its head, and rows of as many texts."""
    return [_row(map(escaped, columns)), _row(["---"] * len(columns)), *(_row(map(escaped, row)) for row in rows)]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
