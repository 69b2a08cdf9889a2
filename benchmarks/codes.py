"""Codes of many images: extraction beside its bare encoder, memory, and a store read at random.

    python benchmarks/codes.py extract --run RUN [--images 20000]     rates, alternated, and their ratio
    python benchmarks/codes.py memory --run RUN --images 1000000      the peak of one extraction of the run's images, repeated so often
    python benchmarks/codes.py store --rows 1000000 --tokens 256      random codes, written, opened and read at random

Memory is what a process has as its own (anonymous pages): pages of mapped files are the system's, shared by all processes of a machine and
given up when it needs them.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from configs.cli import load_recipe
from configs.run_dir import RunDir
from stage1_vqvae.data.cache import cached
from stage1_vqvae.data.pixels import to_model
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN, ImageSource, ImageSplit
from stage1_vqvae.model import load_tokenizer
from stage1_vqvae.training.batching import batches
from stage1_vqvae.training.processes import start
from stage2_prior.codes.store import CodeStore, Manifest, write_manifest, write_shard
from stage2_prior.extract_codes import extract

_BATCH = 64


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, images in (("extract", 20_000), ("memory", 1_000_000)):
        command = commands.add_parser(name)
        command.add_argument("--run", type=Path, required=True)
        command.add_argument("--images", type=int, default=images)
    store = commands.add_parser("store")
    store.add_argument("--rows", type=int, default=1_000_000)
    store.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "extract":
            rates(options.run, options.images, Path(folder))
        elif options.what == "memory":
            peak(options.run, options.images, Path(folder))
        else:
            reading(options.rows, options.tokens, Path(folder))


def rates(path: Path, images: int, folder: Path) -> None:
    """Images a second of extraction, and of the encoder and the search on batches in memory."""
    accelerator, recipe, run = start(load_recipe(path / "recipe.yaml").compute), load_recipe(path / "recipe.yaml"), RunDir(path.resolve())
    tokenizer = load_tokenizer(run, accelerator.device)
    pixels = load_images(recipe.data, [TRAIN]).splits[TRAIN].pixels[:images].clone()
    recipe = dataclasses.replace(recipe, extraction=dataclasses.replace(recipe.extraction, augmentation="none"))
    source = ImageSource({TRAIN: ImageSplit(pixels, None)}, None)
    found: dict[str, list[float]] = {"bare encoder": [], "extraction": []}
    for number in range(4):  # the first warms up
        began = time.perf_counter()
        with torch.no_grad():
            for part in batches(len(pixels), recipe.extraction.batch_size):
                tokenizer.encode(to_model(pixels[part].to(accelerator.device)))
        between = time.perf_counter()
        target = RunDir(folder / str(number))
        target.tokenizer = run.tokenizer
        extract(accelerator, target, tokenizer, source, recipe)
        if number:
            found["bare encoder"].append(len(pixels) / (between - began))
            found["extraction"].append(len(pixels) / (time.perf_counter() - between))
    medians = {name: statistics.median(values) for name, values in found.items()}
    print(f"{len(pixels):,} images: " + ", ".join(f"{name} {value:,.0f} images a second" for name, value in medians.items()))
    print(f"ratio {medians['extraction'] / medians['bare encoder']:.3f}")


def peak(path: Path, images: int, folder: Path) -> None:
    """Memory of its own that an extraction takes at most."""
    accelerator, recipe, run = start(load_recipe(path / "recipe.yaml").compute), load_recipe(path / "recipe.yaml"), RunDir(path.resolve())
    tokenizer = load_tokenizer(run, accelerator.device)
    split = load_images(recipe.data, [TRAIN]).splits[TRAIN]
    shape = (images, *split.pixels.shape[1:])
    pixels = cached(folder, {}, shape, lambda: (split.pixels[row % len(split)].numpy() for row in range(images)), "repeated images").pixels
    target = RunDir(folder / "run")
    target.tokenizer = run.tokenizer
    found, done = [_own_mib()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            found.append(_own_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    extract(accelerator, target, tokenizer, ImageSource({TRAIN: ImageSplit(pixels, None)}, None), recipe)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    print(f"{images:,} images in {seconds:.0f} s: {found[0]:.0f} MiB before, {max(found):.0f} MiB at most")


def reading(rows: int, tokens: int, folder: Path) -> None:
    """A store of random codes: how fast batches of random rows come, beside an array in memory, and what memory they take."""
    side = round(tokens**0.5)
    manifest = Manifest(
        split=TRAIN,
        rows=rows,
        grids=[(side, side)],
        num_codes=[16_384],
        label_names=None,
        augmentation="none",
        variants=1,
        image_shape=(3, 256, 256),
        tokenizer_sha256="0" * 64,
        rows_per_shard=4096,
        sha256=[],
    )
    began = time.perf_counter()
    for shard in range(manifest.num_shards):
        write_shard(folder, manifest, shard, [torch.randint(16_384, (len(manifest.shard_rows(shard)), 1, side, side))], None)
    write_manifest(folder, manifest)
    print(f"written: {rows / (time.perf_counter() - began):,.0f} rows a second, {manifest.num_shards} files")
    before, began = _own_mib(), time.perf_counter()
    store = CodeStore(folder)
    print(f"opened in {time.perf_counter() - began:.2f} s, {_own_mib() - before:.1f} MiB")
    draws = torch.randint(rows, (2000, _BATCH))
    for name in ("first", "second"):
        began = time.perf_counter()
        for drawn in draws:
            store.codes(drawn)
        seconds = time.perf_counter() - began
        print(
            f"{name} time through: {draws.numel() / seconds:,.0f} rows a second, {seconds / len(draws) * 1e3:.2f} ms a batch of {_BATCH}; ",
            end="",
        )
        print(f"{_own_mib() - before:.1f} MiB since before it was opened")
    whole = np.concatenate([store.codes(torch.arange(part.start, part.stop))[0].numpy().astype(np.uint16) for part in batches(rows, 4096)])
    began = time.perf_counter()
    for drawn in draws:
        torch.from_numpy(whole[drawn.numpy()].astype(np.int64))
    print(f"in memory: {(time.perf_counter() - began) / len(draws) * 1e3:.2f} ms a batch")


def _own_mib() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


if __name__ == "__main__":
    main()
