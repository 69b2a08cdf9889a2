"""What happened since the last log line."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from stage1_vqvae.metrics import perplexity, psnr, usage
from training.stopping import check_finite


class Window:
    """Per-step values since the last log line; they stay on the device until then."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        self._terms: list[dict[str, Tensor]] = []
        self._counts: list[list[Tensor]] = []
        self.restart_clock()

    @property
    def steps(self) -> int:
        """Training steps noted since the last log line."""
        return len(self._counts)

    def restart_clock(self) -> None:
        """Leave out what was not training from images/s."""
        self._since = time.monotonic()

    def add(self, counts: list[Tensor], losses: Mapping[str, Tensor], **values: Tensor) -> None:
        """Note a step's counts, (K,) a level, the terms of its loss, and values, `mse` and `gradient_norm` among them."""
        self._counts.append(counts)
        values = {**losses, "loss": torch.stack(list(losses.values())).sum(), **values}
        self._terms.append({name: values[name] for name in (*losses, "loss", "gradient_norm")})
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)

    def close(self, first: int, batch_size: int, advice: str, waited: float) -> tuple[dict[str, float], list[Tensor]]:
        """Means over the window, usage and perplexity of its codes together, codes restarted, images/s, the share of its time that was
        `waited` for images, in seconds; and its counts. Then it starts anew.

        Errors: UserError naming step and term, with `advice`, if a loss or a gradient is not finite.
        """
        steps = self.steps
        check_finite(self._terms, first + 1, advice)
        counts = [torch.stack(level).sum(0) for level in zip(*self._counts, strict=True)]
        restarted = sum(int(value) for value in self._values.pop("restarted", []))
        means = {name: float(torch.stack(values).mean()) for name, values in self._values.items()}
        seconds = time.monotonic() - self._since
        self._values, self._terms, self._counts = {}, [], []
        self.restart_clock()
        values = {
            **means,
            "psnr": psnr(means["mse"]),
            "usage": usage(*counts),
            "perplexity": perplexity(*counts),
            "restarted": restarted,
            "images_per_second": steps * batch_size / seconds,
            "loading_share": waited / seconds,
        }
        return values, counts
