"""Encoding of images for a file: their codes under the prior and, for lossless files, their pixels given the codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from configs.errors import UserError
from pipelines.codec.code_file import CodeFile, Lossless, insert_stored, unpack
from pipelines.codec.coder import Encoding, code_batch_size, decode, encode
from pipelines.codec.pixels import decode_pixels, encode_pixels, pixel_batch_size
from pipelines.encoding import encode_and_decode
from pipelines.scoring.bound import pixel_bits
from pipelines.scoring.surprisals import surprisals
from stage1_vqvae.model import VQVAE
from stage1_vqvae.pictures import png
from stage1_vqvae.quantizers.contract import Codes
from stage2_prior.priors.stepwise import StepwisePrior
from training.devices import float64_copy


class EncodedImages(NamedTuple):
    """The content of a file, and figures about it."""

    content: CodeFile
    codes: Codes
    """Codes in the file, int64 (N, h, w) per level."""
    encoding: Encoding
    reconstructions: Tensor
    """Reconstructions of all images, which a lossy file decodes to, uint8 (N, H, W, C)."""
    bound: Tensor
    """-log2 p(x | z) - log2 p(z) of the images with codes, (N,), float64; empty for a lossy file."""


def encode_images(
    tokenizer: VQVAE,
    prior: StepwisePrior,
    pixels: Tensor,
    labels: Tensor | None,
    names: list[str] | None,
    made_by: tuple[bytes, str],
    batch: int,
    lossless: bool = False,
    progress: bool = False,
) -> EncodedImages:
    """Encode images.

    Args:
        tokenizer: in eval mode; its objective a likelihood if `lossless`.
        prior: in eval mode and float64.
        pixels: uint8 (N, H, W, C).
        labels: (N,) in the prior's numbering, or None.
        names: names in the form of `CodeFile.names`.
        made_by: the run's fingerprint and the prior's name.
        batch: images per batch, if memory allows.
        lossless: also encode pixels.
        progress: show bars.
    """
    codes, reconstructions = encode_and_decode(tokenizer, pixels, batch, progress)
    bound, pixel_part = torch.zeros(0, dtype=torch.float64), None
    if lossless:
        exact = float64_copy(tokenizer)
        bound = surprisals(prior, codes, labels, "bits of codes", progress).sum(1) + pixel_bits(exact, codes, pixels, progress)
        stored = smaller_as_png(pixels, bound)
        coded = torch.tensor([number not in stored for number in range(len(pixels))], dtype=torch.bool)
        bound, codes, labels = bound[coded], tuple(level[coded] for level in codes), None if labels is None else labels[coded]
        coded_pixels, _ = encode_pixels(exact, codes, pixels[coded], pixel_batch_size(exact, batch), progress)
        pixel_part = Lossless(coded_pixels, stored)
    encoding = encode(prior, codes, labels, code_batch_size(prior.draw_layout, batch), progress)
    height, width, channels = pixels.shape[1:]
    content = CodeFile(*made_by, (height, width, channels), encoding.coded, labels, names, pixel_part)
    return EncodedImages(content, codes, encoding, reconstructions, bound)


def smaller_as_png(pixels: Tensor, bits: Tensor) -> dict[int, bytes]:
    """Return the PNGs, by number, of the images, uint8 (N, H, W, C), whose optimised PNG takes at most these bits (N,)."""
    pngs = [png(picture, optimize=True) for picture in pixels]
    return {number: data for number, (data, cost) in enumerate(zip(pngs, bits.tolist(), strict=True)) if 8 * len(data) <= cost}


def verify(data: bytes, encoded: EncodedImages, tokenizer: VQVAE, prior: StepwisePrior, pixels: Tensor, progress: bool = False) -> None:
    """Decode a new file's bytes in smaller batches than in encoding, so that the arithmetic differs, and compare the results.

    `pixels`: the images, uint8 (N, H, W, C), which a lossless file must restore. Errors: UserError if anything differs.
    """
    parsed, content = unpack(data, "the new file"), encoded.content
    decoded_codes = decode(prior, parsed.coded, parsed.labels, at_once=-(-parsed.coded.batch // 2), progress=progress)
    codes_same = all(torch.equal(*level) for level in zip(decoded_codes, encoded.codes, strict=True))
    labels_same = (parsed.labels is None) == (content.labels is None)
    if parsed.labels is not None and content.labels is not None:
        labels_same = torch.equal(parsed.labels, content.labels)
    if not (codes_same and labels_same and parsed._replace(labels=None) == content._replace(labels=None)):
        raise UserError("expected the new file to decode to what was encoded, found something else; nothing was written")
    if parsed.lossless is not None:
        exact = float64_copy(tokenizer)
        coded_pixels = parsed.lossless.pixels
        decoded = decode_pixels(exact, encoded.codes, coded_pixels, at_once=-(-coded_pixels.batch // 2), progress=progress)
        if not torch.equal(insert_stored(decoded, parsed.lossless.stored), pixels):
            raise UserError("expected the new file to decode to the images, found something else; nothing was written")
