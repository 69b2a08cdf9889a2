"""Counted costs of training steps, and the GPU check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from benchmarks.gpu.check import main as check
from benchmarks.gpu.counting import Card, Counting, Dataless
from benchmarks.gpu.steps import perceptual_term, prior_step, tokenizer_step
from configs.errors import UserError
from configs.recipe_file import load_recipe
from stage1_vqvae.objectives.perceptual import LPIPSPart
from tests.conftest import Pretended

ROWS, WIDTH, HIDDEN = 64, 32, 128


def test_counts_of_two_linear_layers() -> None:
    with Dataless(), Counting() as counted:
        model = nn.Sequential(nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False))
        weights = counted.held
        assert weights == 2 * WIDTH * HIDDEN * 4
        x = torch.randn(ROWS, WIDTH)
        counted.operators.clear()
        y = model(x)
        activations = weights + (ROWS * WIDTH + ROWS * HIDDEN + ROWS * WIDTH) * 4  # x, the hidden layer, y
        assert counted.held == activations
        assert counted.flops == 2 * 2 * ROWS * WIDTH * HIDDEN
        assert counted.traffic == 2 * (ROWS * WIDTH + WIDTH * HIDDEN + ROWS * HIDDEN) * 4
        y.sum().backward()
        # Backward: gradients of both weights and of the hidden layer, none of x.
        assert counted.flops == (2 + 3) * 2 * ROWS * WIDTH * HIDDEN
        assert counted.peak >= activations + weights
        del y
        model.zero_grad()
        assert counted.held == weights + ROWS * WIDTH * 4


def test_freed_tensors_are_not_held() -> None:
    with Dataless(), Counting() as counted:
        for _ in range(3):
            torch.zeros(1000) + 1
        assert counted.held == 0
        assert counted.peak == 2 * 4000


def test_an_operators_time_is_the_maximum_of_compute_and_traffic() -> None:
    with Dataless(), Counting() as counted:
        torch.randn(ROWS, WIDTH) @ torch.randn(WIDTH, HIDDEN)
        counted.operators[:] = counted.operators[-1:]
    flops, size = 2 * ROWS * WIDTH * HIDDEN, 4 * (ROWS * WIDTH + WIDTH * HIDDEN + ROWS * HIDDEN)
    assert counted.seconds(Card(0, 1.0, 1e30, 1e30)) == size
    assert counted.seconds(Card(0, 1e30, 1e30, 1.0)) == flops
    # And at least as long as its launch.
    assert 0 < counted.seconds(Card(0, 1e30, 1e30, 1e30)) < 1e-4


def test_the_perceptual_term_is_on_one_device() -> None:
    """Otherwise the GPU check would mix devices."""
    with Dataless(), torch.device("meta"):
        term = perceptual_term(LPIPSPart(), 3)
    assert term is not None
    assert {tensor.device.type for tensor in (*term.parameters(), *term.buffers())} == {"meta"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_check_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="expected a GPU"):
        check([])


def test_the_check_runs_on_a_pretended_gpu(pretended: Pretended) -> None:
    done = pretended("cuda", 1, "tests.launched.gpu_check", "--parts", "search", "group_norm", "sampling")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "failed" not in done.stdout
    for line in (
        "search N 65 K 129 D 3",
        "group normalisation in bf16, gradient at the input",
        "transformer, graphs and eager steps, third batch",
        "sampling 2 x 32, guided",
    ):
        assert re.search(rf"^\| {re.escape(line)}", done.stdout, re.MULTILINE), done.stdout


def test_the_timed_steps_run_twice(tiny_recipe: Path) -> None:
    accelerator, recipe = Accelerator(cpu=True), load_recipe(tiny_recipe)
    for step in (tokenizer_step(accelerator, recipe), prior_step(accelerator, recipe, 2)):
        step.take()
        step.take()
        assert step.parameters > 0
