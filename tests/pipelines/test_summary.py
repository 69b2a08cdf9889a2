"""The table of a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.run_dir import read_json
from pipelines.summary import main


def test_it_shows_what_was_measured_and_where_the_pictures_are(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--run", str(finished_run)])
    out = capsys.readouterr().out
    tokenizer, prior = (read_json(finished_run / name) for name in ("stage1/report.json", "priors/transformer/likelihood.json"))
    for figure in (
        f"{tokenizer['validation']['mse']:.5f}",
        f"{tokenizer['validation']['psnr']:.2f} dB",
        f"{tokenizer['validation']['usage']:.1%}",
        f"{prior['validation']:.3f}",
        f"{prior['unigram']:.3f}",
        "4.000",  # log2 16
        str(finished_run / "stage1" / "codebook.png"),
    ):
        assert figure in out, figure


def test_it_says_what_is_missing(run_copy: Path, capsys: pytest.CaptureFixture[str], one_line_error: Callable[..., str]) -> None:
    shutil.rmtree(run_copy / "priors")
    shutil.rmtree(run_copy / "codes")
    main(["--run", str(run_copy)])
    out = capsys.readouterr().out
    assert "python stage2_prior/extract_codes.py" in out
    assert "accelerate launch stage2_prior/train.py" in out
    (run_copy / "tokenizer.safetensors").unlink()
    assert "stage 1 has not finished" in one_line_error(main, "--run", run_copy)
