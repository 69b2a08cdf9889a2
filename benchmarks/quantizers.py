"""All quantizers at equal bits per image, with the same encoder, steps and small prior.

    python benchmarks/quantizers.py digits
    python benchmarks/quantizers.py cifar10 --data FOLDER        (a local copy of CIFAR-10 as parquet; without it, the Hub)

Nine bits per position: one code of 512, or three of 8. CIFAR-10 is the first 10,000 of its training images. Tokenizer, codes and prior
are made by the project's commands; errors and bits are of the validation split. One seed: differences of a few per cent are noise.
Perplexity is per level (the geometric mean of three). Three codes are three tokens, so compare bits per image.
"""

from __future__ import annotations

import argparse
import glob
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from datasets import load_dataset

from configs.recipe_file import load_recipe
from configs.run_dir import REPOSITORY, RunDir, read_json
from training.metrics_log import read_metrics

_THREE_OF_8 = ["--tokenizer.quantizer.num_codes", "8"]
KINDS: dict[str, list[str]] = {
    "EMA": [],
    "EMA, rotation trick": ["--tokenizer.quantizer.gradient_estimator", "rotation"],
    "EMA, cosine, 8 channels": ["--tokenizer.quantizer.metric", "cosine", "--tokenizer.quantizer.codebook_dim", "8"],
    "gradient (the paper's)": ["--tokenizer.quantizer", "gradient"],
    "gradient, entropy term": ["--tokenizer.quantizer", "gradient", "--tokenizer.quantizer.entropy_weight", "0.01"],
    "SimVQ": ["--tokenizer.quantizer", "simvq"],
    "FSQ 8 x 8 x 8": ["--tokenizer.quantizer", "fsq"],
    "LFQ, entropy term": ["--tokenizer.quantizer", "lfq", "--tokenizer.quantizer.entropy_weight", "0.1"],
    "residual, 3 depths of 8": [*_THREE_OF_8, "--tokenizer.quantizer.depth", "3"],
    "residual, 3 depths share 8": [*_THREE_OF_8, "--tokenizer.quantizer.depth", "3", "--tokenizer.quantizer.shared_codebook", "true"],
    "product, 3 groups of 8": [*_THREE_OF_8, "--tokenizer.quantizer.groups", "3", "--tokenizer.quantizer.codebook_dim", "24"],
}
_PRIOR = ["--prior.layers", "2", "--prior.width", "128", "--prior.heads", "4", "--stage2.batch_size", "64"]
_PRIOR += ["--stage2.lr", "2e-3", "--stage2.warmup_steps", "20"]
SOURCES: dict[str, list[str]] = {
    "digits": ["--config", "configs/digits.yaml", "--stage1.steps", "300", "--extraction.augmentation", "none"],
    "cifar10": ["--config", "configs/cifar10_5min.yaml", "--tokenizer.network.hidden_channels", "64", "--stage1.steps", "800"],
}
_PRIOR_STEPS = {"digits": 150, "cifar10": 150}


def command(script: str, *arguments: str) -> None:
    """Run one of the project's scripts."""
    done = subprocess.run([sys.executable, script, *arguments], cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(arguments)}\n{done.stderr}")


def row(name: str, run: RunDir) -> str:
    """Format the run's figures as a Markdown row."""
    report = read_json(run.stage1 / "report.json")
    prior = read_json(run.prior("transformer") / "likelihood.json")
    speeds = [record["images_per_second"] for record in read_metrics(run.stage1 / "metrics.jsonl") if record["split"] == "train"]
    validation, bits = report["validation"], prior["bits_per_image"]
    recipe = load_recipe(run.recipe)
    milliseconds = 1000 * recipe.stage1.batch_size
    tokens = bits["prior"] / prior["validation"]
    cells = [
        f"{1000 * validation['mse']:.2f}",
        f"{validation['usage']:.0%}",
        f"{validation['perplexity']:.3g} of {read_json(run.codebook_health)['levels'][0]['num_codes']}",
        f"{bits['indices']:.0f}",
        f"{tokens * prior['unigram']:.0f}",
        f"{bits['prior']:.0f}",
        f"{prior['validation']:.2f}",
        f"{milliseconds / statistics.median(speeds):.0f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def ten_thousand(data: str | None, folder: Path) -> Path:
    """Write a parquet file of CIFAR-10's first 10,000 training images."""
    files = {"train": f"{glob.escape(str(data))}/**/train*.parquet"}
    source = load_dataset("parquet", data_files=files, split="train") if data else load_dataset("uoft-cs/cifar10", split="train")
    path = folder / "cifar10-10000.parquet"
    source.select(range(10_000)).to_parquet(path)
    return path


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("--data", help="folder with CIFAR-10 as parquet; without it, the Hub's uoft-cs/cifar10")
    parser.add_argument("--only", help="run only quantizers whose name contains this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = list(SOURCES[options.source])
        if options.source == "cifar10":
            arguments += ["--data.path", str(ten_thousand(options.data, folder)), "--data.validation_share", "0.1"]
        steps = str(_PRIOR_STEPS[options.source])
        schedule = ["--stage2.steps", steps, "--stage2.validation_interval", steps, "--stage2.checkpoint_interval", steps]
        print("| quantizer | MSE x 1000 | usage | perplexity | bits per image: indices | unigram | prior | bits/token | ms/step |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for number, (kind, overrides) in enumerate(KINDS.items()):
            if options.only and options.only.lower() not in kind.lower():
                continue
            run = RunDir(folder / f"run-{number}")
            command("stage1_vqvae/train.py", *arguments, *_PRIOR, *schedule, *overrides, "--run", str(run.path))
            command("stage2_prior/extract_codes.py", "--run", str(run.path))
            command("stage2_prior/train.py", "--run", str(run.path))
            print(row(kind, run), flush=True)


if __name__ == "__main__":
    main()
