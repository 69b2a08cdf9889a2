"""Hundreds of faults and a table of the outcomes, run by `make faults` only.

FAULTS=300 and SEED=0 in the environment set their number and the random seed.
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
import stage2_prior.train  # noqa: F401, so that forked commands start at once
from tests.faults.trials import RESULTS, Outcome, Trial, all_trials, build_world, full_disk


def test_hundreds_of_faults(tmp_path: Path) -> None:
    start, rng, count = time.monotonic(), random.Random(int(os.environ.get("SEED", "0"))), int(os.environ.get("FAULTS", "300"))
    world = build_world(tmp_path)
    weighted = all_trials()
    if can_mount(tmp_path / "probe"):
        weighted += [(full_disk(stage, mount, unmount), 7) for stage in RESULTS]
    else:
        print("a full disk is not tried: mounting a small one takes root")
    total = sum(weight for _, weight in weighted)
    trials: list[Trial] = [trial for trial, weight in weighted for _ in range(max(1, round(weight * count / total)))]
    rng.shuffle(trials)
    outcomes: list[Outcome] = []
    for number, trial in enumerate(trials, 1):
        try:
            outcomes.append(trial(world, rng))
        except AssertionError as error:
            outcomes.append(Outcome(f"unexpected: {trial.__qualname__}", lost=True, wrong=False, detail=str(error)[-3000:]))
        if outcomes[-1].lost or outcomes[-1].wrong:
            print(f"--- {outcomes[-1].kind}: {'lost' if outcomes[-1].lost else 'wrong'}\n{outcomes[-1].detail}", flush=True)
        if number % 20 == 0:
            print(f"{number} of {len(trials)}, {time.monotonic() - start:.0f} s", flush=True)
    print(table(outcomes))
    assert not [outcome for outcome in outcomes if outcome.lost or outcome.wrong]


def table(outcomes: list[Outcome]) -> str:
    """Return a Markdown table of outcomes per kind of fault."""
    kinds = collections.Counter(outcome.kind for outcome in outcomes)
    lines = ["| fault | tried | lost | wrong |", "| --- | --- | --- | --- |"]
    for kind in [*sorted(kinds), None]:
        selected = [outcome for outcome in outcomes if kind in (None, outcome.kind)]
        lines.append(
            f"| {kind or 'all'} | {len(selected)} | {sum(trial.lost for trial in selected)} | {sum(trial.wrong for trial in selected)} |"
        )
    return "\n".join(lines)


def mount(folder: Path, size: int) -> bool:
    """Mount a tmpfs of `size` bytes; return whether that worked."""
    return (
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False).returncode
        == 0
    )


def unmount(folder: Path) -> None:
    """Unmount a folder."""
    subprocess.run(["umount", "-l", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this machine allows mounting."""
    folder.mkdir()
    if not mount(folder, 4096):
        return False
    unmount(folder)
    return True
