"""Publish a run: a bundle of the files that others need, in a folder or on the Hugging Face Hub.

    python pipelines/publish.py --to ./bundle
    python pipelines/publish.py --run digits --to USER/NAME --license mit
    python pipelines/publish.py --prior transformer pixelcnn --to USER/NAME --private

Writes tokenizer, chosen priors, recipe (without paths of this machine), likelihoods, the last evaluation, samples, and a model card
with all figures and their sources. USER/NAME is a repository of the Hub, created if it does not exist; a folder's path starts with `.`,
`/` or `~`, or has no `/` at all. Every command accepts both: `--run ./bundle`, `--run hf:USER/NAME`.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from configs.cli import TRAIN_PRIOR, parse
from configs.errors import UserError, brief, run_entry
from configs.hub import PREFIX, is_connection_error
from configs.run_dir import RunDir, new_folder, program, typed, unused_path
from pipelines.publishing.bundle import write_bundle
from stage2_prior.priors.prior_file import finished_prior

# Files of an earlier bundle that may belong to other priors or another evaluation.
_OURS = ("priors/*", "evaluations/*", "stage1/*", "samples.png")
_MESSAGE = "A run of the two-stage image generator"


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    command = parse(__doc__, (), argv, options=_options)
    run, options = command.run, command.options
    repository = hub_repository(options.to)
    folder = None if repository is not None else unused_path("to", options.to)
    command.need_tokenizer()
    names = options.prior if options.prior is not None else [run.last_prior()] if run.last_prior() is not None else []
    priors = [finished_prior(run, name, command.next(TRAIN_PRIOR)).parent.name for name in names]
    if repository is not None:
        with _refused(repository):  # before the samples are drawn
            HfApi().create_repo(repository, private=options.private, exist_ok=True)
    with tempfile.TemporaryDirectory() if folder is None else new_folder(folder) as target:
        write_bundle(run, priors, Path(target), repository or Path(options.to).name, options.license)
        if repository is not None:
            with _refused(repository):
                done = HfApi().upload_folder(folder_path=target, repo_id=repository, delete_patterns=list(_OURS), commit_message=_MESSAGE)
    where, name = (done.repo_url, f"{PREFIX}{repository}") if folder is None else (RunDir.show(folder), RunDir.show(folder))
    run.record(program(), command.arguments, {"to": options.to, "priors": priors})
    print(f"wrote {where}: tokenizer{', prior ' if priors else ''}{', '.join(priors)}; look at its README.md")
    print(f"next: {typed('pipelines/sample.py')} --n 64 --run {shlex.quote(name)}")


def _options(parser: Any) -> None:
    parser.add_argument("--to", required=True, help="a folder that does not exist yet, or USER/NAME: a repository of the Hub")
    parser.add_argument("--prior", type=str, nargs="+", help="names of priors, the first being the default (default: the last finished)")
    parser.add_argument("--license", type=str, default="unknown", help="the model's licence, as the Hub names licences: mit, apache-2.0")
    parser.add_argument("--private", action="store_true", help="make a new repository private")


def hub_repository(to: str) -> str | None:
    """Return USER/NAME if the option names a repository of the Hub; None for a folder. Errors: UserError for an ambiguous name."""
    name = to.removeprefix(PREFIX)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        if to.startswith(PREFIX):
            raise UserError(f"--to {to}: expected {PREFIX}USER/NAME")
        return None
    if not to.startswith(PREFIX) and Path(name).parent.is_dir():
        raise UserError(f"--to {to}: expected ./{to} for a folder, or {PREFIX}{to} for the Hub, found what could be both")
    return name


@contextmanager
def _refused(repository: str) -> Iterator[None]:
    """Turn refusals of the Hub and lost connections into UserErrors."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, HfHubHTTPError | OfflineModeIsEnabled) and not is_connection_error(error):
            raise
        raise UserError(f"--to {repository}: expected a Hub that takes it (hf auth login), found: {brief(error)}") from None


if __name__ == "__main__":
    run_entry(main)
