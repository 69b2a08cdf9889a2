"""What both training loops log and show: metrics.jsonl, a progress bar, the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn, Self

from accelerate import Accelerator

from configs.errors import say
from configs.schema import Stage1, Stage2
from training.budget import TimeLeft
from training.metrics_log import MetricsLog
from training.processes import finish
from training.progress import progress_bar
from training.schedule import scheduled_rate


class Recorder:
    """Metrics log and progress bar of a training loop; every rank has one, the main process writes."""

    def __init__(self, accelerator: Accelerator, stage: str, folder: Path, config: Stage1 | Stage2, first_step: int) -> None:
        """`stage`: for messages. `folder`: of metrics.jsonl. `first_step`: steps taken before this command."""
        self.accelerator, self.config = accelerator, config
        if accelerator.log_with:
            accelerator.init_trackers(stage.replace(" ", ""))
        self.log = MetricsLog(folder / "metrics.jsonl", accelerator, first_step)
        accelerator.wait_for_everyone()
        size, main = config.batch_size, accelerator.is_main_process
        self._bar = progress_bar(config.steps * size, stage, "img", initial=first_step * size, shown=main)
        self._time_left = TimeLeft(stage, first_step, config.steps)
        self._logged_step = first_step
        self.restart_clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def restart_clock(self) -> None:
        """Leave what was not training out of images per second."""
        self._since = time.monotonic()

    def advance(self, step: int) -> None:
        """Move the bar to `step` steps taken."""
        self._bar.update(self.config.batch_size)
        if self.accelerator.is_main_process and (line := self._time_left.line(step)) is not None:
            self._bar.write(line)

    def log_training(self, step: int, seconds: float, values: Mapping[str, float | str], **shown: str) -> None:
        """Log means over the steps since the last log line, which took `seconds`; `shown` goes into the bar."""
        speed = (step - self._logged_step) * self.config.batch_size / seconds
        self.log.write(step, "train", {**values, "images_per_second": speed, "lr": scheduled_rate(self.config, step - 1)})
        self._bar.set_postfix(shown, refresh=False)
        self._logged_step = step

    def exit_stopped(self, step: int, command: str, code: int) -> NoReturn:
        """End a command that was told to stop, after its checkpoint is written. `command`: how the training goes on."""
        self._bar.close()
        say(f"stopped after step {step} and saved; go on with: {command}")
        finish(self.accelerator)
        sys.exit(code)
