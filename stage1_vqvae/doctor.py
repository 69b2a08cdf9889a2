"""Print the health of a run's codebook at the last validation: usage, perplexity, histogram, nearest codes.

    python stage1_vqvae/doctor.py
    python stage1_vqvae/doctor.py --run my_digits

Also works during stage 1. The same as a picture: stage1/codebook.png.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

from configs.cli import TRAIN_TOKENIZER, parse
from configs.errors import UserError, run_entry
from configs.run_dir import read_json
from stage1_vqvae.monitoring.health import health_from_json, health_table


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    run = parse(__doc__, (), argv).run
    if not run.codebook_health.exists():
        raise UserError(f"{run}: stage 1 has not been validated yet; run first: {TRAIN_TOKENIZER} --resume --run {run}")
    print(health_table(health_from_json(read_json(run.codebook_health))))


if __name__ == "__main__":
    run_entry(main)
