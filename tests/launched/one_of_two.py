"""A rank of two that synchronise at every step; one dies, hangs or is stopped at the sixth.

RANK=... python tests/launched/one_of_two.py FAULT VICTIM

Ticks are shorter than usual, so that tests do not wait a minute.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from configs.errors import run_entry
from configs.schema import Compute
from training import watch
from training.processes import finish, start

FAULTS = {
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: time.sleep(1000),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "run": lambda: None,
    "never come": lambda: None,
    "go on": lambda: None,
}


def main() -> None:
    fault, victim = sys.argv[1], int(sys.argv[2])
    watch._TICK, watch._SILENT, watch._LOST_PEER = 0.2, 10, 3
    watch._JOINING = 5.0
    if fault == "never come" and os.environ["RANK"] == str(victim):
        time.sleep(1000)
    accelerator = start(Compute(threads=1, hang_timeout_minutes=0.06 if fault == "hang" else 5))
    print("they have met", flush=True)
    for step in range(10**6 if fault == "go on" else 12):
        watch.progressed(together=True)
        accelerator.gather(torch.ones(1))
        if step == 5 and accelerator.process_index == victim:
            FAULTS[fault]()
    finish(accelerator)
    if accelerator.process_index == victim:
        time.sleep(3)  # longer than the limit for a silent rank
    print(f"{accelerator.process_index} is done")


if __name__ == "__main__":
    run_entry(main)
