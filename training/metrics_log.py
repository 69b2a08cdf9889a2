"""metrics.jsonl, always; a tracker beside it when asked. One JSON object a line: step, split, named numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from configs.run_dir import append_json_line, write_text


class MetricsLog:
    """Appends to `path` on the main process. A resumed run cuts it back to the step it goes on from."""

    def __init__(self, path: Path, accelerator: Accelerator, first_step: int) -> None:
        self._accelerator = accelerator
        self.path = path
        if accelerator.is_main_process:
            kept = [record for record in read_metrics(path) if record["step"] <= first_step]
            write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, step: int, split: str, values: Mapping[str, float | str]) -> None:
        """Note `values` of `split` after `step` steps."""
        if self._accelerator.is_main_process:
            append_json_line(self.path, {"step": step, "split": split, **values})
        if self._accelerator.trackers:
            self._accelerator.log({f"{split}/{name}": value for name, value in values.items()}, step=step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, oldest first; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
