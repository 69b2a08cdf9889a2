"""Write every image's codes to disk, all splits, for stage 2 to learn from.

    python stage2_prior/extract_codes.py
    python stage2_prior/extract_codes.py --extraction.augmentation shift
    accelerate launch stage2_prior/extract_codes.py        (all GPUs)

The codes lie in the run, a folder a split, and are read back and compared with the tokenizer's own reconstructions.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.cli import TRAIN_PRIOR, parse
from configs.errors import UserError, run_entry, say
from configs.run_dir import RunDir, program, replacing_folder
from configs.schema import Augmentation, Extraction
from stage1_vqvae.data.pixels import to_model, to_uint8
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN, ImageSource, ImageSplit
from stage1_vqvae.data.variants import make_variants, num_variants
from stage1_vqvae.metrics import perplexity, usage
from stage1_vqvae.model import VQVAE, load_tokenizer
from stage1_vqvae.training.batching import batches
from stage1_vqvae.training.processes import start
from stage1_vqvae.training.progress import progress_bar
from stage1_vqvae.training.weights_file import fingerprint
from stage2_prior.codes.store import CodeStore, CodeWriter, Manifest, read_manifest


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    command = parse(__doc__, ("extraction", "compute"), argv, options=_options)
    run, recipe = command.run, command.recipe
    command.need_tokenizer()
    if run.codes.exists() and not command.options.overwrite and _is_done(run, recipe.extraction):
        say(f"{run}: the codes are already extracted")
        say(f"next: {command.next(TRAIN_PRIOR)}")
        return
    accelerator = start(recipe.compute)
    with run.lock():
        tokenizer = load_tokenizer(run, accelerator.device)
        source = load_images(recipe.data, progress=accelerator.is_main_process)
        if accelerator.is_main_process:
            run.record(program(), command.arguments, dataclasses.asdict(recipe.extraction))
            with replacing_folder(run.codes) as folder:
                extract(accelerator, run, tokenizer, source, recipe.extraction, folder)
        else:
            extract(accelerator, run, tokenizer, source, recipe.extraction, None)
        accelerator.wait_for_everyone()
        accelerator.print(f"wrote {run.show(run.codes)}")
        accelerator.print(f"next: {command.next(TRAIN_PRIOR)}")
    accelerator.end_training()


def _options(parser: Any) -> None:
    parser.add_argument("--overwrite", action="store_true", help="extract anew, in place of codes of the same tokenizer")


def _is_done(run: RunDir, config: Extraction) -> bool:
    """Whether the codes there are what is asked for. Errors: UserError if they are good codes of another kind."""
    manifest = read_manifest(run.codes / TRAIN)
    if manifest.tokenizer_sha256 != fingerprint(run.tokenizer):
        say(f"{run}: the codes are another tokenizer's; extracting anew")
        return False
    if manifest.augmentation != config.augmentation:
        found = f"the codes there have augmentation {manifest.augmentation}, asked for was {config.augmentation}"
        raise UserError(f"{run}: {found}; add --overwrite to replace them")
    return True


def extract(accelerator: Accelerator, run: RunDir, tokenizer: VQVAE, source: ImageSource, config: Extraction, folder: Path | None) -> None:
    """Encode all splits; the main process, which has a `folder`, writes them there."""
    sha256 = fingerprint(run.tokenizer)
    for name, split in source.splits.items():
        # Variants are for learning from; what measures stays as it is.
        augmentation: Augmentation = config.augmentation if name == TRAIN else "none"
        manifest = Manifest(
            split=name,
            rows=len(split),
            grids=tokenizer.grids,
            num_codes=list(tokenizer.quantizer.num_codes),
            label_names=source.label_names if split.labels is not None else None,
            augmentation=augmentation,
            variants=num_variants(augmentation),
            image_shape=tokenizer.image_shape,
            tokenizer_sha256=sha256,
        )
        writer = None
        if folder is not None:
            (folder / name).mkdir()
            writer = CodeWriter(folder / name, manifest)
        with progress_bar(len(split), f"extract {name}", "img", shown=folder is not None) as bar:
            for part in batches(len(split), config.batch_size):
                codes = encode_share(accelerator, tokenizer, split.pixels[part], augmentation)
                if writer is not None:
                    writer.add(codes, None if split.labels is None else split.labels[part])
                bar.update(part.stop - part.start)
        if writer is not None:
            assert folder is not None
            writer.close()
            store = CodeStore(folder / name, sha256)
            check(tokenizer, store, split, config.batch_size, accelerator)
            counts = [torch.from_numpy(level) for level in store.counts()]
            per_variant = f" x {manifest.variants} variants" if manifest.variants > 1 else ""
            print(f"{name}: {len(split)} images{per_variant}, usage {usage(*counts):.1%}, perplexity {perplexity(*counts):.1f}")


@torch.no_grad()
def encode_share(accelerator: Accelerator, tokenizer: VQVAE, pixels: Tensor, augmentation: Augmentation) -> list[Tensor]:
    """Codes (rows, variants, h, w) a level of uint8 images (rows, H, W, C), complete and in order on every process.

    Each process encodes its own stretch of the rows; the last stretch is padded to the others' length by repeating a
    row, and the padding is cut off again.
    """
    processes, rank = accelerator.num_processes, accelerator.process_index
    length = -(-len(pixels) // processes)
    mine = torch.arange(rank * length, (rank + 1) * length).clamp(max=len(pixels) - 1)
    images = to_model(pixels[mine].to(accelerator.device))
    variants = []
    for variant in range(num_variants(augmentation)):
        chosen = torch.full((len(images),), variant)
        variants.append(tokenizer.encode(make_variants(images, augmentation, chosen)))
    levels = [torch.stack(level, 1) for level in zip(*variants, strict=True)]
    return [accelerator.gather(level)[: len(pixels)] for level in levels]


@torch.no_grad()
def check(tokenizer: VQVAE, store: CodeStore, split: ImageSplit, batch_size: int, accelerator: Accelerator) -> None:
    """Decode stored codes and compare with the tokenizer's own reconstructions: this process's share of the first batch
    and of the last, encoded just as `encode_share` did, since another batch's rounding may choose another near code.

    Errors: UserError if they differ by more than one step of 255.
    """
    parts = batches(len(split), batch_size)
    for part in parts[:1] + parts[1:][-1:]:
        count = -(-(part.stop - part.start) // accelerator.num_processes)
        rows = torch.arange(part.start, part.start + count)
        codes = tuple(level.to(accelerator.device) for level in store.codes(rows))
        stored = to_uint8(tokenizer.decode(codes)).int()
        own = to_uint8(tokenizer(to_model(split.pixels[rows].to(accelerator.device))).reconstruction).int()
        apart = int((stored - own).abs().max())
        if apart > 1:
            expected = "expected stored codes to decode to the tokenizer's own reconstructions"
            raise UserError(f"{store.manifest.split}: {expected}, found pixels {apart} of 255 apart")


if __name__ == "__main__":
    run_entry(main)
