"""Sample images: draw codes from the prior, decode them.

    python pipelines/sample.py --n 64
    python pipelines/sample.py --n 64 --label 7 --temperature 0.9 --top-p 0.95
    python pipelines/sample.py --n 64 --prior uniform
    python pipelines/sample.py --n 1000 --npz

Writes a new folder samples/NNN into the run: grid.png, one PNG an image, the codes, samples.json. Labels take turns
unless --label names one. Sample i of a seed is the same image whatever --batch-size or the number of processes.
"""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from torch import Tensor

from configs.cli import SUMMARY, TRAIN_PRIOR, TRAIN_TOKENIZER, Command, parse
from configs.errors import UserError, run_entry
from configs.run_dir import program, write_bytes, write_json
from configs.schema import Sampling
from stage1_vqvae.images import batches, to_uint8
from stage1_vqvae.model import VQVAE, fingerprint, load_tokenizer
from stage1_vqvae.plots import grid_scale, image_grid, save_png, square_columns
from stage1_vqvae.quantizers.contract import Codes
from stage1_vqvae.training.processes import start
from stage1_vqvae.training.progress import progress_bar
from stage2_prior.generate import generate, uniform_codes, uniforms
from stage2_prior.likelihood import uniform_bits
from stage2_prior.prior_file import UNIFORM, PriorHeader, load_prior
from stage2_prior.sequence import SequenceLayout
from stage2_prior.transformer import Transformer

# Pictures in grid.png at most; all of them lie beside it.
_SHOWN = 256


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    command = parse(__doc__, ("sampling", "compute"), argv, flat="sampling", options=_options)
    run, config, options = command.run, command.recipe.sampling, command.options
    if options.n < 1:
        raise UserError(f"--n: expected at least 1 image, found {options.n}")
    if not run.tokenizer.exists():
        raise UserError(f"{run}: stage 1 has not finished; run first: {TRAIN_TOKENIZER} --resume --run {run}")
    accelerator = start(command.recipe.compute)
    tokenizer = load_tokenizer(run, accelerator.device)
    prior, header = _prior(command, accelerator)
    if prior is not None and config.precision == "float64":
        # A draw flips where its uniform falls within the rounding of the probabilities, which depends on the batch's shape.
        # In float32 one of 64 digits changed between batches of 64 and of 1; in float64 the rounding is 10^9 times finer.
        prior.double()
    labels = _labels(options.label, options.n, header)
    if labels is not None and config.guidance != 1 and header is not None and not header.knows_no_label:
        raise UserError(f"--guidance: expected 1 for a prior trained with stage2.label_dropout 0, found {config.guidance}")

    if prior is not None and labels is None and config.guidance != 1:
        accelerator.print("guidance has no effect: this prior has no labels")

    # The folder comes first, so that a place that cannot be written is found before the drawing.
    folder = run.new_samples() if accelerator.is_main_process else None
    try:
        codes, pictures = sample(accelerator, tokenizer, prior, labels, options.n, options.seed, config)
        if folder is not None:
            run.record(program(), command.arguments, dataclasses.asdict(config))
            uniform = uniform_bits(tokenizer.grids, tokenizer.quantizer.num_codes)
            details = {
                "n": options.n,
                "seed": options.seed,
                "prior": options.prior or run.last_prior(),
                "sampling": dataclasses.asdict(config),
                "labels": None if labels is None else labels.tolist(),
                "label_names": header.label_names if header is not None else None,
                "tokenizer_sha256": fingerprint(run.tokenizer),
                "bits_per_token": header.validation["bits_per_token"] if header is not None else uniform,
            }
            write(folder, codes, pictures, labels, details, options.npz)
    except BaseException:
        if folder is not None:
            shutil.rmtree(folder)
        raise
    if folder is not None:
        kind = f"{details['prior']} prior, {details['bits_per_token']:.3f} bits a token"
        print(f"wrote {options.n} images ({kind}) to {run.show(folder)}; look at {run.show(folder / 'grid.png')}")
        print(f"next: {command.next(SUMMARY)}")
    accelerator.end_training()


def _options(parser: Any) -> None:
    parser.add_argument("--n", type=int, default=64, help="images to sample")
    parser.add_argument("--seed", type=int, default=0, help="seed; sample i of a seed is always the same")
    parser.add_argument("--label", type=str | None, help="label of all samples, by name or number (default: labels take turns)")
    parser.add_argument("--prior", type=str | None, help=f"name of a prior of the run (default: the last finished), or `{UNIFORM}`")
    parser.add_argument("--npz", action="store_true", help="also write samples.npz: uint8 arr_0 of (N, H, W, C)")


def _prior(command: Command, accelerator: Accelerator) -> tuple[Transformer, PriorHeader] | tuple[None, None]:
    """The prior asked for; (None, None) for the uniform one."""
    run, asked = command.run, command.options.prior
    if asked == UNIFORM:
        return None, None
    name = asked or run.last_prior()
    if name is None:
        raise UserError(f"{run}: it has no finished prior; run first: {command.next(TRAIN_PRIOR)}")
    path = run.prior(name) / "prior.safetensors"
    if not path.exists():
        finished = sorted(found.parent.name for found in run.priors.glob("*/prior.safetensors"))
        raise UserError(f"--prior {name}: expected one of {', '.join([*finished, UNIFORM])}, found no such finished prior in {run}")
    return load_prior(path, fingerprint(run.tokenizer), accelerator.device)


def _labels(asked: str | None, count: int, header: PriorHeader | None) -> Tensor | None:
    """The label of each sample (N,); None without labels. Errors: UserError for a label there is not."""
    names = header.label_names if header is not None else None
    if names is None:
        if asked is not None:
            raise UserError(f"--label {asked}: expected none, since this prior has no labels")
        return None
    if asked is None:
        return torch.arange(count) % len(names)
    if asked in names:
        return torch.full((count,), names.index(asked))
    if asked.isdecimal() and int(asked) < len(names):
        return torch.full((count,), int(asked))
    raise UserError(
        f"--label: expected 0 to {len(names) - 1} or a name ({', '.join(names[:10])}{', ...' * (len(names) > 10)}), found {asked}"
    )


@torch.no_grad()
def sample(
    accelerator: Accelerator, tokenizer: VQVAE, prior: Transformer | None, labels: Tensor | None, count: int, seed: int, config: Sampling
) -> tuple[Codes, Tensor]:
    """Draw and decode `count` samples.

    Batch j is process j mod P's; a short one is padded only to be gathered.
    Returns: codes, int64 (N, h, w) a level, and uint8 pictures (N, H, W, C), on the CPU, complete on every process.
    """
    layout = prior.layout if prior is not None else SequenceLayout(tokenizer.grids, tokenizer.quantizer.num_codes)
    processes, rank = accelerator.num_processes, accelerator.process_index
    size = min(config.batch_size, count)
    parts = batches(count, size)
    channels, height, width = tokenizer.image_shape
    tokens = torch.empty(count, layout.length, dtype=torch.int64)
    pictures = torch.empty(count, height, width, channels, dtype=torch.uint8)
    with progress_bar(count, "sample", "img", shown=accelerator.is_main_process) as bar:
        for first in range(0, len(parts), processes):
            # A process without a batch of its own draws the first again, and nobody takes it.
            mine = parts[first + rank if first + rank < len(parts) else 0]
            numbers = torch.arange(mine.start, mine.stop)
            uniform = uniforms(seed, numbers, layout.length)
            if prior is None:
                codes = uniform_codes(layout, uniform)
            else:
                given = None if labels is None else labels[mine].to(accelerator.device)
                codes = generate(prior, given, uniform, config)
            own_tokens = layout.to_tokens(codes).to(accelerator.device)
            own_pictures = to_uint8(tokenizer.decode(layout.to_codes(own_tokens)))
            all_tokens, all_pictures = _gathered(accelerator, own_tokens, size), _gathered(accelerator, own_pictures, size)
            for process, part in enumerate(parts[first : first + processes]):
                rows = slice(process * size, process * size + part.stop - part.start)
                tokens[part], pictures[part] = all_tokens[rows], all_pictures[rows]
                bar.update(part.stop - part.start)
    return layout.to_codes(tokens), pictures


def _gathered(accelerator: Accelerator, rows: Tensor, size: int) -> Tensor:
    """All processes' rows on the CPU, `size` a process: those of a short batch are padded."""
    padded = rows.new_zeros(size, *rows.shape[1:])
    padded[: len(rows)] = rows
    return accelerator.gather(padded).cpu()


def write(folder: Path, codes: Codes, pictures: Tensor, labels: Tensor | None, details: dict[str, Any], npz: bool) -> None:
    """Write a call's samples into their folder."""
    names = details["label_names"]
    # Labels take turns: with a column a label, each column shows one.
    columns = len(names) if names is not None and len(names) <= 16 else square_columns(min(len(pictures), _SHOWN))
    save_png(folder / "grid.png", image_grid(pictures[:_SHOWN], min(columns, len(pictures))), grid_scale(pictures.shape[1]))
    digits = max(5, len(str(len(pictures))))
    for number, picture in enumerate(pictures):
        save_png(folder / "images" / f"{number:0{digits}d}.png", picture)
    tensors = {f"level{level}": grid for level, grid in enumerate(codes)}
    write_bytes(folder / "codes.safetensors", safetensors.torch.save(tensors | ({} if labels is None else {"labels": labels})))
    if npz:
        buffer = io.BytesIO()
        np.savez(buffer, pictures.numpy())
        write_bytes(folder / "samples.npz", buffer.getvalue())
    write_json(folder / "samples.json", details)


if __name__ == "__main__":
    run_entry(main)
