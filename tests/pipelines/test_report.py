"""The report: one complete file that fetches nothing."""

from __future__ import annotations

import base64
import io
import json
import shutil
import tomllib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs.recipe_file import load_recipe
from configs.run_dir import REPOSITORY, RunDir, read_json, read_summed_json, write_summed_json
from pipelines.report import main
from pipelines.reporting.content import data_table, key_figures, newest_samples, prior_reports, samples
from pipelines.reporting.pictures import embedded, heat_map, line_chart, tile
from pipelines.sample import main as sample
from stage2_prior.train import main as train_prior
from tests.stage2_prior.test_train import change_bytes
from training.weights_file import fingerprint

SECTIONS = ["samples", "evaluation", "curves", "reconstructions", "codebook", "likelihood", "data", "recipe", "environment"]
VOID = {"meta", "img"}
SELF_CLOSING = {"line", "circle", "polyline"}


class Page(HTMLParser):
    """Elements with their attributes, and text, as a browser parses them; tags must be closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.style = ""
        self._open: list[str] = []
        self.feed(path.read_text())
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SELF_CLOSING
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            self.style += data
        else:
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.elements if name in attributes]


def evaluate(run: Path, number: str, **others: Any) -> None:
    """Write an evaluation as pipelines/evaluate.py does."""
    folder = run / "evaluations" / number
    folder.mkdir(parents=True)
    content = {
        "prior": "transformer",
        "prior_sha256": fingerprint(run / "priors/transformer/prior.safetensors"),
        "tokenizer_sha256": fingerprint(run / "tokenizer.safetensors"),
        "distance": "Fréchet distance (classifier features)",
        "distances": {"samples": {"n": 40, "frechet": 12.3456}},
        "tables": [{"title": f"Distances of {number}", "columns": ["images", "N"], "rows": [["samples", "40"]]}],
        "notes": [f"A note of {number}."],
        **others,
    }
    (folder / "evaluation.json").write_text(json.dumps(content))
    Image.new("RGB", (5, 4), "red").save(folder / "neighbours.png")


@pytest.fixture(scope="module")
def full_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with samples and two evaluations; only the report is written into it."""
    run = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("full") / "run"))
    sample(["--run", str(run), "--n", "30"])
    sample(["--run", str(run), "--n", "6", "--prior", "uniform"])
    for number in ("000", "001"):
        evaluate(run, number)
    return run


def test_evaluations_of_other_samples_are_no_key_figures(full_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(full_run, tmp_path / "run"))
    evaluate(run, "002", prior=None, prior_sha256=None, distances={"samples": {"n": 20, "frechet": 98.765}})
    evaluate(run, "003", prior="uniform", prior_sha256=None, distances={"samples": {"n": 20, "frechet": 87.654}})
    text = reported(run).text
    assert text.index("12.35") < text.index("Samples by class")
    assert "98.77" not in text[: text.index("Samples by class")]
    assert "87.65" not in text[: text.index("Samples by class")]


def test_an_empty_folder_of_codes_counts_as_not_extracted(full_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(full_run, tmp_path / "run"))
    shutil.rmtree(run / "codes")
    (run / "codes").mkdir()
    assert "extract_codes.py" in reported(run).text


def test_labels_are_those_of_the_training_codes(run_copy: Path) -> None:
    """Test images of a competition have none, and come first in the alphabet."""
    content = read_summed_json(run_copy / "codes" / "validation" / "manifest.json")
    write_summed_json(run_copy / "codes" / "test" / "manifest.json", {**content, "split": "test", "condition": {"kind": "none"}})
    rows = data_table(RunDir(run_copy), load_recipe(run_copy / "recipe.yaml"), "pictures").rows
    assert [name for name, _ in rows] == ["source", "images", "split train", "split test", "split validation", "labels"]
    assert dict(rows)["labels"] == "2: across, down"  # type: ignore[arg-type]


def reported(run: Path) -> Page:
    main(["--run", str(run)])
    return Page(run / "report.html")


def test_the_report_needs_no_other_file_and_no_network(full_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = reported(full_run)
    size = (full_run / "report.html").stat().st_size
    assert f"({size / 1e6:.1f} MB)" in capsys.readouterr().out
    for name in ("srcset", "data", "poster", "xlink:href", "background", "action"):
        assert not page.attributes(name)
    assert page.attributes("src")
    for uri in page.attributes("src"):
        assert uri.startswith("data:image/png;base64,")
        Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2], validate=True))).load()
    identifiers = page.attributes("id")
    assert page.attributes("href") == [f"#{name}" for name in SECTIONS] == [f"#{name}" for name in identifiers]
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "base"}
    for styles in (page.style, *page.attributes("style")):
        assert "url(" not in styles
        assert "@import" not in styles
    # The page's policy forbids a browser to fetch anything.
    assert "default-src 'none'" in str(page.attributes("content"))
    assert "width=device-width, initial-scale=1" in page.attributes("content")
    assert "prefers-color-scheme: dark" in page.style


def test_the_report_shows_the_contents_of_the_run(full_run: Path) -> None:
    page = reported(full_run)
    stage1, likelihood, history = (
        read_json(full_run / "stage1/report.json"),
        read_json(full_run / "priors/transformer/likelihood.json"),
        [json.loads(line) for line in (full_run / "history.jsonl").read_text().splitlines()],
    )
    shown = [
        f"{stage1['validation']['psnr']:.2f} dB",
        f"MSE {stage1['validation']['mse']:.5f}",
        f"{stage1['validation']['usage']:.1%}",
        *(f"{likelihood[key]:.3f}" for key in ("validation", "train", "unigram", "uniform")),
        *(f"{bits:.1f}" for row in likelihood["positions"][0] for bits in row),
        *(f"{bits:.3f}" for bits in likelihood["labels"].values()),
        *("12.35", "classifier features; 40 samples of prior transformer"),
        *("Distances of 000", "Distances of 001", "A note of 001.", "neighbours"),
        *("across", "down", "8 x 12 pixels, colour", "2 x 3", "36 images", "12 images"),
        *("tokenizer.quantizer.num_codes", "horizontal_flip"),
        *(history[0]["platform"], history[0]["python"], history[0]["versions"]["torch"], history[0]["time"][:10]),
    ]
    assert [text for text in shown if text not in page.text] == []
    # Four curves of stage 1 and one of the prior, a heat map, 30 + 6 samples, reconstructions, codebook, a picture per evaluation.
    assert sum(tag == "svg" for tag, _ in page.elements) == 4 + 1 + 1
    assert len(page.attributes("src")) == 20 + 6 + 1 + 1 + 2
    assert page.text.index("Distances of 001") < page.text.index("Earlier: evaluations/000") < page.text.index("Distances of 000")


def test_samples_are_grouped_by_label(full_run: Path) -> None:
    drawn = samples(RunDir(full_run), full_run / "samples/000")
    assert [(group.label, len(group.tiles)) for group in drawn.classes] == [("across", 10), ("down", 10)]
    for number, group in enumerate(drawn.classes):
        files = [full_run / "samples/000/images" / f"{row:05d}.png" for row in range(number, 20, 2)]
        assert [base64.b64decode(uri.partition(",")[2]) for uri in group.tiles] == [path.read_bytes() for path in files]
    (unlabelled,) = samples(RunDir(full_run), full_run / "samples/001").classes
    assert (unlabelled.label, len(unlabelled.tiles)) == (None, 6)


def test_each_prior_has_its_newest_samples_and_outdated_ones_are_marked(run_copy: Path) -> None:
    for arguments in (["--prior", "uniform"], [], ["--seed", "1"]):
        sample(["--run", str(run_copy), "--n", "2", *arguments])
    run = RunDir(run_copy)
    assert [(drawn.prior, drawn.where, drawn.remarks) for drawn in newest_samples(run)] == [
        ("transformer", "002", []),
        ("uniform", "000", []),
    ]
    evaluate(run_copy, "000")
    page = reported(run_copy)
    assert "Made with an earlier" not in page.text
    assert "12.35" in page.text
    change_bytes(run.prior("transformer") / "prior.safetensors")
    assert [bool(drawn.remarks) for drawn in newest_samples(run)] == [True, False]
    page = reported(run_copy)
    assert page.text.count("Made with an earlier prior") == 2
    # No longer among the key figures.
    assert "12.35" not in page.text
    change_bytes(run.tokenizer)
    assert reported(run_copy).text.count("Made with an earlier tokenizer") == 3


def test_bounds_and_settings_are_those_of_the_priors_own_kind(run_copy: Path) -> None:
    run = RunDir(run_copy)
    train_prior(["--run", str(run_copy), "--prior.kind", "masked"])
    for arguments in ([], ["--rounds", "2"], ["--prior", "transformer"]):
        sample(["--run", str(run_copy), "--n", "2", *arguments])
    masked, in_two_rounds, transformer = (samples(run, run_copy / f"samples/00{number}").description for number in range(3))
    assert "at most" in masked
    assert masked.endswith("; from the unmodified prior")
    assert in_two_rounds.endswith("; rounds 2")
    assert "at most" not in transformer
    assert transformer.endswith("; from the unmodified prior")
    figures = {figure.name: figure.value for figure in key_figures(run, prior_reports(run), [])}
    assert figures["Bits per token"].startswith("at most ")
    assert figures["Bits per image"].startswith("at most ")


def test_labels_and_paths_are_escaped(run_copy: Path) -> None:
    """They come from folders of users."""
    name = "<script>alert(1)</script> & \"'<b>"
    sample(["--run", str(run_copy), "--n", "2"])
    for file, old in (("samples/000/samples.json", "across"), ("priors/transformer/likelihood.json", "across")):
        text = (run_copy / file).read_text()
        assert f'"{old}"' in text
        (run_copy / file).write_text(text.replace(f'"{old}"', json.dumps(name)))
    evaluate(run_copy, "000", notes=[name], tables=[{"title": name, "columns": [name], "rows": [[name]]}])
    page = reported(run_copy)
    assert page.text.count(name) == 2 + 4
    assert not {tag for tag, _ in page.elements} & {"script"}


def test_the_report_names_missing_parts_and_their_commands(run_copy: Path, one_line_error: Callable[..., str]) -> None:
    assert "$ python pipelines/sample.py --n 64 --run" in reported(run_copy).text
    (run_copy / "priors/transformer/likelihood.json").unlink()
    assert "$ python stage2_prior/report.py --prior transformer --run ./run" in reported(run_copy).text
    shutil.rmtree(run_copy / "priors")
    shutil.rmtree(run_copy / "codes")
    text = reported(run_copy).text
    for command in (
        *("python stage2_prior/extract_codes.py", "accelerate launch stage2_prior/train.py"),
        *("python pipelines/sample.py --n 64", "python pipelines/evaluate.py"),
    ):
        assert f"$ {command} --run ./run" in text
    assert "PSNR on validation" in text
    (run_copy / "tokenizer.safetensors").unlink()
    (run_copy / "report.html").unlink()
    assert "stage 1 has not finished" in one_line_error(main, "--run", run_copy)
    assert not (run_copy / "report.html").exists()


def test_the_template_is_installed_with_the_package() -> None:
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["pipelines.reporting"]
    assert {path.name for path in (REPOSITORY / "pipelines" / "reporting").glob("*.jinja")} == {"report.html.jinja"} == set(listed)


def test_a_new_report_replaces_the_old_one(run_copy: Path) -> None:
    before = {path.name for path in run_copy.iterdir()}
    (run_copy / "report.html").write_text("old")
    reported(run_copy)
    assert {path.name for path in run_copy.iterdir()} - before == {"report.html"}


@pytest.mark.parametrize(("values", "logarithmic"), [([3.0, 1.0, 2.5], False), ([100.0, 1.0, 0.02], True), ([5.0, 5.0, 5.0], False)])
def test_curves_agree_with_their_ticks(values: list[float], logarithmic: bool) -> None:
    records: list[dict[str, Any]] = [{"step": 100 * (row + 1), "split": "train", "loss": value} for row, value in enumerate(values)]
    records += [{"step": 300, "split": "validation", "loss": 2.0, "other": 1}, {"step": 310, "split": "train", "loss": float("nan")}]
    chart = line_chart("Loss", records, "loss", {"reference": 2.0})
    assert chart is not None
    train, validation = chart.lines
    assert (train.name, train.last, len(train.points), validation.points[0][0]) == ("train", values[-1], 3, train.points[-1][0])
    assert chart.references[0].at == validation.points[0][1]
    for ticks, axis, numbers in ((chart.x_ticks, 0, [100, 200, 300]), (chart.y_ticks, 1, values)):
        scale = np.log if logarithmic and axis == 1 else np.asarray
        assert len(ticks) >= 2
        marks = scale(np.array([float(tick.text) for tick in ticks]))
        slope, offset = np.polyfit(marks, [tick.at for tick in ticks], 1)
        expected = slope * scale(np.array(numbers, dtype=float)) + offset
        assert np.allclose(expected, [point[axis] for point in train.points], atol=0.2)
        assert (slope > 0) == (axis == 0)
    assert line_chart("Loss", records, "loss of another name", {}) is None


def test_heat_maps_colour_by_value_with_readable_numbers() -> None:
    chart = heat_map([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], 0.0, 5.0)
    assert (chart.rows, chart.columns, chart.numbered) == (2, 3, True)
    assert [(cell.y, cell.x, cell.value) for cell in chart.cells] == [(row // 3, row % 3, float(row)) for row in range(6)]

    def brightness(colour: str) -> float:
        full = colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])
        red, green, blue = (int(full[start : start + 2], 16) / 255 for start in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    shades = [brightness(cell.colour) for cell in chart.cells]
    assert shades == sorted(set(shades))
    assert all(abs(brightness(cell.ink) - brightness(cell.colour)) > 0.4 for cell in chart.cells)
    assert len({cell.colour for cell in heat_map([[2.0, 2.0]], 2.0, 2.0).cells}) == 1
    assert not heat_map([[0.0] * 32], 0.0, 1.0).numbered


def test_large_pictures_are_reduced_and_small_ones_are_not(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (700, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    Image.fromarray(noise[:20, :30]).save(tmp_path / "small.png")
    large, small = embedded(tmp_path / "large.png"), embedded(tmp_path / "small.png")
    assert (large.width, large.height, large.remark) == (1600, 560, "reduced from 2000 x 700 pixels")
    assert (small.width, small.height, small.remark) == (30, 20, "")
    for image in (large, small):
        with Image.open(io.BytesIO(base64.b64decode(image.uri.partition(",")[2]))) as decoded:
            assert decoded.size == (image.width, image.height)
    with Image.open(io.BytesIO(base64.b64decode(tile(tmp_path / "large.png").partition(",")[2]))) as decoded:
        assert decoded.size == (128, 45)
