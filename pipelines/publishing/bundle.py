"""A bundle: the files of a run that others need, without paths of the machine that trained it.

    README.md                    the model card
    config.json                  headers of the tokenizer's and the priors' files
    recipe.yaml                  the recipe without this machine's paths
    tokenizer.safetensors
    stage1/report.json
    priors/NAME/                 prior.safetensors, likelihood.json, .md, .png, report.json
    evaluations/000/             evaluation.json, .md of the last evaluation of these files
    samples.png                  about 64 samples of the first prior

A bundle is a run: all commands work on it except those that need checkpoints; those that read images need the data set.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.recipe_file import load_recipe, recipe_dict
from configs.run_dir import BUNDLE, RunDir, read_json, write_json, write_text, write_yaml
from pipelines.generator import Generator
from pipelines.provenance import contains, model_fingerprints, outputs, publishable_recipe
from pipelines.publishing.card import card, sample_grid
from stage1_vqvae.pictures import grid_scale, image_grid, save_png
from stage2_prior.priors.prior_file import finished_prior, read_prior_header
from training.weights_file import read_header

_PRIOR_FILES = ("likelihood.json", "likelihood.md", "likelihood.png", "report.json")


def write_bundle(run: RunDir, priors: Sequence[str], folder: Path, name: str, licence: str, device: str | None = None) -> None:
    """Write the bundle of a run with a finished tokenizer.

    Args:
        run: the run to publish.
        priors: names of finished priors; the first is the default.
        folder: an empty folder.
        name: the name in the card: USER/NAME, or a folder's name.
        licence: the Hub's name of the licence.
        device: device that draws the samples; None: an accelerator, if there is one.
    """
    recipe = publishable_recipe(load_recipe(run.recipe))
    bundle = RunDir(folder)
    write_yaml(bundle.recipe, recipe_dict(recipe))
    shutil.copyfile(run.tokenizer, bundle.tokenizer)
    _copy_existing(run.stage1, bundle.stage1, ("report.json",))
    for prior in priors:
        _copy_existing(run.prior(prior), bundle.prior(prior), ("prior.safetensors", *_PRIOR_FILES))
    evaluation = _evaluation(run, priors[0] if priors else None)
    if evaluation is not None:
        target = folder / "evaluations" / "000"
        write_json(target / "evaluation.json", {**read_json(evaluation / "evaluation.json"), "run": name})
        text = (evaluation / "evaluation.md").read_text(encoding="utf-8").split("\n", 1)[1]
        write_text(target / "evaluation.md", f"# Evaluation of {name}\n{text}")
    config: dict[str, Any] = {
        "tokenizer": read_header(run.tokenizer, "tokenizer"),
        "priors": {prior: read_prior_header(finished_prior(run, prior, "")) for prior in priors},
        "sampling": dataclasses.asdict(recipe.sampling),
    }
    write_json(folder / BUNDLE, config)
    if priors:
        generator = Generator.from_pretrained(folder, prior=priors[0], device=device)
        columns, count = sample_grid(generator.label_names)
        pictures = generator.draw(count, progress=True).pixels
        save_png(folder / "samples.png", image_grid(pictures, columns), grid_scale(pictures.shape[1]))
    write_text(folder / "README.md", card(bundle, name, licence, recipe))


def _copy_existing(source: Path, target: Path, names: Sequence[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _evaluation(run: RunDir, prior: str | None) -> Path | None:
    """Find the last evaluation of the run's tokenizer with samples drawn from this prior; without a prior, one without samples.

    Evaluations of images from --samples are not published, since those may be private.
    """
    expected = (
        model_fingerprints(run, prior) if prior is not None else {"tokenizer_sha256": model_fingerprints(run, None)["tokenizer_sha256"]}
    )
    expected["drawn"] = None if prior is None else True
    paths = [path for path in outputs(run, "evaluations", "evaluation.json") if contains(read_json(path), expected)]
    return paths[-1].parent if paths else None
