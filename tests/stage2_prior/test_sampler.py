"""Sampling by simulated CUDA graphs: the codes of eager steps for every kind of prior, one replay per position, on the prior's device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.errors import UserError
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.draw import StepwiseSampling, uniforms
from stage2_prior.priors.attention import KeyValueCache
from stage2_prior.priors.contract import Keep
from stage2_prior.priors.cuda_graphs import Graphs
from stage2_prior.priors.pixelcnn import PixelCNN
from stage2_prior.priors.stepwise import FixedBatch
from stage2_prior.sampler import Sampler, default_precision, in_bfloat16
from tests.stage2_prior.priors.prior_kinds import KINDS, LAYOUTS, build, random_codes
from tests.stage2_prior.simulated_graphs import SimulatedCuda, simulated_cuda

__all__ = ["simulated_cuda"]

kinds = pytest.mark.parametrize("kind", [*KINDS, "levelwise"])
layout_names = ("one level", "top and bottom", "residual")
layouts = pytest.mark.parametrize("layout", [LAYOUTS[name] for name in layout_names], ids=layout_names)


def equal(codes: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(codes, others, strict=True))


def spoil(state: Any) -> int:
    """Fill all state that steps keep between positions with NaN, as a failed batch leaves it; returns the number of tensors."""
    if isinstance(state, Tensor):
        if state.dtype.is_floating_point:
            state.fill_(torch.nan)
        return int(state.dtype.is_floating_point)
    if isinstance(state, list | tuple):
        return sum(map(spoil, state))
    # Weights and tensors derived from them are no state.
    attributes = {
        name: value for name, value in getattr(state, "__dict__", {}).items() if name not in ("embedded_positions", "_kernels", "batch")
    }
    return 0 if isinstance(state, nn.Module | SequenceLayout) else sum(map(spoil, attributes.values()))


@kinds
@layouts
def test_graphs_draw_the_codes_of_eager_steps(kind: str, layout: SequenceLayout, simulated_cuda: SimulatedCuda) -> None:
    """With scheduled guidance, kept codes before and between drawn ones, labels or none, changing batch sizes, and NaN left by the
    previous batch.
    """
    prior = build(kind, layout).double()
    sampler = Sampler(prior, graphs=True)
    rising = StepwiseSampling(guidance=2.5, guidance_schedule="cosine", temperature=0.8)
    positions = torch.arange(layout.length)[None]
    mask = layout.grids_of((positions < 3) | (positions % 4 == 1))
    two, against, three = (StepwiseSampling(guidance=guidance) for guidance in (2.0, -1.0, 3.0))
    limited = StepwiseSampling(top_k=3, top_p=0.9, min_p=0.05)
    for number, (batch, config, with_kept, labelled) in enumerate(
        [
            *((3, two, False, True), (3, against, True, True), (3, three, False, True)),
            *((2, rising, True, True), (2, rising, False, True), (2, limited, False, False)),
        ]
    ):
        keep = Keep(random_codes(layout, batch), mask) if with_kept else None
        labels, uniform = torch.arange(batch) if labelled else None, uniforms(number, torch.arange(batch), layout.length)
        assert equal(sampler(labels, uniform, config, keep), prior.sample(labels, uniform, config, keep))
        assert sampler._steps is not None
        assert spoil(sampler._steps._steps) > 0
    assert simulated_cuda.graphs


@kinds
@layouts
def test_static_shape_steps_have_the_logits_of_eager_steps(kind: str, layout: SequenceLayout) -> None:
    """Also where two rows share their codes, as under guidance."""
    prior = build(kind, layout).double()
    codes, labels = random_codes(layout, 3), torch.tensor([0, 4, 2, 5, 5, 5])
    batch = FixedBatch(layout.flat(codes), labels, torch.zeros(1, dtype=torch.int64))
    cache, steps = prior.new_cache(6), prior.fixed_steps(batch)
    assert steps is not None
    with torch.no_grad():
        for position in range(layout.length):
            before = batch.shared(batch.sequences[:, position - 1]) if position else None
            steps.prepare(position)
            assert torch.allclose(steps.logits(steps.phase(position)), prior.step(before, labels, cache), atol=1e-12)
            batch.position.add_(1)


@kinds
def test_a_position_is_one_replay(kind: str, simulated_cuda: SimulatedCuda) -> None:
    """From the third batch on nothing is captured, and only the preparation of a level runs outside graphs."""
    layout = LAYOUTS["top and bottom"]
    prior = build(kind, layout)
    sampler = Sampler(prior, graphs=True)
    for batch in range(3):
        before = sum(graph.replays for graph in simulated_cuda.graphs)
        captured = len(simulated_cuda.graphs)
        sampler(torch.arange(2), uniforms(batch, torch.arange(2), layout.length), StepwiseSampling(guidance=2.0))
    assert len(simulated_cuda.graphs) == captured
    assert sum(graph.replays for graph in simulated_cuda.graphs) - before == layout.length
    if kind == "transformer":
        assert captured == len(layout.grids)
    # None after the last drawn code. Before the first, a transformer reads all kept codes at once, other priors whole levels.
    keep = Keep(random_codes(layout, 2), layout.grids_of(torch.tensor([[True] * 4 + [False] * 2 + [True] * 4])))
    before = sum(graph.replays for graph in simulated_cuda.graphs)
    sampler(torch.arange(2), uniforms(0, torch.arange(2), layout.length), StepwiseSampling(guidance=2.0), keep)
    assert sum(graph.replays for graph in simulated_cuda.graphs) - before == (2 if kind == "transformer" else 4)


@kinds
def test_non_finite_probabilities_are_reported_and_the_next_batch_is_drawn(kind: str, simulated_cuda: SimulatedCuda) -> None:
    layout = LAYOUTS["one level"]
    prior = build(kind, layout).double()
    sampler, labels, uniform = Sampler(prior, graphs=True), torch.arange(2), uniforms(0, torch.arange(2), layout.length)
    (weight, *_) = (parameter for name, parameter in prior.named_parameters() if name.endswith("label.weight"))
    good, config = weight.detach().clone(), StepwiseSampling(guidance=2.0)
    for _ in range(3):
        weight.data[1] = torch.nan
        with pytest.raises(UserError, match="finite"):
            sampler(labels, uniform, config)
        weight.data.copy_(good)
        assert equal(sampler(labels, uniform, config), prior.sample(labels, uniform, config))


def test_sampling_continues_without_graphs_if_a_capture_fails(
    simulated_cuda: SimulatedCuda, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = LAYOUTS["one level"]
    prior = build("transformer", layout).double()
    sampler, uniform = Sampler(prior, graphs=True), uniforms(0, torch.arange(2), layout.length)
    simulated_cuda.error = RuntimeError("operation not permitted\nwhen stream is capturing")
    for _ in range(2):
        assert equal(sampler(None, uniform, StepwiseSampling()), prior.sample(None, uniform, StepwiseSampling()))
    assert capsys.readouterr().out == "warning: sampling without CUDA graphs (RuntimeError: operation not permitted)\n"
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "Stream", lambda device: torch.zeros(1).view(2))
        assert equal(Sampler(prior, graphs=True)(None, uniform, StepwiseSampling()), prior.sample(None, uniform, StepwiseSampling()))
    assert "without CUDA graphs" in capsys.readouterr().out
    simulated_cuda.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        Sampler(prior, graphs=True)(None, uniform, StepwiseSampling())


def test_a_prior_without_static_shape_steps_is_sampled_eagerly(
    simulated_cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = LAYOUTS["top and bottom"]
    monkeypatch.setattr(PixelCNN, "fixed_steps", lambda *_: None)
    for kind in ("pixelcnn", "levelwise"):
        prior, uniform = build(kind, layout).double(), uniforms(0, torch.arange(2), layout.length)
        assert equal(Sampler(prior, graphs=True)(None, uniform, StepwiseSampling()), prior.sample(None, uniform, StepwiseSampling()))
        assert "does not support them" in capsys.readouterr().out
    assert not simulated_cuda.graphs


def test_graphs_are_captured_on_the_second_device(simulated_cuda: SimulatedCuda) -> None:
    """Stream and capture use the named device, whichever is current; other threads may allocate meanwhile."""
    second, counter = torch.device("cuda", 1), torch.zeros(1)
    graphs = Graphs(second)

    def count() -> None:
        counter.add_(1)

    for runs in range(1, 4):
        graphs.run("count", count)
        assert counter.item() == runs
    (created, stream_device), (captured, options) = simulated_cuda.requests
    assert (created, stream_device, captured) == ("stream", second, "capture")
    assert (options["on"], options["stream"].device, options["capture_error_mode"]) == (second, second, "thread_local")
    assert [graph.replays for graph in simulated_cuda.graphs] == [2]


def test_a_captured_step_may_not_synchronise_with_the_host(simulated_cuda: SimulatedCuda) -> None:
    """The simulation rejects a step that reads its position on the host."""
    position = torch.zeros(1, dtype=torch.int64)

    def synchronise() -> None:
        position.fill_(int(position) + 1)

    graphs = Graphs(torch.device("cuda", 0))
    graphs.run("waits", synchronise)
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.run("waits", synchronise)


@kinds
@layouts
@torch.no_grad()
def test_bfloat16_is_the_prior_in_fewer_bits(kind: str, layout: SequenceLayout) -> None:
    """Weights, keys and values have 16 bits, rotary angles 32; logits agree with float32 to rounding, and codes are valid."""
    prior = build(kind, layout)
    narrow = in_bfloat16(prior)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert all(buffer.dtype == torch.float32 for buffer in narrow.buffers() if buffer.dtype.is_floating_point)
    assert {parameter.dtype for parameter in prior.parameters()} == {torch.float32}
    caches = []
    plain = KeyValueCache.__init__

    def recorded(self: KeyValueCache, *arguments: Any) -> None:
        plain(self, *arguments)
        caches.append(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(KeyValueCache, "__init__", recorded)
        codes = narrow.sample(torch.arange(3), uniforms(0, torch.arange(3), layout.length), StepwiseSampling(guidance=1.5))
    assert caches or kind != "transformer"
    assert all(cache.keys.dtype == cache.values.dtype == torch.bfloat16 for cache in caches)
    assert all(0 <= int(level.min()) <= int(level.max()) < k for level, k in zip(codes, layout.num_codes, strict=True))
    for logits, expected in zip(narrow.logits(codes, torch.arange(3)), prior.logits(codes, torch.arange(3)), strict=True):
        assert logits.dtype == torch.bfloat16
        assert (logits.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize(
    ("device", "supports_bf16", "precision"), [("cpu", True, "float64"), ("cuda:1", True, "bfloat16"), ("cuda:1", False, "float32")]
)
def test_the_default_precision_depends_on_the_device(
    device: str, supports_bf16: bool, precision: str, simulated_cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = []

    def supported(including_emulation: bool) -> bool:
        queries.append((simulated_cuda.current, including_emulation))
        return supports_bf16

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert default_precision(torch.device(device)) == precision
    assert queries == ([] if device == "cpu" else [(torch.device(device), False)])
