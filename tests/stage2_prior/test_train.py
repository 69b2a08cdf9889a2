"""The command `stage2_prior/train.py`."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from configs.errors import UserError
from configs.prior_name import PriorName
from configs.recipe_file import load_recipe
from configs.run_dir import RunDir, read_json, write_json
from configs.schema import prior_from
from pipelines.anomalies import validation_bits
from pipelines.complete import main as complete
from pipelines.compress import main as compress
from pipelines.export_onnx import main as export_onnx
from pipelines.sample import main as sample
from stage2_prior.codes.record import codes_record
from stage2_prior.codes.store import CodeStore, write_manifest, write_shard
from stage2_prior.conditions.classes import Classes
from stage2_prior.conditions.none import NoCondition
from stage2_prior.extract_codes import main as extract
from stage2_prior.joining import check_levels
from stage2_prior.likelihood.bits import mean_over_tokens, turning_point, uniform_bits, unigram_bits
from stage2_prior.priors.pixelcnn import PixelCNN
from stage2_prior.priors.prior_file import LoadedPrior, load_prior
from stage2_prior.report import main as report
from stage2_prior.train import check_codes, main, oom_hint
from tests.conftest import Killed, failing
from training.metrics_log import read_metrics
from training.weights_file import fingerprint, load_weights, save_weights


def test_training_writes_the_documented_files(finished_run: Path) -> None:
    folder = finished_run / "priors" / "transformer"
    assert {path.name for path in folder.iterdir()} == {
        "prior.safetensors",
        "recipe.yaml",
        "data.json",
        "report.json",
        "metrics.jsonl",
        "training.png",
        "likelihood.json",
        "likelihood.md",
        "likelihood.png",
        "checkpoints",
    }


def test_the_reported_likelihood_is_that_of_the_saved_prior(finished_run: Path) -> None:
    check_likelihood(finished_run, "transformer")


def check_likelihood(path: Path, name: str) -> None:
    run = RunDir(path)
    folder = run.prior(name)
    prior, header = load_prior(folder / "prior.safetensors", fingerprint(run.tokenizer))
    store = CodeStore(run.codes / "validation")
    assert store.condition is not None
    nats = [prior.nats(store.codes(torch.tensor([row])), store.condition[row : row + 1]) for row in range(len(store))]
    bits = torch.cat(nats).mean().item() / math.log(2)
    report = read_json(folder / "likelihood.json")
    assert report["validation"] == header.bits_per_token == pytest.approx(bits, rel=1e-5)
    assert report["bits_per_image"]["prior"] == pytest.approx(6 * bits, rel=1e-5)
    validations = [record["bits_per_token"] for record in read_metrics(folder / "metrics.jsonl") if record["split"] == "validation"]
    assert min(validations) == report["validation"]


def test_codes_with_an_added_class_are_scored_by_class_name(
    run_copy: Path, one_line_error: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The new class is between the others in the alphabet, so the numbers of those after it move by one."""
    run, arguments = RunDir(run_copy), ["--run", str(run_copy)]
    names = ["across", "aside", "down"]
    before = read_json(run.prior("transformer") / "likelihood.json")
    path, command = run.prior("transformer") / "prior.safetensors", Namespace(run=run)
    scorer = LoadedPrior(*load_prior(path, fingerprint(run.tokenizer)), "transformer")
    usual = validation_bits(command, scorer, conditional=True)

    def store_again(first: int | None) -> None:
        for split in ("train", "validation"):
            store = CodeStore(run.codes / split)
            labels = store.translated(Classes(names=names))
            assert labels is not None
            labels[:1] = labels[:1] if first is None else first
            manifest = dataclasses.replace(store.manifest, condition=Classes(names=names))
            for shard in range(manifest.num_shards):
                codes = [torch.from_numpy(level.copy()) for level in store.shard(shard)]
                write_shard(run.codes / split, manifest, shard, codes, labels[torch.tensor(manifest.shard_rows(shard))])
            write_manifest(run.codes / split, manifest)

    store_again(None)
    report([*arguments, "--accept-changed-data"])
    after = read_json(run.prior("transformer") / "likelihood.json")
    assert [after[key] for key in ("validation", "train", "labels")] == [before[key] for key in ("validation", "train", "labels")]
    assert torch.equal(validation_bits(command, scorer, conditional=True), usual)

    store_again(1)
    line = one_line_error(report, *arguments, "--accept-changed-data")
    assert "train: expected codes of a condition that the prior knows (classes across, down), found aside; train another prior" in line
    assert torch.equal(validation_bits(command, scorer, conditional=True), usual[1:])
    assert "compared with 11 of 12 validation images: the prior does not know the labels of the others" in capsys.readouterr().out
    line = one_line_error(main, *arguments, "--resume", "--stage2.steps", "12")
    assert re.search(r'expected codes of the condition that its training began with, found .*class "aside" is new', line)
    shutil.copytree(run.prior("transformer"), run.prior("joined/level1"))
    check_levels(run, PriorName("joined", 2), Classes(names=["across", "down"]))
    check_levels(run, PriorName("joined", 1), Classes(names=names))  # the level that is to be trained again
    for condition, text in ((Classes(names=names), "classes across, aside, down"), (NoCondition(), "none")):
        with pytest.raises(UserError, match=f"expected all levels trained on the same condition, {text}, found classes across, down"):
            check_levels(run, PriorName("joined", 2), condition)


def test_unigram_and_uniform_bits_by_hand(finished_run: Path) -> None:
    training, validation = CodeStore(finished_run / "codes/train"), CodeStore(finished_run / "codes/validation")
    training_tokens = training.codes(torch.arange(len(training)))[0].flatten().tolist()
    probability = [(training_tokens.count(code) + 1) / (len(training_tokens) + 16) for code in range(16)]
    tokens = validation.codes(torch.arange(len(validation)))[0].flatten().tolist()
    assert unigram_bits(training, validation) == [pytest.approx(-sum(math.log2(probability[code]) for code in tokens) / len(tokens))]
    assert uniform_bits([4, 16]) == [2, 4]
    assert mean_over_tokens([2, 4], [(1, 1), (1, 3)]) == (2 + 3 * 4) / 4


@pytest.mark.parametrize(("kind", "steps"), [("transformer", "30"), ("masked", "8")])  # the second draws random numbers for its loss
def test_a_stopped_and_resumed_training_ends_bit_for_bit_the_same(
    kind: str, steps: str, run_copy: Path, capsys: pytest.CaptureFixture[str], one_line_error: Callable[..., str]
) -> None:
    """Tests in tests/faults kill it as well."""
    sizes = ["--prior.kind", kind, "--prior.layers", "2", "--prior.width", "16", "--prior.heads", "2"]
    settings = ["--run", str(run_copy), *sizes, "--stage2.steps", steps, "--stage2.accumulation", "2"]
    main([*settings, "--name", "whole"])
    with pytest.raises(SystemExit):
        main([*settings, "--name", "stopped", "--stop_after", "1e-9"])
    assert "--resume" in one_line_error(main, *settings, "--name", "stopped")
    main([*settings, "--name", "stopped", "--resume"])
    assert "going on after step 1" in capsys.readouterr().out
    uninterrupted, stopped = (run_copy / "priors" / name for name in ("whole", "stopped"))
    assert (stopped / "prior.safetensors").read_bytes() == (uninterrupted / "prior.safetensors").read_bytes()


def test_gains_learning_rates_of_embeddings_and_averages_by_share_are_trained_resumed_and_drawn_from(run_copy: Path) -> None:
    settings = [
        "--run",
        str(run_copy),
        "--prior.head_gain",
        "true",
        "--stage2.embedding_lr",
        "2e-3",
        "--stage2.weight_average_share",
        "0.5",
    ]
    main([*settings, "--name", "whole"])
    with pytest.raises(SystemExit):
        main([*settings, "--name", "stopped", "--stop_after", "1e-9"])
    main([*settings, "--name", "stopped", "--resume"])
    whole, stopped = (run_copy / "priors" / name / "prior.safetensors" for name in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()
    gains = [
        gain
        for name, gain in load_prior(whole, fingerprint(run_copy / "tokenizer.safetensors"))[0].named_parameters()
        if name.endswith("attention.gain")
    ]
    assert len(gains) == 2
    assert all((gain != 1).all() for gain in gains)
    sample(["--run", str(run_copy), "--prior", "whole", "--n", "2"])


def test_a_guidance_free_prior_is_trained_resumed_and_drawn_from(run_copy: Path, one_line_error: Callable[..., str]) -> None:
    run = ["--run", str(run_copy)]
    settings = [*run, "--prior.guidance_free", "true"]
    main([*settings, "--name", "whole"])
    with pytest.raises(SystemExit):
        main([*settings, "--name", "stopped", "--stop_after", "1e-9"])
    main([*settings, "--name", "stopped", "--resume"])
    whole, stopped = (run_copy / "priors" / name / "prior.safetensors" for name in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()
    check_likelihood(run_copy, "whole")
    sample([*run, "--prior", "whole", "--n", "2", "--guidance", "2"])
    for command, arguments, text in (
        (sample, ["--guidance", "0.5"], "guidance: expected at least 1 for a prior trained with prior.guidance_free, found 0.5"),
        (
            sample,
            ["--guidance", "2", "--guidance-schedule", "linear"],
            "expected constant, [0, 1] for a prior trained with prior.guidance_free",
        ),
        (export_onnx, ["--output", str(run_copy / "onnx")], "prior.guidance_free: expected a prior trained without it to export"),
    ):
        assert text in one_line_error(command, *run, "--prior", "whole", *arguments)
    for arguments, text in (
        (["--stage2.condition_dropout", "0"], "stage2.condition_dropout: expected above 0 with prior.guidance_free, found 0"),
        (["--condition.kind", "none"], "prior.guidance_free: expected false without a condition"),
        (["--level", "1"], "prior.guidance_free: expected false for a level"),
    ):
        assert text in one_line_error(main, *settings, "--name", "new", *arguments)


def test_a_prior_of_any_order_resumes_draws_in_rounds_and_completes_any_mask(
    run_copy: Path, capsys: pytest.CaptureFixture[str], one_line_error: Callable[..., str]
) -> None:
    """With a corrupted context, both by draws of each step."""
    run = ["--run", str(run_copy)]
    settings = [*run, "--prior.order", "any", "--prior.corruption", "0.8", "--stage2.accumulation", "2"]
    main([*settings, "--name", "whole"])
    with pytest.raises(SystemExit):
        main([*settings, "--name", "stopped", "--stop_after", "1e-9"])
    main([*run, "--name", "stopped", "--resume"])
    uninterrupted, stopped = (run_copy / "priors" / name for name in ("whole", "stopped"))
    assert (stopped / "prior.safetensors").read_bytes() == (uninterrupted / "prior.safetensors").read_bytes()
    drawn = []
    for number, options in enumerate([["--rounds", "3"], ["--rounds", "3", "--batch-size", "2"], []]):
        sample([*run, "--n", "5", "--guidance", "1.5", *options])
        drawn.append(load_file(run_copy / f"samples/{number:03d}/codes.safetensors")["level0"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    complete([*run, "--n", "2", "--continuations", "2", "--keep-rows", "1"])
    assert "4 continuations of 2 images, each code given all kept ones; look at" in capsys.readouterr().out
    compress(run)  # decodes what it has written
    assert "prior trained with prior.order raster, found 3" in one_line_error(sample, *run, "--prior", "transformer", "--rounds", "3")
    complete([*run, "--n", "2", "--continuations", "2", "--prior", "transformer"])
    assert "each code given those before it; look at" in capsys.readouterr().out


def test_a_prior_killed_before_its_first_checkpoint_keeps_its_recipe(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It resumes with the options that the out-of-memory message advises."""
    command = ["--run", str(run_copy), "--name", "small"]
    with monkeypatch.context() as patched:
        patched.setattr("stage2_prior.train.take_step", failing(Killed()))
        with pytest.raises(Killed):
            main([*command, "--prior.layers", "1", "--stage2.steps", "2", "--stage2.validation_interval", "1"])
    first_recipe = load_recipe(run_copy / "priors/small/recipe.yaml")
    advised = re.findall(r"--stage2\S+ (?:\d+|true)", oom_hint(first_recipe))
    assert advised == ["--stage2.accumulation 2", "--stage2.gradient_checkpointing true"]
    main([*command, "--resume", *" ".join(advised).split()])
    steps, recipe = read_json(run_copy / "priors/small/report.json")["steps"], load_recipe(run_copy / "priors/small/recipe.yaml")
    assert (steps, recipe.prior) == (2, first_recipe.prior)
    assert (recipe.stage2.accumulation, recipe.stage2.gradient_checkpointing) == (2, True)


def test_changed_codes_are_refused_unless_accepted(
    run_copy: Path, one_line_error: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, path = RunDir(run_copy), run_copy / "priors/transformer/data.json"
    stores = {split: CodeStore(run.codes / split) for split in ("train", "validation")}
    known, recipe = read_json(path), load_recipe(run.recipe)
    assert known == codes_record(stores)
    write_json(path, {**known, "train": {**known["train"], "images": 30}})
    assert "36 images, was 30" in one_line_error(report, "--run", run_copy)
    resume = ["--run", run_copy, "--resume", "--stage2.steps", "12"]
    assert "found train: 36 images, was 30; put it back, train another with --name NAME" in one_line_error(main, *resume)
    check_codes(run, PriorName("transformer"), recipe, stores, accept=True)
    assert capsys.readouterr().out.endswith("going on with data that has changed: train: 36 images, was 30\n")
    others = {"classes": {"across": 18, "bird": 18}, "condition": {"kind": "classes", "names": ["across", "bird"]}}
    write_json(path, {**known, "train": {**known["train"], **others}})
    with pytest.raises(UserError, match=r'expected codes of the condition .*, found .*class "bird" is gone'):
        check_codes(run, PriorName("transformer"), recipe, stores, accept=True)
    write_json(path, known)
    extract(["--run", str(run_copy), "--overwrite", "--extraction.augmentation", "horizontal_flip"])
    assert "expected codes of augmentation none, with which its training began, found horizontal_flip" in one_line_error(main, *resume)


def test_a_training_resumes_in_another_precision(run_copy: Path) -> None:
    """Checkpoints hold float32 weights and moments in any precision, and likelihoods are computed in float32."""
    command = ["--run", str(run_copy), "--name", "mixed", "--stage2.steps", "3"]
    with pytest.raises(SystemExit):
        main([*command, "--compute.mixed_precision", "no", "--stop-after", "1e-9"])
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
    main([*command, "--compute.mixed_precision", "bf16", "--resume"])
    assert read_json(run_copy / "priors" / "mixed" / "report.json")["steps"] == 3
    check_likelihood(run_copy, "mixed")


def test_a_finished_prior_is_not_trained_again_and_a_new_name_starts_another(
    run_copy: Path, capsys: pytest.CaptureFixture[str], one_line_error: Callable[..., str]
) -> None:
    main(["--run", str(run_copy)])
    assert "already finished" in capsys.readouterr().out
    line = one_line_error(main, "--run", run_copy, "--prior.layers", "1")
    assert "prior.layers: 1, not 2" in line
    assert "--name" in line
    shutil.rmtree(run_copy / "priors" / "transformer" / "checkpoints")
    line = one_line_error(main, "--run", run_copy, "--resume", "--stage2.steps", "99")
    assert "expected a checkpoint to go on from after 8 steps, found none" in line
    main(["--run", str(run_copy), "--prior.layers", "1", "--name", "flat", "--stage2.steps", "2"])
    assert RunDir(run_copy).last_prior() == "flat"
    assert len(load_prior(run_copy / "priors/flat/prior.safetensors", fingerprint(run_copy / "tokenizer.safetensors"))[0].blocks) == 1


def test_priors_are_trained_without_a_condition(run_copy: Path) -> None:
    main(["--run", str(run_copy), "--condition.kind", "none", "--name", "blind", "--stage2.steps", "2"])
    prior, header = load_prior(run_copy / "priors/blind/prior.safetensors", fingerprint(run_copy / "tokenizer.safetensors"))
    assert prior.condition == header.condition == NoCondition()
    assert header.supports_unconditional


def test_without_codes_the_error_names_the_command_to_run(run_copy: Path, one_line_error: Callable[..., str]) -> None:
    import shutil

    shutil.rmtree(run_copy / "codes")
    assert "python stage2_prior/extract_codes.py" in one_line_error(main, "--run", run_copy)


def change_bytes(path: Path) -> None:
    """Change a file's bytes but no weight: add eight spaces to the end of a safetensors header."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes((length + 8).to_bytes(8, "little") + content[8 : 8 + length] + b" " * 8 + content[8 + length :])


def test_a_prior_over_another_tokenizers_codes_is_neither_resumed_nor_finished(run_copy: Path, one_line_error: Callable[..., str]) -> None:
    main(["--run", str(run_copy), "--name", "begun", "--stage2.steps", "4"])
    (run_copy / "priors" / "begun" / "prior.safetensors").unlink()
    change_bytes(run_copy / "tokenizer.safetensors")
    extract(["--run", str(run_copy)])
    for name in ("transformer", "begun"):
        line = one_line_error(main, "--run", run_copy, "--name", name, "--resume", "--stage2.steps", "99")
        assert "expected a prior over codes of the run's tokenizer" in line
        assert "--name" in line


def test_a_resumed_prior_uses_its_saved_recipe(run_copy: Path) -> None:
    """With the printed command: only the run, the name and --resume."""
    settings = ["--prior.layers", "1", "--stage2.steps", "6", "--stage2.checkpoint_interval", "4"]
    main(["--run", str(run_copy), "--name", "small", *settings])
    folder = run_copy / "priors" / "small"
    expected = (folder / "prior.safetensors").read_bytes()
    for leftover in (folder / "prior.safetensors", folder / "report.json", folder / "checkpoints" / "step-000000006.pt"):
        leftover.unlink()
    main(["--run", str(run_copy), "--name", "small", "--resume"])
    assert (folder / "prior.safetensors").read_bytes() == expected


def test_fewer_steps_than_the_checkpoint_has_are_refused(run_copy: Path, one_line_error: Callable[..., str]) -> None:
    main(["--run", str(run_copy), "--name", "new", "--stage2.steps", "6"])
    (run_copy / "priors" / "new" / "prior.safetensors").unlink()
    line = one_line_error(main, "--run", run_copy, "--name", "new", "--resume", "--stage2.steps", "5")
    assert "at least the checkpoint's 6, found 5" in line
    assert yaml.safe_load((run_copy / "priors/new/recipe.yaml").read_text())["stage2"]["steps"] == 6


@pytest.mark.parametrize("name", ["..", "a/b", "uniform", ""])
def test_invalid_names_of_priors_are_refused(name: str, run_copy: Path, one_line_error: Callable[..., str]) -> None:
    before = (run_copy / "recipe.yaml").read_bytes()
    if name:
        assert "--name: expected letters" in one_line_error(main, "--run", run_copy, "--name", name)
    else:
        main(["--run", str(run_copy)])  # named after its kind
    assert (run_copy / "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize("settings", [[], ["--prior.attention_interval", "5"]])
def test_a_pixelcnn_is_trained_resumed_and_named_after_its_kind(run_copy: Path, settings: list[str]) -> None:
    """By `--prior.kind` alone, on a transformer's recipe."""
    kind = ["--run", str(run_copy), "--prior.kind", "pixelcnn"]
    main([*kind, *settings, "--stage2.steps", "6", "--stage2.checkpoint_interval", "4", "--stage2.gradient_checkpointing", "true"])
    folder = run_copy / "priors" / "pixelcnn"
    expected = (folder / "prior.safetensors").read_bytes()
    for leftover in (folder / "prior.safetensors", folder / "report.json", folder / "checkpoints" / "step-000000006.pt"):
        leftover.unlink()
    main([*kind, "--resume"])
    assert (folder / "prior.safetensors").read_bytes() == expected
    run = RunDir(run_copy)
    assert run.last_prior() == "pixelcnn"
    prior, header = load_prior(folder / "prior.safetensors", fingerprint(run.tokenizer))
    assert isinstance(prior, PixelCNN)
    # The recipe's two layers of 16 channels are the transformer's.
    assert (header.config.layers, header.config.width, header.config.attention_interval) == (15, 64, 5 * len(settings) // 2)


def test_sizes_come_from_the_command_line_then_the_preset_then_the_recipe(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        ([], (2, 16, 2)),
        (["--prior.kind", "transformer"], (2, 16, 2)),
        (["--prior.preset", "L"], (24, 1024, 16)),
        (["--prior.kind", "pixelcnn"], (15, 64, 4)),
        (["--prior.kind", "pixelcnn", "--prior.preset", "B", "--prior.width", "32"], (20, 32, 4)),
    ):
        with pytest.raises(SystemExit):
            main(["--run", str(run_copy), "--name", "new", *arguments, "--print-recipe"])
        assert prior_from(yaml.safe_load(capsys.readouterr().out)["prior"]).sizes() == expected


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--prior.kind", "uniform"], ["prior.kind", "uniform"]),
        (["--prior.attention_interval", "1"], ["--prior.attention_interval 1"]),
        (["--prior.kind", "pixelcnn", "--prior.attention_interval", "16"], ["prior.attention_interval", "0 to the 15 layers", "16"]),
        (["--prior.kernel_size", "5"], ["--prior.kernel_size 5"]),
        (["--prior.kind", "pixelcnn", "--prior.kernel_size", "4"], ["prior.kernel_size", "odd", "4"]),
        (["--prior.preset", "XL"], ["prior.preset", "XL"]),
        (["--prior.width", "20"], ["prior.width", "multiple of 4 x 2", "20"]),
        (["--stage2.weight_average", "1"], ["stage2.weight_average", "decay < 1", "1"]),
        (["--stage2.weight_average_share", "1.5"], ["stage2.weight_average_share", "0 to 1", "1.5"]),
        (["--stage2.embedding_lr", "0"], ["stage2.embedding_lr", "above 0", "0"]),
        (["--stage2.embedding_lr", "1e-3", "--stage2.optimizer", "adamw"], ["stage2.embedding_lr", "null with optimizer adamw", "0.001"]),
    ],
)
def test_invalid_settings_of_priors_get_one_line(
    run_copy: Path, arguments: list[str], parts: list[str], one_line_error: Callable[..., str]
) -> None:
    line = one_line_error(main, "--run", run_copy, "--name", "new", *arguments)
    assert all(part in line for part in parts), line
    assert not (run_copy / "priors/new").exists()


def test_compiled_training_reaches_the_same_likelihood(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the option, through Accelerate; with torch's eager backend, since a machine may lack a compiler."""
    monkeypatch.setattr("training.processes._COMPILER", "eager")
    main(["--run", str(run_copy), "--name", "compiled", "--compute.compile", "true", "--prior.dropout", "0"])
    main(["--run", str(run_copy), "--name", "plain", "--prior.dropout", "0"])
    compiled, plain = (read_json(run_copy / "priors" / name / "likelihood.json")["validation"] for name in ("compiled", "plain"))
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_a_checkpoint_of_another_format_is_refused(run_copy: Path, one_line_error: Callable[..., str]) -> None:
    folder = run_copy / "priors" / "transformer" / "checkpoints"
    newest = max(folder.iterdir())
    torch.save({**torch.load(newest, weights_only=True), "format": 0}, newest)
    line = one_line_error(main, "--run", run_copy, "--resume", "--stage2.steps", "12")
    assert "expected a checkpoint of stage 2, format 1, found one of stage 2, format 0" in line


def test_priors_of_another_format_are_refused(run_copy: Path, one_line_error: Callable[..., str]) -> None:
    path = run_copy / "priors" / "transformer" / "prior.safetensors"
    weights, header = load_weights(path, "prior")
    save_weights(path, weights, {**header, "format": 0})
    assert "expected a prior of format 1, found 0" in one_line_error(sample, "--run", run_copy)


def test_codes_of_another_tokenizer_are_refused(run_copy: Path, one_line_error: Callable[..., str]) -> None:
    change_bytes(run_copy / "tokenizer.safetensors")
    assert "expected codes of the run's tokenizer" in one_line_error(main, "--run", run_copy, "--name", "new")


def test_the_overfitting_warning_needs_rising_validation_and_falling_training() -> None:
    assert turning_point([5.0, 5.1, 5.2], [4.0, 3.5, 3.0]) == 0
    assert turning_point([5.0, 5.1], [4.0, 3.5]) is None
    assert turning_point([5.2, 5.0, 5.3, 5.29], [4.5, 4.0, 3.5, 3.0]) == 1
    assert turning_point([5.0, 5.1, 4.9], [4.0, 3.5, 3.0]) is None
    assert turning_point([5.0, 5.1, 5.2], [4.0, 4.0, 4.1]) is None


def test_overfitting_gets_a_warning_and_the_best_weights_are_saved(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [
        "--stage2.steps",
        "300",
        "--stage2.lr",
        "0.02",
        "--stage2.validation_interval",
        "50",
        "--prior.dropout",
        "0",
        "--prior.width",
        "64",
    ]
    main(["--run", str(run_copy), "--name", "heart", *settings, "--stage2.weight_decay", "0", "--stage2.condition_dropout", "0"])
    out = capsys.readouterr().out
    report, likelihood = (read_json(run_copy / "priors/heart" / name) for name in ("report.json", "likelihood.json"))
    assert f"warning: validation rises while training falls since step {report['best_step']} " in out
    assert likelihood["validation_turned_at_step"] == report["best_step"] < 300
    assert f"turned after step {report['best_step']}" in (run_copy / "priors/heart/likelihood.md").read_text()
    assert likelihood["train"] < likelihood["validation"]
