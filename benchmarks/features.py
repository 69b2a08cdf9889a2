"""Ranking of image sets by feature networks trained on first use: Fréchet distances to the training images.

    python benchmarks/features.py --run digits

Each set has as many images as the validation split: real images, their reconstructions, samples of the run's last prior under several
settings, samples of the uniform prior, noise. Networks missing in the run are trained and saved there.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.cli import parse
from pipelines.drawing import draw_images
from pipelines.evaluation.distances import Reference
from stage1_vqvae.data.pixels import to_model, to_uint8
from stage1_vqvae.data.sources import load_images
from stage1_vqvae.data.splits import TRAIN, VALIDATION
from stage1_vqvae.features.classifier import CLASSIFIER, ROTATION
from stage1_vqvae.features.networks import feature_network
from stage1_vqvae.model import load_tokenizer
from stage2_prior.draw import StepwiseSampling
from stage2_prior.priors.prior_file import load_finished
from stage2_prior.priors.uniform import UniformPrior
from stage2_prior.sampler import Sampler

SETTINGS = {
    "samples as the recipe says": None,
    "samples, no guidance": StepwiseSampling(),
    "samples, temperature 1.5": StepwiseSampling(temperature=1.5),
    "samples, temperature 0.3": StepwiseSampling(temperature=0.3),
}


def main() -> None:
    """Run the benchmark and print its table."""
    command = parse(__doc__, ("sampling",))
    run, recipe, accelerator = command.run, command.recipe, Accelerator(cpu=True)
    source, tokenizer = load_images(recipe.data, (TRAIN, VALIDATION)), load_tokenizer(run)
    prior, header, _ = load_finished(run, None, "stage 2")
    real = source.splits[VALIDATION].pixels[:]
    count = len(real)
    labels = header.condition.in_turn(count)
    sampler = Sampler(prior)
    with torch.no_grad():
        reconstructed = to_uint8(tokenizer(to_model(real)).reconstruction)
    sets: dict[str, Tensor] = {"real, validation": real, "the same, reconstructed": reconstructed}
    for name, sampling in SETTINGS.items():
        sets[name] = draw_images(accelerator, tokenizer, sampler, labels, count, 0, sampling or recipe.sampling)[1]
    uniform = Sampler(UniformPrior(prior.layout))
    sets["samples of the uniform prior"] = draw_images(accelerator, tokenizer, uniform, None, count, 0, StepwiseSampling())[1]
    sets["noise"] = torch.randint(256, real.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kinds = [*([CLASSIFIER] if source.label_names else []), ROTATION]
    distances_by_set: dict[str, list[float]] = {name: [] for name in sets}
    for kind in kinds:
        network = feature_network(kind, None, run.path, source, accelerator.device)
        reference = Reference(network(source.splits[TRAIN].pixels, 256, TRAIN).vectors)
        for name, pixels in sets.items():
            distance = reference.frechet(network(pixels, 256, name).vectors)
            distances_by_set[name].append(float("nan") if distance is None else distance)
    print(f"| {count} images each | {' | '.join(kinds)} |\n| --- |{' --- |' * len(kinds)}")
    for name, distances in distances_by_set.items():
        print(f"| {name} | {' | '.join(f'{distance:.3g}' for distance in distances)} |")


if __name__ == "__main__":
    main()
