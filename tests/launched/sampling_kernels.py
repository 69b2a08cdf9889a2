"""Checks sampling's Triton kernels in Triton's interpreter against PyTorch operators in float64; the interpreter needs its own process.

Prints as JSON the launches per code of a transformer of 12 layers. (The interpreter multiplies bfloat16 matrices wrongly, so the checks
use float16, which is compiled the same way.)
"""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from stage1_vqvae.attention import rotations
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.conditions.classes import Classes
from stage2_prior.draw import StepwiseSampling, draw, guided, uniforms, warp
from stage2_prior.draw_kernel import draw_code
from stage2_prior.priors import attention
from stage2_prior.priors.attention import _ATTEND, CachedAttention
from stage2_prior.priors.blocks import _GATE
from stage2_prior.priors.contract import Keep
from stage2_prior.priors.levelwise import build_level
from stage2_prior.priors.step_kernels import attend, gate
from stage2_prior.priors.stepwise import FixedBatch, StepwisePrior
from stage2_prior.priors.transformer import _EMBED, Transformer, TransformerPart
from stage2_prior.sampler import _DRAW, Sampler
from training.kernels import Kernel

_CLASSES = Classes(names=["0", "1", "2"])
# Dispatched operators that launch nothing: views and allocations.
_NO_LAUNCH = {"view", "t", "transpose", "slice", "select", "unsqueeze", "squeeze", "detach", "alias", "expand", "split_with_sizes"} | {
    *("empty", "new_empty", "_unsafe_view", "permute", "split", "as_strided", "unbind", "view_as_complex", "view_as_real", "promote_types")
}
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "gate"}


class Launches(TorchDispatchMode):
    """Counts the launches of a GPU: operators by name, and Triton kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        self.counts.update([name] if name not in _NO_LAUNCH else [])
        return func(*args, **(kwargs or {}))


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """Count launches, without running the Triton kernels: their results do not matter here."""
    plain = interpreter.GridExecutor.__call__

    def launch(self: Any, *_: Any, **__: Any) -> None:
        mode.counts[self.fn.__name__.strip("_")] += 1

    mode = Launches()
    interpreter.GridExecutor.__call__ = launch
    try:
        with mode:
            yield mode.counts
    finally:
        interpreter.GridExecutor.__call__ = plain


@contextmanager
def reads_of(*tensors: Tensor) -> Iterator[Counter[int]]:
    """Count the bytes that kernels load from each of these tensors, by its index."""
    plain, counts = interpreter.InterpreterBuilder.create_masked_load, Counter[int]()

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        addresses = pointers.data[mask.data.astype(bool)]
        for number, tensor in enumerate(tensors):
            start, size = tensor.data_ptr(), tensor.element_size()
            counts[number] += size * int(((addresses >= start) & (addresses < start + tensor.numel() * size)).sum())
        return plain(self, pointers, mask, *rest)

    interpreter.InterpreterBuilder.create_masked_load = load
    try:
        yield counts
    finally:
        interpreter.InterpreterBuilder.create_masked_load = plain


@contextmanager
def kernels_on_the_cpu(usable: bool = True) -> Iterator[None]:
    """Run Triton kernels on CPU tensors; or, not `usable`, behave as without Triton."""
    plain, Kernel.usable = Kernel.usable, lambda self, device: usable and not self._failed  # type: ignore[method-assign]
    try:
        yield
    finally:
        Kernel.usable = plain  # type: ignore[method-assign]
    assert not any(kernel._failed for kernel in (_ATTEND, _EMBED, _GATE, _DRAW))


def check_attention() -> None:
    """Odd head widths and batches at the first, some and the last position; unfilled slots hold NaN, which must not be read.

    Several heads have gains.
    """
    for (rows, heads, width, length), dtype in itertools.product(
        [(3, 1, 8, 5), (1, 1, 64, 41), (1, 3, 12, 18), (1, 1, 96, 18)], [torch.float32, torch.bfloat16]
    ):
        attention = CachedAttention(heads * width, heads, gain=heads > 1).to(dtype)
        if attention.gain is not None:
            nn.init.normal_(attention.gain)
        # Queries and keys have their own where there are several heads.
        angles = rotations(torch.rand(*((length, 2, 2) if heads > 1 else (length, 2))) * 9, width).float()
        cache, exact = attention.new_cache(rows, length), copy.deepcopy(attention).double()
        reference = exact.new_cache(rows, length)
        # Reduces the layer to attention alone.
        exact.qkv.weight, exact.out.weight = (nn.Parameter(torch.eye(size).double()) for size in (3 * heads * width, heads * width))
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
        for position in range(length):
            projected = (torch.randn(rows, 3 * heads * width) * 3).to(dtype)
            zeros = torch.zeros(rows, heads * width).double()
            expected = exact.step_(zeros, projected.double(), angles.double(), reference, position)
            if position not in (0, 1, length // 2, length - 1):
                for ours, theirs in ((cache.keys, reference.keys), (cache.values, reference.values)):
                    ours[:, :, position] = theirs[:, :, position]
                continue
            with reads_of(cache.keys, cache.values) as read:
                result = attend(projected, angles, cache.keys, cache.values, torch.tensor([position]), attention.gain)
            tolerance = 1e-5 if dtype == torch.float32 else 0.03
            assert torch.allclose(result.double(), expected, atol=tolerance, rtol=tolerance), (rows, heads, width, position, dtype)
            for ours, theirs in ((cache.keys, reference.keys), (cache.values, reference.values)):
                assert torch.allclose(ours[:, :, : position + 1].double(), theirs[:, :, : position + 1], atol=tolerance, rtol=tolerance)
                assert ours[:, :, position + 1 :].isnan().all()
            # Exactly the keys and the values of the earlier positions.
            assert [read[0], read[1]] == [rows * heads * position * width * projected.element_size()] * 2


def check_gate() -> None:
    for rows, width, hidden in ((1, 16, 128), (5, 48, 128), (130, 20, 256)):
        x, gates, ups = (torch.randn(*shape).half() for shape in ((rows, width), (hidden, width), (hidden, width)))
        expected = torch.nn.functional.silu(x.double() @ gates.double().T) * (x.double() @ ups.double().T)
        assert torch.allclose(gate(x, gates, ups).double(), expected, atol=0.02, rtol=0.005)


def check_draw() -> None:
    """Also at uniforms of 0 and just below 1; codes of zero probability are never drawn; kept codes stay; NaN is reported."""
    batch = 9
    for num_codes, scale, temperature in itertools.product((1, 7, 4099), (None, 1.7), (0.0, 0.7)):
        rows = batch if scale is None else 2 * batch
        logits = torch.randn(rows, num_codes) * 4
        logits[:, : num_codes - 1 : 3] = -torch.inf
        logits = logits if scale is None else logits.nan_to_num(neginf=-1e5)
        uniform = torch.rand(batch, 2, dtype=torch.float64)
        uniform[:3], uniform[3:6] = 0, 1 - 2**-53
        wide = logits.double() if scale is None else guided(logits[:batch].double(), logits[batch:].double(), scale)
        probabilities = warp(wide, StepwiseSampling(temperature=temperature))
        sequences, failed = torch.full((batch, 2), -1), torch.zeros(batch, dtype=torch.int32)
        settings = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([temperature or 1.0], dtype=torch.float64), temperature == 0
        scales = None if scale is None else torch.tensor([9, scale], dtype=torch.float64)
        for position in (0, 1):
            draw_code(logits, uniform, scales, *settings, torch.tensor([position]), sequences, failed)
        assert (sequences[:, 0] == -1).all()
        codes = sequences[:, 1:]
        assert (probabilities.gather(1, codes) > 0).all()
        cumulative = probabilities.cumsum(1)
        above = cumulative.gather(1, codes)
        below = above - probabilities.gather(1, codes)
        assert ((below <= uniform[:, 1:] + 1e-12) & (above >= uniform[:, 1:] - 1e-12)).all() or temperature == 0
        # Just below 1 the order of summation decides among codes of negligible probability.
        exact = torch.arange(batch) if temperature == 0 else torch.tensor([0, 1, 2, *range(6, batch)])
        assert torch.equal(codes[exact, 0], draw(probabilities, uniform[:, 1])[exact])
        assert not failed.any()
        logits[3, -1] = torch.nan
        draw_code(logits, uniform, scales, *settings, torch.tensor([1]), sequences, failed)
        assert failed.tolist() == [int(row == 3) for row in range(batch)]
        assert ((sequences[:, 1] >= 0) & (sequences[:, 1] < num_codes)).all()


def small_prior(layout: SequenceLayout, conditioned: bool = False) -> StepwisePrior:
    torch.manual_seed(0)
    part = TransformerPart(layers=1, width=24, heads=2)
    prior = build_level(part, layout, 1, _CLASSES) if conditioned else part.build(layout, _CLASSES)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return prior.eval().requires_grad_(False)


def check_samples() -> None:
    """All kernels together draw the codes of eager float64 steps: two levels, guidance, an odd batch, kept codes."""
    layout = SequenceLayout([(1, 2), (1, 3)], [4, 6])
    prior = small_prior(layout)
    labels, config = torch.arange(3), StepwiseSampling(guidance=2.0, guidance_schedule="linear", temperature=0.8)
    codes = tuple(torch.randint(k, (3, *grid)) for grid, k in zip(layout.grids, layout.num_codes, strict=True))
    keep_masks = layout.grids_of(torch.arange(layout.length)[None] % 3 == 1)
    uniform = uniforms(0, torch.arange(3), layout.length)
    expected = copy.deepcopy(prior).double().sample(labels, uniform, config, Keep(codes, keep_masks))
    with kernels_on_the_cpu():
        samples = Sampler(prior, graphs=True)(labels, uniform, config, Keep(codes, keep_masks))
    assert all(torch.equal(a, b) for a, b in zip(samples, expected, strict=True))


def check_steps_below_a_level() -> None:
    """Logits of a transformer conditioned on a level above, against its full forward pass in float64."""
    layout = SequenceLayout([(1, 2), (1, 3)], [4, 6])
    prior = small_prior(layout, conditioned=True)
    codes = tuple(torch.randint(k, (3, *grid)) for grid, k in zip(layout.grids, layout.num_codes, strict=True))
    labels = torch.tensor([2, 0, 3])
    (expected,) = copy.deepcopy(prior).double().logits(codes, labels)
    batch = FixedBatch(codes[1].flatten(1), labels, torch.tensor([7]), first=7)
    with kernels_on_the_cpu():
        steps = prior.fixed_steps(batch)
        assert steps is not None
        for position in range(3):
            steps.prepare(position, codes[:1])
            assert torch.allclose(steps.logits(steps.phase(position)).double(), expected[:, position], atol=1e-4, rtol=1e-4)
            batch.position.add_(1)


def count_launches(prior: Transformer, config: StepwiseSampling, usable: bool) -> Counter[str]:
    """Count launches per code at batch size 1, from the second position on."""
    with kernels_on_the_cpu(usable):
        sampler = Sampler(prior, graphs=True)
        steps = sampler._steps_for(torch.zeros(1), 1, config)
        steps._steps.prepare(0)
        steps._to_draw.fill_(1)
        steps._position.fill_(1)
        with launches() as counts:
            steps._advance(0)
    return counts


def count_eager_launches(prior: Transformer, config: StepwiseSampling) -> Counter[str]:
    """Count launches per code of eager sampling, as the difference between sequences of 3 and 2 codes."""
    totals = []
    for length in (2, 3):
        prior.layout = SequenceLayout([(1, length)], prior.layout.num_codes)
        with launches() as counts:
            prior.sample(torch.zeros(1, dtype=torch.int64), uniforms(0, torch.arange(1), length), config)
        totals.append(counts)
    return totals[1] - totals[0]


def main() -> None:
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    # Graphs replaced by eager calls.
    import stage2_prior.sampler as sampling

    class EagerGraphs:
        def __init__(self, device: torch.device) -> None:
            pass

        def run(self, _key: object, function: Any) -> None:
            function()

    sampling.Graphs = EagerGraphs  # type: ignore[misc, assignment]
    attention._weight_first = lambda _: False  # as on a GPU
    for check in (check_attention, check_gate, check_draw, check_samples, check_steps_below_a_level):
        check()
    # LlamaGen-B's number of layers; width and codebook size do not change the number of launches.
    prior = TransformerPart(layers=12, width=16, heads=1).build(SequenceLayout([(1, 4)], [64]), _CLASSES).eval().requires_grad_(False)
    for parameter in prior.parameters():
        parameter.data = parameter.data.half()
    guidance = StepwiseSampling(guidance=1.5, temperature=0.9)
    limits = StepwiseSampling(guidance=1.5, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01)
    counts = {
        "kernels": count_launches(prior, guidance, True),
        "kernels, top_k, top_p, min_p": count_launches(prior, limits, True),
        "no Triton": count_launches(prior, guidance, False),
        "eager": count_eager_launches(prior, guidance),
    }
    print(
        json.dumps(
            {
                name: {
                    "products": sum(count for operator, count in operators.items() if operator in _PRODUCTS),
                    "others": sum(count for operator, count in operators.items() if operator not in _PRODUCTS),
                    "by operator": operators,
                }
                for name, operators in counts.items()
            }
        )
    )


if __name__ == "__main__":
    main()
