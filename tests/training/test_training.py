"""Mechanisms that both training loops use."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from configs.errors import UserError, run_entry
from configs.schema import Compute
from stage1_vqvae.features.weights import read_weights
from training import checkpoint
from training.batching import check_divides, share_of_step
from training.checkpoint import Checkpoints
from training.metrics_log import MetricsLog, read_metrics
from training.optimizer import adamw, clip_, forget_rows_
from training.processes import start
from training.randomness import DataOrder, derived_seed, generator
from training.schedule import learning_rate
from training.stopping import GracefulStop, check_finite
from training.weights_file import load_weights, save_weights


@pytest.mark.parametrize(("count", "batch_size"), [(10, 3), (10, 10), (7, 20), (1, 4)])
def test_every_row_comes_once_per_epoch_in_full_batches(count: int, batch_size: int) -> None:
    order = DataOrder(count, batch_size, seed=3)
    batches = [order.batch(step) for step in range(3 * count)]
    assert all(len(batch) == batch_size for batch in batches)
    stream = torch.cat(batches)
    for epoch in range(len(stream) // count):
        assert sorted(stream[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))


def test_order_depends_on_seed_and_step_only() -> None:
    used = DataOrder(100, 8, seed=0)
    for step in range(50):
        used.batch(step)
    assert torch.equal(used.batch(50), DataOrder(100, 8, seed=0).batch(50))
    assert not torch.equal(DataOrder(100, 8, seed=1).batch(50), DataOrder(100, 8, seed=0).batch(50))
    assert not torch.equal(DataOrder(100, 100, seed=0).batch(0), DataOrder(100, 100, seed=0).batch(1))


@pytest.mark.parametrize(("accumulation", "processes"), [(1, 1), (2, 1), (1, 4), (3, 2)])
def test_ranks_and_micro_steps_partition_a_step(accumulation: int, processes: int) -> None:
    parts = [share_of_step(24, accumulation, m, processes, r) for m in range(accumulation) for r in range(processes)]
    assert sorted(position for part in parts for position in range(24)[part]) == list(range(24))
    with pytest.raises(
        UserError, match=r"stage1\.batch_size: expected a multiple of 5 \(5 processes x 1 micro-steps\), found 24; .* --num_processes 4"
    ):
        check_divides("stage1", 24, 1, 5)
    check_divides("stage1", 24, accumulation, processes)


def test_seeds_differ_by_purpose() -> None:
    seeds = {derived_seed(seed, purpose, step) for seed in range(5) for purpose in ("a", "b") for step in range(5)}
    assert len(seeds) == 50
    assert torch.equal(torch.rand(4, generator=generator(1, "a")), torch.rand(4, generator=generator(1, "a")))


def test_learning_rate_warms_up_then_decays_to_its_final_share() -> None:
    rates = [learning_rate(step, peak=2.0, warmup_steps=10, steps=100, final_share=0.05) for step in range(100)]
    assert rates[10] == max(rates) == 2.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[0] > 0
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(0, peak=1.0, warmup_steps=0, steps=1, final_share=0.1) == 1.0


def test_weight_decay_applies_to_linear_weights_only() -> None:
    model = nn.Sequential(nn.Embedding(4, 6), nn.Linear(6, 5), nn.LayerNorm(5))
    optimizer = adamw(model, 1e-3, 0.5, beta2=0.99)
    decayed = [parameter for group in optimizer.param_groups if group["weight_decay"] == 0.5 for parameter in group["params"]]
    assert len(decayed) == 1
    assert decayed[0] is model[1].weight
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_a_moved_row_loses_its_momentum() -> None:
    parameter = nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(4, 3)
    optimizer.step()
    forget_rows_(optimizer, parameter, torch.tensor([False, True, False, False]))
    for name in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[parameter][name]
        assert bool((moment[1] == 0).all())
        assert bool((moment[[0, 2, 3]] != 0).all())


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "stage 1", 2, Accelerator(cpu=True))
    assert checkpoints.load_latest() is None
    for step in (5, 10, 1000):
        checkpoints.save(step, {"model": {"weight": torch.full((2,), float(step))}})
    checkpoints.wait()
    assert [path.name for path in checkpoints.paths()] == ["step-000000010.pt", "step-000001000.pt"]
    state = checkpoints.load_latest()
    assert state is not None
    assert state["step"] == 1000
    assert torch.equal(state["model"]["weight"], torch.full((2,), 1000.0))


@pytest.mark.parametrize("broken", ["model", "adversary"])
def test_non_finite_weights_are_not_saved(broken: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "stage 1", 1, Accelerator(cpu=True))
    good, bad = {"weight": torch.ones(2)}, {"weight": torch.tensor([1.0, float("nan")])}
    checkpoints.save(5, {"model": good, "adversary": {"model": good}})
    with pytest.raises(UserError, match="step 6: expected finite weights"):
        checkpoints.save(6, {"model": good, "adversary": {"model": good}, broken: bad if broken == "model" else {"model": bad}})
    checkpoints.wait()
    assert [path.name for path in checkpoints.paths()] == ["step-000000005.pt"]


def test_the_best_checkpoint_is_kept_besides_the_newest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "stage 1", 2, Accelerator(cpu=True))
    for step, score in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 4.0)):
        checkpoints.save(step, {}, score)
    checkpoints.wait()
    assert [int(path.stem[5:]) for path in checkpoints.paths()] == [2, 4, 5]
    again = Checkpoints(tmp_path, "stage 1", 2, Accelerator(cpu=True))
    again.save(6, {}, 0.5)
    again.wait()
    assert [int(path.stem[5:]) for path in checkpoints.paths()] == [5, 6]


def test_a_checkpoint_is_a_snapshot_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although training changes the weights while the file is written."""
    allow_writing, save = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *arguments: allow_writing.wait() and save(*arguments))
    weight = torch.zeros(3)
    checkpoints = Checkpoints(tmp_path, "stage 1", 2, Accelerator(cpu=True))
    checkpoints.save(1, {"model": {"weight": weight}, "moments": [(weight,)]})
    weight += 1
    assert not checkpoints.paths()
    allow_writing.set()
    checkpoints.wait()
    state = checkpoints.load_latest()
    assert state is not None
    assert torch.equal(state["model"]["weight"], torch.zeros(3))
    assert torch.equal(state["moments"][0][0], torch.zeros(3))


@pytest.mark.parametrize("grows", [True, False])
def test_a_growing_file_counts_as_progress(grows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_write(path: Path, _: object) -> None:
        partial = path.with_name(f"{path.name}.tmp-1")
        with open(partial, "wb", buffering=0) as file:
            for number in range(10):
                if grows or number == 0:
                    file.write(b"x")
                time.sleep(0.05)
        partial.rename(path)

    progress: list[None] = []
    monkeypatch.setattr(checkpoint, "progressed", lambda: progress.append(None))
    monkeypatch.setattr(checkpoint, "write_file", slow_write)
    monkeypatch.setattr(checkpoint, "_TICK", 0.02)
    checkpoints = Checkpoints(tmp_path, "stage 1", 1, Accelerator(cpu=True))
    checkpoints.save(1, {"model": {}})
    checkpoints.wait()
    assert [path.name for path in checkpoints.paths()] == ["step-000000001.pt"]
    assert len(progress) > 3 if grows else len(progress) <= 1


def test_a_failed_write_is_reported_and_keeps_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, "stage 1", 1, Accelerator(cpu=True))
    checkpoints.save(1, {"model": {}})
    checkpoints.wait()
    checkpoints.check()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    checkpoints.save(2, {"model": {}})
    with pytest.raises(OSError, match=r"No space left on device: .*step-000000002\.pt"):
        checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.pt"]


@pytest.mark.parametrize("damage", ["a bit", "no sum", "cut"])
def test_a_damaged_checkpoint_falls_back_to_the_earlier_one(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(tmp_path, "stage 1", 2, Accelerator(cpu=True))
    for step in (1, 2):
        checkpoints.save(step, {"model": {"weight": torch.full((100,), float(step))}})
    checkpoints.wait()
    path = checkpoints.paths()[-1]
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        content[content.index(torch.full((1,), 2.0).numpy().tobytes())] ^= 1
    path.write_bytes(content[: {"a bit": None, "no sum": -72, "cut": -100}[damage]])
    state = checkpoints.load_latest()
    assert state is not None
    assert state["step"] == 1
    assert f"{path}: expected" in capsys.readouterr().out
    assert [file.name for file in checkpoints.paths()] == ["step-000000001.pt"]


@pytest.mark.parametrize("damage", ["truncated", "text", "another stage", "pickle"])
def test_invalid_checkpoints_are_refused(damage: str, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    written = Checkpoints(tmp_path, "stage 2" if damage == "another stage" else "stage 1", 2, accelerator)
    written.save(5, {"model": {}})
    written.wait()
    path = tmp_path / "step-000000005.pt"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "pickle":
        torch.save({"format": 1, "stage": "stage 1", "step": 5, "model": print}, path)
    with pytest.raises(UserError, match=r"step-000000005\.pt: expected a checkpoint of stage 1") as error:
        Checkpoints(tmp_path, "stage 1", 2, accelerator).load_latest()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("linesep", ["\n", "\r\n"])  # Unix's, Windows'
def test_resuming_truncates_the_metrics_log(linesep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "linesep", linesep)
    path = tmp_path / "metrics.jsonl"
    accelerator = Accelerator(cpu=True)
    log = MetricsLog(path, accelerator, 0)
    for step in (2, 4, 6):
        log.write(step, "train", {"loss": 1 / step})
    with open(path, "a") as file:
        file.write('{"step": 8, "spl')  # a crash in the middle of a line
    MetricsLog(path, accelerator, 4).write(6, "train", {"loss": 0.5})
    assert [(record["step"], record["loss"]) for record in read_metrics(path)] == [(2, 0.5), (4, 0.25), (6, 0.5)]
    assert len(path.read_text().splitlines()) == 3
    assert all(json.loads(line)["split"] == "train" for line in path.read_text().splitlines())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_requests_a_stop_and_the_second_is_passed_on(number: signal.Signals) -> None:
    received = []
    earlier = signal.signal(number, lambda *_: received.append(number))
    try:
        with GracefulStop(Accelerator(cpu=True)) as stop:
            assert not stop.requested()
            os.kill(os.getpid(), number)
            assert stop.requested()
            assert stop.exit_code == 128 + number
            assert not received
            os.kill(os.getpid(), number)
            assert received == [number]
    finally:
        signal.signal(number, earlier)


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of world size 1."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


TWO_RANKS: Any = types.SimpleNamespace(num_processes=2, device=torch.device("cpu"))


@pytest.mark.usefixtures("process_group")
def test_ranks_agree_on_a_stop_one_step_later() -> None:
    with GracefulStop(TWO_RANKS) as stop:
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not stop.requested()
        assert stop.requested()
        assert stop.exit_code == 128 + signal.SIGUSR1
    # After the last step the answer is needed at once.
    with GracefulStop(TWO_RANKS) as stop:
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested(last=True)


@pytest.mark.usefixtures("process_group")
def test_a_signal_during_the_all_reduce_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    signals, all_reduce = [signal.SIGUSR1], dist.all_reduce

    def interrupted_all_reduce(*arguments: Any, **keywords: Any) -> Any:
        result = all_reduce(*arguments, **keywords)
        if signals:
            os.kill(os.getpid(), signals.pop())
        return result

    monkeypatch.setattr(dist, "all_reduce", interrupted_all_reduce)
    with GracefulStop(TWO_RANKS) as stop:
        assert [stop.requested() for _ in range(3)] == [False, False, True]
        assert stop.exit_code == 128 + signal.SIGUSR1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_reported_with_step_and_term(value: float) -> None:
    norms = [1.0, 2.0, value, value]
    # A term may start later than others.
    steps = [{"loss": torch.ones(()), **({"late": torch.ones(())} if step else {}), "norm": torch.tensor(norms[step])} for step in range(4)]
    check_finite(steps[:2], 5, "")
    with pytest.raises(UserError, match=r"step 17: expected norm to be finite, found .*; advice"):
        check_finite(steps, 15, "advice")


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 100.0])
def test_clipping_returns_the_norm_before_clipping(clip_norm: float) -> None:
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert torch.isclose(clip_(Accelerator(cpu=True), model, clip_norm), norm)
    scale = min(1.0, clip_norm / float(norm)) if clip_norm > 0 else 1.0
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradient * scale, rtol=1e-4)


@pytest.mark.parametrize("position", range(0, 1000, 97))
def test_weights_with_a_flipped_bit_are_refused(position: int, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    weights = {"b": torch.randn(3, 4), "a": torch.arange(5), "half": torch.ones(2, dtype=torch.bfloat16), "none": torch.zeros(0)}
    save_weights(path, weights, {"kind": "tokenizer", "sizes": [1, 2]})
    loaded, header = load_weights(path, "tokenizer")
    assert header == {"kind": "tokenizer", "sizes": [1, 2]}
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << position % 8
    path.write_bytes(content)
    with pytest.raises(UserError, match="expected the weights of a tokenizer"):
        load_weights(path, "tokenizer")


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (-float("inf"), "infinity")])
def test_non_finite_weights_are_refused_by_name(value: float, name: str, tmp_path: Path) -> None:
    """In our files and in those of other projects."""
    weights = {"good": torch.ones(3), "steps": torch.ones(2, dtype=torch.int64), "bad": torch.tensor([1.0, value]).bfloat16()}
    save_weights(tmp_path / "own.safetensors", weights, {"kind": "prior"})
    torch.save(weights, tmp_path / "theirs.pth")
    for read in (lambda: load_weights(tmp_path / "own.safetensors", "prior"), lambda: read_weights(tmp_path / "theirs.pth")):
        with pytest.raises(UserError, match=rf"\.\w+: expected finite weights, found {name} in bad$"):
            read()


def test_out_of_memory_is_one_line_with_advice(capsys: pytest.CaptureFixture[str]) -> None:
    start(Compute(threads=1), oom_hint="take fewer")
    with pytest.raises(SystemExit) as ended:
        run_entry(lambda: print(torch.empty(1 << 60)))
    assert ended.value.code == 2
    assert re.fullmatch(r"error: out of memory \(.*allocate.*\); take fewer\n", capsys.readouterr().err)
