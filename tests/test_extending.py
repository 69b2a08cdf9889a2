"""The code blocks of docs/extending.md: each is one file and one line, and works in the entire pipeline."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from configs.parts import FAMILIES, part_from
from configs.recipe_file import load_recipe
from configs.run_dir import REPOSITORY, RunDir, read_json
from pipelines.anomalies import main as anomalies
from pipelines.app import main as app
from pipelines.complete import main as complete
from pipelines.compress import main as compress
from pipelines.evaluate import main as evaluate
from pipelines.export_onnx import main as export_onnx
from pipelines.export_web import main as export_web
from pipelines.generator import Generator
from pipelines.report import main as report
from pipelines.sample import main as sample
from stage1_vqvae.train import main as train_tokenizer
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.codes.store import read_manifest
from stage2_prior.conditions.none import NoCondition
from stage2_prior.export_codes import main as export_codes
from stage2_prior.extract_codes import main as extract_codes
from stage2_prior.import_codes import main as import_codes
from stage2_prior.train import main as train_prior
from training.metrics_log import read_metrics

# The first line of each block: path of its file, family, line of the table.
_HEAD = re.compile(r'# (?P<path>[\w/]+)\.py; .*under "(?P<family>[\w.]+)": "(?P<kind>\w+)": "(?P<address>[\w.:]+)"')
BLOCKS = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "extending.md").read_text(), re.DOTALL)
MIXTURE = BLOCKS[-1]
(NUMBERS,) = [block for block in BLOCKS if "conditions/numbers" in block.partition("\n")[0]]


def test_every_family_has_a_block() -> None:
    heads = [_HEAD.match(block) for block in BLOCKS]
    assert list(dict.fromkeys(head["family"] for head in heads if head)) == list(FAMILIES)
    for head in heads:
        assert head is not None
        assert head["address"].startswith(head["path"].replace("/", ".") + ":")
        assert (REPOSITORY / head["path"]).parent.is_dir()


def register(block: str, most_lines: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> re.Match[str]:
    """Register a block's part as its file and its line in the table would; return the match of its first line."""
    code = block.partition("\n")[2].strip()
    # Not counting imports and blank lines.
    assert sum(bool(line.strip()) and not line.startswith(("from", "import")) for line in code.splitlines()) < most_lines
    head = _HEAD.match(block)
    assert head is not None
    module = head["address"].partition(":")[0]
    # The file is not in the package's folder, but is imported under the address it would have.
    (folder / "part.py").write_text(code)
    spec = importlib.util.spec_from_file_location(module, folder / "part.py")
    assert spec is not None
    assert spec.loader is not None
    monkeypatch.setitem(sys.modules, module, loaded := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(loaded)
    monkeypatch.setitem(FAMILIES[head["family"]], head["kind"], head["address"])
    return head


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block not in (MIXTURE, NUMBERS)], ids=lambda block: block.split(".py")[0].rsplit("/", 1)[1]
)
def test_a_new_part_is_one_file_and_one_line(block: str, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = register(block, 30, tmp_path, monkeypatch)
    name = head["address"].partition(":")[2]

    # The classifier need not be good here.
    monkeypatch.setattr("stage1_vqvae.features.classifier._MIN_STEPS", 1)

    run = RunDir(tmp_path / "run")
    chosen = [f"--{head['family']}.kind", head["kind"]]
    train_tokenizer(["--config", str(tiny_recipe), "--run", str(run.path), "--stage1.steps", "8", *chosen])
    if head["family"].startswith("stage1."):  # later stages do not depend on its terms
        part = getattr(load_recipe(run.recipe).stage1, head["family"].partition(".")[2])
        assert type(part).__name__ == name
        assert head["family"].partition(".")[2] in read_metrics(run.stage1 / "metrics.jsonl")[-2]
        return
    extract_codes(["--run", str(run.path)])
    train_prior(["--run", str(run.path), "--stage2.steps", "40", "--stage2.lr", "0.1"])
    sample(["--run", str(run.path), "--n", "4"])
    compress(["--run", str(run.path)])  # checks that full passes and single steps of the prior agree
    anomalies(["--run", str(run.path)])
    evaluate(["--run", str(run.path), "--features", "classifier", "--n", "8"])
    report(["--run", str(run.path)])
    recipe = load_recipe(run.recipe)
    part = attrgetter(head["family"])(recipe)
    assert type(part).__name__ == name
    assert part.kind == head["kind"]
    if head["family"] == "prior":
        likelihood = read_json(run.prior(head["kind"]) / "likelihood.json")
        assert likelihood["validation"] < likelihood["uniform"]
    assert f"kind: {head['kind']}" in (run.path / "report.html").read_text()


def test_a_prior_without_an_order_works_where_none_is_needed(
    run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line_error: Callable[..., str]
) -> None:
    """Its likelihoods sum to 1; it trains, samples and completes. Commands that need a prior that draws codes in turn refuse it."""
    register(MIXTURE, 60, tmp_path, monkeypatch)
    prior = part_from("prior", {"kind": "mixture"}).build(SequenceLayout([(1, 3)], [4]), NoCondition(), 1).double()
    nats = prior.nats((torch.cartesian_prod(*[torch.arange(4)] * 3)[:, None],), None)
    assert (-nats.sum(1)).exp().sum().item() == pytest.approx(1, abs=1e-10)
    run_option = ["--run", str(run_copy)]
    train_prior([*run_option, "--prior.kind", "mixture", "--stage2.steps", "40", "--stage2.lr", "0.1"])
    likelihood = read_json(run_copy / "priors/mixture/likelihood.json")
    assert likelihood["exact"] is True
    assert likelihood["validation"] < likelihood["unigram"]
    drawn = []
    for number, options in enumerate([[], ["--batch-size", "2"], ["--seed", "1"]]):
        sample([*run_option, "--n", "5", "--guidance", "1.5", *options])
        drawn.append(load_file(run_copy / f"samples/{number:03d}/codes.safetensors")["level0"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    complete([*run_option, "--n", "2", "--continuations", "2", "--prefix-rows", "1"])
    sample([*run_option, "--n", "2", "--prior", "transformer", "--top-k", "3"])
    assert "top_k" in one_line_error(sample, *run_option, "--top-k", "3")
    for command, main in (("compress", compress), ("anomalies", anomalies)):
        assert f"{command}: expected a prior that draws codes in turn, found mixture" in one_line_error(main, *run_option)


def test_a_condition_by_a_vector_goes_from_a_column_to_samples(
    pictures: Path, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_line_error: Callable[..., str]
) -> None:
    """Two numbers of each image, how red and how blue it is: a prior that has learned finds images likelier beside their own."""
    register(NUMBERS, 40, tmp_path, monkeypatch)
    folder, run = tmp_path / "pictures", RunDir(tmp_path / "run")
    shutil.copytree(pictures, folder)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))
    numbers = [(np.asarray(Image.open(folder / file)).mean((0, 1)) / 64 - 2).round(2)[[0, 2]].tolist() for file in files]
    pairs = zip(files, numbers, strict=True)
    lines = [{"file_name": str(file), "label": file.parts[0], "red": red, "blue": blue} for file, (red, blue) in pairs]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    here, kind = ["--run", str(run.path)], ["--condition.kind", "numbers", "--condition.names", "[red,blue]"]
    train_tokenizer(["--config", str(tiny_recipe), *here, "--data.path", str(folder), "--stage1.steps", "30"])
    assert "expected a column lost in" in one_line_error(extract_codes, *here, *kind[:2], "--condition.names", "[lost]")
    extract_codes([*here, *kind])
    assert read_manifest(run.codes / "train").condition.kind == "numbers"
    assert "condition: expected Numbers" in one_line_error(train_prior, *here)
    stored = {path.name: path.read_bytes() for path in (run.codes / "train").iterdir()}
    for form in ("npy", "datasets"):
        export_codes([*here, "--to", form, "--output", str(tmp_path / form)])
        import_codes([*here, "--from", form, "--folder", str(tmp_path / form), "--overwrite"])
        assert {path.name: path.read_bytes() for path in (run.codes / "train").iterdir()} == stored
    imported = ("--folder", tmp_path / "npy", "--overwrite")
    rows = tmp_path / "npy/train/condition.npy"
    for wrong, line in ((np.zeros((9, 2), np.float32), "found 9"), (np.zeros((9, 3), np.float32), r"rows [2] of float32, found [3]")):
        np.save(rows, wrong)
        assert line in one_line_error(import_codes, *here, *imported)
    rows.unlink()
    assert "found no rows of a condition and condition numbers" in one_line_error(import_codes, *here, *imported)
    train_prior([*here, *kind, "--stage2.steps", "60"])

    generator = Generator.from_pretrained(run.path)
    images = [folder / file for file in files]
    matching, swapped = ([f"{red} {blue}" for red, blue in rows] for rows in (numbers, numbers[::-1]))
    assert generator.log_prob(images, matching).mean() > generator.log_prob(images, swapped).mean()
    sample([*here, "--n", "3", "--condition", "-1 0.5", "--guidance", "1.5"])
    assert read_json(run.path / "samples/000/samples.json")["labels"] == [[-1.0, 0.5]] * 3
    assert "label: expected 2 numbers (red, blue), found 1" in one_line_error(sample, *here, "--label", "1")
    complete([*here, "--n", "2", "--prefix-rows", "1"])
    anomalies(here)
    compress(here)  # without the condition, for which the file format has no field
    assert "conditioned on classes" in one_line_error(compress, *here, "--condition", "0 0")
    for number, export in enumerate((export_onnx, export_web)):
        line = one_line_error(export, *here, "--output", tmp_path / f"exported{number}")
        assert "export: expected a prior conditioned on classes, or without a condition, found condition numbers" in line
    assert "app: expected a prior conditioned on classes" in one_line_error(app, *here)
    monkeypatch.setattr("stage1_vqvae.features.classifier._MIN_STEPS", 1)
    evaluate([*here, "--features", "classifier", "--n", "8"])
    report(here)
