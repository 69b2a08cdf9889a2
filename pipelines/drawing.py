"""Drawing from a prior: the check of guidance, the mask of kept codes, drawing and decoding in batches."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import UserError, say
from configs.parts import Sampling
from pipelines.encoding import allocate_pixels
from stage1_vqvae.data.pixels import to_uint8
from stage1_vqvae.model import VQVAE
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.draw import uniforms
from stage2_prior.priors.contract import Keep
from stage2_prior.priors.prior_file import PriorHeader
from stage2_prior.sampler import Sampler
from training.progress import progress_bar


def check_guidance(config: Sampling, condition: Tensor | None, header: PriorHeader | None) -> None:
    """Print a line if guidance has no effect. Errors: UserError for guidance with a prior that was trained without condition dropout."""
    if header is None or config.guidance == 1:
        return
    if condition is None:
        say("guidance has no effect without labels")
    elif not header.supports_unconditional:
        raise UserError(f"guidance: expected 1 for a prior trained with stage2.condition_dropout 0, found {config.guidance}")
    elif getattr(header.config, "guidance_free", False):
        if config.guidance < 1:
            raise UserError(f"guidance: expected at least 1 for a prior trained with prior.guidance_free, found {config.guidance}")
        found = config.guidance_schedule, list(config.guidance_interval)
        if found != ("constant", [0, 1]):
            names = "guidance_schedule, guidance_interval"
            raise UserError(
                f"{names}: expected constant, [0, 1] for a prior trained with prior.guidance_free, found {found[0]}, {found[1]}"
            )


def kept_codes(tokenizer: VQVAE, mask: Tensor) -> Codes:
    """Convert a mask (H, W) of kept pixels to masks (h, w) per level of kept codes, whose patches lie within the mask.

    A grid whose side does not divide the image's has patches of two sizes; each pixel is in one of them.
    """
    height, width = mask.shape
    to_draw, masks = (~mask).nonzero(), []
    for h, w in tokenizer.grids:
        kept = torch.ones(h, w, dtype=torch.bool)
        kept[to_draw[:, 0] * h // height, to_draw[:, 1] * w // width] = False
        masks.append(kept)
    return tuple(masks)


@torch.no_grad()
def draw_images(
    accelerator: Accelerator | None,
    tokenizer: VQVAE,
    sampler: Sampler,
    condition: Tensor | None,
    count: int,
    seed: int,
    config: Sampling,
    keep: Keep | None = None,
    progress: bool = False,
    folder: Path | None = None,
) -> tuple[Codes, Tensor]:
    """Draw and decode `count` samples.

    Batch j, of fixed sample numbers and always of full size, is drawn on rank j mod P of the `accelerator`, so the result does not depend
    on the number of processes.

    Args:
        accelerator: Accelerator of the ranks; None: this process alone.
        condition: (N, ...) rows of the prior's condition; None: no condition.
        keep: codes to keep, of all samples.
        progress: show a bar.
        folder: folder of a temporary file for the pictures; None: in memory.
    Returns: codes, int64 (N, h, w) per level, and uint8 pictures (N, H, W, C), on the CPU, complete on the main process alone.
    """
    prior = sampler.prior
    layout = prior.layout
    processes, rank = (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    device, main = next(tokenizer.parameters()).device, rank == 0
    size = min(config.batch_size, count)
    channels, height, width = tokenizer.image_shape
    num_rows = count if main else 0
    sequences = torch.empty(num_rows, layout.length, dtype=torch.int64)
    pictures = allocate_pixels((num_rows, height, width, channels), folder)
    with progress_bar(count, "sample", "img", shown=main and progress) as bar:
        for first in range(0, count, processes * size):
            # The last batch is filled up with repetitions of the first sample, which are discarded.
            numbers = torch.arange(first + rank * size, first + (rank + 1) * size)
            numbers = numbers.where(numbers < count, 0)
            noise = uniforms(seed, numbers, prior.num_noise)
            batch_keep = None if keep is None else keep._replace(codes=tuple(level[numbers] for level in keep.codes))
            batch_condition = None if condition is None else condition[numbers].to(device)
            codes = tuple(level.to(device) for level in sampler(batch_condition, noise, config, batch_keep))
            drawn = (layout.flat(codes), to_uint8(tokenizer.decode(codes)))
            drawn = drawn if accelerator is None else accelerator.gather(drawn)
            if main:
                rows = slice(first, min(count, first + processes * size))
                sequences[rows], pictures[rows] = (tensor[: rows.stop - rows.start].cpu() for tensor in drawn)
                bar.update(rows.stop - rows.start)
    return layout.grids_of(sequences), pictures
