"""The blocks of docs/extending.md, as they stand there: each is one file and one line, and goes through the whole pipeline."""

from __future__ import annotations

import importlib.util
import re
import sys
from operator import attrgetter
from pathlib import Path

import pytest

from configs.cli import load_recipe
from configs.parts import FAMILIES
from configs.run_dir import REPOSITORY, RunDir, read_json
from pipelines.anomalies import main as anomalies
from pipelines.compress import main as compress
from pipelines.evaluate import main as evaluate
from pipelines.report import main as report
from pipelines.sample import main as sample
from stage1_vqvae.train import main as train_tokenizer
from stage2_prior.extract_codes import main as extract_codes
from stage2_prior.train import main as train_prior
from training.metrics_log import read_metrics

# A file's path, the family, and the table's line, as each block's first line says.
_HEAD = re.compile(r'# (?P<path>[\w/]+)\.py; .*under "(?P<family>[\w.]+)": "(?P<kind>\w+)": "(?P<address>[\w.:]+)"')
BLOCKS = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "extending.md").read_text(), re.DOTALL)


def test_every_family_has_its_block() -> None:
    heads = [_HEAD.match(block) for block in BLOCKS]
    assert [head["family"] for head in heads if head] == list(FAMILIES)
    for head in heads:
        assert head is not None
        assert head["address"].startswith(head["path"].replace("/", ".") + ":")
        assert (REPOSITORY / head["path"]).parent.is_dir()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split(".py")[0].rsplit("/", 1)[1])
def test_a_new_part_is_one_file_and_one_line(block: str, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block.partition("\n")[2].strip()
    # Without what any file has: imports and blank lines.
    assert sum(bool(line.strip()) and not line.startswith(("from", "import")) for line in code.splitlines()) < 30
    head = _HEAD.match(block)
    assert head is not None
    module, _, name = head["address"].partition(":")
    # The file is not in the package's folder, but it is imported by the address it would have.
    (tmp_path / "part.py").write_text(code)
    spec = importlib.util.spec_from_file_location(module, tmp_path / "part.py")
    assert spec is not None
    assert spec.loader is not None
    monkeypatch.setitem(sys.modules, module, loaded := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(loaded)
    monkeypatch.setitem(FAMILIES[head["family"]], head["kind"], head["address"])

    # The classifier need not be a good one here.
    monkeypatch.setattr("stage1_vqvae.features.classifier._LEAST_STEPS", 1)

    run = RunDir(tmp_path / "run")
    chosen = [f"--{head['family']}.kind", head["kind"]]
    train_tokenizer(["--config", str(tiny_recipe), "--run", str(run.path), "--stage1.steps", "8", *chosen])
    if head["family"].startswith("stage1."):  # what comes after stage 1 knows nothing of its terms
        part = getattr(load_recipe(run.recipe).stage1, head["family"].partition(".")[2])
        assert type(part).__name__ == name
        assert head["family"].partition(".")[2] in read_metrics(run.stage1 / "metrics.jsonl")[-2]
        return
    extract_codes(["--run", str(run.path)])
    train_prior(["--run", str(run.path), "--stage2.steps", "40", "--stage2.lr", "0.1"])
    sample(["--run", str(run.path), "--n", "4"])
    compress(["--run", str(run.path)])  # the prior's two ways agree: what was encoded under one is decoded under the other
    anomalies(["--run", str(run.path)])
    evaluate(["--run", str(run.path), "--features", "classifier", "--n", "8"])
    report(["--run", str(run.path)])
    recipe = load_recipe(run.recipe)
    part = attrgetter(head["family"])(recipe)
    assert type(part).__name__ == name
    assert part.kind == head["kind"]
    if head["family"] == "prior":
        found = read_json(run.prior(head["kind"]) / "likelihood.json")
        assert found["validation"] < found["uniform"]
    assert f"kind: {head['kind']}" in (run.path / "report.html").read_text()
