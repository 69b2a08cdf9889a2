"""What all that draws from a prior shares: guidance that is possible, kept codes, drawing and decoding in batches."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import UserError, say
from configs.schema import Sampling
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
    """Says so where guidance has no effect. Errors: UserError for guidance by a prior that has not learned p(codes)."""
    if header is None or config.guidance == 1:
        return
    if condition is None:
        say("guidance has no effect: there are no labels to insist on")
    elif not header.supports_unconditional:
        raise UserError(f"guidance: expected 1 for a prior trained with stage2.condition_dropout 0, found {config.guidance}")


def kept_codes(tokenizer: VQVAE, kept: Tensor) -> Codes:
    """Masks (h, w) a level, of the pixels (H, W) that are kept: of each grid, those codes that span no other pixel."""
    height, width = kept.shape
    return tuple(kept.view(h, height // h, w, width // w).all(3).all(1) for h, w in tokenizer.grids)


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

    Batch j, of fixed sample numbers and always of full size, goes to rank j mod P of the `accelerator`, so the result does not depend on
    the number of processes.

    Args:
        accelerator: None: this process draws alone.
        condition: (N, ...) rows of the prior's condition; None: no condition.
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
            batch_condition = None if condition is None else condition[numbers].to(device)
            codes = tuple(level.to(device) for level in sampler(batch_condition, noise, config, batch_keep))
            found = (layout.flat(codes), to_uint8(tokenizer.decode(codes)))
            found = found if accelerator is None else accelerator.gather(found)
            if main:
                rows = slice(first, min(count, first + processes * size))
                sequences[rows], pictures[rows] = (part[: rows.stop - rows.start].cpu() for part in found)
                bar.update(rows.stop - rows.start)
    return layout.grids_of(sequences), pictures
