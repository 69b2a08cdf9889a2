"""Run a training script's `main` under a launcher, and keep every process's own weights at each checkpoint.

torchrun ... tests/ranks_dump.py FOLDER stage1_vqvae.train ARGUMENTS
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

from configs.errors import run_entry
from stage1_vqvae.training.checkpoint import Checkpoints


def main() -> None:
    folder, module, arguments = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    save = Checkpoints.save

    def save_and_dump(self: Checkpoints, step: int, state: dict[str, Any]) -> None:
        torch.save(state["model"], folder / f"{step}-of-rank-{os.environ.get('RANK', '0')}.pt")
        save(self, step, state)

    Checkpoints.save = save_and_dump  # type: ignore[method-assign]
    importlib.import_module(module).main(arguments)


if __name__ == "__main__":
    run_entry(main)
