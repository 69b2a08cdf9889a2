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


class Net(nn.Module):
    """A layer with a fused map, an embedding before it and a head after it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token, self.qkv, self.out = nn.Embedding(9, 8), nn.Linear(8, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.out(self.qkv(self.token(tokens)).tanh()))


def stepped(net: Net, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> Net:
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        tokens = torch.randint(9, (32,), generator=draws)
        nn.functional.cross_entropy(net(tokens), (3 * tokens + 1) % 9).backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrices = torch.randn(5, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    found = left.mT @ orthogonalised(matrices) @ right.mT
    diagonal = found.diagonal(dim1=1, dim2=2)
    assert torch.allclose(found, torch.diag_embed(diagonal), atol=1e-9)
    # What began above a hundredth of the norm; five steps cannot raise what is far smaller.
    raised = diagonal[values > 0.02 * values.norm(dim=1, keepdim=True)]
    assert float(raised.min()) > 0.6
    assert float(raised.max()) < 1.3


def test_matrices_move_as_torchs_muon_moves_them_and_the_rest_as_adamw_does() -> None:
    """To the two or three digits of its bfloat16; a fused map as three matrices."""
    ours, theirs, start = Net(), Net(), Net()
    optimizer, rest = muon(ours, 1e-3, 0.1, beta2=0.95), adamw(theirs, 1e-3, 0.1, beta2=0.95)
    separate = [nn.Parameter(part.detach().clone()) for part in theirs.qkv.weight.chunk(3)]
    reference = torch.optim.Muon([*separate, theirs.out.weight], lr=1e-2, weight_decay=0.01, momentum=0.95, adjust_lr_fn="original")
    draws = torch.Generator().manual_seed(2)
    for _ in range(3):
        gradients = {name: torch.randn(weight.shape, generator=draws) for name, weight in ours.named_parameters()}
        for net in (ours, theirs):
            for name, weight in net.named_parameters():
                weight.grad = gradients[name].clone()
        for part, gradient in zip(separate, gradients["qkv.weight"].chunk(3), strict=True):
            part.grad = gradient.clone()
        optimizer.step()
        reference.step()
        theirs.qkv.weight.grad = theirs.out.weight.grad = None
        rest.step()
    theirs.qkv.weight.data = torch.cat([part.data for part in separate])
    for name, weight in ours.state_dict().items():
        moved, expected = weight - start.state_dict()[name], theirs.state_dict()[name] - start.state_dict()[name]
        tolerance = 0.03 if name in ("qkv.weight", "out.weight") else 0.0
        assert float((moved - expected).norm()) <= tolerance * float(expected.norm()), name


def test_it_resumes_bit_for_bit() -> None:
    whole, half = Net(), Net()
    stepped(whole, optimizer := muon(whole, 1e-2, 0.1, beta2=0.95), 4)
    stepped(half, first := muon(half, 1e-2, 0.1, beta2=0.95), 4)
    second = muon(half, 1e-2, 0.1, beta2=0.95)
    OptimizerState(half, second).load_state_dict(copy.deepcopy(OptimizerState(half, first).state_dict()))
    stepped(whole, optimizer, 3, seed=1)
    stepped(half, second, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), half.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12)])
def test_products_in_bfloat16_orthogonalise_as_well(shape: tuple[int, int]) -> None:
    """Another matrix by its few digits, and no worse a one: its singular values lie where those of the exact iteration do."""
    matrices = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1))
    exact, rounded = orthogonalised(matrices), orthogonalised(matrices, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    difference = (rounded.float() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert float(difference.max()) < 0.1
    assert torch.allclose(torch.linalg.svdvals(rounded.float()), torch.linalg.svdvals(exact), atol=0.05)


def test_weights_and_moments_stay_float32_where_products_do_not() -> None:
    start, exact, net = Net(), Net(), Net()
    optimizer = muon(net, 1e-2, 0.1, 0.95, products=torch.bfloat16)
    for model, by in ((net, optimizer), (exact, muon(exact, 1e-2, 0.1, 0.95))):
        draws = torch.Generator().manual_seed(3)
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=draws)
        by.step()
    assert {moment.dtype for state in OptimizerState(net, optimizer).state_dict().values() for moment in state.values()} == {torch.float32}
    for name, weight in net.state_dict().items():
        assert weight.dtype == torch.float32
        moved, expected = weight - start.state_dict()[name], exact.state_dict()[name] - start.state_dict()[name]
        tolerance = 0.1 if name in ("qkv.weight", "out.weight") else 0.0
        assert float((moved - expected).norm()) <= tolerance * float(expected.norm()), name


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_matrices_are_shared_out_over_any_number_of_processes(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five weights of three matrices each, which no number of them divides: what the processes send makes up what one would compute."""
    weights = torch.randn(5, 18, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sent: list[Tensor] = []

    def gather(found: Tensor, own: Tensor) -> None:
        sent.append(own)
        found.zero_()

    for rank in range(processes):
        ranks = SimpleNamespace(get_world_size=lambda: processes, get_rank=lambda rank=rank: rank, all_gather_into_tensor=gather)
        monkeypatch.setattr(muon_module, "dist", ranks)
        muon_module._orthogonalise_replicated(weights, 6, None)
    assert {len(own) for own in sent} == {-(-15 // processes)}
    whole = orthogonalised(weights.view(15, 6, 4))
    assert torch.allclose(torch.cat(sent)[:15], whole, rtol=1e-10)
    ranks.all_gather_into_tensor = lambda found, _: found.copy_(torch.cat(sent))
    assert torch.allclose(muon_module._orthogonalise_replicated(weights, 6, None), whole.view(5, 18, 4), rtol=1e-10)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_of_gradients_that_overflowed_is_left_out(name: str) -> None:
    """By fp16's scaler, with AdamW's own kernel, which does not ask it before."""
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


def test_a_kernel_finds_its_count_of_steps_on_its_device() -> None:
    """A checkpoint's are the host's; a device without data shows where they go."""
    net = Net()
    optimizer = adamw(net, 1e-2, 0.1, 0.95)
    kept = copy.deepcopy(OptimizerState(stepped(net, optimizer, 1), optimizer).state_dict())
    with torch.device("meta"):
        elsewhere = Net()
    other = adamw(elsewhere, 1e-2, 0.1, 0.95)
    for fused, device in ((True, "meta"), (None, "cpu")):
        for group in other.param_groups:
            group["fused"] = fused
        OptimizerState(elsewhere, other).load_state_dict(kept)
        assert {state["step"].device.type for state in other.state.values()} == {device}
        assert {state["exp_avg"].device.type for state in other.state.values()} == {"meta"}
