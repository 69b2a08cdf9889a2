"""What all that draws from a prior shares: naming labels, drawing and decoding in batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import UserError, listed, say
from configs.schema import Sampling
from pipelines.encoding import allocate_pixels
from stage1_vqvae.data.names import class_numbers
from stage1_vqvae.data.pixels import to_uint8
from stage1_vqvae.model import VQVAE
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.draw import uniforms
from stage2_prior.priors.contract import Keep
from stage2_prior.priors.prior_file import PriorHeader
from stage2_prior.sampler import Sampler
from training.progress import progress_bar

Label = str | int
"""The name of a class, or its number, which may be written as text where no class has it for a name."""


def check_guidance(config: Sampling, labels: Tensor | None, header: PriorHeader | None) -> None:
    """Says so where guidance has no effect. Errors: UserError for guidance by a prior that has not learned p(codes)."""
    if header is None or config.guidance == 1:
        return
    if labels is None:
        say("guidance has no effect: there are no labels to insist on")
    elif not header.knows_no_label:
        raise UserError(f"guidance: expected 1 for a prior trained with stage2.label_dropout 0, found {config.guidance}")


def labels_of(asked: Label | Sequence[Label] | None, count: int, header: PriorHeader | None) -> Tensor | None:
    """The label of each sample, (N,), as one for all or one each; of None they take turns. None where the prior knows no labels.

    Errors: UserError for a label there is not, or more or fewer than samples.
    """
    names = header.label_names if header is not None else None
    if names is None:
        if asked is not None:
            raise UserError(f"label {asked}: expected none, since this prior has no labels")
        return None
    if asked is None:
        return torch.arange(count) % len(names)
    asked = asked.tolist() if isinstance(asked, Tensor | np.ndarray | np.generic) else asked
    each = [asked] * count if isinstance(asked, str | int) else list(asked)
    if len(each) != count:
        raise UserError(f"label: expected one, or {count}, found {len(each)}")
    return torch.tensor([_number(label, names) for label in each])


def _number(asked: Label, names: list[str]) -> int:
    number = int(class_numbers([asked], names)[0]) if isinstance(asked, str) else -1
    if number >= 0:
        return number
    if str(asked).isdecimal() and int(asked) < len(names):
        return int(asked)
    raise UserError(f"label: expected 0 to {len(names) - 1} or a name ({listed(names)}), found {asked}")


def kept_codes(tokenizer: VQVAE, kept: Tensor) -> Codes:
    """Masks (h, w) a level, of the pixels (H, W) that are kept: of each grid, those codes that span no other pixel."""
    height, width = kept.shape
    return tuple(kept.view(h, height // h, w, width // w).all(3).all(1) for h, w in tokenizer.grids)


@torch.no_grad()
def draw_images(
    accelerator: Accelerator | None,
    tokenizer: VQVAE,
    sampler: Sampler,
    labels: Tensor | None,
    count: int,
    seed: int,
    config: Sampling,
    keep: Keep | None = None,
    progress: bool = False,
    folder: Path | None = None,
) -> tuple[Codes, Tensor]:
    """Draw and decode `count` samples.

    Batch j, of fixed sample numbers and always of full size, goes to rank j mod P of the `accelerator`, so the result does not depend on
    the number of processes.

    Args:
        accelerator: None: this process draws alone.
        keep: of all samples.
        progress: show a bar.
        folder: where pictures lie in a temporary file; None: in memory.
    Returns: codes, int64 (N, h, w) per level, and uint8 pictures (N, H, W, C), on the CPU, complete on the main process alone.
    """
    prior = sampler.prior
    layout = prior.layout
    processes, rank = (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    device, main = next(tokenizer.parameters()).device, rank == 0
    size = min(config.batch_size, count)
    channels, height, width = tokenizer.image_shape
    whole = count if main else 0
    sequences = torch.empty(whole, layout.length, dtype=torch.int64)
    pictures = allocate_pixels((whole, height, width, channels), folder)
    with progress_bar(count, "sample", "img", shown=main and progress) as bar:
        for first in range(0, count, processes * size):
            # Numbers from `count` on are drawn, as the first sample again, and thrown away.
            numbers = torch.arange(first + rank * size, first + (rank + 1) * size)
            numbers = numbers.where(numbers < count, 0)
            noise = uniforms(seed, numbers, prior.num_noise)
            batch_keep = None if keep is None else keep._replace(codes=tuple(level[numbers] for level in keep.codes))
            condition = None if labels is None else labels[numbers].to(device)
            codes = tuple(level.to(device) for level in sampler(condition, noise, config, batch_keep))
            found = (layout.flat(codes), to_uint8(tokenizer.decode(codes)))
            found = found if accelerator is None else accelerator.gather(found)
            if main:
                rows = slice(first, min(count, first + processes * size))
                sequences[rows], pictures[rows] = (part[: rows.stop - rows.start].cpu() for part in found)
                bar.update(rows.stop - rows.start)
    return layout.grids_of(sequences), pictures
