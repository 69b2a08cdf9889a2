"""Write the codes of every image of all splits to disk, for stage 2.

    python stage2_prior/extract_codes.py
    python stage2_prior/extract_codes.py --extraction.augmentation shift
    accelerate launch stage2_prior/extract_codes.py        (all GPUs)

The codes are written to the run, one folder per split, then read back, decoded and compared with the tokenizer's reconstructions. Each
process writes its own files; after an interruption, the same command writes the missing ones.
"""

from __future__ import annotations

from configs import spinning  # noqa: F401  # isort: skip  # before torch

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from configs.cli import EXTRACT_CODES, TRAIN_PRIOR, Command, parse
from configs.data import LOCAL_KEYS, Augmentation, Data
from configs.errors import UserError, run_entry, say
from configs.parts import as_dict
from configs.run_dir import RunDir, program, read_json, replace_folder, write_json
from configs.schema import Extraction, Recipe
from stage1_vqvae.data.loader import read_rows
from stage1_vqvae.data.pixels import to_model, to_uint8
from stage1_vqvae.data.record import Record, check_unchanged, read_record
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN, CroppablePixels, ImageSource, ImageSplit, Pixels
from stage1_vqvae.data.variants import VARIANTS, Variants
from stage1_vqvae.metrics import perplexity, usage
from stage1_vqvae.model import VQVAE, load_tokenizer
from stage2_prior.codes.store import CodeStore, Manifest, open_shard, read_manifest, write_manifest, write_shard
from stage2_prior.conditions.contract import Condition
from stage2_prior.conditions.none import NoCondition
from training.batching import batches
from training.prefetch import read_to
from training.processes import finish, start
from training.progress import progress_bar
from training.weights_file import fingerprint

_PLAN = "plan.json"


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    command = parse(__doc__, ("condition", "extraction", "compute"), argv, reads_images=True, options=_options)
    run, recipe = command.run, command.recipe
    command.need_tokenizer()
    if command.options.verify:
        verify(command)
        return
    if run.codes.exists() and not command.options.overwrite and _is_done(run, recipe):
        say(f"{run}: the codes are already extracted")
        say(f"next: {command.next(TRAIN_PRIOR)}")
        return
    accelerator = start(recipe.compute, oom_hint="take fewer images at once (--extraction.batch_size N)")
    with run.lock():
        tokenizer = load_tokenizer(run, accelerator.device)

        def check(record: Record) -> None:
            check_unchanged(run.data, record, str(run), command.options.accept_changed_data)

        columns = recipe.condition.columns
        source = load_images(read_as(recipe), progress=accelerator.is_main_process, announce=True, check=check, columns=columns)
        accelerator.wait_for_everyone()  # before it is written
        if accelerator.is_main_process:
            write_json(run.data, {**source.record, **read_record(run.data)})
            run.record(program(), command.arguments, dataclasses.asdict(recipe.extraction))
        extract(accelerator, run, tokenizer, source, recipe)
        accelerator.wait_for_everyone()
        say(f"wrote {run.show(run.codes)}")
        say(f"next: {command.next(TRAIN_PRIOR)}")
    finish(accelerator)


def read_as(recipe: Recipe) -> Data:
    """Return the settings for reading images: for variants that are crops, images are decoded each time instead of cached."""
    crops = VARIANTS[recipe.extraction.augmentation].crops
    return dataclasses.replace(recipe.data, decode="each_time") if len(crops) > 1 else recipe.data


def verify(command: Command) -> None:
    """Check a run's codes against their sha256 and report their number. Errors: UserError for the first damaged file."""
    run = command.run
    folders = sorted(path for path in run.codes.glob("*") if path.is_dir())
    if not folders:
        raise UserError(f"{run}: expected codes, found none; {command.next(EXTRACT_CODES)}")
    for folder in folders:
        store = CodeStore(folder, fingerprint(run.tokenizer))
        store.verify()
        sums = "as they were written" if store.manifest.sha256 else "all in range; no sha256 was recorded"
        say(f"{folder.name}: {len(store):,} images in {store.manifest.num_shards:,} files, {sums}")


def _options(parser: Any) -> None:
    parser.add_argument("--overwrite", action="store_true", help="extract again, replacing codes of the same tokenizer")
    parser.add_argument("--verify", action="store_true", help="read all existing codes and compare them with their recorded sha256")


def _is_done(run: RunDir, recipe: Recipe) -> bool:
    """Return whether the run has the recipe's codes. Errors: UserError if it has the same tokenizer's codes with other settings."""
    manifest = read_manifest(run.codes / TRAIN)
    if manifest.tokenizer_sha256 != fingerprint(run.tokenizer):
        say(f"{run}: the codes are another tokenizer's; extracting again")
        return False
    if manifest.augmentation != recipe.extraction.augmentation:
        expected = f"expected codes of augmentation {recipe.extraction.augmentation}, found {manifest.augmentation}"
        raise UserError(f"{run}: {expected}; add --overwrite to replace them")
    manifest.condition_of_prior(recipe.condition)
    return True


def extract(accelerator: Accelerator, run: RunDir, tokenizer: VQVAE, source: ImageSource, recipe: Recipe) -> None:
    """Encode all splits shard by shard, each process its own shards; finished shards of the same extraction are kept.

    Errors: UserError for codes that do not decode to the tokenizer's reconstructions, or processes without a shared disk.
    """
    config, folder, main = recipe.extraction, run.unfinished_codes, accelerator.is_main_process
    condition, sha256 = recipe.condition.build(source), fingerprint(run.tokenizer)
    manifests = {name: build_manifest(name, source, condition, tokenizer, config, sha256) for name in source.splits}
    shards = [(name, shard) for name, manifest in manifests.items() for shard in range(manifest.num_shards)]
    missing = [prepare_folder(folder, recipe, source, manifests, shards) if main else []]
    broadcast_object_list(missing)  # one rank checks, since ranks might see different files
    if main and len(missing[0]) < len(shards):
        print(f"{run}: resuming, {len(shards) - len(missing[0])} of {len(shards)} files of codes exist")
    # Consecutive shards per process, so that each streamed file is read by one process.
    bounds = [len(missing[0]) * part // accelerator.num_processes for part in range(accelerator.num_processes + 1)]
    mine = missing[0][bounds[accelerator.process_index] : bounds[accelerator.process_index + 1]]
    total = sum(len(manifests[name].shard_rows(shard)) for name, shard in mine)
    ranks = "" if accelerator.num_processes == 1 else f" (one process of {accelerator.num_processes})"
    with progress_bar(total, f"extract{ranks}", "img", shown=main) as bar:
        for number, (name, shard) in enumerate(mine):
            split, manifest = source.splits[name], manifests[name]
            rows, variants, encoded = manifest.shard_rows(shard), VARIANTS[manifest.augmentation], []
            for pixels in crops_on(accelerator.device, split.pixels, rows, variants, config.batch_size):
                encoded.append(encode(tokenizer, pixels, variants))
                bar.update(len(pixels))
            codes = [torch.cat(level) for level in zip(*encoded, strict=True)]
            write_shard(folder / name, manifest, shard, codes, encode_condition(manifest.condition, split, rows))
            if number in (0, len(mine) - 1):
                try:
                    check_decodes(tokenizer, folder / name, manifest, shard, split, config.batch_size, accelerator.device)
                except UserError:
                    (folder / _PLAN).unlink(missing_ok=True)  # so that the next command starts over
                    raise
    accelerator.wait_for_everyone()
    if main:
        absent = [name for name, shard in shards if not (folder / name / manifests[name].shard_name(shard)).exists()]
        if absent:
            raise UserError(
                f"{folder}: expected files of codes of all processes, found {len(absent)} missing; they must share the run's disk"
            )
        for name, manifest in manifests.items():
            write_manifest(folder / name, manifest)
            counts = [torch.from_numpy(level) for level in CodeStore(folder / name).counts()]
            per_variant = f" x {manifest.variants} variants" if manifest.variants > 1 else ""
            print(f"{name}: {manifest.rows} images{per_variant}, usage {usage(*counts):.1%}, perplexity {perplexity(*counts):.1f}")
        replace_folder(run.codes, folder)
        (run.codes / _PLAN).unlink()


def encode_condition(condition: Condition, split: ImageSplit, rows: range) -> Tensor | None:
    """Encode the condition of consecutive rows. Errors: UserError for a class that the recipe's condition does not name."""
    encoded = condition.encode(split, slice(rows.start, rows.stop))
    if encoded is not None and not bool(condition.known(encoded).all()):
        row = rows[int(condition.known(encoded).int().argmin())]
        raise UserError(f"condition: expected {condition.describe()} of all images, found another one in row {row}")
    return encoded


def build_manifest(name: str, source: ImageSource, condition: Condition, tokenizer: VQVAE, config: Extraction, sha256: str) -> Manifest:
    """Build the manifest of a split's codes before extraction."""
    # Only training codes are augmented.
    augmentation: Augmentation = config.augmentation if name == TRAIN else "none"
    split = source.splits[name]
    return Manifest(
        split=name,
        rows=len(split),
        grids=tokenizer.grids,
        num_codes=list(tokenizer.quantizer.num_codes),
        digits=[list(sizes) for sizes in tokenizer.quantizer.digits],
        condition=NoCondition() if condition.encode(split, slice(0, 1)) is None else condition,
        augmentation=augmentation,
        variants=len(VARIANTS[augmentation]),
        image_shape=tokenizer.image_shape,
        tokenizer_sha256=sha256,
        rows_per_shard=config.shard_rows,
        sha256=[],
    )


def prepare_folder(
    folder: Path, recipe: Recipe, source: ImageSource, manifests: dict[str, Manifest], shards: list[tuple[str, int]]
) -> list[tuple[str, int]]:
    """Create the folder of an extraction, unless it exists with the same images, tokenizer, condition and variants.

    Returns: the missing shards.
    """
    plan = {
        "data": {key: value for key, value in as_dict(recipe.data).items() if key not in LOCAL_KEYS},
        "images": source.fingerprints,
        "augmentation": recipe.extraction.augmentation,
        "splits": [as_dict(manifest) for manifest in manifests.values()],
    }
    same = (folder / _PLAN).exists() and read_json(folder / _PLAN) == json.loads(json.dumps(plan))
    if folder.exists() and not same:
        say(f"{folder}: the unfinished extraction has other images, other settings or another tokenizer; starting over")
        shutil.rmtree(folder)
    for name in manifests:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for leftover in folder.rglob("*.tmp-*"):  # left by a killed command
        leftover.unlink()
    if not same:
        write_json(folder / _PLAN, plan)

    def is_complete(name: str, shard: int) -> bool:
        try:
            open_shard(folder / name, manifests[name], shard)
        except UserError:
            return False
        return True

    return [(name, shard) for name, shard in shards if not is_complete(name, shard)]


def crops_at(pixels: Pixels, rows: Tensor, variants: Variants) -> Tensor:
    """Read the crops of rows (B,) from which their variants are computed: uint8 (B, crops, H, W, C)."""
    if len(variants.crops) == 1:
        return read_rows(pixels, rows)[:, None]
    assert isinstance(pixels, CroppablePixels)
    return pixels.cropped(rows, [variants.crops] * len(rows))


def crops_on(device: torch.device, pixels: Pixels, rows: range, variants: Variants, batch_size: int) -> Iterator[Tensor]:
    """Yield the crops of consecutive rows (see `crops_at`) on the device, `batch_size` rows at a time; prefetched on an accelerator."""
    parts = [torch.arange(rows.start, rows.stop)[part] for part in batches(len(rows), batch_size)]
    for (crops,) in read_to(device, lambda part: (crops_at(pixels, part, variants),), parts):
        yield crops


@torch.no_grad()
def encode(tokenizer: VQVAE, pixels: Tensor, variants: Variants) -> list[Tensor]:
    """Encode crops, uint8 (B, crops, H, W, C), of `crops_at`: codes (B, variants, h, w) per level, on the CPU."""
    encoded = []
    for number in range(len(variants)):
        images = to_model(pixels[:, number % pixels.shape[1]])
        encoded.append(tokenizer.encode(variants.apply(images, torch.full((len(images),), number))))
    return [torch.stack(level, 1).cpu() for level in zip(*encoded, strict=True)]


@torch.no_grad()
def check_decodes(
    tokenizer: VQVAE, folder: Path, manifest: Manifest, shard: int, split: ImageSplit, batch_size: int, device: torch.device
) -> None:
    """Decode the first batch of a shard that this process has just written, and compare it with the tokenizer's reconstructions.

    Errors: UserError if they differ by more than one step of 255.
    """
    content, rows = open_shard(folder, manifest, shard), manifest.shard_rows(shard)[:batch_size]
    levels = [content[f"level{level}"][: len(rows), 0].astype("int64") for level in range(len(manifest.grids))]
    stored = to_uint8(tokenizer.decode(tuple(torch.from_numpy(level).to(device) for level in levels))).int()
    reconstructions = to_uint8(tokenizer(to_model(split.pixels[rows.start : rows.stop].to(device))).reconstruction).int()
    difference = int((stored - reconstructions).abs().max())
    if difference > 1:
        expected = "expected stored codes to decode to the tokenizer's own reconstructions"
        raise UserError(f"{manifest.split}: {expected}, found pixels {difference} of 255 apart")


if __name__ == "__main__":
    run_entry(main)
