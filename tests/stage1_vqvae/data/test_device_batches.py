"""Batches on a device: rows in order, read in a thread when prefetching."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from stage1_vqvae.data.device_batches import device_batches

CPU = torch.device("cpu")


class RecordingPixels:
    """Pixels that record which threads read them."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels, self.shape, self.threads = pixels, pixels.shape, set[str]()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        self.threads.add(threading.current_thread().name)
        return self.pixels[rows]


@pytest.mark.parametrize("ahead", [False, True])
def test_every_row_comes_once_in_order(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.prefetch._worth_prefetching", lambda _: ahead)
    pixels, labels = RecordingPixels(torch.arange(7 * 12, dtype=torch.uint8).view(7, 2, 2, 3)), torch.arange(7)
    batches = list(device_batches(CPU, 3, pixels, labels))
    assert [rows for rows, _ in batches] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert torch.equal(torch.cat([images for _, (images, _) in batches]), pixels.pixels)
    assert torch.equal(torch.cat([classes for _, (_, classes) in batches]), labels)
    assert (threading.current_thread().name in pixels.threads) != ahead


def test_reading_errors_are_raised_in_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.prefetch._worth_prefetching", lambda _: True)

    class Broken(RecordingPixels):
        def __getitem__(self, rows: Tensor | slice) -> Tensor:
            raise ValueError("unreadable")

    with pytest.raises(ValueError, match="unreadable"):
        list(device_batches(CPU, 3, Broken(torch.zeros(4, 1, 1, 1, dtype=torch.uint8))))
