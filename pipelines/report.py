"""Write one self-contained HTML file about a run: recipe, data, curves, pictures, samples, evaluation, environment.

    python pipelines/report.py
    python pipelines/report.py --run fashion_mnist

Writes report.html into the run, replacing an earlier one. The file needs no other files and no network: it can be mailed, and read on a
phone. For results that the run does not have yet, it names the command that computes them.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from configs.cli import parse
from configs.errors import run_entry
from configs.run_dir import write_text
from pipelines.reporting.content import report_content

_TEMPLATE = "report.html.jinja"


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    command = parse(__doc__, (), argv)
    run = command.run
    command.need_tokenizer()
    path = run.path / "report.html"
    write_text(path, rendered(report_content(command)))
    print(f"wrote {run.show(path)} ({path.stat().st_size / 1e6:.1f} MB)")


def rendered(content: dict[str, Any]) -> str:
    """Render the page. All text is escaped, since labels and paths come from the user."""
    loader = FileSystemLoader(Path(__file__).parent / "reporting")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(_TEMPLATE).render(content)


if __name__ == "__main__":
    run_entry(main)
