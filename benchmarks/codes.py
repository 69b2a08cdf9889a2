"""Codes of many images: extraction against its bare encoder, memory, and random reads of a store.

    python benchmarks/codes.py extract --run RUN [--images 20000]     rates, alternated, and their ratio
    python benchmarks/codes.py memory --run RUN --images 1000000      peak memory of one extraction, of the run's images repeated
    python benchmarks/codes.py store --rows 1000000 --tokens 256      random codes, written, opened and read at random
    python benchmarks/codes.py steps --rows 1000000 --tokens 256      training steps of a prior, against the same codes in memory

Memory is a process's anonymous pages: pages of mapped files are shared by all processes and reclaimed by the system when needed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from configs.parts import as_dict, part_from
from configs.recipe_file import load_recipe
from configs.run_dir import RunDir
from configs.schema import Compute, Recipe
from stage1_vqvae.data.cache import cached_images
from stage1_vqvae.data.pixels import to_model
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN, ImageSource, ImageSplit
from stage1_vqvae.model import VQVAE, load_tokenizer
from stage2_prior.codes.loader import CodeLoader
from stage2_prior.codes.store import CodeStore, Manifest, write_manifest, write_shard
from stage2_prior.conditions.none import NoCondition
from stage2_prior.extract_codes import extract
from stage2_prior.priors.prior_file import build_prior
from stage2_prior.steps import PriorState, take_step
from training.batching import batches
from training.processes import start

_BATCH = 64


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, images in (("extract", 20_000), ("memory", 1_000_000)):
        command = commands.add_parser(name)
        command.add_argument("--run", type=Path, required=True)
        command.add_argument("--images", type=int, default=images)
    for name in ("store", "steps"):
        store = commands.add_parser(name)
        store.add_argument("--rows", type=int, default=1_000_000)
        store.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.command == "extract":
            rates(options.run, options.images, Path(folder))
        elif options.command == "memory":
            peak(options.run, options.images, Path(folder))
        elif options.command == "store":
            reading(options.rows, options.tokens, Path(folder))
        else:
            prior_steps(options.rows, options.tokens, Path(folder))


def rates(path: Path, images: int, folder: Path) -> None:
    """Measure images per second of extraction, and of encoder and search on batches in memory."""
    accelerator, recipe, run, tokenizer = _opened(path)
    pixels = load_images(recipe.data, [TRAIN]).splits[TRAIN].pixels[:images]
    source = ImageSource({TRAIN: ImageSplit(pixels, None)}, None)
    speeds: dict[str, list[float]] = {"bare encoder": [], "extraction": []}
    for number in range(4):  # the first warms up
        start = time.perf_counter()
        with torch.no_grad():
            for part in batches(len(pixels), recipe.extraction.batch_size):
                tokenizer.encode(to_model(pixels[part].to(accelerator.device)))
        between = time.perf_counter()
        target = RunDir(folder / str(number))
        target.tokenizer = run.tokenizer
        extract(accelerator, target, tokenizer, source, recipe)
        if number:
            speeds["bare encoder"].append(len(pixels) / (between - start))
            speeds["extraction"].append(len(pixels) / (time.perf_counter() - between))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"{len(pixels):,} images: " + ", ".join(f"{name} {value:,.0f} images per second" for name, value in medians.items()))
    print(f"ratio {medians['extraction'] / medians['bare encoder']:.3f}")


def peak(path: Path, images: int, folder: Path) -> None:
    """Measure the peak anonymous memory of an extraction."""
    accelerator, recipe, run, tokenizer = _opened(path)
    split = load_images(recipe.data, [TRAIN]).splits[TRAIN]
    shape = (images, *split.pixels.shape[1:])
    repeated = (split.pixels[row % len(split) : row % len(split) + 1][0].numpy() for row in range(images))
    pixels = cached_images(folder, {}, shape, lambda: repeated, "repeated images").pixels
    target = RunDir(folder / "run")
    target.tokenizer = run.tokenizer
    samples, done = [_memory_mib()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            samples.append(_memory_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    extract(accelerator, target, tokenizer, ImageSource({TRAIN: ImageSplit(pixels, None)}, None), recipe)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(f"{images:,} images in {seconds:.0f} s: {samples[0]:.0f} MiB before, {max(samples):.0f} MiB at most")


def _opened(path: Path) -> tuple[Accelerator, Recipe, RunDir, VQVAE]:
    """Create a run whose codes are extracted without variants."""
    run, recipe = RunDir(path.resolve()), load_recipe(path / "recipe.yaml")
    recipe = dataclasses.replace(recipe, extraction=dataclasses.replace(recipe.extraction, augmentation="none"))
    accelerator = start(recipe.compute)
    return accelerator, recipe, run, load_tokenizer(run, accelerator.device)


def random_store(rows: int, tokens: int, folder: Path) -> None:
    """Write random codes with K = 16,384, one square grid per image."""
    side = round(tokens**0.5)
    manifest = Manifest(
        split=TRAIN,
        rows=rows,
        grids=[(side, side)],
        num_codes=[16_384],
        condition=NoCondition(),
        augmentation="none",
        variants=1,
        image_shape=(3, 256, 256),
        tokenizer_sha256="0" * 64,
        rows_per_shard=4096,
        sha256=[],
    )
    start = time.perf_counter()
    for shard in range(manifest.num_shards):
        write_shard(folder, manifest, shard, [torch.randint(16_384, (len(manifest.shard_rows(shard)), 1, side, side))], None)
    write_manifest(folder, manifest)
    print(f"written: {rows / (time.perf_counter() - start):,.0f} rows per second, {manifest.num_shards} files")


def prior_steps(rows: int, tokens: int, folder: Path) -> None:
    """Time training steps of a transformer (4 layers, width 256) on codes on disk and in memory, alternated."""
    random_store(rows, tokens, folder)
    accelerator, recipe = start(Compute()), Recipe()
    config = dataclasses.replace(recipe.stage2, optimizer="adamw", batch_size=16, minutes=0.0)
    torch.manual_seed(0)
    on_disk = CodeStore(folder)
    in_memory = copy.copy(on_disk)
    in_memory._shards = [[np.array(level) for level in on_disk.shard(shard)] for shard in range(on_disk.manifest.num_shards)]
    part = part_from("prior", {**as_dict(recipe.prior), "layers": 4, "width": 256, "heads": 4})
    prior = build_prior(part, NoCondition(), on_disk.manifest)
    state = PriorState(accelerator, prior, config, Compute())
    stores = {"on disk": on_disk, "in memory": in_memory}
    loaders = {name: CodeLoader(store, prior.condition, config, accelerator) for name, store in stores.items()}
    seconds, memory = dict[str, list[float]](), list[float]()
    for step in range(120):
        for name, loader in loaders.items():
            step_start = time.perf_counter()
            take_step(accelerator, state, loader, config, step)
            if step >= 20:
                seconds.setdefault(name, []).append(time.perf_counter() - step_start)
        memory.append(_memory_mib())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(", ".join(f"{name} {median * 1e3:.1f} ms per step" for name, median in medians.items()))
    print(f"ratio {medians['on disk'] / medians['in memory']:.3f}; {memory[20]:.0f} MiB after 20 steps, {memory[-1]:.0f} after 120")


def reading(rows: int, tokens: int, folder: Path) -> None:
    """Time random batches of a store of random codes against an array in memory, and measure their memory."""
    random_store(rows, tokens, folder)
    before, start = _memory_mib(), time.perf_counter()
    store = CodeStore(folder)
    print(f"opened in {time.perf_counter() - start:.2f} s, {_memory_mib() - before:.1f} MiB")
    draws = torch.randint(rows, (2000, _BATCH))
    for name in ("first", "second"):
        start = time.perf_counter()
        for rows_drawn in draws:
            store.codes(rows_drawn)
        seconds = time.perf_counter() - start
        print(
            f"{name} pass: {draws.numel() / seconds:,.0f} rows per second, {seconds / len(draws) * 1e3:.2f} ms per batch of {_BATCH}; ",
            end="",
        )
        print(f"{_memory_mib() - before:.1f} MiB since before it was opened")
    in_memory = np.concatenate(
        [store.codes(torch.arange(part.start, part.stop))[0].numpy().astype(np.uint16) for part in batches(rows, 4096)]
    )
    start = time.perf_counter()
    for rows_drawn in draws:
        torch.from_numpy(in_memory[rows_drawn.numpy()].astype(np.int64))
    print(f"in memory: {(time.perf_counter() - start) / len(draws) * 1e3:.2f} ms per batch")


def _memory_mib() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


if __name__ == "__main__":
    main()
