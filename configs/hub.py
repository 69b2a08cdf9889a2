"""Runs on the Hugging Face Hub, as pipelines/publish.py writes them: `hf:USER/NAME`, or `hf:USER/NAME@REVISION`."""

from __future__ import annotations

import os
import re
import shutil

from configs.errors import UserError, brief
from configs.run_dir import BUNDLE, RunDir, read_json, runs_folder

PREFIX = "hf:"
# Files of a bundle that are downloaded; none is ever executed.
_PATTERNS = ("recipe.yaml", "*.json", "*.md", "*.png", "*.safetensors")


def run_of(name: str) -> RunDir:
    """Return the run of a name. A run of the Hub is downloaded into `runs_folder` as USER--NAME, or updated if it exists there.

    A downloaded run also works without a connection. Errors: UserError if it cannot be downloaded, or is no such run.
    """
    if not name.startswith(PREFIX):
        return RunDir.named(name)
    match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if match is None:
        raise UserError(f"{name}: expected {PREFIX}USER/NAME, or {PREFIX}USER/NAME@REVISION")
    run = RunDir(runs_folder() / name.removeprefix(PREFIX).replace("/", "--"))
    existed = run.path.exists()
    try:
        _fetch(name, match[1], match[2], run)
    except UserError:
        if not existed:
            shutil.rmtree(run.path, ignore_errors=True)  # an incomplete download, or another repository's files
        raise
    return run


def _fetch(name: str, repository: str, revision: str | None, run: RunDir) -> None:
    # Slow to import, and only this needs it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    new = not run.recipe.exists()
    try:
        snapshot_download(repository, revision=revision, allow_patterns=list(_PATTERNS), local_dir=run.path)
    except Exception as error:
        unreachable = isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled) or is_connection_error(error)
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
        # The first one listed is the default; commands take the prior with the newest file, whatever the order of downloads.
        os.utime(run.prior(next(iter(priors))) / "prior.safetensors")


def is_connection_error(error: Exception) -> bool:
    """Return whether an exception of the Hub's client is a connection error, whichever HTTP library the client uses."""
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests")
