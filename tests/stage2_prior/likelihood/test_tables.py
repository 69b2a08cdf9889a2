"""The likelihood report against sums by hand."""

from __future__ import annotations

import dataclasses
import math
import shutil
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from configs.run_dir import RunDir, read_json
from stage2_prior.codes.store import CodeStore, write_manifest, write_shard
from stage2_prior.likelihood.bits import mean_over_tokens, measure, unigram_bits
from stage2_prior.likelihood.tables import likelihood_report, markdown
from stage2_prior.priors.prior_file import load_prior
from stage2_prior.report import main
from tests.stage2_prior.priors.prior_kinds import LAYOUTS, build, manifest, random_codes
from training.weights_file import fingerprint


def store(folder: Path, images: int, num_classes: int) -> CodeStore:
    layout = LAYOUTS["top and bottom"]
    content = dataclasses.replace(manifest(layout, num_classes), rows=images, rows_per_shard=images)
    codes = random_codes(layout, images)
    write_shard(folder, content, 0, [level[:, None] for level in codes], torch.arange(images) % 3 if num_classes else None)
    write_manifest(folder, content)
    return CodeStore(folder)


@pytest.mark.parametrize("kind", ["transformer", "pixelcnn"])
@pytest.mark.parametrize("num_classes", [0, 5])
def test_every_figure_equals_its_definition(tmp_path: Path, kind: str, num_classes: int) -> None:
    """Two levels of 2 and 8 codes; three of the five labels occur."""
    prior = build(kind, LAYOUTS["top and bottom"], num_classes).double()
    training, validation = store(tmp_path / "train", 40, num_classes), store(tmp_path / "validation", 7, num_classes)
    report = likelihood_report(Accelerator(cpu=True), prior, training, validation, 3, [])
    bits = prior.nats(validation.codes(torch.arange(7)), validation.condition) / math.log(2)
    assert report["validation"] == pytest.approx(bits.mean().item())
    assert report["bits_per_image"]["prior"] == pytest.approx(bits.sum(1).mean().item())
    assert report["codes_bits_per_dim"] == pytest.approx(bits.sum(1).mean().item() / (3 * 8 * 8))
    assert [level["validation"] for level in report["levels"]] == pytest.approx([bits[:, :2].mean().item(), bits[:, 2:].mean().item()])
    assert torch.tensor(report["positions"][0]).flatten().tolist() == pytest.approx(bits[:, :2].mean(0).tolist())
    assert torch.tensor(report["positions"][1]).shape == (2, 4)
    expected = {str(label): pytest.approx(bits[label::3].mean().item()) for label in range(3)} if num_classes else {}
    assert report["labels"] == expected
    assert report["uniform"] == pytest.approx((2 * math.log2(4) + 8 * math.log2(6)) / 10)
    assert report["unigram"] == pytest.approx(mean_over_tokens(unigram_bits(training, validation), LAYOUTS["top and bottom"].grids))
    assert report["saved_percent"]["uniform"] == pytest.approx(100 * (report["uniform"] - report["validation"]) / report["uniform"])
    assert report["images"] == {"train": 7, "validation": 7}
    text = markdown("this", report)
    assert all(f"{report[name]:.3f}" in text for name in ("uniform", "unigram", "train", "validation"))


def test_the_batch_size_does_not_change_the_figures(tmp_path: Path) -> None:
    prior = build("transformer", LAYOUTS["top and bottom"]).double()
    codes = store(tmp_path / "codes", 11, 5)
    one_batch, batches = (measure(Accelerator(cpu=True), prior, codes, torch.arange(11), size) for size in (11, 2))
    assert torch.allclose(one_batch.positions, batches.positions)
    assert one_batch.classes == pytest.approx(batches.classes)


def test_all_ranks_compute_equally_many_batches_and_each_image_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """11 images on 3 ranks, of which one has a row less: the sums of the ranks add up to those of one process."""
    prior = build("transformer", LAYOUTS["top and bottom"]).double()
    codes, batch_sizes = store(tmp_path / "codes", 11, 5), list[int]()
    expected = measure(Accelerator(cpu=True), prior, codes, torch.arange(11), 2)
    nats = prior.nats
    monkeypatch.setattr(prior, "nats", lambda codes, condition: batch_sizes.append(len(codes[0])) or nats(codes, condition))
    rank_sums: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr("stage2_prior.likelihood.bits.summed", lambda _, tensors: rank_sums.append(tensors) or tensors)
    for rank in range(3):
        accelerator = types.SimpleNamespace(process_index=rank, num_processes=3, device=torch.device("cpu"))
        measure(accelerator, prior, codes, torch.arange(11), 2)  # type: ignore[arg-type]
    assert batch_sizes == [2, 2] * 3
    assert torch.allclose(sum(tensors["nats"] for tensors in rank_sums) / 11 / math.log(2), expected.positions)
    assert sum(int(tensors["images"].sum()) for tensors in rank_sums) == 11


@pytest.mark.usefixtures("rendered")
def test_the_command_reports_the_same_figures_as_training(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_copy / "priors" / "transformer"
    before = read_json(folder / "likelihood.json")
    for name in ("likelihood.json", "likelihood.md", "likelihood.png"):
        (folder / name).unlink()
    main(["--run", str(run_copy)])
    after = read_json(folder / "likelihood.json")
    assert after["validation"] == pytest.approx(before["validation"], rel=1e-5)
    assert after["train"] == pytest.approx(before["train"], rel=1e-5)
    assert after["labels"].keys() == {"across", "down"}
    assert (folder / "likelihood.md").read_text() in capsys.readouterr().out
    assert (folder / "likelihood.png").stat().st_size > 5000


def test_the_saved_prior_is_the_averaged_one(run_copy: Path) -> None:
    """The last checkpoint's raw weights are not those of the file, and its average is."""
    run = RunDir(run_copy)
    prior, _ = load_prior(run.prior("transformer") / "prior.safetensors", fingerprint(run.tokenizer))
    newest = torch.load(max((run.prior("transformer") / "checkpoints").iterdir()), weights_only=True)
    saved = prior.state_dict()
    assert read_json(run.prior("transformer") / "report.json")["best_step"] == 8
    assert all(torch.equal(saved[name], newest["average"]["model"][name]) for name in saved)
    assert not all(torch.equal(saved[name], newest["model"][name]) for name in saved)


def test_without_a_prior_the_error_names_the_command_to_run(run_copy: Path, one_line_error: Callable[..., str]) -> None:
    assert "expected one of transformer" in one_line_error(main, "--run", run_copy, "--prior", "other")
    shutil.rmtree(run_copy / "priors")
    assert "accelerate launch stage2_prior/train.py" in one_line_error(main, "--run", run_copy)
