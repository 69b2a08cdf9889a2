"""Evaluation end to end on a tiny run: figures of images for which the answer is known."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision

from configs.errors import UserError
from configs.recipe_file import load_recipe
from configs.run_dir import RunDir, write_yaml
from pipelines import evaluate as evaluation
from pipelines.encoding import encode_and_decode
from pipelines.evaluate import class_balance, main, training_networks
from pipelines.evaluation.assessment import pixels_hash
from pipelines.evaluation.reference import one_pass
from pipelines.sample import main as sample
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN, VALIDATION, ImageSource, ImageSplit
from stage1_vqvae.features import classifier
from stage1_vqvae.features.classifier import load_classifier, predict_labels
from stage1_vqvae.features.networks import FeatureNetwork, Features, Layers
from stage1_vqvae.model import load_tokenizer
from stage1_vqvae.pictures import save_png
from tests.pipelines.evaluated import CLASSIFIER, evaluated


@pytest.fixture(scope="module")
def evaluated_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its classifier and one evaluation."""
    run = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("judged") / "run"))
    main(["--run", str(run), *CLASSIFIER, "--n", "40"])
    return run


@pytest.fixture
def run_copy(evaluated_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(evaluated_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def source(evaluated_run: Path) -> ImageSource:
    return load_images(load_recipe(evaluated_run / "recipe.yaml").data)


def test_other_processes_end_before_the_classifier_is_trained(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing weights are reported before anything is drawn."""
    (run_copy / "classifier.safetensors").unlink()
    order: list[str] = []
    for module, name in ((evaluation, "finish"), (classifier, "fit")):
        call = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments, call=call, name=name: order.append(name) or call(*arguments))
    evaluated(run_copy, *CLASSIFIER, "--n", "4")
    assert order == ["finish", "fit"]
    monkeypatch.setattr(evaluation, "draw_samples", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError, match="features resnet18: expected a file of its weights"):
        main(["--run", str(run_copy), "--features", "resnet18"])


def test_samples_and_reconstructions_are_on_disk(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """50,000 images of 256 x 256 pixels would take 10 GB of memory each time."""
    places: list[Path] = []
    temporary_file = tempfile.TemporaryFile
    monkeypatch.setattr("pipelines.encoding.tempfile.TemporaryFile", lambda dir: places.append(dir) or temporary_file(dir=dir))
    evaluated(run_copy, *CLASSIFIER, "--n", "4")
    assert places == [run_copy / "evaluations/001"] * 2


def test_the_report_names_both_sides_of_each_comparison(evaluated_run: Path, source: ImageSource) -> None:
    content = json.loads((evaluated_run / "evaluations/000/evaluation.json").read_text())
    compared = " ".join(map(str, content["compared"].values()))
    assert f"{len(source.splits[VALIDATION])} of validation, 8 x 12 x 3" in compared
    assert f"{len(source.splits[TRAIN])} of train" in compared
    assert "40 drawn from prior transformer, labels in turns: 20 of each of 2 classes" in compared
    assert content["sampling"]["temperature"] == 1.0
    assert content["prior_sha256"]
    assert content["distance"] == "Fréchet distance (classifier features)"
    columns = [column for table in content["tables"] for column in table["columns"]]
    assert not any(name in column for name in ("FID", "KID", "inception") for column in columns), columns
    assert "score of classes (classifier features)" in columns
    assert next(table["title"] for table in content["tables"] if "recall" in table["columns"]) == (
        "Neighbourhoods by classifier features: N = 12 of each set and of the train images"
    )
    assert {"samples", "validation, real", "validation, reconstructed", "samples, 12 of them"} == set(content["distances"])
    assert content["reconstruction"]["ssim"] is None  # 8 pixels are fewer than its window
    assert content["codes"]["usage"] <= 1
    assert (evaluated_run / "evaluations/000/neighbours.png").exists()


def test_training_images_as_samples_are_detected(run_copy: Path, source: ImageSource, tmp_path: Path) -> None:
    training = source.splits[TRAIN].pixels
    np.savez(tmp_path / "copied.npz", training.numpy())
    content = evaluated(run_copy, *CLASSIFIER, "--samples", tmp_path / "copied.npz")
    distances, memorised = content["distances"]["samples"], content["memorisation"]
    assert distances["frechet"] == pytest.approx(0, abs=1e-3)
    assert memorised["ratio_of_median_distances"] < 0.01
    assert memorised["samples"]["with_all_codes_of_a_training_image"] == len(training)
    assert content["prior"] is None
    assert "in_their_class" not in distances  # an npz says nothing of labels


def test_memorised_training_codes_are_detected(run_copy: Path, source: ImageSource) -> None:
    """The samples are decoded training codes, which are not the images and do not encode to the same codes."""
    run, train = RunDir(run_copy), source.splits[TRAIN]
    tokenizer = load_tokenizer(run)
    codes, pictures = encode_and_decode(tokenizer, train.pixels[:20], 8)
    sample(["--run", str(run_copy), "--n", "20"])
    folder = run_copy / "samples/000"
    for number, picture in enumerate(pictures):
        save_png(folder / "images" / f"{number:05d}.png", picture)
    (folder / "codes.safetensors").write_bytes(safetensors.torch.save({"level0": codes[0].contiguous()}))
    memorised = evaluated(run_copy, *CLASSIFIER, "--samples", folder)["memorisation"]
    assert memorised["samples"]["with_all_codes_of_a_training_image"] == 20
    assert memorised["samples"]["median_share_of_other_codes"] == 0
    assert memorised["ratio_of_median_distances"] == pytest.approx(memorised["ratio_of_copies"], rel=0.3)


def test_a_second_evaluation_reads_no_reference_images(run_copy: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from the few in its plot; another network's features are computed again."""
    read: list[int] = []
    initialise = ImageSplit.__init__

    def counted(self: ImageSplit, pixels: torch.Tensor, *others: object) -> None:
        initialise(self, _Counted(pixels, read) if len(pixels) == 36 else pixels, *others)

    monkeypatch.setattr(ImageSplit, "__init__", counted)
    cache = ["--data.cache", run_copy / "cache"]
    first = evaluated(run_copy, *CLASSIFIER, "--n", 4, *cache)
    assert 36 <= sum(read) <= 36 + 48  # features and sum in one pass; codes are in the store
    read.clear()
    again = evaluated(run_copy, *CLASSIFIER, "--n", 4, *cache)
    assert sum(read) <= 48
    assert again == first
    read.clear()
    shutil.rmtree(run_copy / "codes")
    for images in (36, 0):  # encoded once, as they are not in a store
        assert evaluated(run_copy, *CLASSIFIER, "--n", 4, *cache)["memorisation"] == first["memorisation"]
        assert images <= sum(read) <= images + 48
        read.clear()
    assert evaluated(run_copy, "--features", "rotation", "--n", 4, *cache)["features"] == "rotation"
    assert sum(read) >= 36


class _Counted:
    """Images that record how many of them are read at a time."""

    def __init__(self, pixels: torch.Tensor, read: list[int]) -> None:
        self._pixels, self._read, self.shape = pixels, read, pixels.shape

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, rows: torch.Tensor | slice) -> torch.Tensor:
        images = self._pixels[rows]
        self._read.append(len(images) if images.dim() == 4 else 1)
        return images


def test_a_million_images_are_read_once() -> None:
    """With a network whose features are the pixels: moments of all images, vectors of 50,000."""
    read: list[int] = []

    class Many:
        shape = torch.Size((10**6, 1, 1, 1))

        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, rows: slice) -> torch.Tensor:
            read.append(rows.stop - rows.start)
            return (torch.arange(rows.start, rows.stop) % 251).to(torch.uint8)[:, None, None, None]

    layers = Layers(torch.nn.Identity(), lambda images: images)
    network = FeatureNetwork("pixel", "FID", "", lambda pixels: Features(pixels.flatten(1).float(), pixels), layers, torch.device("cpu"))
    result = one_pass(network, Many(), "many", 5000)  # type: ignore[arg-type]
    assert sum(read) == 10**6
    assert result.vectors.shape == (50_000, 1)
    assert torch.equal(result.vectors[:, 0], (result.rows % 251).float())
    assert result.gaussian is not None
    values = np.arange(10**6) % 251
    assert result.gaussian.mean.item() == pytest.approx(values.mean(), rel=1e-9)
    assert result.gaussian.covariance.item() == pytest.approx(values.var(ddof=1), rel=1e-9)
    assert result.pixels_sha256 == pixels_hash(torch.from_numpy(values.astype(np.uint8))[:, None, None, None])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_few_samples_get_the_figures_that_their_number_allows(count: int, run_copy: Path) -> None:
    figures = evaluated(run_copy, *CLASSIFIER, "--n", count)
    distances = figures["distances"]
    assert distances["samples"]["frechet"] is not None
    assert figures["coverage"]["n"] == count
    assert (figures["coverage"]["sets"]["samples"]["precision"] is None) == (count < 4)
    assert distances["samples"]["frechet_of_parts"] is None
    assert distances[f"validation, real, {count} of them"]["n"] == count


def test_folders_that_are_no_labels_are_ignored(run_copy: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures / "across", tmp_path / "images" / "batch1")
    assert "in_their_class" not in evaluated(run_copy, *CLASSIFIER, "--samples", tmp_path / "images")["distances"]["samples"]


def test_samples_of_another_prior_of_the_same_name_get_no_likelihood(run_copy: Path) -> None:
    sample(["--run", str(run_copy), "--n", "12"])
    details = json.loads((run_copy / "samples/000/samples.json").read_text())
    assert "likelihood" in evaluated(run_copy, *CLASSIFIER, "--samples", run_copy / "samples/000")
    (run_copy / "samples/000/samples.json").write_text(json.dumps(details | {"prior_sha256": "0" * 64}))
    assert "likelihood" not in evaluated(run_copy, *CLASSIFIER, "--samples", run_copy / "samples/000")


def test_a_missing_picture_is_refused(run_copy: Path, one_line_error: Callable[..., str]) -> None:
    sample(["--run", str(run_copy), "--n", "12"])
    (run_copy / "samples/000/images/00003.png").unlink()
    line = one_line_error(main, "--run", run_copy, *CLASSIFIER, "--samples", run_copy / "samples/000")
    assert "12 images" in line
    assert "found 11" in line


def test_noise_is_farther_from_the_reference_than_real_images(run_copy: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 8, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", noise)
    distances = evaluated(run_copy, *CLASSIFIER, "--samples", tmp_path / "noise.npz")["distances"]
    noise_figures, real_figures = distances["samples, 12 of them"], distances["validation, real"]
    assert noise_figures["n"] == real_figures["n"]
    assert noise_figures["frechet"] > real_figures["frechet"]
    assert noise_figures["kernel"]["mean"] > real_figures["kernel"]["mean"]


def test_samples_in_a_folder_get_the_figures_of_drawn_ones(run_copy: Path) -> None:
    sample(["--run", str(run_copy), "--n", "40", "--seed", "3"])
    from_folder = evaluated(run_copy, *CLASSIFIER, "--samples", run_copy / "samples/000", "--seed", 3)
    drawn = evaluated(run_copy, *CLASSIFIER, "--n", 40, "--seed", 3)
    assert from_folder["coverage"]["sets"]["samples"] == pytest.approx(drawn["coverage"]["sets"]["samples"])
    for name in ("frechet", "in_their_class"):
        assert from_folder["distances"]["samples"][name] == pytest.approx(drawn["distances"]["samples"][name])
    assert from_folder["prior_sha256"] == drawn["prior_sha256"]


def test_subsets_of_samples_have_all_labels(run_copy: Path, source: ImageSource, tmp_path: Path) -> None:
    """Labels alternate, so every second or third sample would have one label, far from both."""
    train = source.splits[TRAIN]
    assert train.labels is not None
    by_label = [train.pixels[train.labels == label] for label in (0, 1)]
    np.savez(tmp_path / "turns.npz", torch.stack([images[:18] for images in by_label], 1).flatten(0, 1).numpy())
    np.savez(tmp_path / "one_label.npz", by_label[0].numpy())
    distances = {
        name: evaluated(run_copy, *CLASSIFIER, "--samples", tmp_path / f"{name}.npz")["distances"] for name in ("turns", "one_label")
    }
    assert distances["turns"]["samples, 12 of them"]["frechet"] < 0.7 * distances["one_label"]["samples"]["frechet"]


def test_swapped_labels_swap_the_accuracy(run_copy: Path, pictures: Path, tmp_path: Path) -> None:
    """Labels are the folders' names."""
    right = evaluated(run_copy, *CLASSIFIER, "--samples", pictures)["distances"]["samples"]["in_their_class"]
    for name, other in (("across", "down"), ("down", "across")):
        shutil.copytree(pictures / name, tmp_path / "swapped" / other)
    wrong = evaluated(run_copy, *CLASSIFIER, "--samples", tmp_path / "swapped")["distances"]["samples"]["in_their_class"]
    assert right == pytest.approx(1 - wrong)
    assert right > 0.75


def test_the_classifier_is_trained_once_and_learns(run_copy: Path, source: ImageSource) -> None:
    run, device = RunDir(run_copy), torch.device("cpu")
    before = (run.path / "classifier.safetensors").read_bytes()
    classifier = load_classifier(run.path, source, device)
    assert (run.path / "classifier.safetensors").read_bytes() == before
    train = source.splits[TRAIN]
    assert train.labels is not None
    assert (predict_labels(classifier, train.pixels, 7) == train.labels).double().mean() > 0.9


def test_without_a_prior_reconstructions_are_evaluated(run_copy: Path) -> None:
    shutil.rmtree(run_copy / "priors")
    content = evaluated(run_copy, *CLASSIFIER)
    assert content["reconstruction"]["mse"]["low"] <= content["reconstruction"]["mse"]["mean"] <= content["reconstruction"]["mse"]["high"]
    assert "distances" not in content


def test_another_reference_is_used_and_named(run_copy: Path) -> None:
    content = evaluated(run_copy, *CLASSIFIER, "--n", 20, "--reference", "validation")
    assert content["distances"]["validation, real"]["frechet"] == pytest.approx(0, abs=1e-3)
    assert "of validation" in content["compared"]["reference"]


@pytest.mark.parametrize(
    ("labels", "classes", "words"),
    [
        (torch.arange(40) % 2, 2, "20 of each of 2 classes"),
        (torch.arange(50_000) % 1000, 1000, "50 of each of 1000 classes"),
        (torch.arange(41) % 4, 4, "10 or 11 of each of 4 classes"),
        (torch.arange(3) % 5, 5, "0 or 1 of each of 5 classes"),
        (torch.zeros(7, dtype=torch.int64), 3, "0 to 7 of each of 3 classes"),
    ],
)
def test_the_balance_of_classes_is_counted(labels: torch.Tensor, classes: int, words: str) -> None:
    assert class_balance(labels, classes) == words


def test_lpips_is_computed_if_its_weights_are_local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pipelines.evaluation.assessment import perceptual_distances

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    pictures = torch.randint(256, (3, 40, 32, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert perceptual_distances(pictures, pictures, 2) is None
    name = torchvision.models.AlexNet_Weights.DEFAULT.url.rsplit("/", 1)[1]
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), tmp_path / "checkpoints" / name)
    distances = perceptual_distances(pictures, pictures.flip(0), 2)
    assert distances is not None
    assert distances.shape == (3,)
    assert distances[1] == pytest.approx(0, abs=1e-6)  # the middle picture is compared with itself
    assert distances[0] > 0
    assert perceptual_distances(pictures[:, :20], pictures[:, :20], 2) is None


def test_networks_of_training_include_those_of_the_initial_run(tmp_path: Path) -> None:
    first, second = RunDir(tmp_path / "first"), RunDir(tmp_path / "second")
    write_yaml(first.recipe, {"stage1": {"perceptual": {"kind": "features", "network": "resnet18"}}})
    terms = {"perceptual": {"kind": "lpips", "trunk": "alex"}, "adversarial": {"kind": "projected", "network": "rotation"}}
    write_yaml(second.recipe, {"stage1": {**terms, "init_from": str(first.path)}})
    config = load_recipe(second.recipe).stage1
    assert training_networks(config) == {"resnet18", "lpips alex", "rotation"}
    assert training_networks(dataclasses.replace(config, init_from=None)) == {"lpips alex", "rotation"}
    write_yaml(first.recipe, {"stage1": {"perceptual": {"kind": "none"}, "init_from": str(second.path)}})
    assert training_networks(config) == {"lpips alex", "rotation"}
    first.recipe.write_text("no recipe")
    assert training_networks(config) == {"lpips alex", "rotation"}
    first.recipe.unlink()
    assert training_networks(config) == {"lpips alex", "rotation"}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--features", "nothing"], ["features", "nothing"]),
        (["--split", "all"], ["--split", "all"]),
        (["--split", "test"], ["--split test", "train, validation"]),
        (["--n", "1"], ["n", "at least 2"]),
        (["--samples", "nowhere"], ["nowhere"]),
        (["--samples", "nowhere.npz"], ["nowhere.npz"]),
        (["--prior", "best"], ["--prior best"]),
        (["--reference", "test"], ["--reference test", "train, validation"]),
        (["--reference", "nothing"], ["--reference", "train, validation or test, or an npz file, found nothing"]),
        (["--reference", "nowhere.npz"], ["--reference nowhere.npz", "expected --features inception, found classifier"]),
        (["--reference", "nowhere.npz", "--features", "auto"], ["--reference nowhere.npz", "npz file"]),
        (["--prior", "transformer", "--samples", "nowhere"], ["--samples", "--prior", "transformer"]),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(
    run_copy: Path, arguments: list[str], parts: list[str], one_line_error: Callable[..., str]
) -> None:
    line = one_line_error(main, "--run", run_copy, *CLASSIFIER, *arguments)
    assert all(part in line for part in parts), line
    assert [folder.name for folder in (run_copy / "evaluations").iterdir()] == ["000"]


def test_the_classifier_needs_labels(run_copy: Path, source: ImageSource) -> None:
    from configs.errors import UserError

    unlabelled = ImageSource({TRAIN: ImageSplit(source.splits[TRAIN].pixels, None)}, None)
    with pytest.raises(UserError, match="features classifier: expected images with labels"):
        load_classifier(run_copy, unlabelled, torch.device("cpu"))
