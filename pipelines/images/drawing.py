"""What all pipelines that draw from a prior share: finding the prior, naming labels, drawing and decoding in batches."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.cli import TRAIN_PRIOR, Command
from configs.errors import UserError, say
from configs.schema import Sampling
from stage1_vqvae.data.pixels import to_uint8
from stage1_vqvae.model import VQVAE
from stage1_vqvae.quantizers.contract import Codes
from stage1_vqvae.training.progress import progress_bar
from stage1_vqvae.training.weights_file import fingerprint
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.generate import generate, uniform_codes, uniforms
from stage2_prior.priors.contract import AutoregressivePrior
from stage2_prior.priors.cuda_graphs import GraphedTransformer
from stage2_prior.priors.prior_file import UNIFORM, PriorHeader, finished_prior, load_prior
from stage2_prior.priors.transformer import Transformer


class ChosenPrior(NamedTuple):
    """The prior that a command draws from, and its settings."""

    prior: AutoregressivePrior | None
    """The prior, in the precision to draw in; None: every code is equally likely."""
    header: PriorHeader | None
    name: str
    details: dict[str, Any]
    """What the file beside the pictures says: name, precision, and all settings of the drawing."""


def chosen_prior(command: Command, accelerator: Accelerator) -> ChosenPrior:
    """The prior that `--prior` names, or the one last finished. Errors: UserError if there is no such prior."""
    run, config = command.run, command.recipe.sampling
    # A draw flips where its uniform falls within the rounding of the probabilities, which depends on the batch's shape.
    # In float32 one of 64 digits changed between batches of 64 and of 1; in float64 the rounding is 10^9 times finer.
    precision = config.precision or ("float64" if accelerator.device.type == "cpu" else "float32")
    settings = {**dataclasses.asdict(config), "precision": precision}
    if command.options.prior == UNIFORM:
        return ChosenPrior(None, None, UNIFORM, {"prior": UNIFORM, "prior_sha256": None, "sampling": settings})
    path = finished_prior(run, command.options.prior, command.next(TRAIN_PRIOR))
    prior, header = load_prior(path, fingerprint(run.tokenizer), accelerator.device)
    if precision == "float64":
        prior.double()
    if command.recipe.compute.compile and isinstance(prior, Transformer) and accelerator.device.type == "cuda":
        prior = GraphedTransformer(prior)
    details = {"prior": path.parent.name, "prior_sha256": fingerprint(path), "sampling": settings}
    return ChosenPrior(prior, header, path.parent.name, details)


def check_guidance(accelerator: Accelerator, config: Sampling, labels: Tensor | None, header: PriorHeader | None) -> None:
    """Says so where guidance has no effect. Errors: UserError for guidance by a prior that has not learned p(codes)."""
    if header is None or config.guidance == 1:
        return
    if labels is None:
        say("guidance has no effect: there are no labels to insist on")
    elif not header.knows_no_label:
        raise UserError(f"--guidance: expected 1 for a prior trained with stage2.label_dropout 0, found {config.guidance}")


def labels_of(asked: str | None, count: int, header: PriorHeader | None) -> Tensor | None:
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
def draw_images(
    accelerator: Accelerator,
    tokenizer: VQVAE,
    prior: AutoregressivePrior | None,
    labels: Tensor | None,
    count: int,
    seed: int,
    config: Sampling,
    given: Codes | None = None,
    kept: Codes | None = None,
) -> tuple[Codes, Tensor]:
    """Draw and decode `count` samples; of `given` codes (N, h, w) a level, those that `kept` marks are taken over.

    Batch j, of fixed numbers and always of full size, is process j mod P's: so the result is the same at any number of processes.
    Returns: codes, int64 (N, h, w) a level, and uint8 pictures (N, H, W, C), on the CPU, complete on the main process alone.
    """
    layout = prior.layout if prior is not None else SequenceLayout(tokenizer.grids, tokenizer.quantizer.num_codes)
    processes, rank, main = accelerator.num_processes, accelerator.process_index, accelerator.is_main_process
    size = min(config.batch_size, count)
    channels, height, width = tokenizer.image_shape
    whole = count if main else 0
    sequences = torch.empty(whole, layout.length, dtype=torch.int64)
    pictures = torch.empty(whole, height, width, channels, dtype=torch.uint8)
    with progress_bar(count, "sample", "img", shown=main) as bar:
        for first in range(0, count, processes * size):
            # Numbers from `count` on are drawn, as the first sample again, and thrown away.
            numbers = torch.arange(first + rank * size, first + (rank + 1) * size)
            numbers = numbers.where(numbers < count, 0)
            uniform = uniforms(seed, numbers, layout.length)
            of_given = None if given is None else tuple(level[numbers] for level in given)
            if prior is None:
                codes = uniform_codes(layout, uniform)
                if of_given is not None and kept is not None:
                    codes = tuple(torch.where(*level) for level in zip(kept, of_given, codes, strict=True))
            else:
                of_labels = None if labels is None else labels[numbers].to(accelerator.device)
                codes = generate(prior, of_labels, uniform, config, of_given, kept)
            codes = tuple(level.to(accelerator.device) for level in codes)
            found = accelerator.gather((layout.flat(codes), to_uint8(tokenizer.decode(codes))))
            if main:
                rows = slice(first, min(count, first + processes * size))
                sequences[rows], pictures[rows] = (part[: rows.stop - rows.start].cpu() for part in found)
                bar.update(rows.stop - rows.start)
    return layout.grids_of(sequences), pictures
