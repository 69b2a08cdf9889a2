"""The command `summary.py`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.run_dir import RunDir, natural, read_json, write_json
from pipelines.provenance import model_fingerprints
from pipelines.summary import main


def test_the_summary_shows_figures_and_paths_of_plots(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_the_summary_names_missing_steps(run_copy: Path, capsys: pytest.CaptureFixture[str], one_line_error: Callable[..., str]) -> None:
    shutil.rmtree(run_copy / "priors")
    shutil.rmtree(run_copy / "codes")
    main(["--run", str(run_copy)])
    out = capsys.readouterr().out
    assert "python stage2_prior/extract_codes.py" in out
    assert "accelerate launch stage2_prior/train.py" in out
    (run_copy / "tokenizer.safetensors").unlink()
    assert "stage 1 has not finished" in one_line_error(main, "--run", run_copy)


def test_bounds_are_of_the_latest_prior_and_the_newest_evaluation(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluation 1000 comes after 999; results of another prior are hidden, results that need no prior are shown."""
    fingerprints = model_fingerprints(RunDir(run_copy), "transformer")

    def write_evaluation(number: str, mean: float, prior_sha256: str | None) -> None:
        bits = {name: {"mean": mean} for name in ("pixels", "uniform", "learned")}
        bound = {"prior": "transformer", "prior_sha256": prior_sha256, "bits_per_dimension": bits}
        content = {"split": "validation", "tokenizer_sha256": fingerprints["tokenizer_sha256"], "bound": bound}
        write_json(run_copy / "evaluations" / number / "evaluation.json", content)

    def shown() -> list[str]:
        main(["--run", str(run_copy)])
        return [line.rsplit(" ", 1)[1] for line in capsys.readouterr().out.splitlines() if "p(z)" in line]

    write_evaluation("998", 1.0, "an earlier one's")
    assert shown() == ["1.0000"]
    write_evaluation("999", 2.0, fingerprints["prior_sha256"])
    write_evaluation("1000", 3.0, fingerprints["prior_sha256"])
    assert shown() == ["3.0000", "3.0000"]
    write_evaluation("1001", 4.0, "an earlier one's")
    assert shown() == ["3.0000", "3.0000"]


def test_names_are_sorted_by_their_numbers() -> None:
    names = ["run10", "run2", "run", "2", "run2-b", "10", "a/level12", "a/level3", "Ä1"]
    assert sorted(names, key=natural) == ["2", "10", "a/level3", "a/level12", "run", "run2", "run2-b", "run10", "Ä1"]
