"""How long OpenMP's threads spin where they wait for one another.

libgomp, the OpenMP of torch's wheels for Linux, lets a thread that waits spin for some ten milliseconds before it sleeps. Where another
process works on the same cores, the thread that is waited for may have none meanwhile, and a training of two threads falls to a fraction
of its speed. libgomp reads its settings when it is loaded, so every script imports this before torch.
"""

from __future__ import annotations

import os

SPIN_COUNT = 10_000
"""Turns of the waiting loop. Fewer cost a training alone its speed (1,000: a sixth), more cost one in company its share of the cores:
benchmarks/company.py measures both.
"""

if "OMP_WAIT_POLICY" not in os.environ:  # which says the same, and which this would override
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
