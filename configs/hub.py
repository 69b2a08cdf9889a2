"""Runs on the Hugging Face Hub, as pipelines/publish.py writes them: `hf:USER/NAME`, or `hf:USER/NAME@REVISION`."""

from __future__ import annotations

import os
import re
import shutil

from configs.errors import UserError
from configs.run_dir import BUNDLE, RunDir, read_json, runs_folder

PREFIX = "hf:"
# Of what a bundle holds, nothing else is fetched, and nothing of it is ever executed.
_FETCHED = ("recipe.yaml", "*.json", "*.md", "*.png", "*.safetensors")


def run_of(name: str) -> RunDir:
    """The run that a user names. One of the Hub is fetched into `runs_folder`, as USER--NAME, where it is a run like any other; what is
    there already is not fetched again, and serves without a connection too.

    Errors: UserError for what cannot be fetched, or is no such run.
    """
    if not name.startswith(PREFIX):
        return RunDir.named(name)
    found = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if found is None:
        raise UserError(f"{name}: expected {PREFIX}USER/NAME, or {PREFIX}USER/NAME@REVISION")
    run = RunDir(runs_folder() / name.removeprefix(PREFIX).replace("/", "--"))
    known = run.path.exists()
    try:
        _fetch(name, found[1], found[2], run)
    except UserError:
        if not known:
            shutil.rmtree(run.path, ignore_errors=True)  # what was fetched of something else
        raise
    return run


def _fetch(name: str, repository: str, revision: str | None, run: RunDir) -> None:
    # Slow to import, and only this needs it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        snapshot_download(repository, revision=revision, allow_patterns=list(_FETCHED), local_dir=run.path)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        if isinstance(error, HfHubHTTPError | HFValidationError) or not run.recipe.exists():
            why = str(error).strip().splitlines()[0]
            raise UserError(f"{name}: expected a repository of the Hub that can be read, found none ({why})") from None
    if not (run.path / BUNDLE).exists() or not run.tokenizer.exists():
        raise UserError(f"{name}: expected a run that pipelines/publish.py wrote, found something else")
    # The prior that was named first is the one last finished, whatever came first over the network.
    first = next(iter(read_json(run.path / BUNDLE)["priors"]), None)
    if first is not None:
        os.utime(run.prior(first) / "prior.safetensors")
