"""A trained run as a Python object: samples, codes, completions, likelihoods, compressed files.

from pipelines import Generator

generator = Generator.from_pretrained("digits")
generator.sample(4, label="7", seed=1)[0].save("seven.png")
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard, overload

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from configs.cli import TRAIN_PRIOR, Command
from configs.data import Data
from configs.errors import UserError, say
from configs.hub import run_of
from configs.parts import Sampling, as_class
from configs.recipe_file import load_recipe
from configs.run_dir import RunDir
from configs.schema import Recipe
from pipelines.codec.code_file import CodeFile, Sizes, check_made_by, insert_stored, pack, run_fingerprint, unpack
from pipelines.codec.coder import decode as decode_codes
from pipelines.codec.image_coder import EncodedImages, encode_images, verify
from pipelines.codec.pixels import decode_pixels
from pipelines.conditioning import requested_condition, sample_condition
from pipelines.drawing import check_guidance, draw_images, kept_codes
from pipelines.encoding import decode, encode
from pipelines.inputs.pictures import Mask, Pictures, mask_in, pictures_out, pixels_in
from pipelines.scoring.surprisals import surprisals
from stage1_vqvae.model import VQVAE, load_tokenizer
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.conditions.contract import Label
from stage2_prior.priors.contract import Keep, Prior
from stage2_prior.priors.prior_file import UNIFORM, PriorHeader, finished_prior, learned_name, load_finished
from stage2_prior.priors.stepwise import StepwisePrior, stepwise
from stage2_prior.priors.uniform import UniformPrior
from stage2_prior.sampler import Sampler, default_precision, in_bfloat16
from training.devices import float64_copy, float64_device, numbered
from training.weights_file import fingerprint


class Drawn(NamedTuple):
    """Samples with their codes and condition."""

    codes: Codes
    """int64 (N, h, w) per level."""
    pixels: Tensor
    """uint8 (N, H, W, C)."""
    condition: Tensor | None
    """(N, ...) rows of the prior's condition; None: it has none."""


class Compressed(NamedTuple):
    """Compressed images, with the sizes of the parts and the encoder's figures."""

    data: bytes
    sizes: Sizes
    encoded: EncodedImages


class Generator:
    """A trained tokenizer, and a prior over its codes if there is one.

    Input images are Pillow images, uint8 (H, W, C) or (N, H, W, C), or files; all but arrays of the right size are scaled and cropped as in
    training. Output images are Pillow images or, with `output="tensor"`, uint8 (N, H, W, C). Codes are int64 (N, h, w) per level, coarse to
    fine. Invalid arguments raise `UserError`, a ValueError.
    """

    def __init__(
        self,
        run: RunDir,
        tokenizer: VQVAE,
        prior: Prior | None,
        header: PriorHeader | None,
        prior_name: str | None,
        data: Data,
        sampling: Sampling,
        accelerator: Accelerator | None = None,
    ) -> None:
        """Use `from_pretrained` to load one from a run."""
        self.run, self.tokenizer, self.prior, self.header, self.prior_name = run, tokenizer, prior, header, prior_name
        self.data, self.sampling, self._accelerator = data, sampling, accelerator
        self.device = next(tokenizer.parameters()).device
        # Computed now, since the files may be replaced later.
        self.tokenizer_sha256 = fingerprint(run.tokenizer)
        self._prior_sha256 = None if header is None else fingerprint(run.prior(str(prior_name)) / "prior.safetensors")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        prior: str | None = None,
        device: torch.device | str | None = None,
        precision: Literal["float64", "float32", "bfloat16"] | None = None,
    ) -> Generator:
        """Load the generator of a run.

        Args:
            source: a run's name, its folder (as text with a `/` in it, or as a path), or `hf:USER/NAME` on the Hub.
            prior: name of the prior; None: the one last finished, if any; `uniform`: all codes equally likely.
            device: device to compute on; None: an accelerator, if there is one.
            precision: precision of the prior while sampling; None: the recipe's, or else float64 on a CPU, and on a GPU bfloat16 where
                supported, otherwise float32. (The recipe's section `compute` applies to commands only.)
        Errors: UserError if there is no such run, or it has not finished its first stage or that prior.
        """
        run = RunDir(source.expanduser()) if isinstance(source, Path) else run_of(source)
        if not run.exists():
            raise UserError(f"{run}: expected a run, found none")
        recipe = load_recipe(run.recipe)
        sampling = recipe.sampling if precision is None else dataclasses.replace(recipe.sampling, precision=precision)
        return cls.from_run(run, recipe.data, sampling, prior, device)

    @classmethod
    def from_run(
        cls,
        run: RunDir,
        data: Data,
        sampling: Sampling,
        prior: str | None = None,
        device: torch.device | str | None = None,
        accelerator: Accelerator | None = None,
    ) -> Generator:
        """Load the generator of a run with these sections of the recipe; samples are distributed over the ranks of an `accelerator`."""
        if accelerator is not None:
            device = accelerator.device
        elif device is None:
            device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        device = numbered(torch.device(device))
        if not run.tokenizer.exists():
            raise UserError(f"{run}: stage 1 has not finished")
        tokenizer = load_tokenizer(run, device)
        # A draw flips where its uniform falls within the rounding of the probabilities, which depends on the batch's shape.
        # In float32 one of 64 digits changed between batches of 64 and of 1; in float64 the rounding is 10^9 times finer.
        sampling = dataclasses.replace(sampling, precision=sampling.precision or default_precision(device))
        learned = learned_name(run, prior)
        if learned is None:
            uniform = UniformPrior(SequenceLayout(tokenizer.grids, tokenizer.quantizer.num_codes)) if prior == UNIFORM else None
            return cls(run, tokenizer, uniform, None, prior, data, sampling, accelerator)
        loaded, header, name = load_finished(run, learned, f"{TRAIN_PRIOR} --run {run}", device)
        if sampling.precision == "float64":
            loaded.to(float64_device(device)).double()
        return cls(run, tokenizer, loaded, header, name, data, as_class(sampling, header.config.SAMPLING), accelerator)

    def __repr__(self) -> str:
        height, width, channels = self.image_shape
        grids = " + ".join(f"{h} x {w}" for h, w in self.tokenizer.grids)
        return f"Generator({str(self.run)!r}: {height} x {width} x {channels} of {grids} codes, prior {self.prior_name}, {self.device})"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images."""
        channels, height, width = self.tokenizer.image_shape
        return height, width, channels

    @property
    def origin(self) -> dict[str, Any]:
        """Origin of samples, for the JSON beside them: the prior's name and sha256, and all sampling settings."""
        return {"prior": self.prior_name, "prior_sha256": self._prior_sha256, "sampling": dataclasses.asdict(self.sampling)}

    @property
    def columns(self) -> Sequence[str]:
        """Columns of the data set that the prior's condition is read from."""
        return self.header.condition.columns if self.header is not None else ()

    @property
    def label_names(self) -> list[str]:
        """Names of the classes that the prior is conditioned on; empty if it is not."""
        return list(self.header.condition.class_names) if self.header is not None else []

    # --- samples

    @overload
    def sample(
        self,
        n: int = 1,
        label: Label | Sequence[Label] | None = None,
        seed: int = 0,
        *,
        output: Literal["pil"] = "pil",
        **settings: Any,
    ) -> list[Image.Image]: ...
    @overload
    def sample(
        self, n: int = 1, label: Label | Sequence[Label] | None = None, seed: int = 0, *, output: Literal["tensor"], **settings: Any
    ) -> Tensor: ...
    def sample(
        self,
        n: int = 1,
        label: Label | Sequence[Label] | None = None,
        seed: int = 0,
        *,
        output: Literal["pil", "tensor"] = "pil",
        **settings: Any,
    ) -> list[Image.Image] | Tensor:
        """Draw images. Sample i of a seed has the same codes for any `n`; single pixels may differ by one of 256 levels, because decoding
        depends on the batch.

        Args:
            n: number of images.
            label: label of all images, or one per image; None: the classes take turns.
            seed: seed of the draws.
            output: `pil` or `tensor`.
            settings: settings that replace the recipe's: `temperature`, `guidance`, `guidance_schedule`, `guidance_power`,
                `guidance_interval`, `batch_size` and those of the prior's kind, such as `top_k`, `top_p`, `min_p`.
        """
        return pictures_out(self.draw(n, label, seed, **settings).pixels, output)

    def draw(
        self,
        n: int = 1,
        label: Label | Sequence[Label] | None = None,
        seed: int = 0,
        *,
        progress: bool = False,
        folder: Path | None = None,
        **settings: Any,
    ) -> Drawn:
        """Draw codes, pixels and conditions as `sample` does; complete on the main process alone.

        `progress`: show a bar. `folder`: keep the pixels in a temporary file there instead of memory.
        """
        if n < 1:
            raise UserError(f"n: expected at least 1 image, found {n}")
        sampler, condition = self._sampler, sample_condition(self.header, label, n)
        config = self._sampling(settings)
        check_guidance(config, condition, self.header)
        drawn = draw_images(self._accelerator, self.tokenizer, sampler, condition, n, seed, config, progress=progress, folder=folder)
        return Drawn(*drawn, condition)

    # --- codes

    def encode(self, images: Pictures) -> Codes:
        """Encode images to codes, on the CPU."""
        return encode(self.tokenizer, self.pixels(images), self.sampling.batch_size)

    @overload
    def decode(self, codes: Codes, *, output: Literal["pil"] = "pil") -> list[Image.Image]: ...
    @overload
    def decode(self, codes: Codes, *, output: Literal["tensor"]) -> Tensor: ...
    def decode(self, codes: Codes, *, output: Literal["pil", "tensor"] = "pil") -> list[Image.Image] | Tensor:
        """Decode codes to images. Errors: UserError for codes of other grids or outside the codebook."""
        self._check(codes)
        return pictures_out(decode(self.tokenizer, codes, self.sampling.batch_size), output)

    # --- completions

    @overload
    def complete(
        self,
        images: Pictures,
        keep: Mask,
        label: Label | Sequence[Label] | None = None,
        seed: int = 0,
        *,
        output: Literal["pil"] = "pil",
        **settings: Any,
    ) -> list[Image.Image]: ...
    @overload
    def complete(
        self,
        images: Pictures,
        keep: Mask,
        label: Label | Sequence[Label] | None = None,
        seed: int = 0,
        *,
        output: Literal["tensor"],
        **settings: Any,
    ) -> Tensor: ...
    def complete(
        self,
        images: Pictures,
        keep: Mask,
        label: Label | Sequence[Label] | None = None,
        seed: int = 0,
        *,
        output: Literal["pil", "tensor"] = "pil",
        **settings: Any,
    ) -> list[Image.Image] | Tensor:
        """Draw parts of images again. The kept parts are those of the tokenizer's reconstruction.

        Args:
            images: images to complete; for n continuations of an image, pass n copies.
            keep: mask (H, W) of the pixels to keep, or a picture that is white there; in each grid, codes are kept whose patch lies within.
                Each code is drawn given those before it; by a masked prior or one of `prior.order any`, given all kept codes of its level;
                by `next_scale`, given all codes of coarser levels.
            label: as in `sample`; None: no class.
            seed: seed of the draws.
            output: `pil` or `tensor`.
            settings: as in `sample`.
        """
        pixels = self.pixels(images)
        condition = requested_condition(self.header, label, len(pixels))
        codes = encode(self.tokenizer, pixels, self.sampling.batch_size)
        return pictures_out(self.continuations(codes, mask_in(keep, self.data), condition, seed, **settings), output)

    def continuations(
        self, codes: Codes, keep: Tensor, condition: Tensor | None, seed: int, *, progress: bool = False, **settings: Any
    ) -> Tensor:
        """Draw as `complete` does, from codes, a mask (H, W) and rows of the prior's condition.

        Returns: uint8 (N, H, W, C), complete on the main process alone.
        """
        sampler, config, known = self._sampler, self._sampling(settings), Keep(codes, kept_codes(self.tokenizer, keep))
        check_guidance(config, condition, self.header)
        return draw_images(self._accelerator, self.tokenizer, sampler, condition, len(codes[0]), seed, config, known, progress)[1]

    # --- likelihoods

    def log_prob(self, images: Pictures | Codes, label: Label | Sequence[Label] | None = None) -> Tensor:
        """Compute log p of each image's codes under the prior, in nats, (N,), float64."""
        return -math.log(2) * torch.cat([level.flatten(1) for level in self.surprisals(images, label)], 1).sum(1)

    def surprisals(self, images: Pictures | Codes, label: Label | Sequence[Label] | None = None) -> tuple[Tensor, ...]:
        """Compute -log2 p of each code given those before it, in bits: float64 (N, h, w) per level."""
        prior, codes = self.exact_prior("surprisals"), images if _is_codes(images) else self.encode(images)
        self._check(codes)
        return prior.layout.grids_of(surprisals(prior, codes, requested_condition(self.header, label, len(codes[0])), "bits"))

    # --- compression

    def compress(self, images: Pictures, label: Label | Sequence[Label] | None = None, lossless: bool = False) -> bytes:
        """Compress images to the bytes of a .vqc file, which decompress to the tokenizer's reconstructions.

        Args:
            images: images to compress.
            label: as in `complete`; known classes save bits.
            lossless: also code the pixels, so that all are restored exactly; needs a tokenizer whose objective is a likelihood.
        """
        pixels = self.pixels(images)
        return self.compressed(pixels, requested_condition(self.header, label, len(pixels)), lossless=lossless).data

    def compressed(
        self,
        pixels: Tensor,
        condition: Tensor | None,
        names: list[str] | None = None,
        batch_size: int = 64,
        lossless: bool = False,
        progress: bool = False,
    ) -> Compressed:
        """Compress uint8 (N, H, W, C), rows of the prior's condition, and names as in `CodeFile`; then verify the bytes by decoding them.

        Errors: UserError if they decode to anything else, and for a condition of another kind than classes.
        """
        prior = self.exact_prior("compress")
        if condition is not None and not self.label_names:
            kind = prior.condition.kind
            raise UserError(f"label: expected none, or a prior conditioned on classes, since files hold no others, found {kind}")
        if lossless:
            self.tokenizer.likelihood().check(pixels)
        encoded = encode_images(self.tokenizer, prior, pixels, condition, names, self._made_by, batch_size, lossless, progress)
        data, sizes = pack(encoded.content)
        verify(data, encoded, self.tokenizer, prior, pixels, progress)
        return Compressed(data, sizes, encoded)

    @property
    def _made_by(self) -> tuple[bytes, str]:
        """Fingerprint of the loaded tokenizer and prior, and the prior's name."""
        return run_fingerprint(self.tokenizer_sha256, str(self._prior_sha256)), str(self.prior_name)

    @overload
    def decompress(self, data: bytes, *, output: Literal["pil"] = "pil") -> list[Image.Image]: ...
    @overload
    def decompress(self, data: bytes, *, output: Literal["tensor"]) -> Tensor: ...
    def decompress(self, data: bytes, *, output: Literal["pil", "tensor"] = "pil") -> list[Image.Image] | Tensor:
        """Decompress the bytes that `compress` returned. Errors: UserError for bytes of another run or prior, or of another format."""
        content = unpack(data, "data")
        codes, exact = self.decompressed(content, "data")
        if exact is not None:
            return pictures_out(exact, output)
        return self.decode(codes, output="tensor") if output == "tensor" else self.decode(codes)

    def decompressed(self, content: CodeFile, where: str, progress: bool = False) -> tuple[Codes, Tensor | None]:
        """Decode a file's content: the codes of the images that have codes and, for a lossless file, all pixels, uint8 (N, H, W, C).

        `where`: name of the file in messages.
        """
        prior = self.exact_prior("decompress")
        check_made_by(content, self._made_by, str(self.run), where)
        known = content.labels is None or len(content.labels) == 0 or int(content.labels.max()) < max(1, len(self.label_names))
        if content.image_shape != self.image_shape or not known:
            raise UserError(f"{where}: expected images and labels of run {self.run}, found a header that contradicts its fingerprint")
        codes = decode_codes(prior, content.coded, content.labels, progress=progress)
        if content.lossless is None:
            return codes, None
        pixels = decode_pixels(float64_copy(self.tokenizer), codes, content.lossless.pixels, progress=progress)
        return codes, insert_stored(pixels, content.lossless.stored)

    # --- inputs, settings and priors

    def pixels(self, images: Pictures) -> Tensor:
        """Convert images to uint8 (N, H, W, C) of the run's size. Errors: UserError for anything that is no image."""
        return pixels_in(images, self.data)

    def _sampling(self, settings: dict[str, Any]) -> Sampling:
        """Return the recipe's settings, some of them replaced. Errors: UserError for an unknown or invalid one."""
        known = {field.name for field in dataclasses.fields(self.sampling)} - {"precision"}
        if unknown := sorted(settings.keys() - known):
            raise UserError(f"{unknown[0]}: expected one of {', '.join(sorted(known))}, found no such setting")
        try:
            return dataclasses.replace(self.sampling, **settings)
        except ValueError as error:
            raise UserError(str(error)) from None

    @cached_property
    def _sampler(self) -> Sampler:
        prior = self._need_prior()
        if self.header is None or self.sampling.precision != "bfloat16":
            return Sampler(prior)
        say("sampling in bfloat16: codes may differ from --precision float32")
        return Sampler(in_bfloat16(prior))

    def _need_prior(self) -> Prior:
        if self.prior is None:
            raise UserError(f"{self.run}: it has no finished prior")
        return self.prior

    def stepwise_prior(self, purpose: str) -> StepwisePrior:
        """Return the prior if it draws codes one after another. Errors: UserError, naming the purpose, for another kind or none."""
        return stepwise(self._need_prior(), purpose, UNIFORM if self.header is None else self.header.config.kind)

    def exact_prior(self, purpose: str) -> StepwisePrior:
        """Return `stepwise_prior` in float64, whatever the sampling precision."""
        prior = self.stepwise_prior(purpose)
        return prior if next(prior.parameters()).dtype == torch.float64 else self._float64_prior

    @cached_property
    def _float64_prior(self) -> StepwisePrior:
        assert isinstance(self.prior, StepwisePrior)
        return float64_copy(self.prior)

    def _check(self, codes: Codes) -> None:
        """Errors: UserError for codes of other grids, dtypes or codebook sizes."""
        expected = [(len(codes[0]), *grid) for grid in self.tokenizer.grids] if len(codes) else []
        shapes = [tuple(level.shape) for level in codes]
        if not codes or shapes != expected:
            raise UserError(f"codes: expected (N, h, w) per level, of {self.tokenizer.grids}, found {shapes}")
        for level, (grid, number) in enumerate(zip(codes, self.tokenizer.quantizer.num_codes, strict=True), 1):
            if grid.dtype != torch.int64 or (grid.numel() and not 0 <= int(grid.min()) <= int(grid.max()) < number):
                raise UserError(f"codes: expected int64 from 0 to {number - 1} at level {level}, found others")


def _is_codes(images: Pictures | Codes) -> TypeGuard[Codes]:
    """Return whether the argument is codes: a tuple of int64 tensors."""
    return isinstance(images, tuple) and all(isinstance(level, Tensor) and level.dtype == torch.int64 for level in images)


def load_generator(command: Command, accelerator: Accelerator, prior: str | None) -> Generator:
    """Load the generator of a command's run and recipe, with the prior of that name or the one last finished.

    Errors: UserError if there is no such prior; it names the command to run first.
    """
    if prior != UNIFORM:
        prior = finished_prior(command.run, prior, command.next(TRAIN_PRIOR)).parent.name
    sampling = command_sampling(command.recipe, accelerator.device)
    return Generator.from_run(command.run, command.recipe.data, sampling, prior, accelerator=accelerator)


def command_sampling(recipe: Recipe, device: torch.device) -> Sampling:
    """Return the recipe's sampling section; on a GPU without mixed precision its default precision is float32 instead of bfloat16."""
    exact = recipe.compute.mixed_precision == "no" and recipe.sampling.precision is None and device.type == "cuda"
    return dataclasses.replace(recipe.sampling, precision="float32") if exact else recipe.sampling
