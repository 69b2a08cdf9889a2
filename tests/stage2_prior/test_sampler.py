"""Sampling by CUDA graphs, simulated: the codes of plain steps for every kind of prior, a replay a position, on the prior's own device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Sampling
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.generate import default_precision, generate, in_bfloat16, uniforms
from stage2_prior.priors.attention import KeyValueCache
from stage2_prior.priors.contract import FixedBatch
from stage2_prior.priors.cuda_graphs import Graphs
from stage2_prior.priors.pixelcnn import PixelCNN
from stage2_prior.sampler import Sampler
from tests.stage2_prior.priors.prior_kinds import KINDS, LAYOUTS, build, random_codes
from tests.stage2_prior.simulated_graphs import SimulatedCuda, simulated_cuda

__all__ = ["simulated_cuda"]

kinds = pytest.mark.parametrize("kind", [*KINDS, "levelwise"])
chosen = ("one level", "top and bottom", "residual")
layouts = pytest.mark.parametrize("layout", [LAYOUTS[name] for name in chosen], ids=chosen)


def equal(codes: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(codes, others, strict=True))


def spoil(state: Any) -> int:
    """NaN in all that steps keep from position to position, as a batch that went wrong would leave it; how many tensors that are."""
    if isinstance(state, Tensor):
        if state.dtype.is_floating_point:
            state.fill_(torch.nan)
        return int(state.dtype.is_floating_point)
    if isinstance(state, list | tuple):
        return sum(map(spoil, state))
    # Weights, and what is made of them.
    kept = {name: value for name, value in getattr(state, "__dict__", {}).items() if name not in ("_positions", "_kernels", "batch")}
    return 0 if isinstance(state, nn.Module | SequenceLayout) else sum(map(spoil, kept.values()))


@kinds
@layouts
def test_graphs_draw_the_codes_of_plain_steps(kind: str, layout: SequenceLayout, simulated_cuda: SimulatedCuda) -> None:
    """Guidance on a schedule, kept codes, labels or none, sizes that come and go; whatever NaN the batch before has left."""
    prior = build(kind, layout).double()
    sampler = Sampler(prior, graphs=True)
    rising = Sampling(guidance=2.5, guidance_schedule="cosine", temperature=0.8)
    kept = layout.grids_of(torch.arange(layout.length)[None] % 4 == 1)
    for number, (batch, config, keeps, labelled) in enumerate(
        [
            *((3, Sampling(guidance=2.0), False, True), (3, Sampling(guidance=-1.0), True, True), (3, Sampling(guidance=3.0), False, True)),
            *((2, rising, True, True), (2, rising, False, True), (2, Sampling(top_k=3, top_p=0.9, min_p=0.05), False, False)),
        ]
    ):
        given = (random_codes(layout, batch), kept) if keeps else ()
        labels, uniform = torch.arange(batch) if labelled else None, uniforms(number, torch.arange(batch), layout.length)
        assert equal(sampler(labels, uniform, config, *given), generate(prior, labels, uniform, config, *given))
        assert sampler._steps is not None
        assert spoil(sampler._steps._steps) > 0
    assert simulated_cuda.graphs


@kinds
@layouts
def test_steps_of_fixed_shape_have_the_logits_of_the_steps(kind: str, layout: SequenceLayout) -> None:
    """Also where each code is read by two rows, as under guidance."""
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
    """From the third batch on nothing is captured any more, and nothing runs outside of graphs but what precedes a level."""
    layout = LAYOUTS["top and bottom"]
    prior = build(kind, layout)
    sampler = Sampler(prior, graphs=True)
    for batch in range(3):
        before = sum(graph.replays for graph in simulated_cuda.graphs)
        captured = len(simulated_cuda.graphs)
        sampler(torch.arange(2), uniforms(batch, torch.arange(2), layout.length), Sampling(guidance=2.0))
    assert len(simulated_cuda.graphs) == captured
    assert sum(graph.replays for graph in simulated_cuda.graphs) - before == layout.length
    if kind == "transformer":
        assert captured == len(layout.grids)


@kinds
def test_what_is_not_finite_is_told_and_the_next_batch_is_drawn(kind: str, simulated_cuda: SimulatedCuda) -> None:
    layout = LAYOUTS["one level"]
    prior = build(kind, layout).double()
    sampler, labels, uniform = Sampler(prior, graphs=True), torch.arange(2), uniforms(0, torch.arange(2), layout.length)
    (weight, *_) = (parameter for name, parameter in prior.named_parameters() if name.endswith("label.weight"))
    good, config = weight.detach().clone(), Sampling(guidance=2.0)
    for _ in range(3):
        weight.data[1] = torch.nan
        with pytest.raises(UserError, match="finite"):
            sampler(labels, uniform, config)
        weight.data.copy_(good)
        assert equal(sampler(labels, uniform, config), generate(prior, labels, uniform, config))


def test_where_a_capture_fails_sampling_goes_on_without(
    simulated_cuda: SimulatedCuda, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = LAYOUTS["one level"]
    prior = build("transformer", layout).double()
    sampler, uniform = Sampler(prior, graphs=True), uniforms(0, torch.arange(2), layout.length)
    simulated_cuda.error = RuntimeError("operation not permitted\nwhen stream is capturing")
    for _ in range(2):
        assert equal(sampler(None, uniform, Sampling()), generate(prior, None, uniform, Sampling()))
    assert capsys.readouterr().out == "warning: sampling without CUDA graphs (RuntimeError: operation not permitted)\n"
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "Stream", lambda device: torch.zeros(1).view(2))
        assert equal(Sampler(prior, graphs=True)(None, uniform, Sampling()), generate(prior, None, uniform, Sampling()))
    assert "without CUDA graphs" in capsys.readouterr().out
    simulated_cuda.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        Sampler(prior, graphs=True)(None, uniform, Sampling())


def test_a_prior_with_nothing_but_steps_is_drawn_from_all_the_same(
    simulated_cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = LAYOUTS["top and bottom"]
    monkeypatch.setattr(PixelCNN, "fixed_steps", lambda *_: None)
    for kind in ("pixelcnn", "levelwise"):
        prior, uniform = build(kind, layout).double(), uniforms(0, torch.arange(2), layout.length)
        assert equal(Sampler(prior, graphs=True)(None, uniform, Sampling()), generate(prior, None, uniform, Sampling()))
        assert "does not support them" in capsys.readouterr().out
    assert not simulated_cuda.graphs


def test_graphs_are_captured_on_the_second_device(simulated_cuda: SimulatedCuda) -> None:
    """Whichever is current: stream and capture are of the device that is named, and other threads may go on allocating."""
    second, counter = torch.device("cuda", 1), torch.zeros(1)
    graphs = Graphs(second)

    def count() -> None:
        counter.add_(1)

    for runs in range(1, 4):
        graphs.run("count", count)
        assert counter.item() == runs
    (made, stream_device), (captured, options) = simulated_cuda.asked
    assert (made, stream_device, captured) == ("stream", second, "capture")
    assert (options["on"], options["stream"].device, options["capture_error_mode"]) == (second, second, "thread_local")
    assert [graph.replays for graph in simulated_cuda.graphs] == [2]


def test_a_captured_step_may_not_wait_for_the_host(simulated_cuda: SimulatedCuda) -> None:
    """What the simulation is worth: a step that reads its position, or one that leaves something in a variable, is found out."""
    position = torch.zeros(1, dtype=torch.int64)

    def waits() -> None:
        position.fill_(int(position) + 1)

    graphs = Graphs(torch.device("cuda", 0))
    graphs.run("waits", waits)
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.run("waits", waits)


@kinds
@layouts
@torch.no_grad()
def test_bfloat16_is_the_prior_in_fewer_bits(kind: str, layout: SequenceLayout) -> None:
    """Weights, keys and values have 16 bits, angles 32; logits are those of float32 to within their rounding, and codes are drawn."""
    prior = build(kind, layout)
    narrow = in_bfloat16(prior)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert all(buffer.dtype == torch.float32 for buffer in narrow.buffers() if buffer.dtype.is_floating_point)
    assert {parameter.dtype for parameter in prior.parameters()} == {torch.float32}
    caches = []
    plain = KeyValueCache.__init__

    def noted(self: KeyValueCache, *arguments: Any) -> None:
        plain(self, *arguments)
        caches.append(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(KeyValueCache, "__init__", noted)
        codes = generate(narrow, torch.arange(3), uniforms(0, torch.arange(3), layout.length), Sampling(guidance=1.5))
    assert caches or kind != "transformer"
    assert all(cache.keys.dtype == cache.values.dtype == torch.bfloat16 for cache in caches)
    assert all(0 <= int(level.min()) <= int(level.max()) < k for level, k in zip(codes, layout.num_codes, strict=True))
    for found, expected in zip(narrow(codes, torch.arange(3)), prior(codes, torch.arange(3)), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize(
    ("device", "has", "precision"), [("cpu", True, "float64"), ("cuda:1", True, "bfloat16"), ("cuda:1", False, "float32")]
)
def test_the_device_decides_on_the_precision(
    device: str, has: bool, precision: str, simulated_cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def supported(including_emulation: bool) -> bool:
        asked.append((simulated_cuda.current, including_emulation))
        return has

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert default_precision(torch.device(device)) == precision
    assert asked == ([] if device == "cpu" else [(torch.device(device), False)])
