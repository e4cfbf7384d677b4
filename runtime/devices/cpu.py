"""device=cpu: slots and store in shared host memory, a link of stated speed in a process of its own."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from runtime.copier import BaseCopier, Copier
from runtime.devices import Device
from runtime.store import SlotPool


class CpuDevice(Device):
    name = "cpu"
    torch_device = torch.device("cpu")

    def slots(self, num_slots: int, expert_bytes: int) -> SlotPool:
        return SlotPool(num_slots, expert_bytes)

    def hold(self, store: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def copier(self, store: Any, slots: Any, *, bytes_per_s: float = math.inf, **options: Any) -> BaseCopier:
        """Raises:
        ValueError: no stated speed: this link has none of its own.
        """
        if bytes_per_s == math.inf:
            raise ValueError("device=cpu has no link of its own; state its speed")
        return Copier(store, slots, bytes_per_s=bytes_per_s, **{"fixed_s": 0.0} | options)

    def synchronize(self) -> None:
        """Computing on the CPU returns when it is done."""

    def to_host(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return list(tensors)

    def mark(self) -> None:
        return None

    def peak_bytes(self) -> None:
        return None

    def reset_peak(self) -> None:
        """Nothing is counted."""


DEVICE = CpuDevice
