"""Evaluation end to end on a tiny run: what must come out for images whose answer is known."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import torch
import torchvision

from configs.cli import load_recipe
from configs.errors import UserError
from configs.run_dir import RunDir, write_yaml
from pipelines import evaluate as evaluation
from pipelines.encoding import encode_and_decode
from pipelines.evaluate import class_balance, main, training_networks
from pipelines.evaluation.assessment import pixels_hash
from pipelines.evaluation.reference import one_pass
from pipelines.evaluation.reference_batch import load_reference_batch
from pipelines.sample import main as sample
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN, VALIDATION, ImageSource, ImageSplit
from stage1_vqvae.features import classifier
from stage1_vqvae.features.classifier import load_classifier, predict_labels
from stage1_vqvae.features.networks import FeatureNetwork, Features, Layers
from stage1_vqvae.model import load_tokenizer
from stage1_vqvae.pictures import save_png

OWN = ["--features", "classifier"]


def evaluated(run: Path, *arguments: object) -> dict[str, Any]:
    before = set((run / "evaluations").glob("*"))
    main(["--run", str(run), *map(str, arguments)])
    (new,) = set((run / "evaluations").glob("*")) - before
    found = json.loads((new / "evaluation.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    shown = (new / "evaluation.md").read_text()
    assert all(cell in shown for table in found["tables"] for row in table["rows"] for cell in row)
    return found


@pytest.fixture(scope="module")
def judged_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its classifier, and one evaluation."""
    run = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("judged") / "run"))
    main(["--run", str(run), *OWN, "--n", "40"])
    return run


@pytest.fixture
def run_copy(judged_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(judged_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def source(judged_run: Path) -> ImageSource:
    return load_images(load_recipe(judged_run / "recipe.yaml").data)


def test_nobody_waits_for_a_network_that_is_made_on_the_spot(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other processes are let go before it is trained; that it cannot be is said before anything is drawn."""
    (run_copy / "classifier.safetensors").unlink()
    order: list[str] = []
    for module, name in ((evaluation, "finish"), (classifier, "fit")):
        call = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, call=call, name=name: order.append(name) or call(*given))
    evaluated(run_copy, *OWN, "--n", "4")
    assert order == ["finish", "fit"]
    monkeypatch.setattr(evaluation, "draw_samples", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError, match="features resnet18: expected a file of its weights"):
        main(["--run", str(run_copy), "--features", "resnet18"])


def test_its_samples_and_reconstructions_lie_on_the_disk(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """50,000 of 256 x 256 pixels would take 10 GB of memory each."""
    places: list[Path] = []
    temporary_file = tempfile.TemporaryFile
    monkeypatch.setattr("pipelines.encoding.tempfile.TemporaryFile", lambda dir: places.append(dir) or temporary_file(dir=dir))
    evaluated(run_copy, *OWN, "--n", "4")
    assert places == [run_copy / "evaluations/001"] * 2


def test_it_says_what_was_compared_with_what(judged_run: Path, source: ImageSource) -> None:
    found = json.loads((judged_run / "evaluations/000/evaluation.json").read_text())
    said = " ".join(map(str, found["compared"].values()))
    assert f"{len(source.splits[VALIDATION])} of validation, 8 x 12 x 3" in said
    assert f"{len(source.splits[TRAIN])} of train" in said
    assert "40 drawn from prior transformer, labels in turns: 20 of each of 2 classes" in said
    assert found["sampling"]["temperature"] == 1.0
    assert found["prior_sha256"]
    assert found["distance"] == "Fréchet distance (classifier features)"
    columns = [column for table in found["tables"] for column in table["columns"]]
    assert not any(name in column for name in ("FID", "KID", "inception") for column in columns), columns
    assert "score of classes (classifier features)" in columns
    assert next(table["title"] for table in found["tables"] if "recall" in table["columns"]) == (
        "Neighbourhoods by classifier features: N = 12 of each set and of the train images"
    )
    assert {"samples", "validation, real", "validation, reconstructed", "samples, 12 of them"} == set(found["distances"])
    assert found["reconstruction"]["ssim"] is None  # 8 pixels are fewer than its window
    assert found["codes"]["usage"] <= 1
    assert (judged_run / "evaluations/000/neighbours.png").exists()


def test_training_images_handed_in_as_samples_are_found_out(run_copy: Path, source: ImageSource, tmp_path: Path) -> None:
    training = source.splits[TRAIN].pixels
    np.savez(tmp_path / "copied.npz", training.numpy())
    found = evaluated(run_copy, *OWN, "--samples", tmp_path / "copied.npz")
    distances, remembered = found["distances"]["samples"], found["memorisation"]
    assert distances["frechet"] == pytest.approx(0, abs=1e-3)
    assert remembered["ratio_of_median_distances"] < 0.01
    assert remembered["samples"]["with_all_codes_of_a_training_image"] == len(training)
    assert found["prior"] is None
    assert "in_their_class" not in distances  # an npz says nothing of labels


def test_a_prior_that_knows_its_images_by_heart_is_found_out(run_copy: Path, source: ImageSource) -> None:
    """Its samples are what the decoder makes of training codes: not the images themselves, nor do they encode to the same codes."""
    run, train = RunDir(run_copy), source.splits[TRAIN]
    tokenizer = load_tokenizer(run)
    codes, pictures = encode_and_decode(tokenizer, train.pixels[:20], 8)
    sample(["--run", str(run_copy), "--n", "20"])
    folder = run_copy / "samples/000"
    for number, picture in enumerate(pictures):
        save_png(folder / "images" / f"{number:05d}.png", picture)
    (folder / "codes.safetensors").write_bytes(safetensors.torch.save({"level0": codes[0].contiguous()}))
    remembered = evaluated(run_copy, *OWN, "--samples", folder)["memorisation"]
    assert remembered["samples"]["with_all_codes_of_a_training_image"] == 20
    assert remembered["samples"]["median_share_of_other_codes"] == 0
    assert remembered["ratio_of_median_distances"] == pytest.approx(remembered["ratio_of_copies"], rel=0.3)


def test_a_second_evaluation_reads_no_image_of_the_reference(run_copy: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But the few that its picture shows; another cache, or other weights of the features, are looked at again."""
    read: list[int] = []
    whole = ImageSplit.__init__

    def counted(self: ImageSplit, pixels: torch.Tensor, labels: np.ndarray | None) -> None:
        whole(self, _Counted(pixels, read) if len(pixels) == 36 else pixels, labels)

    monkeypatch.setattr(ImageSplit, "__init__", counted)
    cache = ["--data.cache", run_copy / "cache"]
    first = evaluated(run_copy, *OWN, "--n", 4, *cache)
    assert 36 <= sum(read) <= 36 + 48  # features and sum in one pass; codes are in the store
    read.clear()
    again = evaluated(run_copy, *OWN, "--n", 4, *cache)
    assert sum(read) <= 48
    assert again == first
    read.clear()
    shutil.rmtree(run_copy / "codes")
    for images in (36, 0):  # encoded once, as they are not in a store
        assert evaluated(run_copy, *OWN, "--n", 4, *cache)["memorisation"] == first["memorisation"]
        assert images <= sum(read) <= images + 48
        read.clear()
    assert evaluated(run_copy, "--features", "rotation", "--n", 4, *cache)["features"] == "rotation"
    assert sum(read) >= 36


class _Counted:
    """Images that note how many of them are read at a time."""

    def __init__(self, pixels: torch.Tensor, read: list[int]) -> None:
        self._pixels, self._read, self.shape = pixels, read, pixels.shape

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, rows: torch.Tensor | slice) -> torch.Tensor:
        found = self._pixels[rows]
        self._read.append(len(found) if found.dim() == 4 else 1)
        return found


def test_a_million_images_are_read_once_in_little_memory() -> None:
    """Of a network whose features are the pixels: moments of all, the vectors of 50,000."""
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
    found = one_pass(network, Many(), "many", 5000)  # type: ignore[arg-type]
    assert sum(read) == 10**6
    assert found.vectors.shape == (50_000, 1)
    assert torch.equal(found.vectors[:, 0], (found.rows % 251).float())
    assert found.gaussian is not None
    values = np.arange(10**6) % 251
    assert found.gaussian.mean.item() == pytest.approx(values.mean(), rel=1e-9)
    assert found.gaussian.covariance.item() == pytest.approx(values.var(ddof=1), rel=1e-9)
    assert found.pixels_sha256 == pixels_hash(torch.from_numpy(values.astype(np.uint8))[:, None, None, None])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_few_samples_are_judged_as_far_as_they_go(count: int, run_copy: Path) -> None:
    figures = evaluated(run_copy, *OWN, "--n", count)
    found = figures["distances"]
    assert found["samples"]["frechet"] is not None
    assert figures["coverage"]["n"] == count
    assert (figures["coverage"]["sets"]["samples"]["precision"] is None) == (count < 4)
    assert found["samples"]["frechet_of_parts"] is None
    assert found[f"validation, real, {count} of them"]["n"] == count


def test_folders_that_are_no_labels_are_none(run_copy: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures / "across", tmp_path / "images" / "batch1")
    assert "in_their_class" not in evaluated(run_copy, *OWN, "--samples", tmp_path / "images")["distances"]["samples"]


def test_samples_of_another_prior_of_that_name_get_no_likelihood(run_copy: Path) -> None:
    sample(["--run", str(run_copy), "--n", "12"])
    told = json.loads((run_copy / "samples/000/samples.json").read_text())
    assert "likelihood" in evaluated(run_copy, *OWN, "--samples", run_copy / "samples/000")
    (run_copy / "samples/000/samples.json").write_text(json.dumps(told | {"prior_sha256": "0" * 64}))
    assert "likelihood" not in evaluated(run_copy, *OWN, "--samples", run_copy / "samples/000")


def test_a_lost_picture_does_not_move_the_labels(run_copy: Path, one_line_error: Callable[..., str]) -> None:
    sample(["--run", str(run_copy), "--n", "12"])
    (run_copy / "samples/000/images/00003.png").unlink()
    line = one_line_error(main, "--run", run_copy, *OWN, "--samples", run_copy / "samples/000")
    assert "12 images" in line
    assert "found 11" in line


def test_noise_lies_farther_from_the_images_than_they_do(run_copy: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 8, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", noise)
    found = evaluated(run_copy, *OWN, "--samples", tmp_path / "noise.npz")["distances"]
    of_noise, of_real = found["samples, 12 of them"], found["validation, real"]
    assert of_noise["n"] == of_real["n"]
    assert of_noise["frechet"] > of_real["frechet"]
    assert of_noise["kernel"]["mean"] > of_real["kernel"]["mean"]


def test_samples_in_a_folder_are_judged_as_those_drawn(run_copy: Path) -> None:
    sample(["--run", str(run_copy), "--n", "40", "--seed", "3"])
    from_folder = evaluated(run_copy, *OWN, "--samples", run_copy / "samples/000", "--seed", 3)
    drawn = evaluated(run_copy, *OWN, "--n", 40, "--seed", 3)
    assert from_folder["coverage"]["sets"]["samples"] == pytest.approx(drawn["coverage"]["sets"]["samples"])
    for name in ("frechet", "in_their_class"):
        assert from_folder["distances"]["samples"][name] == pytest.approx(drawn["distances"]["samples"][name])
    assert from_folder["prior_sha256"] == drawn["prior_sha256"]


def test_as_many_samples_as_held_out_images_have_all_labels(run_copy: Path, source: ImageSource, tmp_path: Path) -> None:
    """Training images in turns: a subset of every second or third would be of one label, far from both."""
    train = source.splits[TRAIN]
    assert train.labels is not None
    by_label = [train.pixels[train.labels == label] for label in (0, 1)]
    np.savez(tmp_path / "turns.npz", torch.stack([images[:18] for images in by_label], 1).flatten(0, 1).numpy())
    np.savez(tmp_path / "one_label.npz", by_label[0].numpy())
    found = {name: evaluated(run_copy, *OWN, "--samples", tmp_path / f"{name}.npz")["distances"] for name in ("turns", "one_label")}
    assert found["turns"]["samples, 12 of them"]["frechet"] < 0.7 * found["one_label"]["samples"]["frechet"]


def test_labels_of_real_images_in_folders(run_copy: Path, pictures: Path, tmp_path: Path) -> None:
    """Swap the folders' names: what was right is wrong."""
    right = evaluated(run_copy, *OWN, "--samples", pictures)["distances"]["samples"]["in_their_class"]
    for name, other in (("across", "down"), ("down", "across")):
        shutil.copytree(pictures / name, tmp_path / "swapped" / other)
    wrong = evaluated(run_copy, *OWN, "--samples", tmp_path / "swapped")["distances"]["samples"]["in_their_class"]
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


def test_without_a_prior_reconstructions_are_judged(run_copy: Path) -> None:
    shutil.rmtree(run_copy / "priors")
    found = evaluated(run_copy, *OWN)
    assert found["reconstruction"]["mse"]["low"] <= found["reconstruction"]["mse"]["mean"] <= found["reconstruction"]["mse"]["high"]
    assert "distances" not in found


def test_another_reference_is_used_and_named(run_copy: Path) -> None:
    found = evaluated(run_copy, *OWN, "--n", 20, "--reference", "validation")
    assert found["distances"]["validation, real"]["frechet"] == pytest.approx(0, abs=1e-3)
    assert "of validation" in found["compared"]["reference"]


def small_inception(*_: object, **__: object) -> FeatureNetwork:
    """Stand-in for Inception: linear maps of an image's pixels to 6 features, 3 logits and 5 spatial features."""
    maps = torch.randn(8 * 12 * 3, 14, generator=torch.Generator().manual_seed(0)) / 100

    def spatial(pixels: torch.Tensor) -> tuple[Features, torch.Tensor]:
        vectors, logits, of_positions = (pixels.flatten(1).float() / 25 @ maps).split([6, 3, 5], 1)
        return Features(vectors, logits), of_positions

    layers = Layers(torch.nn.Identity(), lambda images: images)
    return FeatureNetwork("inception", "FID", "0" * 64, lambda pixels: spatial(pixels)[0], layers, torch.device("cpu"), spatial=spatial)


@pytest.fixture
def with_small_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "feature_network", small_inception)
    monkeypatch.setattr(evaluation, "load_reference_batch", lambda *asked: load_reference_batch(*asked, (6, 5)))


def random_images(count: int, seed: int, brightest: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, brightest, (count, 8, 12, 3), dtype=np.uint8)


@pytest.mark.usefixtures("with_small_inception")
def test_a_reference_file_gives_adms_figures(run_copy: Path, tmp_path: Path) -> None:
    """FID and sFID use the file's statistics, of more images than it holds; precision and recall use its images."""
    whole, samples = random_images(200, 0), random_images(30, 1, 200)
    network = small_inception()
    assert network.spatial is not None

    def all_of(images: np.ndarray) -> list[np.ndarray]:
        assert network.spatial is not None
        (vectors, logits), spatial = network.spatial(torch.from_numpy(images))
        return [vectors.numpy(), spatial.numpy(), logits.numpy()]

    pooled, spatial, _ = all_of(whole)
    statistics = {"mu": pooled.mean(0), "sigma": np.cov(pooled, rowvar=False)}
    statistics |= {"mu_s": spatial.mean(0), "sigma_s": np.cov(spatial, rowvar=False)}
    np.savez(tmp_path / "reference.npz", arr_0=whole[:20], **statistics)
    np.savez(tmp_path / "samples.npz", samples)
    found = evaluated(run_copy, "--reference", tmp_path / "reference.npz", "--samples", tmp_path / "samples.npz", "--batch_size", 7)
    figures = found["beside_batch"]["samples"]

    def frechet(first: np.ndarray, second: np.ndarray) -> float:
        covariances = [np.cov(vectors.astype(np.float64), rowvar=False) for vectors in (first, second)]
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
        return float(((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root))

    def inside(points: np.ndarray, centres: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(centres - centre, axis=1))[3] for centre in centres]
        return float(np.mean([(np.linalg.norm(centres - point, axis=1) <= radii).any() for point in points]))

    vectors, of_positions, logits = all_of(samples)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert figures["n"] == 30
    assert figures["frechet"] == pytest.approx(frechet(pooled, vectors), rel=1e-4)
    assert figures["spatial_frechet"] == pytest.approx(frechet(spatial, of_positions), rel=1e-4)
    assert figures["class_score"] == pytest.approx(np.exp((shares * np.log(shares / shares.mean(0))).sum(1).mean()), rel=1e-4)
    assert figures["precision"] == pytest.approx(inside(vectors, all_of(whole[:20])[0]))
    assert figures["recall"] == pytest.approx(inside(all_of(whole[:20])[0], vectors))
    assert set(found["beside_batch"]) == {"samples", "validation, real", "validation, reconstructed", "samples, 12 of them"}
    assert found["beside_batch"]["samples, 12 of them"]["n"] == found["beside_batch"]["validation, real"]["n"]
    assert "distances" not in found
    assert found["memorisation"]["samples"]["n"] == 30
    shown = next(table for table in found["tables"] if "reference.npz" in table["title"])
    assert shown["columns"][2:5] == ["FID", "sFID", "inception score"]
    assert found["compared"]["reference"].startswith("reference.npz: 20 images and statistics mu, sigma, mu_s, sigma_s, sha256 ")
    assert str(tmp_path) not in found["compared"]["reference"]


@pytest.mark.usefixtures("with_small_inception")
def test_a_file_of_statistics_alone_says_what_is_missing(run_copy: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(6), sigma=np.eye(6))
    found = evaluated(run_copy, "--reference", tmp_path / "statistics.npz", "--n", 13)
    figures = found["beside_batch"]["samples"]
    assert figures["frechet"] > 0
    assert figures["class_score"] >= 1
    assert [figures[key] for key in ("spatial_frechet", "precision", "recall")] == [None] * 3
    assert 0 <= figures["in_their_class"] <= 1
    for name in ("Precision and recall", "sFID"):
        assert sum(note.startswith(f"{name}: not computed") for note in found["notes"]) == 1
    assert "labels in turns: 6 or 7 of each of 2 classes" in found["compared"]["samples"]


@pytest.mark.usefixtures("with_small_inception")
def test_without_a_prior_reconstructions_stand_beside_a_file(run_copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(run_copy / "priors")
    np.savez(tmp_path / "images.npz", random_images(20, 0))
    found = evaluated(run_copy, "--reference", tmp_path / "images.npz")
    assert set(found["beside_batch"]) == {"validation, real", "validation, reconstructed"}
    assert found["notes"][-1].startswith("Samples: not evaluated")


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


def test_what_sample_writes_is_of_adms_layout(run_copy: Path, tmp_path: Path) -> None:
    """ADM's evaluator can read it: arr_0, uint8 (N, H, W, 3), labels in turns."""
    sample(["--run", str(run_copy), "--n", "5", "--npz"])
    with np.load(run_copy / "samples/000/samples.npz", allow_pickle=False) as written:
        assert list(written) == ["arr_0"]
        assert (written["arr_0"].dtype, written["arr_0"].shape) == (np.uint8, (5, 8, 12, 3))
    assert json.loads((run_copy / "samples/000/samples.json").read_text())["labels"] == [0, 1, 0, 1, 0]


def test_lpips_where_its_weights_are_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pipelines.evaluation.assessment import perceptual_distances

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    pictures = torch.randint(256, (3, 40, 32, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert perceptual_distances(pictures, pictures, 2) is None
    name = torchvision.models.AlexNet_Weights.DEFAULT.url.rsplit("/", 1)[1]
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet(weights=None).state_dict(), tmp_path / "checkpoints" / name)
    found = perceptual_distances(pictures, pictures.flip(0), 2)
    assert found is not None
    assert found.shape == (3,)
    assert found[1] == pytest.approx(0, abs=1e-6)  # the middle one is its own mirror
    assert found[0] > 0
    assert perceptual_distances(pictures[:, :20], pictures[:, :20], 2) is None


def test_features_that_training_used_are_known_through_the_run_it_began_from(tmp_path: Path) -> None:
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
    line = one_line_error(main, "--run", run_copy, *OWN, *arguments)
    assert all(part in line for part in parts), line
    assert [folder.name for folder in (run_copy / "evaluations").iterdir()] == ["000"]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((4, 8, 8, 3), np.uint8), "expected uint8 (N, 8, 12, 3), found (4, 8, 8, 3)"),
        (np.zeros((4, 8, 12, 3)), "expected arr_0 as uint8 (N, H, W, C), found float64"),
        (np.zeros((1, 8, 12, 3), np.uint8), "expected at least 2 images, found 1"),
    ],
)
def test_an_npz_of_another_size_is_refused(
    array: np.ndarray, expected: str, run_copy: Path, tmp_path: Path, one_line_error: Callable[..., str]
) -> None:
    np.savez(tmp_path / "samples.npz", array)
    assert expected in one_line_error(main, "--run", run_copy, *OWN, "--samples", tmp_path / "samples.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"text"])
def test_what_is_no_npz_is_refused(content: bytes, run_copy: Path, tmp_path: Path, one_line_error: Callable[..., str]) -> None:
    (tmp_path / "samples.npz").write_bytes(content)
    assert "expected an npz file" in one_line_error(main, "--run", run_copy, *OWN, "--samples", tmp_path / "samples.npz")
    with open(tmp_path / "samples.npz", "wb") as file:
        np.save(file, np.zeros((4, 8, 12, 3), np.uint8))  # an npy under the name of an npz
    assert "expected an npz file" in one_line_error(main, "--run", run_copy, *OWN, "--samples", tmp_path / "samples.npz")


def test_the_classifier_needs_labels(run_copy: Path, source: ImageSource) -> None:
    from configs.errors import UserError

    unlabelled = ImageSource({TRAIN: ImageSplit(source.splits[TRAIN].pixels, None)}, None)
    with pytest.raises(UserError, match="features classifier: expected images with labels"):
        load_classifier(run_copy, unlabelled, torch.device("cpu"))
