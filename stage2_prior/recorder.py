"""Log lines, progress bar and warnings of a stage 2 training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.errors import say
from configs.schema import Stage2
from stage2_prior.likelihood.bits import bits
from stage2_prior.likelihood.tables import turned_at
from stage2_prior.steps import PriorState
from training.metrics_log import read_metrics
from training.processes import summed
from training.recorder import Recorder
from training.schedule import Due
from training.stopping import check_finite

_ADVICE = "lower --stage2.lr and go on with --resume"


class PriorRecorder(Recorder):
    """Recorder of stage 2. Losses of single steps stay on the device until a log line is due."""

    def __init__(self, accelerator: Accelerator, folder: Path, config: Stage2, state: PriorState) -> None:
        super().__init__(accelerator, "stage 2", folder, config, state.step)
        self._best = state.best
        self._steps: list[tuple[Tensor, Tensor]] = []
        self._train_bits = float("nan")
        self.validations: list[dict[str, Any]] = [record for record in read_metrics(self.log.path) if record["split"] == "validation"]
        """Records of all validations so far, those before a resume included."""

    def record(self, step: int, loss: Tensor, norm: Tensor, due: Due) -> None:
        """Record this rank's loss () and the gradient's norm () at the `step`-th training step; write a log line if one is due.

        Errors: UserError naming step and term if a loss or a gradient is not finite.
        """
        self._steps.append((loss, norm))
        self.advance(step)
        if not due.log:
            return
        losses, norms = (torch.stack(values) for values in zip(*self._steps, strict=True))
        means = summed(self.accelerator, {"losses": losses})["losses"] / self.accelerator.num_processes
        terms = [{"loss": loss, "gradient_norm": norm} for loss, norm in zip(means, norms, strict=True)]
        check_finite(terms, step - len(terms) + 1, _ADVICE)
        self._train_bits = bits(float(means.mean()))
        seconds = time.monotonic() - self._since
        values = {"bits_per_token": self._train_bits, "gradient_norm": float(norms.mean())}
        self.log_training(step, seconds, values, bits=f"{self._train_bits:.3f}", best=f"{self._best.bits:.3f}")
        self._steps = []
        self.restart_clock()

    def validated(self, step: int, validation_bits: float) -> None:
        """Log a validation, and warn if the prior has begun to memorise its training images."""
        values = {"bits_per_token": validation_bits, "train_bits_per_token": self._train_bits}
        self.log.write(step, "validation", values)
        self.validations.append({"step": step, **values})
        turned = turned_at(self.validations)
        if turned is not None:
            self._bar.clear()
            say(
                f"warning: validation rises while training falls since step {turned} ({self._best.bits:.3f} bits per token there, "
                f"{validation_bits:.3f} now): the prior memorises its training images; the weights of step {self._best.step} are kept"
            )
        self.restart_clock()
