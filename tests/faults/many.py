"""Hundreds of faults, and a table of what survived: `make faults`, which runs this file alone; other test runs pass over it.

FAULTS=300 and SEED=0 in the environment say how many, and which.
"""

from __future__ import annotations

import collections
import os
import random
import subprocess
import time
from pathlib import Path

os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})


import stage2_prior.extract_codes
import stage2_prior.train  # noqa: F401, forked from here, commands begin at once
from tests.faults.trials import RESULTS, Outcome, Trial, all_trials, full_disk, made_world


def test_hundreds_of_faults(tmp_path: Path) -> None:
    began, draw, count = time.monotonic(), random.Random(int(os.environ.get("SEED", "0"))), int(os.environ.get("FAULTS", "300"))
    world = made_world(tmp_path)
    weighted = all_trials()
    if mounts(tmp_path / "probe"):
        weighted += [(full_disk(stage, mount, unmount), 7) for stage in RESULTS]
    else:
        print("no small disk can be mounted here (that takes root): a full one is not tried")
    total = sum(weight for _, weight in weighted)
    trials: list[Trial] = [trial for trial, weight in weighted for _ in range(max(1, round(weight * count / total)))]
    draw.shuffle(trials)
    outcomes: list[Outcome] = []
    for number, trial in enumerate(trials, 1):
        try:
            outcomes.append(trial(world, draw))
        except AssertionError as error:
            outcomes.append(Outcome(f"unforeseen: {trial.__qualname__}", lost=True, wrong=False, detail=str(error)[-3000:]))
        if outcomes[-1].lost or outcomes[-1].wrong:
            print(f"--- {outcomes[-1].kind}: {'lost' if outcomes[-1].lost else 'wrong'}\n{outcomes[-1].detail}", flush=True)
        if number % 20 == 0:
            print(f"{number} of {len(trials)}, {time.monotonic() - began:.0f} s", flush=True)
    print(table(outcomes))
    assert not [outcome for outcome in outcomes if outcome.lost or outcome.wrong]


def table(outcomes: list[Outcome]) -> str:
    """As Markdown."""
    kinds = collections.Counter(outcome.kind for outcome in outcomes)
    lines = ["| fault | tried | lost | wrong |", "| --- | --- | --- | --- |"]
    for kind in [*sorted(kinds), None]:
        of = [outcome for outcome in outcomes if kind in (None, outcome.kind)]
        lines.append(f"| {kind or 'all'} | {len(of)} | {sum(one.lost for one in of)} | {sum(one.wrong for one in of)} |")
    return "\n".join(lines)


def mount(folder: Path, size: int) -> bool:
    """A disk of so many bytes."""
    return (
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False).returncode
        == 0
    )


def unmount(folder: Path) -> None:
    """And away with it."""
    subprocess.run(["umount", "-l", str(folder)], check=True)


def mounts(folder: Path) -> bool:
    """Whether that can be done here."""
    folder.mkdir()
    if not mount(folder, 4096):
        return False
    unmount(folder)
    return True
