"""Runs on the Hugging Face Hub, as pipelines/publish.py writes them: `hf:USER/NAME`, or `hf:USER/NAME@REVISION`."""

from __future__ import annotations

import os
import re
import shutil

from configs.errors import UserError, brief
from configs.run_dir import BUNDLE, RunDir, read_json, runs_folder

PREFIX = "hf:"
# Of what a bundle holds, nothing else is fetched, and nothing of it is ever executed.
_FETCHED = ("recipe.yaml", "*.json", "*.md", "*.png", "*.safetensors")


def run_of(name: str) -> RunDir:
    """The run that a user names. One of the Hub is fetched into `runs_folder`, as USER--NAME, where it is a run like any other: by its own
    name it stays as it is, by that of the Hub it is brought up to what is there. What was fetched serves without a connection too.

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

    new = not run.recipe.exists()
    try:
        snapshot_download(repository, revision=revision, allow_patterns=list(_FETCHED), local_dir=run.path)
    except Exception as error:
        unreachable = isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled) or is_of_connection(error)
        if not unreachable and not isinstance(error, HfHubHTTPError | HFValidationError):
            raise
        if not unreachable or new:
            raise UserError(f"{name}: expected a repository of the Hub that can be read, found none ({brief(error)})") from None
    content = read_json(run.path / BUNDLE) if (run.path / BUNDLE).exists() else None
    priors = content.get("priors") if isinstance(content, dict) else None
    if not isinstance(priors, dict) or not run.tokenizer.exists():
        raise UserError(f"{name}: expected a run that pipelines/publish.py wrote, found something else")
    for prior in priors:
        if not (run.prior(prior) / "prior.safetensors").exists():
            raise UserError(f"{name}: expected its prior {prior}, found that it has not been fetched; try again with a connection")
    if new and priors:
        # The prior that was named first is the one last finished, whatever came first over the network.
        os.utime(run.prior(next(iter(priors))) / "prior.safetensors")


def is_of_connection(error: Exception) -> bool:
    """Whether an exception of the Hub's client says that the Hub was not reached: whose it is depends on the client's version."""
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests")
