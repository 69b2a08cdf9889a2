"""Joining priors of single levels, trained one by one, into one prior of all levels."""

from __future__ import annotations

from accelerate import Accelerator

from configs.errors import UserError
from configs.parts import as_dict
from configs.prior_name import PriorName
from configs.run_dir import RunDir, read_json, write_json
from configs.schema import condition_from
from stage2_prior.codes.store import CodeStore
from stage2_prior.conditions.contract import Condition
from stage2_prior.likelihood.tables import likelihood_report, write_report
from stage2_prior.priors.levelwise import LevelwisePart
from stage2_prior.priors.prior_file import PriorHeader, build_prior, load_prior, read_prior_header, save_prior

# Images per batch for the likelihood.
_BATCH_SIZE = 64


def check_levels(run: RunDir, name: PriorName, condition: Condition) -> None:
    """Check that all finished levels of a prior, except the named one, have the same condition.

    Errors: UserError if one has another.
    """
    for path in sorted(name.at_level(None).folder(run).glob("level*/prior.safetensors")):
        other = condition_from(read_prior_header(path)["condition"])
        if path.parent != name.folder(run) and other != condition:
            assert isinstance(other, Condition)
            expected = f"expected all levels trained on the same condition, {condition.describe()}, found {other.describe()}"
            raise UserError(f"{run.show(path.parent)}: {expected}; train all levels under another --name")


def join_levels(accelerator: Accelerator, run: RunDir, name: PriorName, training: CodeStore, validation: CodeStore) -> int | None:
    """Join the priors of single levels of a name into a prior of all levels, and write it with its likelihood report.

    Returns the first level, from 1 on, without a prior yet; None: the joined prior is written.
    Errors: as `check_levels`; UserError for codes of classes that the levels do not know.
    """
    target, sha256 = name.at_level(None).folder(run), training.manifest.tokenizer_sha256
    accelerator.wait_for_everyone()
    folders = [name.at_level(number).folder(run) for number in range(1, 1 + len(training.manifest.grids))]
    for number, folder in enumerate(folders, 1):
        if not (folder / "prior.safetensors").exists():
            return number
    parts, headers = zip(*(load_prior(folder / "prior.safetensors", sha256, accelerator.device) for folder in folders), strict=True)
    condition = headers[0].condition
    check_levels(run, name, condition)
    config = LevelwisePart(levels=[as_dict(header.config) for header in headers])
    prior = build_prior(config, condition, training.manifest).to(accelerator.device)
    weights = {f"parts.{number}.{key}": value for number, part in enumerate(parts) for key, value in part.state_dict().items()}
    prior.load_state_dict(weights)
    likelihood = likelihood_report(accelerator, prior, training, validation, _BATCH_SIZE, [])
    if accelerator.is_main_process:
        reports = [read_json(folder / "report.json") for folder in folders]
        totals = {key: sum(report[key] for report in reports) for key in ("steps", "minutes", "parameters")}
        unconditional = all(header.supports_unconditional for header in headers)
        header = PriorHeader.of(config, condition, training.manifest, unconditional, totals["steps"], likelihood["validation"])
        write_json(target / "report.json", {**totals, "best_step": None})
        write_report(target, target.name, likelihood)
        save_prior(target / "prior.safetensors", weights, header)
        print(f"all levels: {likelihood['validation']:.3f} bits per token; wrote {run.show(target / 'prior.safetensors')}")
    return None
