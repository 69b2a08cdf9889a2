"""Overhead of stage 1's loop: its images per second against a bare training step on one batch.

    python benchmarks/stage1_step.py --data FOLDER       (a local copy of CIFAR-10 as parquet; without it, the Hub)

The bare step is forward, backward, clipping, optimizer, codebook and weight average of configs/cifar10_5min.yaml on a fixed batch; the
loop adds order, data, statistics, restarts, logging and checks. Rounds alternate; two threads.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from configs.recipe_file import load_recipe
from configs.run_dir import REPOSITORY, RunDir
from stage1_vqvae.model import VQVAE
from training.averaging import WeightAverage
from training.metrics_log import read_metrics
from training.optimizer import adamw

_RECIPE = REPOSITORY / "configs" / "cifar10_5min.yaml"
_ROUNDS, _STEPS = 3, 300


def bare() -> float:
    """Measure images per second of the bare step."""
    recipe = load_recipe(_RECIPE)
    torch.manual_seed(0)
    model = VQVAE(recipe.tokenizer, recipe.data.height, recipe.data.width, recipe.data.channels)
    optimizer = adamw(model, recipe.stage1.lr, recipe.stage1.weight_decay, beta2=0.99)
    average = WeightAverage(model, recipe.stage1.average_decay, shared=("quantizer",))
    images = torch.randn(recipe.stage1.batch_size, recipe.data.channels, recipe.data.height, recipe.data.width)
    times = []
    for _ in range(_STEPS):
        start = time.perf_counter()
        output = model(images)
        torch.stack(list(output.losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.stage1.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        model.quantizer.update_(output.statistics)
        average.update_()
        times.append(time.perf_counter() - start)
    return len(images) / statistics.median(times)


def loop(data: str | None) -> float:
    """Measure images per second as logged by stage 1, the median over windows."""
    with tempfile.TemporaryDirectory() as folder:
        source = ["--data.path", data] if data else []
        command = [sys.executable, str(REPOSITORY / "stage1_vqvae/train.py"), "--config", str(_RECIPE), "--run", f"{folder}/run"]
        command += ["--stage1.steps", str(_STEPS), "--stage1.log_interval", "20", "--compute.threads", "2", *source]
        subprocess.run(command, check=True, capture_output=True)
        records = read_metrics(RunDir(Path(folder) / "run").stage1 / "metrics.jsonl")
    return statistics.median(record["images_per_second"] for record in records if record["split"] == "train")


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with CIFAR-10 as parquet; without it, the Hub's uoft-cs/cifar10")
    options = parser.parse_args()
    torch.set_num_threads(2)
    rounds = [(bare(), loop(options.data)) for _ in range(_ROUNDS)]
    step_speed, loop_speed = (statistics.median(column) for column in zip(*rounds, strict=True))
    print("| bare step, images/s | the loop, images/s | share of the loop that is the step |\n| --- | --- | --- |")
    print(f"| {step_speed:.0f} | {loop_speed:.0f} | {loop_speed / step_speed:.1%} |")


if __name__ == "__main__":
    main()
