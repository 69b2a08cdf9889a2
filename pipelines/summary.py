"""Print one table of a run's results and the paths of its pictures.

python pipelines/summary.py
python pipelines/summary.py --run fashion_mnist
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

from pathlib import Path

from configs.cli import EXTRACT_CODES, TRAIN_PRIOR, parse
from configs.errors import run_entry
from configs.run_dir import RunDir, natural, read_json, typed
from pipelines.provenance import model_fingerprints, outputs
from stage1_vqvae.metrics import compression_ratio
from stage2_prior.codes.store import read_manifest


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    command = parse(__doc__, (), argv)
    run = command.run
    command.need_tokenizer()
    rows = tokenizer_rows(run)
    if not run.codes.exists():
        rows.append(("codes", f"none yet; {command.next(EXTRACT_CODES)}"))
    else:
        rows += [(f"codes, {path.name}", codes_row(path)) for path in sorted(run.codes.iterdir(), key=natural)]
    name = run.last_prior()
    rows += prior_rows(run, name) if name is not None else [("prior", f"none yet; {command.next(TRAIN_PRIOR)}")]
    rows += bound_rows(run)
    rows += [("pictures" if number == 0 else "", run.show(path)) for number, path in enumerate(pictures(run, name))]
    print(table(f"run {run}", rows))


def tokenizer_rows(run: RunDir) -> list[tuple[str, str]]:
    """Build the rows of stage 1's result on the validation split."""
    report = read_json(run.stage1 / "report.json")
    metrics, bits = report["validation"], report["bits_per_image"]
    return [
        ("validation MSE ([0, 1], 8-bit)", f"{metrics['mse']:.5f}"),
        ("validation PSNR", f"{metrics['psnr']:.2f} dB"),
        ("codebook usage", f"{metrics['usage']:.1%}"),
        ("codebook perplexity", f"{metrics['perplexity']:.1f}"),
        ("bits per image: raw / indices", f"{bits['raw']} / {bits['indices']:.0f} ({bits['raw'] / bits['indices']:.1f} : 1)"),
        ("minutes of stage 1", f"{report['minutes']:.1f}"),
    ]


def codes_row(folder: Path) -> str:
    """Describe the codes of a split."""
    manifest = read_manifest(folder)
    grids = " + ".join(f"{h}x{w} of {k}" for (h, w), k in zip(manifest.grids, manifest.num_codes, strict=True))
    variants = f" x {manifest.variants} variants" if manifest.variants > 1 else ""
    return f"{manifest.rows} images{variants}, {grids}"


def prior_rows(run: RunDir, name: str) -> list[tuple[str, str]]:
    """Build the rows of stage 2's result on the validation split, with the unigram and uniform references."""
    if not (run.prior(name) / "likelihood.json").exists():
        return [(f"bits per token: prior {name}", f"not known; {typed('stage2_prior/report.py')} --prior {name} --run {run}")]
    report, likelihood = (read_json(run.prior(name) / file) for file in ("report.json", "likelihood.json"))
    bits, at_most = likelihood["bits_per_image"], "" if likelihood["exact"] else "at most "
    return [
        (f"bits per token: prior {name}", f"{at_most}{likelihood['validation']:.3f}"),
        ("bits per token: unigram", f"{likelihood['unigram']:.3f}"),
        ("bits per token: uniform (log2 K)", f"{likelihood['uniform']:.3f}"),
        ("bits per image under the prior", f"{bits['prior']:.0f} ({compression_ratio(bits['raw'], bits['prior']):.1f} : 1)"),
        ("minutes of stage 2", f"{report['minutes']:.1f}"),
    ]


def bound_rows(run: RunDir) -> list[tuple[str, str]]:
    """Build the rows of the bound on bits per dimension, from the newest evaluation of this tokenizer with the prior last finished; without
    one, of the bounds that need no prior.
    """
    current, without_prior = model_fingerprints(run, run.last_prior()), list[tuple[str, str]]()
    for path in reversed(outputs(run, "evaluations", "evaluation.json")):
        results = read_json(path)
        if "bound" not in results or results["tokenizer_sha256"] != current["tokenizer_sha256"]:
            continue
        bits = {name: values["mean"] for name, values in results["bound"]["bits_per_dimension"].items() if name != "pixels"}
        rows = {name: (f"bits per dimension, {results['split']}: p(z) {name}", f"at most {mean:.4f}") for name, mean in bits.items()}
        if all(results["bound"].get(key) == current[key] for key in ("prior", "prior_sha256")):
            return list(rows.values())
        without_prior = without_prior or [row for name, row in rows.items() if not name.startswith("learned")]
    return without_prior


def pictures(run: RunDir, prior: str | None) -> list[Path]:
    """List the existing pictures: training graphs, codebook, newest reconstructions, samples."""
    paths = [
        run.stage1 / "training.png",
        run.stage1 / "codebook.png",
        *sorted((run.stage1 / "reconstructions").glob("*.png"), key=natural)[-1:],
    ]
    paths += [run.prior(prior) / file for file in ("training.png", "likelihood.png")] if prior is not None else []
    return [path for path in [*paths, *outputs(run, "samples", "grid.png")] if path.exists()]


def table(title: str, rows: list[tuple[str, str]]) -> str:
    """Format a title and rows of two columns as plain text."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, "-" * len(title), *(f"{name:<{width}}  {value}" for name, value in rows)])


if __name__ == "__main__":
    run_entry(main)
