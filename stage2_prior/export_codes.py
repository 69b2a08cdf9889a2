"""Write a run's codes for other tools, one folder per split.

    python stage2_prior/export_codes.py --output codes                    NumPy arrays: level0.npy, labels.npy
    python stage2_prior/export_codes.py --to datasets --output codes      what `datasets.load_from_disk` opens: level0, label

Each level is (rows, variants, h, w); rows are in the order of the data set.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

from typing import Any

from configs.cli import EXTRACT_CODES, parse
from configs.errors import UserError, run_entry
from configs.run_dir import new_folder, not_there_yet
from stage1_vqvae.data.splits import TRAIN
from stage2_prior.codes.exchange import FORMS, export
from stage2_prior.codes.store import CodeStore
from training.weights_file import fingerprint


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    command = parse(__doc__, (), argv, options=_options)
    run, options = command.run, command.options
    if options.to not in FORMS:
        raise UserError(f"--to: expected one of {', '.join(FORMS)}, found {options.to}")
    output = not_there_yet("output", options.output)
    if not (run.codes / TRAIN).is_dir():
        raise UserError(f"{run}: its codes have not been extracted; run first: {command.next(EXTRACT_CODES)}")
    command.need_tokenizer()
    sha256 = fingerprint(run.tokenizer)
    stores = {path.name: CodeStore(path, sha256) for path in sorted(run.codes.iterdir()) if path.is_dir()}
    with new_folder(output) as folder:
        export(stores, folder, options.to)
    print(f"wrote {output}: {', '.join(f'{len(store):,} images of {name}' for name, store in stores.items())}")


def _options(parser: Any) -> None:
    parser.add_argument("--to", default=FORMS[0], help=f"form: {' or '.join(FORMS)}")
    parser.add_argument("--output", required=True, help="the folder to write; must not exist")


if __name__ == "__main__":
    run_entry(main)
