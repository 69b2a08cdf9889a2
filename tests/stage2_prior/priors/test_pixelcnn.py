"""PixelCNN: masks against the paper's, no blind spot, reach, sizes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.priors.pixelcnn import GatedLayer, LevelNetwork, PixelCNN, PixelCNNPart, convolved
from stage2_prior.priors.prior_file import build_prior
from tests.stage2_prior.priors.prior_kinds import classes, manifest


def network(grid: tuple[int, int], **settings: int) -> LevelNetwork:
    torch.manual_seed(0)
    config = PixelCNNPart(**{"layers": 3, "width": 16, "heads": 4, **settings}, dropout=0).resolved()  # type: ignore[arg-type]
    return LevelNetwork(config, grid, [7], classes(0)).double().eval()


def dependencies(network: LevelNetwork, grid: tuple[int, int]) -> torch.Tensor:
    """Return a (T, T) mask: whether a position's logits have a gradient at the embedded code of another."""
    embedded: list[torch.Tensor] = []
    network.token.register_forward_hook(lambda _m, _i, output: (embedded.append(output.detach().requires_grad_()), embedded[-1])[1])
    logits = network(torch.randint(7, (1, *grid)), network.context((), torch.tensor([0])), False)[0]
    rows = []
    for position in logits:
        (gradient,) = torch.autograd.grad(position.square().sum(), embedded[0], retain_graph=True)
        rows.append(gradient[0].abs().sum(-1).flatten() > 0)
    return torch.stack(rows)


@pytest.mark.parametrize("grid", [(6, 6), (4, 9), (9, 4)])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_a_deep_stack_sees_exactly_the_earlier_positions(grid: tuple[int, int], kernel_size: int) -> None:
    depends = dependencies(network(grid, layers=7, kernel_size=kernel_size), grid)
    assert torch.equal(depends, torch.ones_like(depends).tril(-1))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_shallow_stack_sees_as_far_as_its_masks(layers: int) -> None:
    """3 rows above in the first layer, 1 more per further layer; as many columns to either side, in the position's row only to the left."""
    grid, reach = (9, 11), 3 + layers - 1
    depends = dependencies(network(grid, layers=layers), grid)
    for position in range(99):
        row, column = divmod(position, 11)
        for other in range(99):
            up, aside = row - other // 11, other % 11 - column
            within = (up > 0 and up <= reach and abs(aside) <= reach) or (up == 0 and -reach <= aside < 0)
            assert bool(depends[position, other]) == within, (position, other)


def test_with_attention_a_shallow_stack_sees_all_earlier_positions() -> None:
    depends = dependencies(network((8, 8), layers=2, attention_interval=2), (8, 8))
    assert torch.equal(depends, torch.ones_like(depends).tril(-1))


@pytest.mark.parametrize("first", [True, False])
def test_shifted_convolutions_are_the_papers_masked_ones(first: bool) -> None:
    """A layer's convolutions, on shifted inputs if it is the first, against k x k and 1 x k kernels with the weights that
    masks A (first) and B leave at their positions and zeros elsewhere.
    """
    torch.manual_seed(0)
    kernel, width = (7 if first else 3), 4
    layer = GatedLayer(width, kernel, first, dropout=0.0, heads=0).double()
    x = torch.randn(2, width, 6, 5, dtype=torch.float64)
    middle = kernel // 2
    # Vertical: rows above the middle; horizontal: columns left of it; mask B also has the middle, of inputs that are already shifted.
    above = torch.zeros(2 * width, width, kernel, kernel, dtype=torch.float64)
    above[:, :, middle + (not first) - layer.reach : middle + (not first)] = layer.vertical.weight
    left = torch.zeros(2 * width, width, 1, kernel, dtype=torch.float64)
    left[..., middle + (not first) - layer.reach : middle + (not first)] = layer.horizontal.weight
    vertical = F.conv2d(x, above, layer.vertical.bias, padding=middle)
    horizontal = F.conv2d(x, left, layer.horizontal.bias, padding=(0, middle))
    down, right = x, x
    if first:
        down, right = F.pad(x[:, :, :-1], (0, 0, 1, 0)), F.pad(x[..., :-1], (1, 0))
    rows = F.pad(down.movedim(1, -1), (0, 0, layer.sides, layer.sides, layer.reach - 1, 0))
    columns = F.pad(right.movedim(1, -1), (0, 0, layer.reach - 1, 0))
    assert torch.allclose(convolved(layer.vertical, rows).movedim(-1, 1), vertical)
    assert torch.allclose(convolved(layer.horizontal, columns).movedim(-1, 1), horizontal)


def test_a_stack_too_shallow_for_its_grid_gets_a_warning() -> None:
    layout = SequenceLayout([(16, 16)], [8])
    warnings = [
        build_prior(
            PixelCNNPart(layers=layers, width=16, heads=4, attention_interval=attention), classes(0), manifest(layout)
        ).training_warnings()
        for layers, attention in ((5, 0), (13, 0), (5, 5))
    ]
    assert warnings[0] == ["a position sees 7 codes far, of 15; more --prior.layers or a larger --prior.kernel_size see further"]
    assert warnings[1:] == [[], []]


def test_the_small_preset_has_the_parameters_of_public_ones() -> None:
    prior = build_prior(PixelCNNPart(), classes(10), manifest(SequenceLayout([(8, 8)], [512])))
    assert isinstance(prior, PixelCNN)
    assert sum(parameter.numel() for parameter in prior.parameters()) / 1e6 == pytest.approx(1.8, rel=0.1)
