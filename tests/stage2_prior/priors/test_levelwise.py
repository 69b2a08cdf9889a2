"""One prior per level: joined they have the properties of every prior, and equal their parts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configs.parts import part_from
from configs.run_dir import read_json
from pipelines.report import main as report
from pipelines.sample import main as sample
from stage1_vqvae.train import main as train_tokenizer
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.codes.store import CodeStore
from stage2_prior.conditions.none import NoCondition
from stage2_prior.draw import StepwiseSampling, uniforms
from stage2_prior.extract_codes import main as extract_codes
from stage2_prior.priors.levelwise import Levelwise
from stage2_prior.priors.prior_file import load_prior
from stage2_prior.train import main as train_prior
from tests.stage2_prior.priors import test_priors as common
from tests.stage2_prior.priors.prior_kinds import LAYOUTS, build, random_codes
from training.weights_file import fingerprint

KIND = "levelwise"
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@layouts
def test_each_position_depends_on_exactly_the_earlier_positions(layout: SequenceLayout) -> None:
    common.test_each_position_depends_on_exactly_the_earlier_positions(KIND, layout)


@layouts
def test_cached_steps_give_the_logits_of_the_full_pass(layout: SequenceLayout) -> None:
    common.test_cached_steps_give_the_logits_of_the_full_pass(KIND, layout, True)


def test_probabilities_sum_to_one_over_all_codes() -> None:
    common.test_probabilities_sum_to_one_over_all_codes(KIND, (3, 2))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    common.test_gradient_checkpointing_changes_no_gradient(KIND, LAYOUTS["top and bottom"])


def test_levels_have_the_bits_of_their_priors_and_separate_gradients() -> None:
    """The joined nats of each level are its prior's, and their gradient reaches that prior alone."""
    layout = LAYOUTS["top and bottom"]
    prior = build(KIND, layout).double()
    assert isinstance(prior, Levelwise)
    codes, labels = random_codes(layout, 4), torch.tensor([0, 1, 5, 2])
    joined = prior.nats(codes, labels).split(layout.lengths, 1)
    for level, part in enumerate(prior.parts):
        assert torch.equal(part.nats(codes[: level + 1], labels), joined[level])
        gradients = torch.autograd.grad(joined[level].sum(), list(prior.parameters()), allow_unused=True, retain_graph=True)
        named = zip(prior.named_parameters(), gradients, strict=True)
        names = [name for (name, _), gradient in named if gradient is not None and bool((gradient != 0).any())]
        assert names
        assert all(name.startswith(f"parts.{level}.") for name in names)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_sample_is_the_same_whatever_it_is_batched_with(guidance: float) -> None:
    layout = LAYOUTS["top and bottom"]
    prior = build(KIND, layout).double()
    uniform, labels = uniforms(0, torch.arange(5), layout.length), torch.arange(5)
    config = StepwiseSampling(guidance=guidance)
    together = prior.sample(labels, uniform, config)
    for row in range(5):
        alone = prior.sample(labels[row : row + 1], uniform[row : row + 1], config)
        assert all(torch.equal(level[row : row + 1], expected) for level, expected in zip(together, alone, strict=True))


def test_the_number_of_priors_must_be_that_of_the_levels() -> None:
    config = part_from("prior", {"kind": KIND, "levels": [{"kind": "pixelcnn"}]})
    with pytest.raises(ValueError, match="expected 2 priors, one per level, found 1"):
        config.build(LAYOUTS["top and bottom"], NoCondition())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> Path:
    """A run with two grids and no prior; tests write only into copies."""
    run = tmp_path_factory.mktemp("levels") / "run"
    network = ["--tokenizer.network.kind", "hierarchical", "--tokenizer.network.downsampling", "2"]
    train_tokenizer(["--config", str(tiny_recipe), "--run", str(run), *network, "--stage1.steps", "20"])
    extract_codes(["--run", str(run)])
    return run


def test_levels_trained_separately_are_joined_when_all_are_finished(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_line_error: Callable[..., str]
) -> None:
    """A transformer above, a PixelCNN with attention below; resumed bit for bit; then sampled as any other prior."""
    run = Path(shutil.copytree(run, tmp_path / "run"))
    below = ["--level", "2", "--prior.kind", "pixelcnn", "--prior.layers", "2", "--prior.width", "16", "--prior.attention_interval", "1"]
    train_prior(["--run", str(run), *below])
    assert "--level 1" in capsys.readouterr().out.splitlines()[-1]
    assert not (run / "priors/levelwise/prior.safetensors").exists()
    assert "finished prior" in one_line_error(sample, "--run", run, "--n", "2")
    train_prior(["--run", str(run), "--level", "1"])
    assert "all levels: " in capsys.readouterr().out

    folder = run / "priors/levelwise"
    joined, lower = (read_json(path / "likelihood.json") for path in (folder, folder / "level2"))
    upper = read_json(folder / "level1/likelihood.json")
    assert joined["bits_per_image"]["prior"] == pytest.approx(sum(report["bits_per_image"]["prior"] for report in (upper, lower)))
    assert [level["validation"] for level in joined["levels"]] == pytest.approx([upper["validation"], lower["validation"]])
    sha256 = fingerprint(run / "tokenizer.safetensors")
    prior, header = load_prior(folder / "prior.safetensors", sha256)
    assert (header.config.kind, header.level) == ("levelwise", None)
    part, part_header = load_prior(folder / "level2/prior.safetensors", sha256)
    assert (part_header.config.kind, part_header.level) == ("pixelcnn", 1)
    store = CodeStore(run / "codes/validation")
    codes = store.codes(torch.arange(len(store)))
    assert torch.equal(prior.nats(codes, store.condition)[:, 6:], part.nats(codes, store.condition))

    sample(["--run", str(run), "--n", "3"])
    assert read_json(run / "samples/000/samples.json")["prior"] == "levelwise"
    report(["--run", str(run)])
    assert "levelwise" in (run / "report.html").read_text()
    assert "--name levelwise" in one_line_error(train_prior, "--run", run, "--name", "levelwise")

    # Killed after a checkpoint, the second level resumes with its recipe to the same weights.
    before = (folder / "level2/prior.safetensors").read_bytes()
    (folder / "level2/prior.safetensors").unlink()
    max((folder / "level2/checkpoints").iterdir()).unlink()
    train_prior(["--run", str(run), "--level", "2", "--resume"])
    assert (folder / "level2/prior.safetensors").read_bytes() == before


def test_levels_that_do_not_exist_are_refused(run: Path, one_line_error: Callable[..., str]) -> None:
    for level in ("0", "3"):
        assert "expected 1 to 2" in one_line_error(train_prior, "--run", run, "--level", level)
    assert not (run / "priors").exists()
