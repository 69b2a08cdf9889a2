"""Evaluate a run: reconstructions, samples compared with real images, codes, memorisation of training images.

    python pipelines/evaluate.py
    python pipelines/evaluate.py --features inception --n 50000
    python pipelines/evaluate.py --features resnet50 --weights resnet50.safetensors
    python pipelines/evaluate.py --samples FOLDER_OR_NPZ
    python pipelines/evaluate.py --reference VIRTUAL_imagenet256_labeled.npz --n 50000

Draws --n samples with the run's sampling settings, labels taking turns, or reads images made elsewhere (--samples). Reconstructs the
held-out --split. Compares the samples and, for scale, the held-out images with the --reference: a split, or a reference batch of
ADM's evaluation (npz), for FID, sFID, inception score, precision and recall. All images are rounded to 8 bits first. Writes a new
folder evaluations/NNN with evaluation.json, evaluation.md and pictures.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

import dataclasses
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from configs.cli import REPORT, TRAIN_PRIOR, Command, parse
from configs.errors import UserError, run_entry, say
from configs.recipe_file import load_recipe
from configs.run_dir import RunDir, program, read_json, write_json, write_text
from configs.schema import Stage1, condition_from
from pipelines.encoding import allocate_pixels
from pipelines.evaluation.assessment import Assessor, Samples, local_lpips, pixels_hash
from pipelines.evaluation.npz import array_in
from pipelines.evaluation.reference_batch import load_reference_batch
from pipelines.evaluation.tables import markdown, notes, tables
from pipelines.generator import load_generator
from pipelines.provenance import base_name, contains, describe_weights, model_fingerprints
from stage1_vqvae.data.files import load_files
from stage1_vqvae.data.names import normalised
from stage1_vqvae.data.record import Record, check_unchanged
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TEST, TRAIN, VALIDATION, ImageSource
from stage1_vqvae.features.classifier import NotTrainedError, load_classifier
from stage1_vqvae.features.networks import AUTO, INCEPTION, feature_network
from stage1_vqvae.features.weights import read_weights
from stage1_vqvae.model import load_tokenizer
from stage1_vqvae.objectives.contract import PixelLikelihood
from stage1_vqvae.pictures import grid_scale, save_png
from stage2_prior.codes.store import CodeStore, read_manifest
from stage2_prior.priors.prior_file import UNIFORM, LoadedPrior, drawn_prior, learned_name, load_finished
from training.processes import SMALLER_BATCHES, finish, start
from training.weights_file import fingerprint


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    sections = ("evaluation", "sampling", "compute")
    command = parse(__doc__, sections, argv, flat="evaluation", drawn_prior=drawn_prior, reads_images=True, options=_options)
    run, config, options = command.run, command.recipe.evaluation, command.options
    if options.samples is not None and options.prior is not None:
        raise UserError(f"--samples: expected no --prior beside it, found {options.prior}")
    batch_path = reference_file(options.reference)
    for name in ("split", "reference"):
        value, alternative = getattr(options, name), ", or an npz file" if name == "reference" else ""
        if value not in (TRAIN, VALIDATION, TEST) and (name == "split" or batch_path is None):
            raise UserError(f"--{name}: expected {TRAIN}, {VALIDATION} or {TEST}{alternative}, found {value}")
    if batch_path is not None and config.features not in (AUTO, INCEPTION):
        raise UserError(f"--reference {options.reference}: expected --features {INCEPTION}, found {config.features}")
    features = config.features if batch_path is None else INCEPTION
    command.need_tokenizer()
    accelerator = start(command.recipe.compute, oom_hint=SMALLER_BATCHES)
    tokenizer = load_tokenizer(run, accelerator.device)
    with run.numbered("evaluations", accelerator.is_main_process) as folder:
        # Check all inputs that may be missing before anything slow starts.
        data = command.recipe.data
        batch = None
        if folder is not None and batch_path is not None:
            batch = load_reference_batch(batch_path, (data.height, data.width, data.channels))
        source = load_splits(command, progress=folder is not None)
        network_arguments = (features, config.weights, run.path, source, accelerator.device)
        network = None
        if folder is not None:
            local_lpips()
            # A network that has to be trained, or Inception with its fallback, is loaded after the other processes have finished.
            with suppress(NotTrainedError):
                network = None if features == AUTO else feature_network(*network_arguments, may_train=False)
        samples = None
        if options.samples is not None:
            samples = load_samples(command, options.samples, source.label_names, folder) if folder is not None else None
        elif options.prior is not None or run.last_prior() is not None:
            samples = draw_samples(command, accelerator, folder)
        finish(accelerator)  # the rest takes one process; the others need not wait
        if folder is not None:
            network = network or feature_network(*network_arguments)
            training = training_codes(run, source)
            assessor = Assessor(tokenizer, network, source, data, config, batch, training, fingerprint(run.tokenizer), folder)
            results = evaluate(command, assessor, samples)
            if samples is not None:
                save_png(folder / "neighbours.png", assessor.neighbours(samples), grid_scale(samples.pixels.shape[1]))
            write_json(folder / "evaluation.json", results)
            write_text(folder / "evaluation.md", markdown(results))
            run.record(program(), command.arguments, dataclasses.asdict(config))
            print(markdown(results))
            print(f"wrote {run.show(folder / 'evaluation.json')}, .md and pictures")
            print(f"next: {command.next(REPORT if samples is not None else TRAIN_PRIOR)}")


def _options(parser: Any) -> None:
    parser.add_argument("--samples", type=str, help="images made elsewhere to evaluate: a folder, or an npz with uint8 (N, H, W, C)")
    parser.add_argument("--prior", type=str, help=f"name of a prior of the run (default: the last finished), or `{UNIFORM}`")
    parser.add_argument("--split", type=str, default=VALIDATION, help="held-out images, which are reconstructed and compared like samples")
    parser.add_argument("--reference", type=str, default=TRAIN, help="reference for the samples: a split, or an npz file in ADM's layout")


def reference_file(reference: str) -> Path | None:
    """Return the path of the file that --reference names; None if it names a split or no file."""
    path = Path(reference).expanduser()
    is_split = reference in (TRAIN, VALIDATION, TEST)
    return path if not is_split and (path.suffix == ".npz" or path.is_file()) else None


def load_splits(command: Command, progress: bool) -> ImageSource:
    """Load the splits to compare. Errors: UserError for a split that the data does not have."""
    options = command.options
    named = {"split": options.split} | ({} if reference_file(options.reference) else {"reference": options.reference})

    def check(record: Record) -> None:
        check_unchanged(command.run.data, record, str(command.run), command.options.accept_changed_data)

    columns = command.recipe.condition.columns
    source = load_images(command.recipe.data, {TRAIN, VALIDATION, *named.values()}, progress, check=check, columns=columns)
    for name, split in named.items():
        if split not in source.splits:
            raise UserError(f"--{name} {split}: expected one of {', '.join(source.splits)}, the splits of the run's data")
    return source


def draw_samples(command: Command, accelerator: Accelerator, folder: Path | None) -> Samples:
    """Draw samples of a prior of the run, their pixels in a temporary file in the folder; complete on the main process alone."""
    config = command.recipe.evaluation
    generator = load_generator(command, accelerator, command.options.prior)
    codes, pixels, condition = generator.draw(config.n, seed=config.seed, progress=True, folder=folder)
    names = generator.label_names
    labels = None if condition is None or not names else [names[label] for label in condition.tolist()]
    balance = "no labels" if condition is None else f"labels in turns: {class_balance(condition, len(names))}"
    origin = {"source": f"drawn from prior {generator.prior_name}, {balance}", "tokenizer_sha256": generator.tokenizer_sha256}
    return Samples(pixels, codes, labels, origin | generator.origin)


def class_balance(labels: Tensor, classes: int) -> str:
    """Describe how many of the labels (N,) each class has, as `19 or 20 of each of 10 classes`."""
    counts = labels.bincount(minlength=classes)
    least, most = int(counts.min()), int(counts.max())
    numbers = str(least) if least == most else f"{least} {'or' if most == least + 1 else 'to'} {most}"
    return f"{numbers} of each of {classes} classes"


def load_samples(command: Command, path: str, label_names: list[str] | None, folder: Path | None = None) -> Samples:
    """Load images made elsewhere or by sample.py, with the labels in samples.json or of their folders, if the run has these classes.

    `folder`: folder of a temporary file for the decoded pixels; None: in memory. Errors: UserError for a missing path, a file that is no
    image, or an npz of another image size.
    """
    data, source = command.recipe.data, Path(path).expanduser()
    details: dict[str, Any] = {"source": f"images in {base_name(path)}"}
    details |= dict.fromkeys(("prior", "prior_sha256", "sampling", "tokenizer_sha256"))
    codes, labels, allocate = None, None, partial(allocate_pixels, folder=folder)
    if source.suffix == ".npz":
        array = array_in(source, "arr_0", "--samples")
        if array.dtype != np.uint8 or array.ndim != 4:
            raise UserError(f"--samples {path}: expected arr_0 as uint8 (N, H, W, C), found {array.dtype} {array.shape}")
        pixels = torch.from_numpy(array)
        if pixels.shape[1:] != (data.height, data.width, data.channels):
            expected = f"expected uint8 (N, {data.height}, {data.width}, {data.channels})"
            raise UserError(f"--samples {path}: {expected}, found {tuple(pixels.shape)}")
    elif (source / "samples.json").exists():
        manifest = read_json(source / "samples.json")
        pixels = load_files([str(source / "images")], data, progress=True, allocate=allocate).pixels
        if len(pixels) != manifest["n"]:
            raise UserError(f"--samples {path}: expected the {manifest['n']} images that its samples.json lists, found {len(pixels)}")
        names = () if manifest["condition"] is None else condition_from(manifest["condition"]).class_names
        labels = [names[label] for label in manifest["labels"]] if manifest["labels"] is not None and names else None
        details |= {key: manifest.get(key) for key in ("prior", "prior_sha256", "sampling", "tokenizer_sha256")}
        if details["tokenizer_sha256"] == fingerprint(command.run.tokenizer):
            tensors = read_weights(source / "codes.safetensors")
            codes = tuple(tensors[f"level{level}"] for level in range(len(tensors) - ("condition" in tensors)))
    else:
        files = load_files([path], data, progress=True, allocate=allocate)
        pixels, labels = files.pixels, files.labels
    if len(pixels) < 2:
        raise UserError(f"--samples {path}: expected at least 2 images, found {len(pixels)}")
    labels = None if labels is None else [normalised(label) for label in labels]
    unknown = sorted(set(labels or ()) - set(label_names or ()))
    if unknown:
        say(f"--samples {path}: evaluated without labels, since the run's data has no class {unknown[0]}")
    return Samples(pixels, codes, None if unknown else labels, details)


def training_networks(config: Stage1) -> set[str]:
    """Return the names of the feature networks in the tokenizer's loss terms, LPIPS' trunk as `lpips alex`, and those of the runs that it
    was initialised from, as far as these still exist.
    """
    names: set[str] = set()
    visited: set[str] = set()
    while True:
        parts = (config.perceptual, config.adversarial)
        names |= {str(part.network) for part in parts if hasattr(part, "network")}
        names |= {f"{part.kind} {part.trunk}" for part in parts if hasattr(part, "trunk")}
        # A run of that name may have been trained again since, even from one of its descendants: `visited` ends such a cycle.
        if config.init_from is None or config.init_from in visited:
            return names
        visited.add(config.init_from)
        try:
            config = load_recipe(RunDir.named(config.init_from).recipe).stage1
        except UserError:
            return names


def training_codes(run: RunDir, source: ImageSource) -> CodeStore | None:
    """Open the run's codes of the training images; None if they are missing, of another tokenizer or of another number of images."""
    folder, sha256 = run.codes / TRAIN, fingerprint(run.tokenizer)
    if not folder.is_dir():
        return None
    manifest = read_manifest(folder)
    return CodeStore(folder, sha256) if (manifest.tokenizer_sha256, manifest.rows) == (sha256, len(source.splits[TRAIN])) else None


def code_models(command: Command, device: torch.device) -> tuple[LoadedPrior | None, CodeStore | None]:
    """Load the two models of the run's codes: the prior that `--prior` names, or the one last finished, and the training codes for their
    frequencies. None for one that the run does not have.
    """
    run, sha256 = command.run, fingerprint(command.run.tokenizer)
    learned, codes = learned_name(run, command.options.prior), run.codes / TRAIN
    prior = None if learned is None else load_finished(run, learned, command.next(TRAIN_PRIOR), device)
    return prior, CodeStore(codes, sha256) if codes.is_dir() else None


def evaluate(command: Command, assessor: Assessor, samples: Samples | None) -> dict[str, Any]:
    """Compute the content of evaluation.json. It may be published, so files and folders are named without their paths."""
    run, config, split = command.run, command.recipe.evaluation, command.options.split
    network, source, batch = assessor.network, assessor.source, assessor.batch
    reference = command.options.reference if batch is None else batch.path.name
    held_out = source.splits[split]
    n, height, width, channels = held_out.pixels.shape
    results: dict[str, Any] = {
        "run": run.path.resolve().name,
        "evaluation": {**dataclasses.asdict(config), "weights": describe_weights(config.weights)},
        "tokenizer_sha256": fingerprint(run.tokenizer),
        **({} if samples is None else {key: samples.details[key] for key in ("prior", "prior_sha256", "sampling")}),
        "samples_tokenizer_sha256": None if samples is None else samples.details["tokenizer_sha256"],
        "compared": {
            "held-out images": f"{n} of {split}, {height} x {width} x {channels}, sha256 {pixels_hash(held_out.pixels)[:16]}",
            "reference": described_reference(assessor, reference, samples),
            "samples": "none" if samples is None else f"{len(samples.pixels)} {samples.details['source']}",
            "features": f"{network.name}, {assessor.features(split).vectors.shape[1]} of them, weights {network.sha256[:16]}",
            "seed": config.seed,
        },
        "drawn": None if samples is None else command.options.samples is None,
        "distance": network.distance,
        "kernel_distance": network.named("KID", "kernel distance"),
        "class_score": network.named("inception score", "score of classes"),
        "instead_of": network.instead_of,
        "trained_by": sorted(training_networks(command.recipe.stage1)),
        "features": network.name,
        "split": split,
        "reference": reference,
        "reconstruction": assessor.reconstruction(split),
        "codes": assessor.codes(split),
    }
    if isinstance(assessor.tokenizer.objective, PixelLikelihood):
        results["bound"] = assessor.bound(split, *code_models(command, torch.device(network.device)))
        results["bound"]["prior_sha256"] = model_fingerprints(run, results["bound"]["prior"])["prior_sha256"]
    labelled = samples is not None and samples.labels is not None and held_out.labels is not None
    classifier = load_classifier(run.path, source, network.device) if labelled else None
    if batch is not None:
        results["beside_batch"], results["batch_missing"] = assessor.beside_batch(samples, split, classifier), batch.missing()
    if samples is not None:
        if batch is None:
            results["distances"], results["coverage"] = assessor.beside_real(samples, split, reference, classifier)
        results["memorisation"] = assessor.memorisation(samples, split)
        if (likelihood := prior_likelihood(run, samples)) is not None:
            results["likelihood"] = likelihood
    return results | {"tables": tables(results), "notes": notes(results)}


def prior_likelihood(run: RunDir, samples: Samples) -> dict[str, Any] | None:
    """Read the likelihood of the prior that drew the samples; None if there is no report, or the run does not have this prior."""
    if samples.details["prior_sha256"] is None:
        return None
    path = run.prior(samples.details["prior"]) / "likelihood.json"
    # The run may have another prior of that name.
    if not path.exists() or not contains(samples.details, model_fingerprints(run, samples.details["prior"])):
        return None
    likelihood = read_json(path)
    return {key: likelihood[key] for key in ("exact", "validation", "unigram", "uniform", "codes_bits_per_dim")}


def described_reference(assessor: Assessor, name: str, samples: Samples | None) -> str:
    """Describe the reference, a split or a file, for the report."""
    batch = assessor.batch
    if batch is None and samples is None:
        return f"none, since nothing is compared with {name}"
    if batch is None:
        return f"{len(assessor.source.splits[name])} of {name}, sha256 {assessor.reference(name).pixels_sha256[:16]}"
    images = "" if batch.images is None else f"; images sha256 {pixels_hash(batch.images)[:16]}"
    return f"{name}: {batch.contents()}{images}"


if __name__ == "__main__":
    run_entry(main)
