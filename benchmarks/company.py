"""Training speed alone and beside busy processes, by how long waiting OpenMP threads spin.

    python benchmarks/company.py
    python benchmarks/company.py --seconds 20 --rounds 5 --threads 2 --company 1

Steps of the recipe `digits` on random images, in alternating processes: with the default of torch's OpenMP (libgomp), with the setting of
configs/spinning.py, and with other spin counts. In half of the rounds `--company` other processes each keep a core busy. Prints medians
over rounds, in steps per second, and ratios to libgomp's default alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from configs.recipe_file import DEFAULT_RECIPE, load_recipe

_BUSY = "while True: sum(range(10**5))"
_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def measure(threads: int, seconds: float) -> None:
    """Print the steps per second of this process."""
    import torch

    from stage1_vqvae.model import VQVAE
    from training.optimizer import adamw

    torch.set_num_threads(threads)
    recipe = load_recipe(DEFAULT_RECIPE)
    data, batch = recipe.data, recipe.stage1.batch_size
    tokenizer = VQVAE(recipe.tokenizer, data.height, data.width, data.channels).train()
    optimizer = adamw(tokenizer, recipe.stage1.lr, recipe.stage1.weight_decay, 0.99)
    images = torch.rand(batch, data.channels, data.height, data.width) * 2 - 1

    def step() -> None:
        output = tokenizer(images)
        torch.stack(list(output.losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        tokenizer.quantizer.update_(output.statistics)

    for _ in range(3):
        step()
    steps, start = 0, time.monotonic()
    while time.monotonic() - start < seconds:
        step()
        steps += 1
    print(steps / (time.monotonic() - start))


@contextmanager
def company(count: int) -> Iterator[None]:
    """Start processes that keep one core busy each."""
    others = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds per measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--company", type=int, default=1, help="busy processes beside the training")
    parser.add_argument("--counts", type=int, nargs="*", default=[0, 10_000, 100_000], help="other spin counts")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.threads, options.seconds)
        return
    from configs.spinning import SPIN_COUNT  # not before: it would set the count of processes that measure, too

    settings: dict[str, str | None] = {"libgomp's default": None, f"commands' ({SPIN_COUNT})": str(SPIN_COUNT)}
    settings |= {str(count): str(count) for count in options.counts}
    bare = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    command = [sys.executable, __file__, "--measure", "--threads", str(options.threads), "--seconds", str(options.seconds)]
    speeds: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.rounds):
        for others in (0, options.company):
            for name, count in settings.items():
                environment = bare if count is None else {**bare, "GOMP_SPINCOUNT": count}
                with company(others):
                    process = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", check=True)
                speeds.setdefault((name, others), []).append(float(process.stdout))
    medians = {key: statistics.median(values) for key, values in speeds.items()}
    reference = medians["libgomp's default", 0]
    print(f"| spin count | alone | beside {options.company} busy | alone, ratio | beside, ratio |\n| --- | --- | --- | --- | --- |")
    for name in settings:
        alone, beside = medians[name, 0], medians[name, options.company]
        print(f"| {name} | {alone:.2f} | {beside:.2f} | {alone / reference:.2f} | {beside / reference:.2f} |")


if __name__ == "__main__":
    main()
