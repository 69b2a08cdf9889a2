"""Batches on a device: rows in order, the same of every source, read in a thread if prefetched."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from stage1_vqvae.data.device_batches import device_batches

CPU = torch.device("cpu")


class Read:
    """Pixels that note which thread read them."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels, self.shape, self.threads = pixels, pixels.shape, set[str]()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        self.threads.add(threading.current_thread().name)
        return self.pixels[rows]


@pytest.mark.parametrize("ahead", [False, True])
def test_all_rows_come_once_and_in_order(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.prefetch._worth_prefetching", lambda _: ahead)
    pixels, labels = Read(torch.arange(7 * 12, dtype=torch.uint8).view(7, 2, 2, 3)), torch.arange(7)
    found = list(device_batches(CPU, 3, pixels, labels))
    assert [rows for rows, _ in found] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert torch.equal(torch.cat([of_pixels for _, (of_pixels, _) in found]), pixels.pixels)
    assert torch.equal(torch.cat([of_labels for _, (_, of_labels) in found]), labels)
    assert (threading.current_thread().name in pixels.threads) != ahead


def test_an_error_in_reading_is_raised_where_batches_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.prefetch._worth_prefetching", lambda _: True)

    class Broken(Read):
        def __getitem__(self, rows: Tensor | slice) -> Tensor:
            raise ValueError("unreadable")

    with pytest.raises(ValueError, match="unreadable"):
        list(device_batches(CPU, 3, Broken(torch.zeros(4, 1, 1, 1, dtype=torch.uint8))))
