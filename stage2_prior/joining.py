"""Joining priors of single levels, trained one by one, to one prior of all levels."""

from __future__ import annotations

from accelerate import Accelerator

from configs.errors import UserError, listed
from configs.parts import as_dict
from configs.prior_name import PriorName
from configs.run_dir import RunDir, read_json, write_json
from stage2_prior.codes.store import CodeStore
from stage2_prior.likelihood.tables import likelihood_report, write_report
from stage2_prior.priors.levelwise import LevelwisePart
from stage2_prior.priors.prior_file import PriorHeader, build_prior, load_prior, read_prior_header, save_prior

# Images at once for the likelihood.
_BATCH_SIZE = 64


def check_levels(run: RunDir, name: PriorName, label_names: list[str] | None) -> None:
    """Check that those levels of a prior that are finished, but for the one of that name, are conditioned on the same classes.

    Args:
        run: the prior's.
        name: of one level's prior.
        label_names: the classes; None: no classes.
    Errors: UserError if some are conditioned on others.
    """
    for path in sorted(name.at_level(None).folder(run).glob("level*/prior.safetensors")):
        found = read_prior_header(path)["label_names"]
        if path.parent == name.folder(run) or found == label_names:
            continue
        where, ways = run.show(path.parent), "train all levels under another --name"
        if found is None or label_names is None:
            raise UserError(f"{where}: expected all levels with prior.conditional, or none, found both; {ways}")
        raise UserError(f"{where}: expected all levels trained on the same classes, {listed(label_names)}, found {listed(found)}; {ways}")


def join_levels(accelerator: Accelerator, run: RunDir, name: PriorName, training: CodeStore, validation: CodeStore) -> int | None:
    """Once all levels have a prior under that name, write a prior of all of them beside, with its likelihood, to which theirs add up.
    Returns the first level, from 1 on, that has none yet; None: the prior is written.

    Errors: UserError as `check_levels`, and for codes of classes that the levels do not know.
    """
    whole, sha256 = name.at_level(None).folder(run), training.manifest.tokenizer_sha256
    accelerator.wait_for_everyone()
    folders = [name.at_level(number).folder(run) for number in range(1, 1 + len(training.manifest.grids))]
    for number, folder in enumerate(folders, 1):
        if not (folder / "prior.safetensors").exists():
            return number
    parts, headers = zip(*(load_prior(folder / "prior.safetensors", sha256, accelerator.device) for folder in folders), strict=True)
    names = headers[0].label_names
    check_levels(run, name, names)
    if names is not None:
        for store in (training, validation):
            store.number_by(names)
    config = LevelwisePart(conditional=headers[0].config.conditional, levels=[as_dict(header.config) for header in headers])
    prior = build_prior(config, training.manifest).to(accelerator.device)
    weights = {f"parts.{number}.{key}": value for number, part in enumerate(parts) for key, value in part.state_dict().items()}
    prior.load_state_dict(weights)
    likelihood = likelihood_report(accelerator, prior, training, validation, _BATCH_SIZE, [])
    if accelerator.is_main_process:
        reports = [read_json(folder / "report.json") for folder in folders]
        added = {key: sum(report[key] for report in reports) for key in ("steps", "minutes", "parameters")}
        known = all(header.knows_no_label for header in headers)
        header = PriorHeader.of(config, training.manifest, known, added["steps"], likelihood["validation"])
        write_json(whole / "report.json", {**added, "best_step": None})
        write_report(whole, whole.name, likelihood)
        save_prior(whole / "prior.safetensors", weights, header)
        print(f"all levels: {likelihood['validation']:.3f} bits a token; wrote {run.show(whole / 'prior.safetensors')}")
    return None
