"""Randomness without hidden state: every draw is a pure function of a seed and of its purpose.

That one rule gives exact resume and the same data at any number of ranks: nothing has to be saved or synchronised.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError


def whole_seed(seed: Any) -> int:
    """Convert a seed of any numeric type to int, because seeds are hashed as text. Errors: UserError if it is no whole number."""
    try:
        number = int(seed)
        if number == seed:  # neither 1.5 nor "1"
            return number
    except (TypeError, ValueError, OverflowError, RuntimeError):  # of None, NaN, infinity, a tensor of several numbers
        pass
    raise UserError(f"seed: expected a whole number, found {seed!r}")


def derived_seed(seed: int, *purpose: object) -> int:
    """Derive a 63-bit seed for a purpose, equal on every machine and rank; `seed` may have any size and sign."""
    digest = hashlib.blake2b(repr((whole_seed(seed), *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """Create a CPU generator for one purpose."""
    return torch.Generator().manual_seed(derived_seed(seed, *purpose))


def seed_layers(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Seed torch's own generators, on all devices, before a forward pass: layer dropout draws from them."""
    torch.manual_seed(derived_seed(seed, "layers", step, micro_step, rank))


class DataOrder:
    """An endless order of the training rows: one permutation of 0..count-1 after another.

    Step s takes entries [s B, (s + 1) B), so every row is seen once per epoch, all batches are full, and a resumed run continues at its
    step.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._epochs: dict[int, Tensor] = {}

    def epoch(self, number: int) -> Tensor:
        """Return the permutation (count,) of an epoch."""
        if number not in self._epochs:
            # A batch may reach into later epochs, never back: earlier ones are dropped.
            self._epochs = {old: order for old, order in self._epochs.items() if old >= number - 1}
            self._epochs[number] = torch.randperm(self.count, generator=generator(self.seed, "order", number))
        return self._epochs[number]

    def batch(self, step: int) -> Tensor:
        """Return the training rows (B,) of a step."""
        entries = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = entries // self.count
        parts = [self.epoch(int(number))[entries[epochs == number] % self.count] for number in epochs.unique()]
        return torch.cat(parts)
