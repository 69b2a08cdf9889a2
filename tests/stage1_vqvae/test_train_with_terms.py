"""Stage 1 with perceptual and adversarial terms, and initialised from another run; test_resume.py has resuming with terms."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from configs.recipe_file import load_recipe
from configs.run_dir import RunDir, read_json
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import VALIDATION
from stage1_vqvae.model import load_tokenizer
from stage1_vqvae.monitoring.validation import validate
from stage1_vqvae.steps import TokenizerState, build_state
from stage1_vqvae.train import main
from training.metrics_log import read_metrics

# A discriminator that starts at step 30 of 120 and affects the tokenizer after a ramp, with LeCam's moving averages as extra state.
ADVERSARY = ["--stage1.adversarial.kind", "patch", "--stage1.adversarial.layers", "1", "--stage1.adversarial.channels", "4"]
ADVERSARY += ["--stage1.adversarial.start", "0.25", "--stage1.adversarial.penalty", "lecam"]


def test_resuming_reuses_the_trained_feature_network(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A perceptual term and a projected discriminator share one classifier, separate from evaluation's."""
    monkeypatch.setattr("stage1_vqvae.features.classifier._MIN_STEPS", 2)
    settings = ["--config", str(tiny_recipe), "--stage1.steps", "8", "--stage1.checkpoint_interval", "4", "--stage1.perceptual", "features"]
    settings += ["--stage1.adversarial", "projected", "--stage1.adversarial.start", "0.25", "--stage1.adversarial.channels", "4"]
    complete, resumed = tmp_path / "complete", tmp_path / "resumed"
    main([*settings, "--run", str(complete)])
    shutil.copytree(complete, resumed)
    (resumed / "tokenizer.safetensors").unlink()
    (resumed / "stage1/checkpoints/step-000000008.pt").unlink()
    monkeypatch.setattr("stage1_vqvae.features.classifier.fit", None)  # it must not be trained again
    main(["--run", str(resumed), "--resume"])
    assert (resumed / "tokenizer.safetensors").read_bytes() == (complete / "tokenizer.safetensors").read_bytes()
    assert not (complete / "classifier.safetensors").exists()
    names = set(read_metrics(complete / "stage1/metrics.jsonl")[0])
    assert names >= {"perceptual", "adversarial", "discriminator", "adversarial_weight", "adversarial_kept"}


def test_a_budget_counts_feature_networks_once(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The feature network exists before the state whose building time the budget counts twice, and training uses the same one."""
    monkeypatch.setattr("stage1_vqvae.features.classifier._MIN_STEPS", 1)
    network, contents = tmp_path / "run/stage1/classifier.safetensors", []

    def recording_build_state(*arguments: Any) -> TokenizerState:
        contents.append(network.read_bytes())
        return build_state(*arguments)

    monkeypatch.setattr("stage1_vqvae.train.build_state", recording_build_state)
    budget = ["--stage1.minutes", "0.02", "--stage1.perceptual", "features"]
    main(["--config", str(tiny_recipe), "--run", str(tmp_path / "run"), *budget])
    assert contents == [network.read_bytes()] * 2


def test_mixed_precision_only_changes_rounding(tiny_recipe: Path, tmp_path: Path) -> None:
    """Two steps of tokenizer and discriminator in bfloat16 are close to float32."""
    for name in ("no", "bf16"):
        settings = ["--config", str(tiny_recipe), "--run", str(tmp_path / name), "--stage1.steps", "2", "--stage1.log_interval", "2"]
        main([*settings, *ADVERSARY, "--stage1.adversarial.start", "0", "--compute.mixed_precision", name])
        AcceleratorState._reset_state(reset_partial_state=True)
    full, half = (read_metrics(tmp_path / name / "stage1/metrics.jsonl")[0] for name in ("no", "bf16"))
    for name in ("reconstruction", "discriminator", "adversarial_weight"):
        assert half[name] == pytest.approx(full[name], rel=0.05)
        assert half[name] != full[name]
    # Validation uses the saved weights in float32, as later commands do.
    run = RunDir(tmp_path / "bf16")
    validation = load_images(load_recipe(run.recipe).data, [VALIDATION]).splits[VALIDATION]
    expected = validate(Accelerator(cpu=True), load_tokenizer(run), validation, 8).metrics
    assert read_json(run.stage1 / "report.json")["validation"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("trained", ["all", "decoder"])
def test_training_can_start_from_another_runs_tokenizer(trained: str, finished_run: Path, tmp_path: Path) -> None:
    """Its tokenizer section is inherited; training only the decoder keeps encoder and quantizer unchanged."""
    new = tmp_path / "new"
    main(["--init-from", str(finished_run), "--run", str(new), "--stage1.steps", "6", "--stage1.trained", trained, *ADVERSARY])
    before, after = (load_file(run / "tokenizer.safetensors") for run in (finished_run, new))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == ({"decoder"} if trained == "decoder" else {"encoder", "quantizer", "decoder"})
    errors = [read_json(run / "stage1/report.json")["validation"]["mse"] for run in (finished_run, new)]
    assert errors[1] < 1.5 * errors[0]  # about as good as before; random weights are ten times worse
    recipe = load_recipe(new / "recipe.yaml")
    assert recipe.tokenizer == load_recipe(finished_run / "recipe.yaml").tokenizer
    assert recipe.stage1.init_from == str(finished_run.resolve())


def test_invalid_initial_tokenizers_are_refused(
    finished_run: Path, tiny_recipe: Path, tmp_path: Path, one_line_error: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("configs.run_dir.runs_folder", lambda: tmp_path)  # without any run
    new = ["--run", tmp_path / "new"]
    assert "--run NAME" in one_line_error(main, "--init-from", finished_run)
    assert "expected a run with a finished tokenizer" in one_line_error(main, "--init-from", tmp_path / "none", *new)
    line = one_line_error(main, "--init-from", finished_run, *new, "--tokenizer.network.residual_blocks", "2")
    assert "expected a weight encoder." in line
    assert "stage1.trained: expected all" in one_line_error(main, "--config", tiny_recipe, *new, "--stage1.trained", "decoder")
    likelihood = ["--tokenizer.objective", "logistic", *ADVERSARY]
    assert "stage1.adversarial: expected none" in one_line_error(main, "--config", tiny_recipe, *new, *likelihood)
