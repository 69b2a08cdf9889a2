"""The command `extract_codes.py`."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from configs.recipe_file import load_recipe
from configs.run_dir import RunDir
from stage1_vqvae.data.pixels import to_model, to_uint8
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN, VALIDATION, CroppablePixels
from stage1_vqvae.data.variants import VARIANTS
from stage1_vqvae.model import load_tokenizer
from stage2_prior import extract_codes
from stage2_prior.codes.store import CodeStore, read_manifest
from stage2_prior.extract_codes import main
from training.weights_file import fingerprint


def test_stored_codes_are_the_tokenizers_in_the_order_of_the_images(finished_run: Path) -> None:
    run = RunDir(finished_run)
    tokenizer = load_tokenizer(run)
    source = load_images(load_recipe(run.recipe).data)
    assert {path.name for path in run.codes.iterdir()} == set(source.splits) == {TRAIN, VALIDATION}
    for name, split in source.splits.items():
        store = CodeStore(run.codes / name, fingerprint(run.tokenizer))
        assert len(store) == len(split)
        (codes,) = store.codes(torch.arange(len(split)))
        (expected,) = tokenizer.encode(to_model(split.pixels[:]))
        assert torch.equal(codes, expected)
        assert torch.equal(store.condition, split.labels)
        pictures = to_uint8(tokenizer.decode((codes,))).int()
        assert int((pictures - to_uint8(tokenizer(to_model(split.pixels[:])).reconstruction).int()).abs().max()) <= 1
    manifest = read_manifest(run.codes / TRAIN)
    assert (manifest.grids, manifest.num_codes, manifest.condition.class_names) == ([(2, 3)], [16], ["across", "down"])


def test_variants_are_an_axis_of_the_training_codes(run_copy: Path) -> None:
    main(["--run", str(run_copy), "--extraction.augmentation", "horizontal_flip", "--overwrite"])
    run = RunDir(run_copy)
    tokenizer = load_tokenizer(run)
    pixels = load_images(load_recipe(run.recipe).data).splits[TRAIN].pixels[:]
    store = CodeStore(run.codes / TRAIN)
    assert store.manifest.variants == 2
    rows = torch.arange(len(store))
    (mirrored,) = store.codes(rows, torch.ones(len(store), dtype=torch.int64))
    assert torch.equal(mirrored, tokenizer.encode(to_model(pixels.flip(2)))[0])
    assert CodeStore(run.codes / VALIDATION).manifest.variants == 1


@pytest.mark.parametrize("augmentation", ["five_crops", "ten_crops"])
def test_crops_are_variants_cut_from_whole_images(augmentation: str, run_copy: Path, pictures: Path) -> None:
    """Variant 0 is the image itself; the other crops are not enlarged from cached pixels."""
    main(["--run", str(run_copy), "--extraction.augmentation", augmentation, "--overwrite"])
    run = RunDir(run_copy)
    tokenizer, data = load_tokenizer(run), load_recipe(run.recipe).data
    stored = CodeStore(run.codes / TRAIN)
    pixels = load_images(dataclasses.replace(data, decode="each_time")).splits[TRAIN].pixels
    assert isinstance(pixels, CroppablePixels)
    crops = pixels.cropped(torch.arange(len(stored)), [VARIANTS["five_crops"].crops] * len(stored))
    assert torch.equal(crops[:, 0], pixels[:])
    if augmentation == "ten_crops":
        crops = torch.cat([crops, crops.flip(3)], 1)
    assert stored.manifest.variants == crops.shape[1]
    for variant in range(crops.shape[1]):
        (codes,) = stored.codes(torch.arange(len(stored)), torch.full((len(stored),), variant))
        assert torch.equal(codes, tokenizer.encode(to_model(crops[:, variant]))[0])
    assert CodeStore(run.codes / VALIDATION).manifest.variants == 1


@pytest.mark.parametrize("options", [["--data.decode", "each_time", "--data.workers", workers] for workers in "012"])
def test_codes_do_not_depend_on_how_images_are_read(options: list[str], run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(run_copy / "codes")
    monkeypatch.setattr("training.prefetch._worth_prefetching", lambda _: True)  # as on a GPU
    main(["--run", str(run_copy), "--overwrite", *options])
    assert contents(run_copy / "codes") == before


def test_the_path_of_the_data_may_change_and_the_image_size_may_not(
    run_copy: Path, pictures: Path, tmp_path: Path, one_line_error: Callable[..., str]
) -> None:
    before = contents(run_copy / "codes")
    moved = Path(shutil.copytree(pictures, tmp_path / "moved", copy_function=shutil.copyfile))  # at another time
    main(["--run", str(run_copy), "--overwrite", "--data.path", str(moved), "--data.cache", str(tmp_path / "cache")])
    assert contents(run_copy / "codes") == before
    assert list((tmp_path / "cache").glob("*.pixels"))
    assert "data.height" in one_line_error(main, "--run", run_copy, "--overwrite", "--data.height", 16)


def test_repeated_extraction_is_skipped_and_other_settings_need_overwrite(
    run_copy: Path, capsys: pytest.CaptureFixture[str], one_line_error: Callable[..., str]
) -> None:
    before = (run_copy / "codes/train/manifest.json").stat().st_mtime_ns
    main(["--run", str(run_copy)])
    assert "already extracted" in capsys.readouterr().out
    line = one_line_error(main, "--run", run_copy, "--extraction.augmentation", "shift")
    assert "--overwrite" in line
    assert (run_copy / "codes/train/manifest.json").stat().st_mtime_ns == before


def test_codes_of_another_tokenizer_are_extracted_again(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from stage1_vqvae.train import main as train_tokenizer
    from stage2_prior.train import main as train_prior

    train_tokenizer(["--run", str(run_copy), "--resume", "--stage1.steps", "66"])
    with pytest.raises(ValueError, match="expected codes of the run's tokenizer"):
        train_prior(["--run", str(run_copy), "--name", "second"])
    main(["--run", str(run_copy)])
    out = capsys.readouterr().out
    assert "extracting again" in out
    assert out.count("48 images in 2 classes (across, down); train 36, validation 12 (held out)") == 2  # by the training and this command
    assert read_manifest(run_copy / "codes/train").tokenizer_sha256 == fingerprint(run_copy / "tokenizer.safetensors")


def contents(codes: Path) -> dict[str, bytes]:
    return {str(path.relative_to(codes)): path.read_bytes() for path in codes.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("fails_after", "damaged"), [(0, None), (3, None), (8, None), (3, "cut short"), (8, "another tokenizer's")])
def test_an_interrupted_extraction_resumes_to_the_same_codes(
    fails_after: int, damaged: str | None, run_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """36 and 12 images in files of 5; the old codes stay until the new ones are complete."""
    command = ["--run", str(run_copy), "--overwrite", "--extraction.shard_rows", "5", "--extraction.batch_size", "3"]
    main(command)
    complete = contents(run_copy / "codes")
    assert len(complete) == 8 + 1 + 3 + 1
    written, write = [], extract_codes.write_shard

    def fail(*arguments: object) -> None:
        if len(written) == fails_after:
            raise OSError(28, "No space left on device", "codes")
        written.append(arguments)
        write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(extract_codes, "write_shard", fail)
        with pytest.raises(OSError, match="No space"):
            main(command)
    assert contents(run_copy / "codes") == complete
    unfinished = run_copy / "codes.unfinished/train"
    (unfinished / "codes-00007-of-00008.safetensors.tmp-1").write_bytes(b"half")
    shards = sorted(unfinished.glob("*.safetensors"))
    if damaged == "cut short" and shards:
        shards[0].write_bytes(shards[0].read_bytes()[:-1])
    elif damaged == "another tokenizer's" and shards:
        save_file(load_file(shards[0]), shards[0], {"tokenizer_sha256": "0" * 64})
    good = fails_after - (damaged is not None)
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(extract_codes, "write_shard", lambda *arguments: (written.append(arguments), write(*arguments)))
        main([*command[:-1], "2"])  # as advised when memory is full
    assert (f"resuming, {good} of 11 files" in capsys.readouterr().out) == (good > 0)
    assert len(written) == 11 + (damaged is not None)
    assert contents(run_copy / "codes") == complete
    assert not list(run_copy.glob("codes.*"))


@pytest.mark.parametrize("other", ["augmentation", "images"])
def test_leftovers_of_another_extraction_are_not_resumed(
    other: str, pictures: Path, run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One with other settings, or of a folder whose images have changed since."""
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    (run_copy / "recipe.yaml").write_text((run_copy / "recipe.yaml").read_text().replace(str(pictures), str(folder)))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "codes")

    command = ["--run", str(run_copy), "--overwrite"]
    with monkeypatch.context() as patched:
        patched.setattr(extract_codes, "write_manifest", fail)
        with pytest.raises(OSError, match="No space"):
            main([*command, "--extraction.augmentation", "horizontal_flip"] if other == "augmentation" else command)
    if other == "images":
        for path in folder.rglob("*.png"):
            Image.open(path).rotate(180).save(path)
    main([*command, "--accept-changed-data"])
    assert read_manifest(run_copy / "codes/train").variants == 1
    after = contents(run_copy / "codes")
    main([*command, "--accept-changed-data"])
    assert contents(run_copy / "codes") == after


def test_verify_checks_every_file_of_codes(run_copy: Path, capsys: pytest.CaptureFixture[str], one_line_error: Callable[..., str]) -> None:
    main(["--run", str(run_copy), "--verify"])
    assert "train: 36 images in 5 files, as they were written" in capsys.readouterr().out
    path = sorted((run_copy / "codes/validation").glob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert f"{path.name}: expected sha256" in one_line_error(main, "--run", run_copy, "--verify")
    shutil.rmtree(run_copy / "codes")
    assert "expected codes, found none" in one_line_error(main, "--run", run_copy, "--verify")


def test_codes_that_decode_to_other_images_are_refused(
    run_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_line_error: Callable[..., str]
) -> None:
    real, before = extract_codes.encode, contents(run_copy / "codes")
    with monkeypatch.context() as patched:
        patched.setattr(extract_codes, "encode", lambda *args: [(level + 1) % 16 for level in real(*args)])
        assert "expected stored codes to decode to the tokenizer's own reconstructions" in one_line_error(
            main, "--run", run_copy, "--overwrite"
        )
    assert contents(run_copy / "codes") == before
    capsys.readouterr()
    main(["--run", str(run_copy), "--overwrite"])
    assert "resuming" not in capsys.readouterr().out
    assert contents(run_copy / "codes") == before


def test_without_a_tokenizer_the_error_names_the_command_to_run(
    tmp_path: Path, finished_run: Path, one_line_error: Callable[..., str]
) -> None:
    assert "accelerate launch stage1_vqvae/train.py" in one_line_error(main, "--run", tmp_path / "nothing")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_bytes((finished_run / "recipe.yaml").read_bytes())
    assert "accelerate launch stage1_vqvae/train.py --resume" in one_line_error(main, "--run", tmp_path / "begun")
