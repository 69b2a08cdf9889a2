"""The likelihood report of a trained prior: bits a token beside uniform and unigram, by position, level and label.

    python stage2_prior/report.py
    python stage2_prior/report.py --prior pixelcnn

Training ends with it; on its own it measures the finished prior again. Writes likelihood.json, likelihood.md and
likelihood.png into priors/NAME of the run, and prints the second.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

from typing import Any

from configs.cli import EXTRACT_CODES, TRAIN_PRIOR, TRAIN_TOKENIZER, accept_option, parse
from configs.errors import UserError, run_entry
from stage1_vqvae.data.record import check_unchanged
from stage1_vqvae.data.splits import TRAIN, VALIDATION
from stage2_prior.codes.record import CODES, codes_record
from stage2_prior.codes.store import CodeStore
from stage2_prior.likelihood.tables import likelihood_report, markdown, write_report
from stage2_prior.priors.prior_file import load_finished
from training.metrics_log import read_metrics
from training.processes import finish, start

_BATCH_SIZE = 64


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    command = parse(__doc__, ("compute",), argv, options=_options)
    run = command.run
    if not run.tokenizer.exists():
        raise UserError(f"{run}: stage 1 has not finished; run first: {TRAIN_TOKENIZER} --resume --run {run}")
    if not (run.codes / TRAIN).is_dir():
        raise UserError(f"{run}: its codes have not been extracted; run first: {command.next(EXTRACT_CODES)}")
    accelerator = start(command.recipe.compute)
    prior, header, name = load_finished(run, command.options.prior, command.next(TRAIN_PRIOR), accelerator.device)
    folder, sha256 = run.prior(name), header.tokenizer_sha256
    training, validation = CodeStore(run.codes / TRAIN, sha256), CodeStore(run.codes / VALIDATION, sha256)
    recorded = min(folder.rglob(CODES), default=folder / CODES)  # of a prior of levels, in the folder of each
    stores = {TRAIN: training, VALIDATION: validation}
    check_unchanged(recorded, codes_record(stores), run.show(folder), command.options.accept_changed_data, "another with --name NAME")
    validations = [record for record in read_metrics(folder / "metrics.jsonl") if record["split"] == "validation"]
    report = likelihood_report(accelerator, prior, training, validation, _BATCH_SIZE, validations)
    if accelerator.is_main_process:
        print(markdown(name, report), end="")
        with run.lock():
            write_report(folder, name, report)
        print(f"\nwrote likelihood.json, likelihood.md and likelihood.png to {run.show(folder)}")
    finish(accelerator)


def _options(parser: Any) -> None:
    accept_option(parser)
    parser.add_argument("--prior", type=str, help="name of a prior of the run (default: the last finished)")


if __name__ == "__main__":
    run_entry(main)
