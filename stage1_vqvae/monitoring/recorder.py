"""Log lines, progress bar and pictures of a stage 1 training."""

from __future__ import annotations

import time

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.run_dir import RunDir
from configs.schema import Recipe
from stage1_vqvae.data.loader import Loader
from stage1_vqvae.data.splits import ImageSplit
from stage1_vqvae.metrics import perplexity, psnr, usage
from stage1_vqvae.model import VQVAE
from stage1_vqvae.monitoring.health import CollapseWatch
from stage1_vqvae.monitoring.validation import ValidationResult, save_grids, save_health, save_reconstructions
from stage1_vqvae.quantizers.contract import level_counts
from training.recorder import Recorder
from training.schedule import Due
from training.stopping import check_finite

_ADVICE = "lower --stage1.lr and go on with --resume"


class TokenizerRecorder(Recorder):
    """Recorder of stage 1. Values of single steps stay on the device until a log line is due."""

    def __init__(self, accelerator: Accelerator, run: RunDir, recipe: Recipe, tokenizer: VQVAE, loader: Loader, first_step: int) -> None:
        super().__init__(accelerator, "stage 1", run.stage1, recipe.stage1, first_step)
        self._run, self._loader = run, loader
        self._micro_batches = accelerator.num_processes * recipe.stage1.accumulation
        self._collapse = CollapseWatch(tokenizer.quantizer, recipe.tokenizer)
        self._warning: str | None = None
        self._reset()
        loader.waited()  # before the first step, for k-means

    def _reset(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        self._terms: list[dict[str, Tensor]] = []
        self._counts: list[list[Tensor]] = []
        self.restart_clock()

    def record(self, step: int, statistics: dict[str, Tensor], due: Due) -> None:
        """Record the statistics of a training step, the `step`-th; write a log line if one is due.

        Errors: UserError naming step and term if a loss or a gradient is not finite.
        """
        losses, logged = (
            {name.removeprefix(prefix): total / self._micro_batches for name, total in statistics.items() if name.startswith(prefix)}
            for prefix in ("loss/", "logged/")
        )
        terms = {**losses, "loss": torch.stack(list(losses.values())).sum(), "gradient_norm": statistics["gradient_norm"]}
        # Squared error on [-1, 1] is four times that on [0, 1].
        mse = statistics["squared_error"] / self._micro_batches / 4
        values = {**terms, **logged, "mse": mse, "restarted": statistics["restarted"]}
        self._terms.append(terms)
        self._counts.append(level_counts(statistics))
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)
        self.advance(step)
        if due.log:
            self._write_line(step)

    def _write_line(self, step: int) -> None:
        check_finite(self._terms, step - len(self._terms) + 1, _ADVICE)
        counts = [torch.stack(level).sum(0) for level in zip(*self._counts, strict=True)]
        restarted = sum(int(value) for value in self._values.pop("restarted"))
        means = {name: float(torch.stack(values).mean()) for name, values in self._values.items()}
        seconds = time.monotonic() - self._since
        values: dict[str, float | str] = {
            **means,
            "psnr": psnr(means["mse"]),
            "usage": usage(*counts),
            "perplexity": perplexity(*counts),
            "restarted": restarted,
            "loading_share": self._loader.waited() / seconds,
        }
        earlier, self._warning = self._warning, self._collapse.warning(counts)
        if self._warning is not None:
            values["warning"] = self._warning
            if earlier is None and self.accelerator.is_main_process:
                self._bar.write(f"step {step}: {self._warning}")
        shown = {"loss": f"{means['loss']:.4f}", "psnr": f"{values['psnr']:.2f}", "usage": f"{values['usage']:.0%}"}
        self.log_training(step, seconds, values, **shown)
        self._reset()

    def validated(self, step: int, result: ValidationResult, tokenizer: VQVAE, validation: ImageSplit) -> None:
        """Log a validation, and draw the codebook's health and reconstructions."""
        self.log.write(step, "validation", result.metrics)
        if self.accelerator.is_main_process:
            save_health(self._run, tokenizer, result.counts, step, self.accelerator.num_processes)
            save_reconstructions(self._run, tokenizer, validation, step, self.accelerator.device)
            save_grids(self._run, tokenizer, validation, self.accelerator.device)
        self.restart_clock()
