"""Run a line of Python with `runs/` replaced by another folder.

python tests/launched/python.py FOLDER LINE
"""

from __future__ import annotations

import sys
from pathlib import Path

from configs import hub

hub.runs_folder = lambda: Path(sys.argv[1])
exec(sys.argv[2])
