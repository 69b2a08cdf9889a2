"""An evaluation, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluate import main

CLASSIFIER = ["--features", "classifier"]


def evaluated(run: Path, *arguments: object) -> dict[str, Any]:
    before = set((run / "evaluations").glob("*"))
    main(["--run", str(run), *map(str, arguments)])
    (new,) = set((run / "evaluations").glob("*")) - before
    content = json.loads((new / "evaluation.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    shown = (new / "evaluation.md").read_text()
    assert all(cell in shown for table in content["tables"] for row in table["rows"] for cell in row)
    return content
