"""A training step of the VQGAN network against diffusers' `VQModel` of equal size: seconds, and memory of the process.

    python benchmarks/vqgan_step.py
    python benchmarks/vqgan_step.py --size 256 --batch 1 --rounds 5

LlamaGen's f16 network (Sun et al. 2024): 128 channels, multipliers 1, 1, 2, 2, 4, two blocks, attention at the lowest resolution. Encoder,
the maps around the quantizer and decoder, forward and backward of the squared error in float32; no quantizer, no optimizer. Medians of
alternated rounds; memory is the peak of a process with one of them alone. Needs `pip install -e '.[dev]'`, for diffusers.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from stage1_vqvae.networks.vqgan import VQGANPart

_MULTIPLIERS, _CHANNELS, _LATENT, _CODE_DIM = [1, 1, 2, 2, 4], 128, 256, 8


def ours() -> nn.Module:
    """This project's encoder and decoder, on channels-last images as in `VQVAE`."""
    part = VQGANPart(hidden_channels=_CHANNELS, multipliers=_MULTIPLIERS, attention=[16], latent_channels=_LATENT)
    return nn.Sequential(*part.build(3, _CODE_DIM, 3))


def diffusers() -> nn.Module:
    """Build the same layers as `diffusers.VQModel`."""
    from diffusers import VQModel

    model = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(_CHANNELS * multiplier for multiplier in _MULTIPLIERS),
        layers_per_block=2,
        latent_channels=_LATENT,
        vq_embed_dim=_CODE_DIM,
        num_vq_embeddings=16,
    )
    return nn.Sequential(model.encoder, model.quant_conv, model.post_quant_conv, model.decoder)


CONTESTANTS: dict[str, Callable[[], nn.Module]] = {"ours": ours, "diffusers.VQModel": diffusers}


def step(model: nn.Module, images: torch.Tensor) -> None:
    """Run forward and backward."""
    model.zero_grad()
    (model(images) - images).square().mean().backward()


def images_for(name: str, size: int, batch: int) -> torch.Tensor:
    """Generate random images."""
    images = torch.rand(batch, 3, size, size)
    return images.contiguous(memory_format=torch.channels_last) if name == "ours" else images


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=CONTESTANTS, help="take steps of one of them, and print the memory of the process in MiB")
    options = parser.parse_args()
    if options.only:
        model, images = CONTESTANTS[options.only](), images_for(options.only, options.size, options.batch)
        for _ in range(2):
            step(model, images)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
        return
    models = {name: build() for name, build in CONTESTANTS.items()}
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in models.values()]
    assert sizes[0] == sizes[1], sizes
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(options.rounds + 1):
        for name, model in models.items():
            images = images_for(name, options.size, options.batch)
            start = time.perf_counter()
            step(model, images)
            times[name] += [time.perf_counter() - start] if number else []
    print("| network | parameters | seconds per step | ratio | memory MiB |\n| --- | --- | --- | --- | --- |")
    seconds = {name: statistics.median(values) for name, values in times.items()}
    for name, median in seconds.items():
        arguments = ["--only", name, "--size", str(options.size), "--batch", str(options.batch)]
        memory = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, encoding="utf-8", check=True).stdout
        ratio = median / seconds["diffusers.VQModel"]
        print(f"| {name} | {sizes[0] / 1e6:.1f} M | {median:.2f} | {ratio:.2f} | {float(memory.split()[-1]):.0f} |", flush=True)


if __name__ == "__main__":
    main()
