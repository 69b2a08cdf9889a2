"""Content of a run's report, read from the run's files; the template lays it out."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from configs.cli import EVALUATE, EXTRACT_CODES, SAMPLE, TRAIN_PRIOR, Command
from configs.parts import FAMILIES, as_dict, default_part, part_class
from configs.recipe_file import flattened, load_recipe, recipe_dict
from configs.run_dir import RunDir, natural, read_json, typed
from configs.schema import Recipe, condition_from, prior_from
from pipelines.provenance import base_name, model_fingerprints, outputs, publishable_argument, publishable_recipe, significant
from pipelines.reporting.pictures import Chart, Embedded, HeatMap, colour_scale, embedded, heat_map, line_chart, tile
from stage1_vqvae.data.splits import TRAIN
from stage2_prior.codes.store import Manifest, read_manifest
from stage2_prior.priors.prior_file import UNIFORM, read_prior_header
from training.metrics_log import read_metrics

_MEASURE_PRIOR = typed("stage2_prior/report.py")

_STAGE1_CURVES = {"loss": "loss", "psnr": "PSNR, dB", "usage": "codebook usage", "perplexity": "codebook perplexity"}
_STAGE2_CURVES = {"bits_per_token": "bits per token"}
# Largest number of shown samples per prior, and per class.
_MOST_TILES, _MOST_OF_A_CLASS = 100, 10
_MOST_CLASSES = 50
_MOST_LABELS_NAMED = 20


class KeyFigure(NamedTuple):
    """A number at the top of the report."""

    name: str
    value: str
    note: str


class Table(NamedTuple):
    """A table of text."""

    columns: list[str]
    rows: list[list[str]]
    title: str = ""


class Missing(NamedTuple):
    """A result that the run does not have yet, and the command that computes it."""

    message: str
    command: str

    @classmethod
    def publishable(cls, message: str, command: str) -> Missing:
        """Build it with the command as typed in a checkout, without this machine's paths."""
        return cls(message, shlex.join(map(publishable_argument, shlex.split(command))))


class Picture(NamedTuple):
    """An embedded image with its caption."""

    image: Embedded
    caption: str


class LabelBits(NamedTuple):
    """Bits per token of one class."""

    label: str
    bits: float
    percent: float
    """Bits as a percentage of those of the class with most bits."""


class PriorReport(NamedTuple):
    """Section on a finished prior."""

    name: str
    description: str
    figures: Table
    charts: list[Chart]
    heat_maps: list[HeatMap]
    low: float
    """Bits of the heat maps' first colour."""
    high: float
    labels: list[LabelBits]
    remarks: list[str]


class ClassOfSamples(NamedTuple):
    """Samples of one class; all samples if there are no classes."""

    label: str | None
    tiles: list[str]


class Samples(NamedTuple):
    """Section on the samples of one command."""

    where: str
    prior: str
    description: str
    classes: list[ClassOfSamples]
    columns: int
    """Number of samples of the largest class."""
    remarks: list[str]


class Evaluation(NamedTuple):
    """Section on one evaluation."""

    where: str
    tables: list[Table]
    notes: list[str]
    remarks: list[str]
    pictures: list[Picture]
    distance: KeyFigure | None
    """Fréchet distance of the samples to the reference images."""
    learned: bool
    """Whether the samples come from a learned prior of the run."""


def report_content(command: Command) -> dict[str, Any]:
    """Collect everything the template shows, without paths of this machine, since the page may be mailed.

    Errors: UserError for a file of the run that cannot be read.
    """
    run, full_recipe = command.run, load_recipe(command.run.recipe)
    recipe = publishable_recipe(full_recipe)
    source = str(recipe.data.name) if full_recipe.data.path is None else base_name(full_recipe.data.path)
    priors = prior_reports(run)
    evaluations = [evaluation(run, path.parent) for path in outputs(run, "evaluations", "evaluation.json")]
    return {
        "name": run.path.resolve().name,
        "lead": f"{source}: {image_size(recipe)}",
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "key_figures": key_figures(run, priors, evaluations),
        "recipe": Table(["key", "value", "default"], changed_keys(recipe)),
        "recipe_text": yaml.safe_dump(recipe_dict(recipe), sort_keys=False),
        "data": data_table(run, recipe, source),
        "codes": codes_table(run) or Missing.publishable("The codes have not been extracted.", command.next(EXTRACT_CODES)),
        "curves": charts(read_metrics(run.stage1 / "metrics.jsonl"), _STAGE1_CURVES, {}),
        "stage1": stage1_text(run),
        "reconstructions": newest_reconstructions(run),
        "grids": picture(
            run.stage1 / "grids.png",
            "Validation images; decoded from the coarsest grid of codes alone, with the finer ones at their mean; decoded from all grids.",
        ),
        "codebook": codebook_table(run),
        "codebook_picture": picture(run.stage1 / "codebook.png", "How often each code is used, and the codes on their two principal axes."),
        "codebook_warning": read_json(run.codebook_health)["warning"] if run.codebook_health.exists() else None,
        "priors": priors,
        "no_prior": missing_prior(command),
        "colour_scale": colour_scale(),
        "samples": newest_samples(run),
        "no_samples": Missing.publishable("No samples have been drawn.", command.next(SAMPLE)),
        "evaluations": evaluations[::-1],
        "no_evaluation": Missing.publishable("The run has not been evaluated.", command.next(EVALUATE)),
        "environment": environment(read_metrics(run.history)),
        "commands": commands(read_metrics(run.history)),
    }


def key_figures(run: RunDir, priors: Sequence[PriorReport], evaluations: Sequence[Evaluation]) -> list[KeyFigure]:
    """Build the numbers at the top, from the newest prior and evaluation."""
    report = read_json(run.stage1 / "report.json")
    metrics, bits = report["validation"], report["bits_per_image"]
    figures = [
        KeyFigure("Reconstruction", f"{metrics['psnr']:.2f} dB", f"PSNR on validation; MSE {metrics['mse']:.5f}"),
        KeyFigure("Codebook usage", f"{metrics['usage']:.1%}", f"perplexity {metrics['perplexity']:.1f}"),
    ]
    bound = ""
    if priors:
        measured, bound = read_json(run.prior(priors[0].name) / "likelihood.json"), bound_prefix(run, priors[0].name)
        figures.append(
            KeyFigure(
                "Bits per token",
                f"{bound}{measured['validation']:.3f}",
                f"prior {priors[0].name}; unigram {measured['unigram']:.3f}, uniform {measured['uniform']:.3f}",
            )
        )
        bits = measured["bits_per_image"]
    smallest = bits.get("prior", bits["indices"])
    named = f"as indices {bits['indices']:,.0f}, raw {bits['raw']:,}" if "prior" in bits else f"as indices; raw {bits['raw']:,}"
    figures.append(KeyFigure("Bits per image", f"{bound}{smallest:,.0f}", named))
    # Only for samples of a learned prior of the current models.
    distances = [metrics.distance for metrics in evaluations if metrics.distance is not None and metrics.learned and not metrics.remarks]
    figures += distances[-1:]
    return figures


def changed_keys(recipe: Recipe) -> list[list[str]]:
    """List key, value and default of every setting that differs from its default; a part's defaults are those of its kind."""
    values, defaults = flattened(recipe_dict(recipe)), flattened(recipe_dict(Recipe()))
    for family in FAMILIES:
        kind = values[f"{family}.kind"]
        part_defaults = as_dict(part_class(family, kind)())
        defaults |= {f"{family}.{name}": value for name, value in part_defaults.items() if name != "kind"}
    return [[key, str(value), str(defaults[key])] for key, value in values.items() if value != defaults[key]]


def image_size(recipe: Recipe) -> str:
    """Describe size and channels of the run's images."""
    data = recipe.data
    return f"{data.height} x {data.width} pixels, {'grey' if data.channels == 1 else 'colour'}"


def data_table(run: RunDir, recipe: Recipe, source: str) -> Table:
    """Build the table of the images' source, size, splits and labels."""
    rows = [["source", source], ["images", image_size(recipe)]]
    for manifest in manifests(run):
        variants = f" x {manifest.variants} variants ({manifest.augmentation})" if manifest.variants > 1 else ""
        rows.append([f"split {manifest.split}", f"{manifest.rows:,} images{variants}"])
    if manifests(run):
        condition = manifests(run)[0].condition
        names = condition.class_names
        more = f", and {len(names) - _MOST_LABELS_NAMED} more" if len(names) > _MOST_LABELS_NAMED else ""
        rows.append(["labels", f"{len(names)}: {', '.join(names[:_MOST_LABELS_NAMED])}{more}" if names else condition.describe()])
    return Table(["", ""], rows)


def manifests(run: RunDir) -> list[Manifest]:
    """Read the manifests of extracted splits, the training codes' first, since priors take their labels from it.

    A killed extraction may have left an empty folder.
    """
    result = [read_manifest(path.parent) for path in run.codes.glob("*/manifest.json")]
    return sorted(result, key=lambda manifest: (manifest.split != TRAIN, manifest.split))


def codes_table(run: RunDir) -> Table | None:
    """Build the table of grid and number of codes per level; None before extraction."""
    if not manifests(run):
        return None
    manifest = manifests(run)[0]
    rows = [
        [str(level + 1), f"{h} x {w}", f"{k:,}"] for level, ((h, w), k) in enumerate(zip(manifest.grids, manifest.num_codes, strict=True))
    ]
    return Table(["level", "grid", "codes K"], rows)


def charts(records: Sequence[dict[str, Any]], names: dict[str, str], references: dict[str, float]) -> list[Chart]:
    """Build line charts of a metrics log, one per metric."""
    result = [line_chart(title, records, name, references) for name, title in names.items()]
    return [chart for chart in result if chart is not None]


def stage1_text(run: RunDir) -> str:
    """Describe the duration of stage 1."""
    report = read_json(run.stage1 / "report.json")
    return f"{report['steps']:,} steps in {report['minutes']:.1f} minutes"


def newest_reconstructions(run: RunDir) -> Picture | None:
    """Embed the reconstructions of the last step."""
    paths = sorted((run.stage1 / "reconstructions").glob("*.png"))
    step = int(paths[-1].stem.removeprefix("step-")) if paths else 0
    return picture(paths[-1], f"Validation images, and under each its reconstruction, after step {step:,}.") if paths else None


def picture(path: Path, caption: str) -> Picture | None:
    """Embed a picture of the run; None if it does not exist."""
    if not path.exists():
        return None
    image = embedded(path)
    return Picture(image, f"{caption} ({image.remark})" if image.remark else caption)


def codebook_table(run: RunDir) -> Table | None:
    """Build the table of the codebook's health that doctor.py prints, one row per level."""
    if not run.codebook_health.exists():
        return None
    rows = []
    for number, level in enumerate(read_json(run.codebook_health)["levels"]):
        apart = "no codebook" if level["nearest_median"] is None else f"{level['nearest_median']:.3f}"
        figures = [f"{level['num_codes']:,}", f"{level['usage']:.1%}", f"{level['perplexity']:.1f}", f"{level['dead']:,}", apart]
        rows.append([str(number + 1), *figures])
    return Table(["level", "codes K", "usage", "perplexity", "never used", "nearest code, median"], rows)


def missing_prior(command: Command) -> Missing:
    """Name the command that gives the report its first prior."""
    for name in unmeasured_priors(command.run):
        return Missing.publishable(f"Prior {name} has no likelihood report.", command.next(f"{_MEASURE_PRIOR} --prior {name}"))
    return Missing.publishable("No prior has been trained.", command.next(TRAIN_PRIOR))


def unmeasured_priors(run: RunDir) -> list[str]:
    """List the finished priors without a likelihood report."""
    return [name for name in run.finished_priors() if not (run.prior(name) / "likelihood.json").exists()]


def prior_reports(run: RunDir) -> list[PriorReport]:
    """Build the sections of the priors with a likelihood report, the one last finished first."""
    names = [name for name in run.finished_priors() if (run.prior(name) / "likelihood.json").exists()]
    return [prior_report(run, name) for name in sorted(names, key=lambda name: name != run.last_prior())]


def prior_report(run: RunDir, name: str) -> PriorReport:
    """Build the section of a prior: curves, likelihood, heat maps."""
    folder = run.prior(name)
    report, measured = (read_json(folder / file) for file in ("report.json", "likelihood.json"))
    config = prior_from(read_prior_header(folder / "prior.safetensors")["config"])
    fields = ", ".join(f"{name} {value}" for name, value in as_dict(config).items() if name != "kind")
    description = (
        f"{config.kind} ({fields}), {report['parameters'] / 1e6:.1f} M parameters; "
        f"{report['steps']:,} steps in {report['minutes']:.1f} minutes"
    )
    if report["best_step"] is not None:  # None for levels trained separately, which have one each
        description += f", best at step {report['best_step']:,}"
    saved, images, at_most = measured["saved_percent"], measured["images"], "" if measured["exact"] else "at most "
    rows = [
        ["uniform (log2 K)", f"{measured['uniform']:.3f}", f"{saved['uniform']:.1f} %"],
        ["unigram (training frequencies)", f"{measured['unigram']:.3f}", f"{saved['unigram']:.1f} %"],
        *(
            [f"prior, {images[split]:,} {name} images", f"{at_most}{measured[split]:.3f}", ""]
            for split, name in (("validation", "validation"), ("train", "training"))
        ),
    ]
    grids = measured["positions"]
    flat = [bits for grid in grids for row in grid for bits in row]
    # A prior that is certain of every code has zero bits for all classes.
    highest = max(measured["labels"].values(), default=0.0) or 1.0
    turned = measured["validation_turned_at_step"]
    references = {key: measured[key] for key in ("unigram", "uniform")}
    return PriorReport(
        name=name,
        description=description,
        figures=Table(["", "bits per token", "saved by the prior"], rows),
        charts=charts(read_metrics(folder / "metrics.jsonl"), _STAGE2_CURVES, references),
        heat_maps=[heat_map(grid, min(flat), max(flat)) for grid in grids],
        low=min(flat),
        high=max(flat),
        labels=[LabelBits(label, bits, 100 * bits / highest) for label, bits in measured["labels"].items()],
        remarks=[]
        if turned is None
        else [f"Validation turned after step {turned:,}: from then on the prior memorised its training images."],
    )


def newest_samples(run: RunDir) -> list[Samples]:
    """Build the sections of the newest samples of each prior: the prior last finished first, the uniform prior last."""
    newest: dict[str, Path] = {}
    for path in outputs(run, "samples", "samples.json"):
        newest[read_json(path)["prior"]] = path.parent
    names = sorted(newest, key=lambda name: (name == UNIFORM, name != run.last_prior(), natural(name)))
    return [samples(run, newest[name]) for name in names]


def samples(run: RunDir, folder: Path) -> Samples:
    """Build the section of one command's samples, the first of each class."""
    details = read_json(folder / "samples.json")
    files = sorted((folder / "images").glob("*.png"), key=natural)
    labels, names = details["labels"], condition_from(details["condition"] or {"kind": "none"}).class_names
    remarks = staleness_warnings(run, details)
    if labels is None or not names:
        classes = [ClassOfSamples(None, [tile(path) for path in files[:64]])]
    else:
        labels_drawn = sorted(set(labels))
        labels_shown = labels_drawn[:_MOST_CLASSES]
        per_label = max(1, min(_MOST_OF_A_CLASS, _MOST_TILES // len(labels_shown)))
        if len(labels_shown) < len(labels_drawn):
            remarks.append(f"Shown are {len(labels_shown)} of {len(labels_drawn)} labels.")
        # Rows come from the names of the files, since some may have been deleted.
        paths_by_label = {label: [path for path in files if labels[int(path.stem)] == label][:per_label] for label in labels_shown}
        classes = [ClassOfSamples(names[label], [tile(path) for path in paths]) for label, paths in paths_by_label.items()]
    neutral = neutral_sampling(run, details["prior"])
    warped = [f"{key.replace('_', ' ')} {value}" for key, value in significant(details["sampling"]).items() if value != neutral.get(key)]
    drawn_as = "all codes equally likely" if details["prior"] == UNIFORM else ", ".join(warped) or "from the unmodified prior"
    bits = f"{bound_prefix(run, details['prior'])}{details['bits_per_token']:.3f} bits per token"
    description = f"{details['n']:,} samples, seed {details['seed']}, {bits}; {drawn_as}"
    columns = max(len(group.tiles) for group in classes)
    return Samples(folder.name, details["prior"], description, classes, columns, remarks)


def neutral_sampling(run: RunDir, prior: str | None) -> dict[str, Any]:
    """Return the defaults of the sampling settings of a prior's kind; without the prior's file, of the default kind."""
    path = run.prior(str(prior)) / "prior.safetensors"
    part = prior_from(read_prior_header(path)["config"]) if path.exists() else default_part("prior")
    return vars(part.SAMPLING())


def bound_prefix(run: RunDir, prior: str | None) -> str:
    """Return "at most " before the bits of a prior whose likelihood is a bound."""
    path = run.prior(str(prior)) / "likelihood.json"
    return "" if not path.exists() or read_json(path)["exact"] else "at most "


def staleness_warnings(run: RunDir, details: dict[str, Any]) -> list[str]:
    """Return a warning if an output was made with an earlier tokenizer or prior."""
    # An evaluation's bound may use another prior than its samples; images from elsewhere have no prior.
    for part in (details, details.get("bound") or {}):
        current = model_fingerprints(run, part.get("prior"))
        for key, model in (("tokenizer_sha256", "tokenizer"), ("prior_sha256", "prior")):
            if part.get(key) is not None and part[key] != current[key]:
                return [f"Made with an earlier {model}: the run's current models would give other results."]
    return []


def evaluation(run: RunDir, folder: Path) -> Evaluation:
    """Build the section of one evaluation."""
    results = read_json(folder / "evaluation.json")
    tables = [Table(table["columns"], table["rows"], table["title"]) for table in results["tables"]]
    pictures = [Picture(embedded(path), path.stem.replace("_", " ")) for path in sorted(folder.glob("*.png"), key=natural)]
    distance = None
    if "samples" in results.get("distances", {}):
        figures, prior_note = results["distances"]["samples"], f" of prior {results['prior']}" if results["prior"] else ""
        features = results["distance"].removeprefix("Fréchet distance").strip(" ()")
        distance = KeyFigure("Fréchet distance", f"{figures['frechet']:.4g}", f"{features}; {figures['n']:,} samples{prior_note}")
    learned = results.get("prior") not in (None, UNIFORM)
    return Evaluation(folder.name, tables, results["notes"], staleness_warnings(run, results), pictures, distance, learned)


def environment(history: Sequence[dict[str, Any]]) -> Table:
    """Build the table of the commands' environment; several values where commands differ."""
    flat = [
        {
            "commit": entry["commit"] or "unknown",
            "python": entry["python"],
            "platform": entry["platform"],
            **entry["versions"],
            "processes": str(entry["processes"]),
        }
        for entry in history
    ]
    keys = dict.fromkeys(key for entry in flat for key in entry)
    return Table(["", ""], [[key, ", ".join(dict.fromkeys(entry[key] for entry in flat if key in entry))] for key in keys])


def commands(history: Sequence[dict[str, Any]]) -> Table:
    """Build the table of the run's commands, oldest first."""
    rows = [
        [
            entry["time"].replace("T", " ").removesuffix("+00:00"),
            " ".join([entry["command"], *map(publishable_argument, entry["arguments"])]),
        ]
        for entry in history
    ]
    return Table(["started (UTC)", "command"], rows)
