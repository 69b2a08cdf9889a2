"""Speed of priors: sampling against bare matrix products and full passes, training against torch's layers.

    python benchmarks/priors.py
    python benchmarks/priors.py --rounds 7
    python benchmarks/priors.py --heads --rounds 3
    python benchmarks/priors.py --llamagen FOLDER     (a checkout of github.com/FoundationVision/LlamaGen: its sampler beside ours, alone)

64 images of 8x8 codes, K = 512, no guidance, float32, medians of alternated rounds, random weights. The chain is the transformer's
matrix products in order, (64, C) by each matrix and the head, 64 times, as `linear(x, weight)`. One full pass per position, timed once, is
the cost of sampling without a cache. --heads compares the transformer's heads alone.

Beside LlamaGen: networks of its B (12 layers x 768, 16 x 16 codes of 16,384, 1,000 classes), 2 images, guidance 2, top-k 2,000; its sampler
is `autoregressive/models/generate.py`, uncompiled as its `sample_c2i.py` runs it.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.conditions.classes import Classes
from stage2_prior.conditions.none import NoCondition
from stage2_prior.draw import StepwiseSampling, draw, uniforms, warp
from stage2_prior.priors.pixelcnn import PixelCNNPart
from stage2_prior.priors.stepwise import StepwisePrior
from stage2_prior.priors.transformer import Transformer, TransformerPart
from training.optimizer import adamw

_IMAGES, _K, _GRID = 64, 512, (8, 8)
_SIZES = {"layers": 6, "width": 384, "heads": 6}
_LAYOUT = SequenceLayout([_GRID], [_K])
_CONDITION = Classes(names=[*map(str, range(10))])
_STEPS = 4


@torch.no_grad()
def full_passes(prior: StepwisePrior, labels: Tensor, uniform: Tensor) -> Tensor:
    """Sample codes (B, T) with a full pass per position."""
    sequences = torch.zeros(len(labels), _LAYOUT.length, dtype=torch.int64)
    for position in range(_LAYOUT.length):
        logits = prior.logits(_LAYOUT.grids_of(sequences), labels)[0][:, position]
        sequences[:, position] = draw(warp(logits, StepwiseSampling()), uniform[:, position])
    return sequences


@torch.no_grad()
def chain(prior: Transformer) -> Tensor:
    """Run the transformer's matrix products of a sampling run, and nothing else."""
    x = torch.randn(_IMAGES, _SIZES["width"])
    for _ in range(_LAYOUT.length):
        for block in prior.blocks:
            x = F.linear(x, block.attention.qkv.weight)[:, : _SIZES["width"]]
            x = F.linear(x, block.attention.out.weight)
            x = F.linear(x, block.mlp.gate.weight) + F.linear(x, block.mlp.up.weight)
            x = F.linear(x, block.mlp.out.weight)
        logits = F.linear(x, prior.head.weight)
    return logits


class PlainTransformer(nn.Module):
    """torch's encoder layers with a causal mask and learned positions."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(_K + 1, width), nn.Parameter(torch.zeros(_LAYOUT.length, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, _K, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(_LAYOUT.length))

    mask: Tensor

    def forward(self, sequences: Tensor) -> Tensor:
        """Compute logits (B, T, K) of codes (B, T)."""
        before = F.pad(sequences[:, :-1], (1, 0), value=_K)
        return self.head(self.layers(self.token(before) + self.position, mask=self.mask, is_causal=True))


def training_steps(model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Run several training steps: forward, backward, optimizer."""
    model.train()
    for _ in range(_STEPS):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def medians(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Measure median seconds of each in alternated rounds, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name] += [time.perf_counter() - start] if number else []
    return {name: statistics.median(values) for name, values in times.items()}


def sampling(rounds: int) -> None:
    """Print the table of sampling times."""
    labels, uniform = torch.arange(_IMAGES) % 10, uniforms(0, torch.arange(_IMAGES), _LAYOUT.length)
    transformer = TransformerPart(**_SIZES).build(_LAYOUT, _CONDITION).eval()
    pixelcnn = PixelCNNPart().build(_LAYOUT, _CONDITION).eval()
    with_attention = PixelCNNPart(attention_interval=5).build(_LAYOUT, _CONDITION).eval()
    print("| prior | parameters | cached s | chain of its products s | ratio | full pass per position s | ratio | same codes |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, prior in (("transformer, 6 x 384", transformer), ("PixelCNN, 15 x 64", pixelcnn), ("the same, attention", with_attention)):
        codes = prior.sample(labels, uniform, StepwiseSampling())
        start = time.perf_counter()
        same = torch.equal(_LAYOUT.flat(codes), full_passes(prior, labels, uniform))
        full = time.perf_counter() - start
        contestants: dict[str, Callable[[], object]] = {"cached": lambda p=prior: p.sample(labels, uniform, StepwiseSampling())}
        if isinstance(prior, Transformer):
            contestants["chain"] = lambda p=prior: chain(p)
        seconds = medians(contestants, rounds)
        chained = f"{seconds['chain']:.3f} | {seconds['cached'] / seconds['chain']:.2f}" if "chain" in seconds else "- | -"
        parameters = sum(parameter.numel() for parameter in prior.parameters()) / 1e6
        against_full = f"{full:.2f} | {full / seconds['cached']:.1f}"
        print(
            f"| {name} | {parameters:.1f} M | {seconds['cached']:.3f} | {chained} | {against_full} | {'yes' if same else 'NO'} |",
            flush=True,
        )


def memory() -> None:
    """Print the process's peak memory while 256 images are sampled in batches of 16."""
    prior = TransformerPart(**_SIZES).build(_LAYOUT, _CONDITION).eval()
    held = []
    for batch in range(16):
        numbers = torch.arange(batch * 16, (batch + 1) * 16)
        prior.sample(numbers % 10, uniforms(0, numbers, _LAYOUT.length), StepwiseSampling())
        held.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
    shown = ", ".join(f"{held[done - 1]:.0f}" for done in (1, 2, 4, 8, 16))
    print(f"peak resident MiB after 1, 2, 4, 8 and 16 batches of 16 images (transformer, 6 x 384): {shown}\n")


def training(rounds: int) -> None:
    """Print the table of training speeds."""
    ours, plain = TransformerPart(**_SIZES, dropout=0.0).build(_LAYOUT, NoCondition()), PlainTransformer(**_SIZES)
    sequences = torch.randint(_K, (_IMAGES, _LAYOUT.length))
    codes = _LAYOUT.grids_of(sequences)
    optimizers = [adamw(model, 1e-3, 0.05, beta2=0.95) for model in (ours, plain)]
    contestants: dict[str, Callable[[], object]] = {
        "ours": lambda: training_steps(ours, lambda: ours(codes, None), optimizers[0]),
        "nn.TransformerEncoder": lambda: training_steps(
            plain, lambda: F.cross_entropy(plain(sequences).flatten(0, 1), sequences.flatten()), optimizers[1]
        ),
    }
    seconds_by_model = medians(contestants, rounds)
    print("\n| transformer, 6 x 384 | parameters | tokens/s in training | ratio |\n| --- | --- | --- | --- |")
    for (name, seconds), model in zip(seconds_by_model.items(), (ours, plain), strict=True):
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        speed = _STEPS * sequences.numel() / seconds
        print(f"| {name} | {parameters:.2f} M | {speed:.0f} | {seconds_by_model['nn.TransformerEncoder'] / seconds:.2f} |")


def beside_llamagen(folder: Path, rounds: int, images: int = 2) -> None:
    """Print the table of LlamaGen's sampler and ours on networks of the same sizes."""
    sys.path.insert(0, str(folder))
    from autoregressive.models.generate import generate
    from autoregressive.models.gpt import GPT_models

    layout, labels = SequenceLayout([(16, 16)], [16_384]), torch.arange(images)
    theirs = GPT_models["GPT-B"](vocab_size=16_384, block_size=layout.length, num_classes=1000).eval()
    nn.init.normal_(theirs.output.weight, std=0.02)  # it begins as zeros
    ours = TransformerPart(preset="B").build(layout, Classes(names=[*map(str, range(1000))])).eval()
    uniform, settings = uniforms(0, labels, layout.length), StepwiseSampling(guidance=2.0, top_k=2000)
    contestants: dict[str, Callable[[], object]] = {
        "LlamaGen": lambda: generate(theirs, labels, layout.length, cfg_scale=settings.guidance, top_k=settings.top_k),
        "ours": lambda: ours.sample(labels, uniform, settings),
    }
    seconds = medians(contestants, rounds)
    print("| sampler | s | codes/s | ratio |\n| --- | --- | --- | --- |")
    for name, value in seconds.items():
        print(f"| {name} | {value:.1f} | {images * layout.length / value:.0f} | {value / seconds['ours']:.2f} |")


def heads(rounds: int) -> None:
    """Print the table of weights and times of a transformer that draws digits, as ratios to one that draws codes whole."""
    print("| K | weights | digits / table | training step | sampling |\n| --- | --- | --- | --- | --- |")
    for bits in (10, 14):
        layout = SequenceLayout([_GRID], [2**bits], [(2,) * bits])
        sizes: dict[str, Any] = {"layers": 4, "width": 256, "heads": 4, "dropout": 0.0}
        priors = {head: TransformerPart(**sizes, head=head).build(layout, NoCondition()) for head in ("table", "digits")}  # type: ignore[arg-type]
        codes, uniform = (torch.randint(2**bits, (8, *_GRID)),), uniforms(0, torch.arange(8), priors["digits"].num_noise)
        contestants: dict[str, Callable[[], object]] = {}
        for head, prior in priors.items():
            optimizer = adamw(prior, 1e-3, 0.05, beta2=0.95)
            contestants[f"train {head}"] = lambda p=prior, c=codes, o=optimizer: training_steps(p, lambda: p(c, None), o)
            contestants[f"sample {head}"] = lambda p=prior, u=uniform: p.eval().sample(None, u, StepwiseSampling())
        seconds = medians(contestants, rounds)
        table, digits = (sum(parameter.numel() for parameter in prior.parameters()) / 1e6 for prior in priors.values())
        ratios = [f"{seconds[f'{work} digits'] / seconds[f'{work} table']:.2f}" for work in ("train", "sample")]
        print(f"| 2^{bits} | {table:.1f} M, {digits:.1f} M | {digits / table:.2f} | {' | '.join(ratios)} |", flush=True)


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llamagen", type=Path, help="a checkout of LlamaGen, whose sampler alone is then compared")
    parser.add_argument("--heads", action="store_true")
    options = parser.parse_args()
    rounds = options.rounds
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads\n")
    if options.llamagen is not None:
        beside_llamagen(options.llamagen, rounds)
    elif options.heads:
        heads(rounds)
        return
    memory()
    sampling(rounds)
    training(rounds)


if __name__ == "__main__":
    main()
