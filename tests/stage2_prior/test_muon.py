"""Muon against singular value decompositions, torch's own Muon, and AdamW."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from stage2_prior import muon as muon_module
from stage2_prior.muon import muon, orthogonalised
from training.optimizer import OptimizerState, adamw
from training.schedule import set_learning_rate


class Net(nn.Module):
    """A layer with a fused map, an embedding before it and a head after it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token, self.qkv, self.out = nn.Embedding(9, 8), nn.Linear(8, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.out(self.qkv(self.token(tokens)).tanh()))


def take_steps(net: Net, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> Net:
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        tokens = torch.randint(9, (32,), generator=draws)
        nn.functional.cross_entropy(net(tokens), (3 * tokens + 1) % 9).backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    matrices = torch.randn(5, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    rotated = left.mT @ orthogonalised(matrices) @ right.mT
    diagonal = rotated.diagonal(dim1=1, dim2=2)
    assert torch.allclose(rotated, torch.diag_embed(diagonal), atol=1e-9)
    # Only values above 2 % of the norm: five steps cannot raise far smaller ones.
    raised = diagonal[values > 0.02 * values.norm(dim=1, keepdim=True)]
    assert float(raised.min()) > 0.6
    assert float(raised.max()) < 1.3


def test_matrices_step_as_by_torchs_muon_and_other_weights_as_by_adamw() -> None:
    """Equal to the two or three digits of torch's bfloat16; a fused map counts as three matrices."""
    ours, theirs, start = Net(), Net(), Net()
    optimizer, adamw_reference = muon(ours, 1e-3, 0.1, beta2=0.95), adamw(theirs, 1e-3, 0.1, beta2=0.95)
    separate = [nn.Parameter(part.detach().clone()) for part in theirs.qkv.weight.chunk(3)]
    muon_reference = torch.optim.Muon([*separate, theirs.out.weight], lr=1e-2, weight_decay=0.01, momentum=0.95, adjust_lr_fn="original")
    draws = torch.Generator().manual_seed(2)
    for _ in range(3):
        gradients = {name: torch.randn(weight.shape, generator=draws) for name, weight in ours.named_parameters()}
        for net in (ours, theirs):
            for name, weight in net.named_parameters():
                weight.grad = gradients[name].clone()
        for part, gradient in zip(separate, gradients["qkv.weight"].chunk(3), strict=True):
            part.grad = gradient.clone()
        optimizer.step()
        muon_reference.step()
        theirs.qkv.weight.grad = theirs.out.weight.grad = None
        adamw_reference.step()
    theirs.qkv.weight.data = torch.cat([part.data for part in separate])
    for name, weight in ours.state_dict().items():
        moved, expected = weight - start.state_dict()[name], theirs.state_dict()[name] - start.state_dict()[name]
        tolerance = 0.03 if name in ("qkv.weight", "out.weight") else 0.0
        assert float((moved - expected).norm()) <= tolerance * float(expected.norm()), name


def test_embeddings_and_head_step_with_a_learning_rate_of_their_own() -> None:
    """Also where the rate follows a schedule: AdamW's first step is as long as its rate."""
    net, plain = Net(), Net()
    for rate in (1e-3, 4e-4):
        before = [copy.deepcopy(model.state_dict()) for model in (net, plain)]
        optimizers = muon(net, 1e-3, 0.0, beta2=0.95, embedding_lr=5e-3), muon(plain, 1e-3, 0.0, beta2=0.95)
        for model, optimizer in zip((net, plain), optimizers, strict=True):
            set_learning_rate(optimizer, rate)
            take_steps(model, optimizer, 1)
        for name, weight in net.state_dict().items():
            moved, without = weight - before[0][name], plain.state_dict()[name] - before[1][name]
            if name in ("token.weight", "head.weight", "head.bias"):
                assert moved.abs().max().item() == pytest.approx(5 * rate, rel=1e-3)
                assert without.abs().max().item() == pytest.approx(rate, rel=1e-3)
            elif rate == 1e-3:  # from the same weights
                assert torch.equal(moved, without)


def test_muon_resumes_bit_for_bit() -> None:
    uninterrupted, resumed = Net(), Net()
    take_steps(uninterrupted, optimizer := muon(uninterrupted, 1e-2, 0.1, beta2=0.95), 4)
    take_steps(resumed, first := muon(resumed, 1e-2, 0.1, beta2=0.95), 4)
    second = muon(resumed, 1e-2, 0.1, beta2=0.95)
    OptimizerState(resumed, second).load_state_dict(copy.deepcopy(OptimizerState(resumed, first).state_dict()))
    take_steps(uninterrupted, optimizer, 3, seed=1)
    take_steps(resumed, second, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12)])
def test_products_in_bfloat16_orthogonalise_as_well(shape: tuple[int, int]) -> None:
    """The result differs by rounding, but its singular values lie where those of the exact iteration do."""
    matrices = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1))
    exact, rounded = orthogonalised(matrices), orthogonalised(matrices, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    difference = (rounded.float() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert float(difference.max()) < 0.1
    assert torch.allclose(torch.linalg.svdvals(rounded.float()), torch.linalg.svdvals(exact), atol=0.05)


def test_weights_and_moments_stay_float32_with_bfloat16_products() -> None:
    start, exact, net = Net(), Net(), Net()
    optimizer = muon(net, 1e-2, 0.1, 0.95, products=torch.bfloat16)
    for model, model_optimizer in ((net, optimizer), (exact, muon(exact, 1e-2, 0.1, 0.95))):
        draws = torch.Generator().manual_seed(3)
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=draws)
        model_optimizer.step()
    assert {moment.dtype for state in OptimizerState(net, optimizer).state_dict().values() for moment in state.values()} == {torch.float32}
    for name, weight in net.state_dict().items():
        assert weight.dtype == torch.float32
        moved, expected = weight - start.state_dict()[name], exact.state_dict()[name] - start.state_dict()[name]
        tolerance = 0.1 if name in ("qkv.weight", "out.weight") else 0.0
        assert float((moved - expected).norm()) <= tolerance * float(expected.norm()), name


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_matrices_are_divided_among_any_number_of_ranks(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five weights of three matrices each: the parts that the ranks send make up the result of one process."""
    weights = torch.randn(5, 18, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sent: list[Tensor] = []

    def gather(output: Tensor, rank_part: Tensor) -> None:
        sent.append(rank_part)
        output.zero_()

    for rank in range(processes):
        ranks = SimpleNamespace(get_world_size=lambda: processes, get_rank=lambda rank=rank: rank, all_gather_into_tensor=gather)
        monkeypatch.setattr(muon_module, "dist", ranks)
        muon_module._orthogonalise_replicated(weights, 6, None)
    assert {len(rank_part) for rank_part in sent} == {-(-15 // processes)}
    expected = orthogonalised(weights.view(15, 6, 4))
    assert torch.allclose(torch.cat(sent)[:15], expected, rtol=1e-10)
    ranks.all_gather_into_tensor = lambda output, _: output.copy_(torch.cat(sent))
    assert torch.allclose(muon_module._orthogonalise_replicated(weights, 6, None), expected.view(5, 18, 4), rtol=1e-10)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_steps_with_overflowed_gradients_are_skipped(name: str) -> None:
    """By fp16's gradient scaler; AdamW's fused kernel tests for overflow itself."""
    net = Net()
    optimizer = {"adamw": adamw, "muon": muon}[name](net, 1e-2, 0.1, 0.95, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflowed in (False, True):
        before = copy.deepcopy(net.state_dict())
        scaler.scale(net(torch.arange(9)).square().sum() * (float("inf") if overflowed else 1.0)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        same = [torch.equal(weight, before[key]) for key, weight in net.state_dict().items()]
        assert all(same) if overflowed else not any(same[:4])
    assert scaler.get_scale() == 2.0


def test_loaded_step_counts_are_on_the_device_of_the_kernel() -> None:
    """Checkpoints hold them on the host; the meta device shows where they are loaded to."""
    net = Net()
    optimizer = adamw(net, 1e-2, 0.1, 0.95)
    saved = copy.deepcopy(OptimizerState(take_steps(net, optimizer, 1), optimizer).state_dict())
    with torch.device("meta"):
        on_meta = Net()
    other = adamw(on_meta, 1e-2, 0.1, 0.95)
    for fused, device in ((True, "meta"), (None, "cpu")):
        for group in other.param_groups:
            group["fused"] = fused
        OptimizerState(on_meta, other).load_state_dict(saved)
        assert {state["step"].device.type for state in other.state.values()} == {device}
        assert {state["exp_avg"].device.type for state in other.state.values()} == {"meta"}
