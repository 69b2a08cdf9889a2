"""Record of the data that a training began with: a small file in the run, which later commands compare with the data that they read.

data.json                  the images of stage 1, written when it begins; extraction adds the splits that stage 1 does not read
priors/NAME/data.json      the codes of a prior
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError, say
from configs.run_dir import read_json
from stage1_vqvae.data.cache import portable_fingerprint
from stage1_vqvae.data.splits import VALIDATION, SourceSplit

Record = dict[str, dict[str, Any]]
"""Per split: `images`, their number; `classes`, number of images per class name in the order of labels, or None; `files`, the portable
fingerprint of its files (cache.py); `rows`, the sha256 of all labels and of the rows that belong to the split.
"""
_NAMED = 3  # classes in a message


def split_record(
    count: int, labels: np.ndarray | None, names: list[str] | None, files: str | None = None, rows: str | None = None
) -> dict[str, Any]:
    """Build the record of a split of `count` images with labels (count,), indices of `names`. `files`, `rows`: None: not recorded."""
    classes = None
    if labels is not None and names is not None:
        classes = dict(zip(names, np.bincount(labels, minlength=len(names)).tolist(), strict=True))
    return {"images": count, "classes": classes, "files": files, "rows": rows}


def source_record(split: SourceSplit, rows: np.ndarray | None, names: list[str] | None) -> dict[str, Any]:
    """Build the record of rows (None: all) of a source's split."""
    content = hashlib.sha256()
    for array in (rows, split.labels):
        content.update(b"all" if array is None else array.astype(np.int64).tobytes())
    labels = split.labels if split.labels is None or rows is None else split.labels[rows]
    return split_record(
        len(split) if rows is None else len(rows), labels, names, portable_fingerprint(split.fingerprint), content.hexdigest()
    )


def changes(recorded: Record, current: Record) -> list[str]:
    """Describe each difference in the splits that both records have."""
    lines: list[str] = []
    both = [name for name in recorded if name in current]
    for name in both:
        before, now = recorded[name], current[name]
        if now["images"] != before["images"]:
            lines.append(f"{name}: {now['images']:,} images, was {before['images']:,}")
        elif now["classes"] != before["classes"] or any(_differs(before[key], now[key]) for key in ("files", "rows")):
            lines.append(f"{name}: not the same {now['images']:,} images (names, sizes, order or labels differ)")
    old, new = (list(dict.fromkeys(label for name in both for label in record[name]["classes"] or ())) for record in (recorded, current))
    for labels, others, change in ((new, old, "new"), (old, new, "gone")):
        different = [f'"{label}"' for label in labels if label not in set(others)]
        if different:
            more = f" and {len(different) - _NAMED:,} more" if len(different) > _NAMED else ""
            lines.append(f"class {', '.join(different[:_NAMED])}{more} {'is' if len(different) == 1 else 'are'} {change}")
    if set(old) == set(new) and old != new:
        lines.append("the classes are in another order")
    return lines


def _differs(before: str | None, now: str | None) -> bool:
    """Return whether two fingerprints of one kind differ; that of a copy on disk cannot be compared with the Hub's."""
    if before is None or now is None:
        return False
    kinds = {text.partition(":")[0] if ":" in text else "" for text in (before, now)}
    return before != now and len(kinds) == 1


def check_unchanged(path: Path, current: Record, where: str, accept: bool, elsewhere: str = "another with --run NAME") -> None:
    """Compare data with the record of a training, if there is one.

    Args:
        path: file of the record.
        current: record of the data that a command has read.
        where: name of the run or prior in messages.
        accept: print the changes instead of refusing them.
        elsewhere: name of the training to suggest instead.
    Errors: UserError with the changes in one line.
    """
    recorded = read_record(path)
    different = changes(recorded, current)
    if not different:
        return
    summary = "; ".join(different)
    if not accept:
        ways = f"put it back, train {elsewhere}, or go on all the same with --accept-changed-data"
        raise UserError(f"{where}: expected the data that its training began with, found {summary}; {ways}")
    mixed = any(line.startswith(VALIDATION) for line in different)
    held_out = "; images that it was trained on may be among those held out now" if mixed else ""
    say(f"{where}: going on with data that has changed: {summary}{held_out}")


def read_record(path: Path) -> Record:
    """Read a record; empty if there is no file, as for imported weights."""
    return dict(read_json(path)) if path.exists() else {}
