"""Import a run's codes from another tool instead of extracting them.

    python stage2_prior/import_codes.py --folder codes                       NumPy arrays: codes/train/level0.npy, labels.npy
    python stage2_prior/import_codes.py --from datasets --folder codes       from `save_to_disk`: codes/train, columns level0, label

A condition other than classes is in condition.npy or the column condition; of what kind it is, export_codes.py wrote into manifest.json.
The codes must come from the run's tokenizer, which is checked if there is a manifest. The folder has one folder per split, at least train
and validation. Levels are (rows, h, w) or (rows, h * w), with an optional axis of variants after the first.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

import shutil
from pathlib import Path
from typing import Any

from configs.cli import TRAIN_PRIOR, parse
from configs.errors import UserError, run_entry
from configs.run_dir import program, replace_folder
from stage1_vqvae.data.record import check_unchanged, split_record
from stage1_vqvae.data.splits import TEST, TRAIN, VALIDATION
from stage1_vqvae.model import load_tokenizer
from stage2_prior.codes.exchange import FORMS, import_split, read_condition, read_external
from stage2_prior.codes.store import Manifest
from stage2_prior.conditions.none import NoCondition
from training.weights_file import fingerprint


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    command = parse(__doc__, (), argv, options=_options)
    run, recipe, options, form = command.run, command.recipe, command.options, getattr(command.options, "from")
    if form not in FORMS:
        raise UserError(f"--from: expected one of {', '.join(FORMS)}, found {form}")
    command.need_tokenizer()
    if run.codes.exists() and not options.overwrite:
        raise UserError(f"{run}: it has codes already; add --overwrite to replace them")
    source, tokenizer = Path(options.folder).expanduser(), load_tokenizer(run)
    splits = {name: read_external(source / name, form) for name in (TRAIN, VALIDATION, TEST) if name != TEST or (source / name).exists()}
    condition, rows = read_condition(splits, source)
    record = {}
    imported = run.codes.with_name("codes.imported")
    with run.lock():
        shutil.rmtree(imported, ignore_errors=True)  # left by a killed command
        try:
            for name, external in splits.items():
                template = Manifest(
                    split=name,
                    rows=0,
                    grids=tokenizer.grids,
                    num_codes=list(tokenizer.quantizer.num_codes),
                    digits=[list(sizes) for sizes in tokenizer.quantizer.digits],
                    condition=condition if name in rows else NoCondition(),
                    augmentation="none",
                    variants=1,
                    image_shape=tokenizer.image_shape,
                    tokenizer_sha256=fingerprint(run.tokenizer),
                    rows_per_shard=recipe.extraction.shard_rows,
                    sha256=[],
                )
                (imported / name).mkdir(parents=True)
                manifest = import_split(external, rows.get(name), imported / name, source / name, template)
                labels = rows[name].numpy() if condition.class_names and name in rows else None
                record[name] = split_record(manifest.rows, labels, list(condition.class_names) or None)
                print(f"{name}: {manifest.rows:,} images" + (f" x {manifest.variants} variants" if manifest.variants > 1 else ""))
        except BaseException:
            shutil.rmtree(imported)
            raise
        check_unchanged(run.data, record, str(run), accept=True)  # the user named the folder
        replace_folder(run.codes, imported)
        run.record(program(), command.arguments, {})
    print(f"wrote {run.show(run.codes)}")
    print(f"next: {command.next(TRAIN_PRIOR)}")


def _options(parser: Any) -> None:
    parser.add_argument("--from", default=FORMS[0], help=f"form: {' or '.join(FORMS)}")
    parser.add_argument("--folder", required=True, help="folder with one folder per split")
    parser.add_argument("--overwrite", action="store_true", help="replace the run's codes")


if __name__ == "__main__":
    run_entry(main)
