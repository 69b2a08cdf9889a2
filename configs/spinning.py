"""A limit on how long OpenMP's threads spin while they wait for one another.

libgomp, the OpenMP of torch's wheels for Linux, lets a waiting thread spin for some ten milliseconds before it sleeps. If another process
uses the same cores, a spinning thread can keep the thread it waits for from running, and a training with two threads falls to a fraction of
its speed. libgomp reads its settings when it is loaded, so every script imports this module before torch.
"""

from __future__ import annotations

import os

SPIN_COUNT = 10_000
"""Iterations of the waiting loop. Fewer slow down a training that has the machine to itself (1,000: by a sixth), more slow down one beside
another process; benchmarks/company.py measures both.
"""

if "OMP_WAIT_POLICY" not in os.environ:  # this would override the user's policy
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
