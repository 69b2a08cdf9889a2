"""What all pipelines that draw from a prior share: finding the prior, naming labels, drawing and decoding in batches."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.cli import TRAIN_PRIOR, Command
from configs.errors import UserError
from configs.schema import Sampling
from stage1_vqvae.images import to_uint8
from stage1_vqvae.model import VQVAE, fingerprint
from stage1_vqvae.quantizers.contract import Codes
from stage1_vqvae.training.progress import progress_bar
from stage2_prior.contract import AutoregressivePrior
from stage2_prior.cuda_graphs import GraphedTransformer
from stage2_prior.generate import generate, uniform_codes, uniforms
from stage2_prior.prior_file import UNIFORM, PriorHeader, load_prior
from stage2_prior.sequence import SequenceLayout
from stage2_prior.transformer import Transformer


def chosen_prior(command: Command, accelerator: Accelerator) -> tuple[AutoregressivePrior, PriorHeader] | tuple[None, None]:
    """The prior that `--prior` names, in the precision to draw in; (None, None) for the uniform one.

    Errors: UserError if there is no such prior.
    """
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
    prior, header = load_prior(path, fingerprint(run.tokenizer), accelerator.device)
    precision = command.recipe.sampling.precision or ("float64" if accelerator.device.type == "cpu" else "float32")
    if precision == "float64":
        # A draw flips where its uniform falls within the rounding of the probabilities, which depends on the batch's shape.
        # In float32 one of 64 digits changed between batches of 64 and of 1; in float64 the rounding is 10^9 times finer.
        prior.double()
    if command.recipe.compute.compile and isinstance(prior, Transformer) and accelerator.device.type == "cuda":
        return GraphedTransformer(prior), header
    return prior, header


def check_guidance(config: Sampling, labels: Tensor | None, header: PriorHeader | None) -> None:
    """Errors: UserError for guidance by a prior that has not learned p(codes)."""
    if labels is not None and config.guidance != 1 and header is not None and not header.knows_no_label:
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
    places = torch.empty(whole, layout.length, dtype=torch.int64)
    pictures = torch.empty(whole, height, width, channels, dtype=torch.uint8)
    with progress_bar(count, "sample", "img", shown=main) as bar:
        for first in range(0, count, processes * size):
            # Numbers from `count` on are drawn, as the first sample again, and thrown away.
            numbers = torch.arange(first + rank * size, first + (rank + 1) * size)
            numbers = numbers.where(numbers < count, 0)
            uniform = uniforms(seed, numbers, layout.length)
            if prior is None:
                codes = uniform_codes(layout, uniform)
            else:
                of_labels = None if labels is None else labels[numbers].to(accelerator.device)
                of_given = None if given is None else tuple(level[numbers] for level in given)
                codes = generate(prior, of_labels, uniform, config, of_given, kept)
            codes = tuple(level.to(accelerator.device) for level in codes)
            found = accelerator.gather((layout.flat(codes), to_uint8(tokenizer.decode(codes))))
            if main:
                rows = slice(first, min(count, first + processes * size))
                places[rows], pictures[rows] = (part[: rows.stop - rows.start].cpu() for part in found)
                bar.update(rows.stop - rows.start)
    return layout.grids_of(places), pictures
