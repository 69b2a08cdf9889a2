"""Markdown tables, rendered by another project's parser."""

from __future__ import annotations

import html
import re

import pytest

from configs.markdown import escaped, markdown_table

NAMES = [
    "cat",
    "a|b",
    "a\\|b",
    "\\",
    "<unk>",
    "__background__",
    "*",
    "`x`",
    "two\nlines",
    "_a",
    "x_y",
    "[a](b)",
    "C:\\data",
    "&lt;",
    "a & b",
    "| --- |",
    "é",
]


def test_rendered_cells_show_the_original_text() -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    page = parser.render("\n".join(markdown_table([*NAMES], [NAMES, NAMES[::-1]])))
    cells = [html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", page)]
    shown = [name.replace("\n", " ") for name in NAMES]
    assert cells == [*shown, *shown, *shown[::-1]]


def test_plain_text_is_not_escaped() -> None:
    for text in ("usage, validation", "bits per token, prior x_y", "0.25 ± 0.1 (N = 12)", "8 x 12", "50 %"):
        assert escaped(text) == text
