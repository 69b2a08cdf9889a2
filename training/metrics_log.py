"""metrics.jsonl, one JSON object per line (step, split, named numbers); and the recipe's tracker, if it has one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from configs.run_dir import append_json_line, write_text


class MetricsLog:
    """A log that the main process appends to; a resumed training first cuts it back to its checkpoint's step."""

    def __init__(self, path: Path, accelerator: Accelerator, first_step: int) -> None:
        self._accelerator = accelerator
        self.path = path
        if accelerator.is_main_process:
            records = [record for record in read_metrics(path) if record["step"] <= first_step]
            write_text(path, "".join(json.dumps(record) + "\n" for record in records))

    def write(self, step: int, split: str, values: Mapping[str, float | str]) -> None:
        """Log `values` of `split` after `step` steps."""
        if self._accelerator.is_main_process:
            append_json_line(self.path, {"step": step, "split": split, **values})
        if self._accelerator.trackers:
            self._accelerator.log({f"{split}/{name}": value for name, value in values.items()}, step=step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl, oldest first; a last line cut short by a crash is skipped."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
