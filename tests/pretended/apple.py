"""Float64 work moves to the CPU on Apple's GPUs: part of the chain on a pretended `mps`."""

from __future__ import annotations

import torch

from tests.pretended.device import Pretended
from tests.pretended.rules import raises
from training.devices import (
    as_float64,
    float64_copy,
    float64_device,
    numbered,
    pinned,
    set_current_device,
    wait_for,
    widest_float,
)


def check() -> None:
    device = numbered(torch.device("mps"))
    cpu = torch.device("cpu")
    with Pretended() as log:
        x = torch.ones(3, device="mps")
        for operation in (
            x.double,
            lambda: x.to("cpu", torch.float64).to("mps"),
            lambda: torch.zeros(1, dtype=torch.float64, device="mps"),
        ):
            with raises("doesn't support float64"):
                operation()
        assert x.device == device == torch.device("mps", 0)
        assert widest_float(device) == torch.float32
        assert float64_device(device) == cpu
        assert (as_float64(x).device, as_float64(x).dtype) == (cpu, torch.float64)
        model = torch.nn.Linear(3, 3).to(device)
        assert {(weight.device, weight.dtype) for weight in float64_copy(model).parameters()} == {(cpu, torch.float64)}
        assert {weight.device for weight in model.parameters()} == {device}
        assert not pinned(torch.ones(3), device).is_pinned()
        set_current_device(device)
        log.waits.clear()
        wait_for(device)
        assert log.waits.total() == 1
