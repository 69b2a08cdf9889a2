"""Encoding and decoding of images, and pixels in files on disk."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.drawing import draw_images
from pipelines.encoding import allocate_pixels, encode_and_decode
from stage2_prior.codes.sequence import SequenceLayout
from stage2_prior.draw import StepwiseSampling
from stage2_prior.priors.uniform import UniformPrior
from stage2_prior.sampler import Sampler


class Constant(torch.nn.Module):
    """A tokenizer of 64 x 64 pixels with one code per image, its colour."""

    image_shape, grids, quantizer = (3, 64, 64), ((1, 1),), SimpleNamespace(num_codes=(256,))

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, images: Tensor) -> tuple[Tensor]:
        return (((images[:, 0, :1, :1] + 1) * 127.5).round().long(),)

    def decode(self, codes: tuple[Tensor]) -> Tensor:
        return (codes[0].float() / 127.5 - 1)[:, None].expand(-1, *self.image_shape)


def mapped_file(tensor: Tensor) -> str:
    """Return the path of the file in which Linux maps a tensor's bytes, empty for plain memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, _, *path = line.split(maxsplit=5)
        first, last = (int(address, 16) for address in addresses.split("-"))
        if first <= tensor.data_ptr() < last:
            assert tensor.data_ptr() + tensor.numel() <= last
            return "".join(path)
    raise AssertionError("no such address")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it asks Linux")
def test_samples_and_reconstructions_are_in_files_that_are_deleted(tmp_path: Path) -> None:
    tokenizer: Any = Constant()
    sampler, config = Sampler(UniformPrior(SequenceLayout([(1, 1)], [256]))), StepwiseSampling(batch_size=8)
    in_memory = draw_images(None, tokenizer, sampler, None, 20, 0, config)
    codes, pictures = draw_images(None, tokenizer, sampler, None, 20, 0, config, folder=tmp_path)
    again, reconstructions = encode_and_decode(tokenizer, pictures, 8, folder=tmp_path)
    assert all(mapped_file(pixels).startswith(f"{tmp_path}/") for pixels in (pictures, reconstructions))
    assert not mapped_file(in_memory[1]).startswith("/")
    assert all(torch.equal(in_memory[0][0], level) for level in (codes[0], again[0]))
    assert all(torch.equal(in_memory[1], pixels) for pixels in (pictures, reconstructions))
    assert list(tmp_path.iterdir()) == []  # even if the process is killed


def test_a_full_disk_raises_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
        allocate_pixels((1, 8, 8, 3), tmp_path)
