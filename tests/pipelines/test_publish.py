"""Published runs: in a folder, and on a Hub that speaks the real protocol."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from configs.hub import run_of
from pipelines import Generator
from pipelines.evaluate import main as evaluate
from pipelines.publish import hub_repository, main
from pipelines.publishing.bundle import write_bundle
from pipelines.report import main as report
from pipelines.sample import main as sample
from tests.conftest import Script, check_names_no_place
from tests.pipelines.fake_hub import Repositories, fake_hub
from training.weights_file import fingerprint

TOKEN = "hf_of_tests"
# The command, with named runs outside of this checkout.
SAMPLE = "from configs.errors import run_entry; from pipelines.sample import main; run_entry(lambda: main(['--run', '{}']))"


@pytest.fixture(scope="module")
def evaluated_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose recipe names local paths: of images, their cache, weights, and the initial run."""
    run = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("judged") / "run"))
    recipe, place = yaml.safe_load((run / "recipe.yaml").read_text()), run.parent
    recipe["data"] |= {"name": str(place / "named"), "cache": str(place / "cache")}
    recipe["stage1"] |= {"init_from": str(place / "first"), "perceptual": {"kind": "lpips", "weights": str(place / "vgg.pth")}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    evaluate(["--run", str(run), "--features", "classifier", "--n", "12"])
    recipe["evaluation"]["weights"] = str(place / "inception.pth")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    report(["--run", str(run)])
    return run


@pytest.fixture(scope="module")
def bundle(evaluated_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "digits"
    main(["--run", str(evaluated_run), "--to", str(folder), "--license", "mit"])
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Repositories]]:
    """A Hub for processes started by the test, which contact no other host."""
    with fake_hub(TOKEN) as (address, repositories):
        for name, value in {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        yield address, repositories


def test_a_bundle_draws_the_samples_of_its_run(bundle: Path, evaluated_run: Path) -> None:
    ours, theirs = Generator.from_pretrained(evaluated_run, device="cpu"), Generator.from_pretrained(bundle, device="cpu")
    assert [picture.tobytes() for picture in ours.sample(4)] == [picture.tobytes() for picture in theirs.sample(4)]
    for name in ("tokenizer.safetensors", "priors/transformer/prior.safetensors"):
        assert fingerprint(bundle / name) == fingerprint(evaluated_run / name)


def test_a_bundle_has_no_local_paths_and_only_the_files_that_users_need(bundle: Path, evaluated_run: Path, pictures: Path) -> None:
    """Evaluations and the report have no local paths either."""
    files = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    prior_files = {
        f"priors/transformer/{name}" for name in ("prior.safetensors", "likelihood.json", "likelihood.md", "likelihood.png", "report.json")
    }
    others = {"README.md", "config.json", "recipe.yaml", "tokenizer.safetensors", "stage1/report.json", "samples.png"}
    assert files == prior_files | others | {"evaluations/000/evaluation.json", "evaluations/000/evaluation.md"}
    assert str(pictures) in (evaluated_run / "recipe.yaml").read_text()
    check_names_no_place(bundle, evaluated_run / "evaluations", evaluated_run / "report.html")
    assert "named" in (bundle / "README.md").read_text()


def test_the_card_has_each_figure_with_its_origin(bundle: Path, evaluated_run: Path) -> None:
    card = ModelCard.load(bundle / "README.md")
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    likelihood = json.loads((evaluated_run / "priors/transformer/likelihood.json").read_text())
    report = json.loads((evaluated_run / "stage1/report.json").read_text())["validation"]
    rows = [line for line in card.text.splitlines() if line.startswith("| ")]
    (bits,) = [row for row in rows if row.startswith("| bits per token, prior transformer")]
    assert f"{likelihood['validation']:.3f}" in bits
    assert "12 validation images" in bits
    assert any(f"{report['mse']:.5f}" in row and "60 steps" in row for row in rows)
    assert all(row.count("|") == 4 for row in card.text.partition("## Figures")[2].partition("## Eval")[0].splitlines() if row)
    assert "12 drawn from prior transformer" in card.text
    assert "across, down" in card.text
    config = json.loads((bundle / "config.json").read_text())
    assert config["tokenizer"]["kind"] == "tokenizer"
    assert config["priors"]["transformer"]["condition"] == {"kind": "classes", "names": ["across", "down"]}


def test_a_bundle_is_uploaded_to_the_hub_and_fetched(
    hub: tuple[str, Repositories], evaluated_run: Path, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, repositories = hub
    done = script("pipelines/publish.py", "--run", evaluated_run, "--to", "me/digits", "--license", "mit")
    assert done.returncode == 0, done.stderr
    assert f"wrote {address}/me/digits" in done.stdout
    assert "--run hf:me/digits" in done.stdout
    assert {"README.md", "tokenizer.safetensors", "priors/transformer/prior.safetensors"} <= repositories["me/digits"].keys()
    repositories["me/digits"] |= {"priors/old/prior.safetensors": b"of another tokenizer", "theirs.txt": b""}
    again = script("pipelines/publish.py", "--run", evaluated_run, "--to", "me/digits", "--license", "mit")
    assert again.returncode == 0, again.stderr
    assert "priors/old/prior.safetensors" not in repositories["me/digits"]
    assert "theirs.txt" in repositories["me/digits"]
    # In another working directory that contains runs, as for an installed package.
    repositories["me/digits"]["run_me.py"] = b"raise SystemExit"
    ask = "from pipelines import Generator; g = Generator.from_pretrained('hf:me/digits', device='cpu'); g.sample(2)[1].save('1.png')"
    monkeypatch.setattr("configs.hub.runs_folder", lambda: tmp_path)
    elsewhere = script("tests/launched/python.py", tmp_path, ask, cwd=tmp_path)
    assert elsewhere.returncode == 0, elsewhere.stderr
    fetched = tmp_path / "me--digits"
    assert fingerprint(fetched / "tokenizer.safetensors") == fingerprint(evaluated_run / "tokenizer.safetensors")
    assert not (fetched / "run_me.py").exists()
    sample(["--run", str(fetched), "--n", "2"])
    assert (fetched / "samples/000/images/00001.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    # Without a connection, fetched files are used.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert script("tests/launched/python.py", tmp_path, ask, cwd=tmp_path).returncode == 0
    (fetched / "priors/transformer/prior.safetensors").unlink()  # as if it had not been fetched
    part = script("tests/launched/python.py", tmp_path, SAMPLE.format("hf:me/digits"))
    assert part.returncode == 2
    assert "hf:me/digits: expected its prior transformer, found that it has not been fetched" in part.stderr
    none = script("tests/launched/python.py", tmp_path, SAMPLE.format("hf:me/other"))
    assert none.returncode == 2
    assert none.stderr.startswith("error: hf:me/other: expected a repository of the Hub that can be read, found none (")


def test_refusals_of_the_hub_get_one_line(
    hub: tuple[str, Repositories], evaluated_run: Path, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = script("tests/launched/python.py", tmp_path, SAMPLE.format("hf:me/none"))
    assert none.returncode == 2
    assert "hf:me/none: expected a repository of the Hub that can be read, found none (404" in none.stderr
    hub[1]["me/foreign"] = {"config.json": b"{}"}
    foreign = script("tests/launched/python.py", tmp_path, SAMPLE.format("hf:me/foreign"))
    assert foreign.returncode == 2
    assert not (tmp_path / "me--foreign").exists()
    assert "hf:me/foreign: expected a run that pipelines/publish.py wrote" in foreign.stderr
    monkeypatch.setenv("HF_TOKEN", "another")
    refused = script("pipelines/publish.py", "--run", evaluated_run, "--to", "me/digits")
    assert refused.returncode == 2
    assert "--to me/digits: expected a Hub that takes it (hf auth login), found: Client error '401 Unauthorized'" in refused.stderr
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # no server listens there
    offline = script("pipelines/publish.py", "--run", evaluated_run, "--to", "me/digits")
    assert offline.returncode == 2
    assert "--to me/digits: expected a Hub that takes it" in offline.stderr
    assert "Traceback" not in none.stderr + foreign.stderr + refused.stderr + offline.stderr


def test_the_first_named_prior_is_the_default(evaluated_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(evaluated_run, tmp_path / "run"))
    shutil.copytree(run / "priors/transformer", run / "priors/older")
    write_bundle(run_of(str(run)), ["older", "transformer"], tmp_path / "bundle", "me/both", "unknown", "cpu")
    assert "prior older" in (tmp_path / "bundle/README.md").read_text()
    assert list(json.loads((tmp_path / "bundle/config.json").read_text())["priors"]) == ["older", "transformer"]


def test_a_run_without_a_prior_is_published_as_a_tokenizer(evaluated_run: Path, tmp_path: Path) -> None:
    """Only an evaluation without samples is published, not one of an earlier prior or of other samples."""
    run = Path(shutil.copytree(evaluated_run, tmp_path / "run"))
    options = ["--run", str(run), "--features", "classifier", "--weights", "null"]
    evaluate([*options, "--samples", str(run / "stage1/reconstructions")])
    shutil.rmtree(run / "priors")
    main(["--run", str(run), "--to", str(tmp_path / "none")])
    assert not (tmp_path / "none/evaluations").exists()
    evaluate(options)
    main(["--run", str(run), "--to", str(tmp_path / "bundle")])
    assert not (tmp_path / "bundle/samples.png").exists()
    assert "| samples | none |" in (tmp_path / "bundle/README.md").read_text()
    check_names_no_place(tmp_path / "bundle", run / "evaluations")
    assert "two-stage-reconstruct" in (tmp_path / "bundle/README.md").read_text()
    assert yaml.safe_load((tmp_path / "bundle/recipe.yaml").read_text())["data"]["path"] is None
    assert len(Generator.from_pretrained(tmp_path / "bundle", device="cpu").encode(str(next(tmp_path.rglob("*.png"))))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: to"),
        (["--to", "{run}"], "expected a folder that does not exist yet, found one"),
        (["--to", "."], "--to .: expected a folder that does not exist yet, found one"),
        (["--to", "hf:digits"], "--to hf:digits: expected hf:USER/NAME"),
        (["--to", "{run}/new", "--prior", "best"], "--prior best: expected one of transformer"),
    ],
)
def test_mistakes_get_one_line(arguments: list[str], message: str, run_copy: Path, one_line_error: Callable[..., str]) -> None:
    assert message in one_line_error(main, "--run", run_copy, *[argument.format(run=run_copy) for argument in arguments])
    assert not (run_copy / "new").exists()


def test_ambiguous_destinations_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_repository("me/digits") == hub_repository("hf:me/digits") == "me/digits"
    os.mkdir("me")
    assert hub_repository("hf:me/digits") == "me/digits"
    assert hub_repository("./me/digits") is hub_repository("digits") is None
    with pytest.raises(ValueError, match=r"expected \./me/digits for a folder, or hf:me/digits"):
        hub_repository("me/digits")
