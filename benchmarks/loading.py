"""Image loading of stage 1: waiting time per step, decoding speed, seconds to the first step, memory.

    python benchmarks/loading.py make --data CIFAR10 --output FOLDER      JPEGs of --size in class folders, enlarged from CIFAR-10's;
                                                                          or --tars N WebDataset files
    python benchmarks/loading.py steps --config FILE --data PATH          step times: batches in memory, kept decoded, decoded each time;
                                                                          and --stream, of Parquet and .tar files
    python benchmarks/loading.py decode --data FOLDER                     images per second by threads and by requested size
    python benchmarks/loading.py first --config FILE --files 100000       seconds until a step of a folder of so many files has its images
    python benchmarks/loading.py memory --config FILE --data PATH         of one process, and of two that read the same images

Step times are medians of blocks of steps, alternated, as ratios to that of batches in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import multiprocessing
import statistics
import tarfile
import tempfile
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image

from configs.data import Data
from configs.recipe_file import load_recipe
from configs.run_dir import RunDir
from configs.schema import Recipe
from stage1_vqvae.data.loader import Loader
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN, ImageSource, ImageSplit, Pixels
from stage1_vqvae.steps import build_state, initialise_, take_step
from training.devices import wait_for

_IN_MEMORY = "batches in memory"


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("make", "steps", "decode", "first", "memory"):
        command = commands.add_parser(name)
        command.add_argument("--data", help="a local data set")
        command.add_argument("--config", type=Path, help="recipe")
        command.add_argument("--output", type=Path)
        command.add_argument("--files", type=int, default=20_000 if name == "make" else 100_000)
        command.add_argument("--size", type=int, nargs=2, default=(256, 256), help="width and height of the JPEGs")
        command.add_argument("--tars", type=int, default=0, help="WebDataset files to write; 0 = one file per image")
        command.add_argument("--stream", action="store_true", help="also stream the files without a copy")
        command.add_argument("--steps", type=int, default=20, help="steps per block")
        command.add_argument("--blocks", type=int, default=7)
        command.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    {"make": make, "steps": steps, "decode": decode, "first": first, "memory": memory}[options.command](options)


def make(options: argparse.Namespace) -> None:
    """Write JPEG files for the other commands."""
    source = load_images(Data(path=options.data, validation_share=0.01))
    split, names = source.splits[TRAIN], source.label_names
    assert split.labels is not None
    assert names is not None
    options.output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as open_files:
        tars = [open_files.enter_context(tarfile.open(options.output / f"{number:05d}.tar", "w")) for number in range(options.tars)]
        for row in range(options.files):
            label, content = int(split.labels[row]), io.BytesIO()
            picture = Image.fromarray(split.pixels[row : row + 1][0].numpy()).resize(options.size, Image.Resampling.BICUBIC)
            picture.save(content, "JPEG", quality=90)
            if not tars:
                folder = options.output / names[label]
                folder.mkdir(exist_ok=True)
                (folder / f"{row:05d}.jpg").write_bytes(content.getvalue())
            for ending, body in (("jpg", content.getvalue()), ("cls", str(label).encode())) if tars else ():
                entry = tarfile.TarInfo(f"{row:05d}.{ending}")
                entry.size = len(body)
                tars[row % len(tars)].addfile(entry, io.BytesIO(body))


def recipe_for(options: argparse.Namespace, **data: object) -> Recipe:
    """Load the recipe with other images and another way of reading them."""
    recipe = load_recipe(options.config)
    path = options.data or recipe.data.path
    stage1 = dataclasses.replace(recipe.stage1, minutes=0.0)
    return dataclasses.replace(recipe, stage1=stage1, data=dataclasses.replace(recipe.data, path=path, **data))  # type: ignore[arg-type]


def steps(options: argparse.Namespace) -> None:
    """Time steps by image source."""
    accelerator, recipe = Accelerator(cpu=not torch.accelerator.is_available()), recipe_for(options)
    cached = load_images(recipe.data, [TRAIN], progress=True).splits[TRAIN]
    rows = torch.arange(min(len(cached), 50 * recipe.stage1.batch_size))
    sources = {_IN_MEMORY: (recipe.data, ImageSplit(cached.pixels[rows].clone(), None), False)}
    sources |= {"kept decoded": (recipe.data, cached, False), "kept decoded, read ahead": (recipe.data, cached, True)}
    for workers in options.workers:
        data = dataclasses.replace(recipe.data, decode="each_time", workers=workers)
        for stream in (False, True) if options.stream else (False,):
            split = load_images(dataclasses.replace(data, stream=stream), [TRAIN]).splits[TRAIN]
            label = f"{'streamed and ' if stream else ''}decoded each time by {workers} threads"
            sources |= {label: (data, split, False), f"{label}, ahead": (data, split, True)}
    with tempfile.TemporaryDirectory() as folder:
        state = build_state(accelerator, RunDir(Path(folder)), recipe, ImageSource({TRAIN: cached}, None))
        loaders = {name: Loader(split, data, recipe.stage1, accelerator, ahead) for name, (data, split, ahead) in sources.items()}
        initialise_(accelerator, state, loaders[_IN_MEMORY], recipe.stage1)
        state.model.train()
        seconds_per_step: dict[str, list[float]] = {name: [] for name in sources}
        shares: dict[str, list[float]] = {name: [] for name in sources}
        for block in range(options.blocks + 1):  # the first warms up
            for name, loader in loaders.items():
                take_step(accelerator, state, loader, recipe.stage1, block * (options.steps + 1))  # fills what is read ahead
                loader.waited()
                start = time.perf_counter()
                for step in range(options.steps):
                    take_step(accelerator, state, loader, recipe.stage1, block * (options.steps + 1) + 1 + step)
                wait_for(accelerator.device)
                seconds = time.perf_counter() - start
                if block:
                    seconds_per_step[name].append(seconds / options.steps)
                    shares[name].append(loader.waited() / seconds)
    print("| images | ms per step | ratio | waited for images |\n| --- | --- | --- | --- |")
    for name, values in seconds_per_step.items():
        ratio = statistics.median(value / reference for value, reference in zip(values, seconds_per_step[_IN_MEMORY], strict=True))
        print(f"| {name} | {statistics.median(values) * 1e3:.1f} | {ratio:.3f} | {statistics.median(shares[name]):.2%} |")


def decode(options: argparse.Namespace) -> None:
    """Measure images decoded per second."""
    columns = ["pixels asked for", *(f"{workers} threads" for workers in options.workers)]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for side in (32, 64, 128, 256):
        rates = []
        for workers in options.workers:
            data = Data(path=options.data, height=side, width=side, decode="each_time", workers=workers)
            pixels = load_images(data, [TRAIN]).splits[TRAIN].pixels
            rows = torch.randperm(len(pixels))[:4096].split(256)
            pixels[rows[0]]
            start = time.perf_counter()
            for part in rows[1:]:
                pixels[part]
            rates.append(sum(map(len, rows[1:])) / (time.perf_counter() - start))
        print(f"| {side}x{side} | {' | '.join(f'{rate:,.0f}' for rate in rates)} |")


def first(options: argparse.Namespace) -> None:
    """Measure seconds from a folder's name to the images of the first step."""
    content = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(content, "JPEG", quality=90)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.files):
            (Path(folder) / f"{number:06d}.jpg").write_bytes(content.getvalue())
        for decode in ("each_time", "once"):
            options.data = folder
            recipe = recipe_for(options, decode=decode, cache=f"{folder}/.cache")
            for time_through in ("first", "second"):
                start = time.perf_counter()
                split = load_images(recipe.data).splits[TRAIN]
                loaded = time.perf_counter()
                Loader(split, recipe.data, recipe.stage1, Accelerator(cpu=True)).images(0, 0)
                loading, seconds = loaded - start, time.perf_counter() - start
                print(f"{options.files:,} files, {decode}, {time_through} time: {loading:.1f} s to load, {seconds:.1f} s to the first step")


def memory(options: argparse.Namespace) -> None:
    """Measure MiB for images, with one process and with two; pages that both map count half for each."""
    recipe, context = recipe_for(options), multiprocessing.get_context("spawn")
    load_images(recipe.data, [TRAIN], progress=True)
    totals = []
    for count in (1, 2):
        pipes = [context.Pipe() for _ in range(count)]
        readers = [context.Process(target=_read_all, args=(recipe.data, child)) for _, child in pipes]
        for reader in readers:
            reader.start()
        taken = []
        for pipe, _ in pipes:
            pipe.recv()
        for pipe, _ in pipes:  # all have read all
            pipe.send("measure")
            taken.append(pipe.recv())
        for pipe, _ in pipes:
            pipe.send("end")
        for reader in readers:
            reader.join()
        totals.append(sum(taken))
        print(f"{count} processes: {', '.join(f'{mib:.1f}' for mib in taken)} MiB for images")
    print(f"two processes take {totals[1] / totals[0]:.3f} times the memory of one")


def _read_all(data: Data, pipe: Connection) -> None:
    torch.zeros(1).add_(1)
    load_images(data, [TRAIN]).splits[TRAIN].pixels[:1]  # imports do not count
    before = _mib()
    pixels: Pixels = load_images(data, [TRAIN]).splits[TRAIN].pixels
    total = sum(int(pixels[start : start + 256].max()) for start in range(0, len(pixels), 256))
    pipe.send(total)
    pipe.recv()
    pipe.send(_mib() - before)
    pipe.recv()


def _mib() -> float:
    """Measure the process's anonymous memory and its share of the pages of decoded images."""
    total, is_image_file = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if "-" in name.split()[0]:  # a range of addresses, and the file that it maps
            is_image_file = line.endswith(".pixels")
        elif name == "Anonymous" or (name == "Pss" and is_image_file):
            total += int(value.split()[0])
    return total / 1024


if __name__ == "__main__":
    main()
