"""Training images, micro-step by micro-step; and how anything is read for a GPU while it works on what was before."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.data import Data
from configs.schema import Stage1
from stage1_vqvae.data.crops import crops_from
from stage1_vqvae.data.order import order_of
from stage1_vqvae.data.pixels import to_model
from stage1_vqvae.data.splits import CroppablePixels, ImageSplit, Pixels
from stage1_vqvae.data.variants import make_variants, num_variants
from stage1_vqvae.training.batching import share_of_step
from stage1_vqvae.training.devices import numbered, pinned, work_on
from stage1_vqvae.training.randomness import generator
from stage1_vqvae.training.watch import progressed

Key = TypeVar("Key")
Value = TypeVar("Value")

_AHEAD = 2


def worth_reading_ahead(device: torch.device) -> bool:
    """Whether images for work on that device are better read while it is at work. On a CPU it has all cores, and its threads wait for one
    another at every layer: who takes a core from one of them for a while holds up all.
    """
    return device.type != "cpu"


def read_ahead(read: Callable[[Key], Value], keys: Iterable[Key], ahead: bool) -> Iterator[Value]:
    """What is read for each key, in their order; `ahead`: the next two in a thread, while the caller works on the last."""
    if not ahead:
        yield from map(read, keys)
        return
    left, waiting = iter(keys), deque[Future[Value]]()
    with ThreadPoolExecutor(1) as thread:
        try:
            waiting.extend(thread.submit(read, key) for key in itertools.islice(left, _AHEAD))
            while waiting:
                found = waiting.popleft().result()
                waiting.extend(thread.submit(read, key) for key in itertools.islice(left, 1))
                yield found
        finally:
            for future in waiting:
                future.cancel()


def read_to(
    device: torch.device, read: Callable[[Key], tuple[Tensor, ...]], keys: Iterable[Key], ahead: bool | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """The tensors that `read` makes on the CPU for each key, on the device, in the keys' order. For an accelerator they are read ahead, and
    on a GPU copied from page-locked memory, so that neither reading nor copying makes the host wait for it.

    `ahead`: whether the next are read in a thread; None: where that is worth it.
    """
    device = numbered(device)

    def read_for_device(key: Key) -> tuple[Tensor, ...]:
        found = read(key)
        work_on(device)  # this thread may be a new one
        return tuple(pinned(tensor, device) for tensor in found)

    for found in read_ahead(read_for_device, keys, worth_reading_ahead(device) if ahead is None else ahead):
        yield tuple(tensor.to(device, non_blocking=True) for tensor in found)


class StepReader:
    """What training reads for every micro-step, on the process's device; read ahead as long as it is asked for in turn."""

    def __init__(
        self,
        read: Callable[[tuple[int, int]], tuple[Tensor, ...]],
        accumulation: int,
        device: torch.device,
        ahead: bool | None = None,
    ) -> None:
        """`read`: tensors on the CPU, a pure function of (step, micro-step). `accumulation`: micro-steps a step. `ahead`: see `read_to`."""
        self._read, self._accumulation, self._device, self._ahead = read, accumulation, device, ahead
        self._next: tuple[int, int] | None = None
        self._stream: Iterator[tuple[Tensor, ...]] = iter(())
        self._waited = 0.0

    def at(self, step: int, micro_step: int) -> tuple[Tensor, ...]:
        """A micro-step's tensors. Errors: those of `read`."""
        began = time.perf_counter()
        if self._next != (step, micro_step):
            self._stream = read_to(self._device, self._read, self._from(step, micro_step), self._ahead)
        found = next(self._stream)
        progressed(together=True)
        self._next = (step, micro_step + 1) if micro_step + 1 < self._accumulation else (step + 1, 0)
        self._waited += time.perf_counter() - began
        return found

    def waited(self) -> float:
        """Seconds that the training has waited since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def _from(self, step: int, micro_step: int) -> Iterator[tuple[int, int]]:
        first = step * self._accumulation + micro_step
        return (divmod(number, self._accumulation) for number in itertools.count(first))


def pixels_of(pixels: Pixels, rows: Tensor) -> Tensor:
    """Some images, uint8 (B, H, W, C), by this thread alone: torch would begin a team of its own for every thread that asks it."""
    return torch.from_numpy(pixels.numpy()[rows.numpy()]) if isinstance(pixels, Tensor) else pixels[rows]


class Loader:
    """A process's images of every micro-step.

    Which they are, and in which crop and variant, is a function of (seed, step, position in the step's batch): the same whatever the number
    of processes and threads, and where a training was interrupted.
    """

    def __init__(self, training: ImageSplit, data: Data, config: Stage1, accelerator: Accelerator, ahead: bool | None = None) -> None:
        """`ahead`: whether the next images are read in a thread; None: where that is worth it."""
        self._training, self._data, self._config = training, data, config
        self._processes, self._rank = accelerator.num_processes, accelerator.process_index
        self._order = order_of(training.pixels, config.batch_size, config.seed)
        self._reader = StepReader(self._read, config.accumulation, accelerator.device, ahead)

    def share(self, micro_step: int) -> slice:
        """This process's part of a step's batch."""
        return share_of_step(self._config.batch_size, self._config.accumulation, micro_step, self._processes, self._rank)

    def images(self, step: int, micro_step: int) -> Tensor:
        """The images (B, C, H, W) in [-1, 1] of a micro-step, on the process's device.

        Errors: UserError for one that cannot be read.
        """
        pixels, variants = self._reader.at(step, micro_step)
        # They came as bytes: a quarter of what floats would be on the way to a GPU.
        return make_variants(to_model(pixels), self._config.augmentation, variants)

    def waited(self) -> float:
        """Seconds that the training has waited for images since this was last asked."""
        return self._reader.waited()

    def _read(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The pixels (B, H, W, C) and variants (B,) of a micro-step."""
        (step, micro_step), config, data, pixels = key, self._config, self._data, self._training.pixels
        batch, share = self._order.batch(step), self.share(micro_step)
        variants = torch.randint(num_variants(config.augmentation), batch.shape, generator=generator(config.seed, "augmentation", step))
        if data.crop == "random" and isinstance(pixels, CroppablePixels):
            draws = torch.rand((len(batch), 3), generator=generator(config.seed, "crop", step))[share]
            found = pixels.cropped(batch[share], [[crop] for crop in crops_from(draws, data.crop_area)])[:, 0]
        else:
            found = pixels_of(pixels, batch[share])
        return found, variants[share]
