"""Evaluate a run: reconstructions, samples beside real images, codes, and whether training images come back.

    python pipelines/evaluate.py
    python pipelines/evaluate.py --features inception --n 50000
    python pipelines/evaluate.py --features resnet50 --weights resnet50.safetensors
    python pipelines/evaluate.py --samples FOLDER_OR_NPZ

Draws --n samples by the run's own sampling settings, labels in turns, or takes images made elsewhere. Reconstructions are of
the held-out --split; samples are compared with the --reference split, and so are, for scale, the held-out images. All
images are rounded to 8 bits first. Writes a new folder evaluations/NNN: evaluation.json and .md, which say what was compared
with what, and pictures.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from configs.cli import REPORT, TRAIN_PRIOR, Command, parse
from configs.errors import UserError, run_entry
from configs.run_dir import program, read_json, write_bytes, write_json
from pipelines.assessment import Assessor, Samples, pixels_hash
from pipelines.classifier import run_classifier
from pipelines.drawing import check_guidance, chosen_prior, draw_images, labels_of
from pipelines.evaluation_report import markdown, notes, tables
from pipelines.features import feature_network
from stage1_vqvae.images import TEST, TRAIN, VALIDATION, load_files, load_images
from stage1_vqvae.model import VQVAE, fingerprint, load_tokenizer
from stage1_vqvae.plots import grid_scale, save_png
from stage1_vqvae.training.processes import start
from stage2_prior.prior_file import UNIFORM


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    command = parse(__doc__, ("evaluation", "sampling", "compute"), argv, flat="evaluation", options=_options)
    run, options = command.run, command.options
    for name in ("split", "reference"):
        if getattr(options, name) not in (TRAIN, VALIDATION, TEST):
            raise UserError(f"--{name}: expected {TRAIN}, {VALIDATION} or {TEST}, found {getattr(options, name)}")
    command.need_tokenizer()
    accelerator = start(command.recipe.compute)
    tokenizer = load_tokenizer(run, accelerator.device)
    with run.numbered("evaluations", accelerator.is_main_process) as folder:
        # First what can be missing, then what takes its time.
        assessor = prepared(command, tokenizer, accelerator.device) if folder is not None else None
        samples = None
        if options.samples is not None:
            samples = given(command, options.samples) if folder is not None else None
        elif options.prior is not None or run.last_prior() is not None:
            samples = drawn(command, accelerator, tokenizer)
        if folder is not None and assessor is not None:
            run.record(program(), command.arguments, dataclasses.asdict(command.recipe.evaluation))
            found = evaluate(command, assessor, samples)
            if samples is not None:
                save_png(folder / "neighbours.png", assessor.neighbours(samples), grid_scale(samples.pixels.shape[1]))
            write_json(folder / "evaluation.json", found)
            write_bytes(folder / "evaluation.md", markdown(found).encode())
            print(markdown(found))
            print(f"wrote {run.show(folder / 'evaluation.json')}, .md and pictures")
            print(f"next: {command.next(REPORT if samples is not None else TRAIN_PRIOR)}")
    accelerator.end_training()


def _options(parser: Any) -> None:
    parser.add_argument("--samples", type=str | None, help="images made elsewhere to judge: a folder, or an npz with uint8 (N, H, W, C)")
    parser.add_argument("--prior", type=str | None, help=f"name of a prior of the run (default: the last finished), or `{UNIFORM}`")
    parser.add_argument("--split", type=str, default=VALIDATION, help="held-out images: reconstructed, and compared as samples are")
    parser.add_argument("--reference", type=str, default=TRAIN, help="the split with which samples are compared")


def prepared(command: Command, tokenizer: VQVAE, device: torch.device) -> Assessor:
    """Images and feature network. Errors: UserError for a split or weights there are not."""
    options, config = command.options, command.recipe.evaluation
    source = load_images(command.recipe.data, {TRAIN, VALIDATION, options.split, options.reference}, progress=True)
    for name in ("split", "reference"):
        if getattr(options, name) not in source.splits:
            raise UserError(f"--{name} {getattr(options, name)}: expected one of {', '.join(source.splits)}, the splits of the run's data")
    return Assessor(tokenizer, feature_network(config, command.run, source, device), source, config)


def drawn(command: Command, accelerator: Accelerator, tokenizer: VQVAE) -> Samples:
    """Samples of a prior of the run; complete on the main process alone."""
    config, sampling = command.recipe.evaluation, command.recipe.sampling
    chosen = chosen_prior(command, accelerator)
    labels = labels_of(None, config.n, chosen.header)
    check_guidance(accelerator, sampling, labels, chosen.header)
    _, pixels = draw_images(accelerator, tokenizer, chosen.prior, labels, config.n, config.seed, sampling)
    names = chosen.header.label_names if chosen.header is not None else None
    shown = None if labels is None or names is None else [names[label] for label in labels.tolist()]
    details = {"source": f"drawn from prior {chosen.name}, {'labels in turns' if shown else 'no labels'}", **chosen.details}
    return Samples(pixels, shown, details)


def given(command: Command, path: str) -> Samples:
    """Images made elsewhere: with the labels that our own samples.json, or their folders, say.

    Errors: UserError for what is missing, no image, or an npz of another size.
    """
    data, place = command.recipe.data, Path(path).expanduser()
    details = {"source": f"images in {path}", "prior": None, "prior_sha256": None, "sampling": None}
    if place.suffix == ".npz":
        try:
            with np.load(place, allow_pickle=False) as content:
                array = content["arr_0"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--samples {path}: expected an npz file with arr_0, found: {error}") from None
        if array.dtype != np.uint8 or array.shape[1:] != (data.height, data.width, data.channels) or len(array) < 2:
            wanted = f"expected at least 2 images, uint8 (N, {data.height}, {data.width}, {data.channels})"
            raise UserError(f"--samples {path}: {wanted}, found {array.dtype} {array.shape}")
        return Samples(torch.from_numpy(array), None, details)
    own = place / "samples.json"
    files = load_files([str(place / "images") if own.exists() else path], data, progress=True)
    if len(files.pixels) < 2:
        raise UserError(f"--samples {path}: expected at least 2 images, found {len(files.pixels)}")
    if not own.exists():
        return Samples(files.pixels, files.labels, details)
    told = read_json(own)
    labels = None if told["labels"] is None else [told["label_names"][label] for label in told["labels"]]
    return Samples(files.pixels, labels, details | {key: told[key] for key in ("prior", "prior_sha256", "sampling")})


def evaluate(command: Command, assessor: Assessor, samples: Samples | None) -> dict[str, Any]:
    """All figures, tables and notes, as evaluation.json has them."""
    run, config, split, reference = command.run, command.recipe.evaluation, command.options.split, command.options.reference
    network, source = assessor.network, assessor.source
    held_out, known = source.splits[split], source.splits[reference]
    n, height, width, channels = held_out.pixels.shape
    found: dict[str, Any] = {
        "run": str(run),
        "evaluation": dataclasses.asdict(config),
        "tokenizer_sha256": fingerprint(run.tokenizer),
        **({} if samples is None else {key: samples.details[key] for key in ("prior", "prior_sha256", "sampling")}),
        "compared": {
            "held-out images": f"{n} of {split}, {height} x {width} x {channels}, sha256 {pixels_hash(held_out.pixels)[:16]}",
            "reference": f"{len(known)} of {reference}, sha256 {pixels_hash(known.pixels)[:16]}",
            "samples": "none" if samples is None else f"{len(samples.pixels)} {samples.details['source']}",
            "features": f"{network.name}, {assessor.features(split).vectors.shape[1]} of them, weights {network.sha256[:16]}",
            "seed": config.seed,
        },
        "distance": network.distance,
        "split": split,
        "reference": reference,
        "reconstruction": assessor.reconstruction(split),
        "codes": assessor.codes(split),
    }
    if samples is not None:
        labelled = samples.labels is not None and held_out.labels is not None
        classifier = run_classifier(run, source, network.device) if labelled else None
        found["distances"] = assessor.beside_real(samples, split, reference, classifier)
        found["memorisation"] = assessor.memorisation(samples, split)
        prior = samples.details["prior"]
        if prior is not None and (run.prior(prior) / "likelihood.json").exists():
            likelihood = read_json(run.prior(prior) / "likelihood.json")
            found["likelihood"] = {key: likelihood[key] for key in ("validation", "unigram", "uniform", "codes_bits_per_dim")}
    return found | {"tables": tables(found), "notes": notes(found)}


if __name__ == "__main__":
    run_entry(main)
