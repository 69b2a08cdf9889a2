"""Training images per micro-step."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.data import Data, TransformPart
from configs.schema import Stage1
from stage1_vqvae.data.order import build_order
from stage1_vqvae.data.pixels import to_model
from stage1_vqvae.data.splits import CroppablePixels, ImageSplit, Pixels
from stage1_vqvae.data.variants import VARIANTS, Variants
from training.batching import share_of_step
from training.devices import pinned
from training.prefetch import StepReader
from training.randomness import generator


def read_rows(pixels: Pixels, rows: Tensor) -> Tensor:
    """Read the images at `rows`, uint8 (B, H, W, C); numpy indexes them, since torch would start an OpenMP team per calling thread."""
    return torch.from_numpy(pixels.numpy()[rows.numpy()]) if isinstance(pixels, Tensor) else pixels[rows]


def crops_vary(transform: TransformPart, variants: Variants) -> bool:
    """Whether training crops an image in more than one way, so that the pixels kept by data.decode once do not suffice."""
    return transform.num_draws > 0 or len(variants.crops) > 1


class Loader:
    """Training images of this rank per micro-step.

    The image, its crop and its variant are functions of (seed, step, position in the step's batch): they do not depend on the world size,
    on threads, or on where training was interrupted.
    """

    def __init__(self, training: ImageSplit, data: Data, config: Stage1, accelerator: Accelerator, ahead: bool | None = None) -> None:
        """`ahead`: prefetch the next images in a thread; None: on accelerators only."""
        self._training, self._transform, self._config = training, data.transform, config
        self._variants = VARIANTS[config.augmentation]
        self._device = accelerator.device
        self._processes, self._rank = accelerator.num_processes, accelerator.process_index
        self._order = build_order(training.pixels, config.batch_size, config.seed)
        self._reader = StepReader(self._read, config.accumulation, accelerator.device, ahead)

    def share(self, micro_step: int) -> slice:
        """Return this rank's slice of a step's batch."""
        return share_of_step(self._config.batch_size, self._config.accumulation, micro_step, self._processes, self._rank)

    def images(self, step: int, micro_step: int) -> Tensor:
        """Return the images (B, C, H, W) in [-1, 1] of a micro-step, on this rank's device.

        Errors: UserError for an image that cannot be read.
        """
        pixels, variants = self._reader.at(step, micro_step)
        # Images are copied to the device as bytes, a quarter of the size of floats.
        return self._variants.apply(to_model(pixels), variants)

    def uniforms(self, step: int, micro_step: int) -> Tensor:
        """Draw (B,) numbers in [0, 1) on this rank's device, one per image, a function of (seed, step, position in the batch)."""
        draws = torch.rand(self._config.batch_size, generator=generator(self._config.seed, "objective", step))
        return pinned(draws[self.share(micro_step)], self._device).to(self._device, non_blocking=True)

    def waited(self) -> float:
        """Return the seconds spent waiting for images since the last call."""
        return self._reader.waited()

    def _read(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Read the pixels (B, H, W, C) and draw the variants (B,) of a micro-step."""
        (step, micro_step), seed, transform, pixels = key, self._config.seed, self._transform, self._training.pixels
        batch, share = self._order.batch(step), self.share(micro_step)
        rows = batch[share]
        variants = torch.randint(len(self._variants), batch.shape, generator=generator(seed, "augmentation", step))[share]
        if not crops_vary(transform, self._variants):
            return read_rows(pixels, rows), variants
        assert isinstance(pixels, CroppablePixels)
        draws = torch.rand((len(batch), transform.num_draws), generator=generator(seed, "crop", step))[share].tolist()
        crops = [self._variants.crops[number % len(self._variants.crops)] for number in variants.tolist()]
        return pixels.cropped(rows, [[crop or transform.crop(draw)] for crop, draw in zip(crops, draws, strict=True)])[:, 0], variants
