"""Where experts are computed, one file each: slots, the way into them, and the host's side of that way.

A device is found by its file's name, which defines ``DEVICE``, a subclass of ``Device``.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import torch

from runtime.copier import BaseCopier
from runtime.repack import Order


class DeviceError(ValueError):
    """A device that is not known or not there; one sentence."""


class Slots(Protocol):
    """``num_slots`` expert-sized buffers on a device, ``row_bytes`` apart."""

    num_slots: int
    count: int
    expert_bytes: int
    row_bytes: int
    device: torch.device

    def row(self, index: int) -> torch.Tensor:
        """Buffer ``index``: uint8 [expert_bytes] on the device."""

    def close(self) -> None:
        """Let go of the memory."""


class Device(ABC):
    """What the engine needs of the place where experts are computed.

    Attributes:
        name: its file's.
        torch_device: where the model's dense weights and activations are.
        fused: experts are multiplied straight from their slots (`runtime.kernels`), their codes in the order "rows".

    Raises:
        DeviceError: the machine has none; one sentence.
    """

    name: ClassVar[str]
    torch_device: torch.device
    fused: bool = False

    @property
    def order(self) -> Order:
        """The order of codes in which a store serves this device best."""
        return "rows" if self.fused else "hqq"

    @abstractmethod
    def slots(self, num_slots: int, expert_bytes: int) -> Slots:
        """All slots, in memory that is taken once."""

    @abstractmethod
    def hold(self, store: Any) -> AbstractContextManager[None]:
        """Keep ``store``'s memory where the copier reads it fastest; leave before the store is closed."""

    @abstractmethod
    def copier(
        self,
        store: Any,
        slots: Any,
        *,
        bytes_per_s: float = math.inf,
        fixed_s: float = 0.0,
        chunk_bytes: int,
        max_submitted: int = 2,
        write_back_bytes_per_s: float | None = None,
    ) -> BaseCopier:
        """A started copier; ``bytes_per_s`` infinite: the link's own speed, where there is one."""

    @abstractmethod
    def synchronize(self) -> None:
        """Return when everything given to the device so far is done."""

    @abstractmethod
    def to_host(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Small tensors of the device, in the host's memory: one copy, one wait. Read them before the next call."""

    @abstractmethod
    def mark(self) -> object | None:
        """For ``Request.after``: passed when what was computed so far is done; None where that is now."""

    @abstractmethod
    def peak_bytes(self) -> int | None:
        """Most bytes the allocator held at once since ``reset_peak``; None where nobody counts."""

    @abstractmethod
    def reset_peak(self) -> None:
        """Count the peak from here."""


def names() -> list[str]:
    """Every device's name, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def open_device(name: str) -> Device:
    """The device called ``name``.

    Raises:
        DeviceError: no such device, or this machine has none.
    """
    if name not in names():
        raise DeviceError(f"device {name!r} is unknown; choose one of {', '.join(names())}")
    kind: type[Device] = importlib.import_module(f"{__name__}.{name}").DEVICE
    return kind()
