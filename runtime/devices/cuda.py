"""device=cuda: slots in one tensor of the GPU, the store page-locked, copies on streams of their own."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from runtime import kernels
from runtime.copier import BaseCopier
from runtime.cuda_copier import CudaStream, ThreadCopier
from runtime.devices import Device, DeviceError
from runtime.store import ALIGNMENT

_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every context


class TensorSlots:
    """``num_slots`` buffers in one uint8 tensor of ``device``; ``row_bytes`` is expert_bytes aligned up to 64.

    Raises:
        ValueError: no slots, or of no bytes.
        torch.OutOfMemoryError: the device has not that much left.
    """

    def __init__(self, num_slots: int, expert_bytes: int, device: torch.device) -> None:
        if num_slots < 1 or expert_bytes < 1:
            raise ValueError(f"{num_slots} slots of {expert_bytes} bytes asked for; both must be at least 1")
        self.num_slots = self.count = num_slots
        self.expert_bytes = expert_bytes
        self.row_bytes = -(-expert_bytes // ALIGNMENT) * ALIGNMENT
        self.device = device
        with torch.inference_mode(False):  # else copies into it would be refused outside of inference mode
            self._block: torch.Tensor | None = torch.zeros(num_slots, self.row_bytes, dtype=torch.uint8, device=device)

    def row(self, index: int) -> torch.Tensor:
        """Buffer ``index``: uint8 [expert_bytes]."""
        if self._block is None:
            raise ValueError(f"slot {index} was asked for after close(); keep the slots open while they are used")
        if not 0 <= index < self.num_slots:
            raise IndexError(f"slot {index} was asked for; there are 0 to {self.num_slots - 1}")
        return self._block[index, : self.expert_bytes]

    def close(self) -> None:
        self._block = None

    def __enter__(self) -> TensorSlots:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class CudaDevice(Device):
    name = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise DeviceError("device cuda was asked for, but torch finds no CUDA device; choose device cpu")
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.fused = kernels.available()

    def slots(self, num_slots: int, expert_bytes: int) -> TensorSlots:
        slots = TensorSlots(num_slots, expert_bytes, self.torch_device)
        self.synchronize()  # zeroed, before another stream writes into them
        return slots

    @contextmanager
    def hold(self, store: Any) -> Iterator[None]:
        first = store.row(0)
        with page_locked(torch.cuda.cudart(), first.data_ptr(), store.count * store.row_bytes, self._forget_error):
            yield

    def _forget_error(self) -> None:
        """A refused call is reported again by the next kernel launch, whatever that is: take the report here."""
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self.torch_device)

    def copier(
        self, store: Any, slots: Any, *, write_back_bytes_per_s: float | None = None, **options: Any
    ) -> BaseCopier:
        back = None if write_back_bytes_per_s is None else CudaStream(self.torch_device)
        options = {"bytes_per_s": math.inf, "fixed_s": 0.0} | options
        return ThreadCopier(
            store,
            slots,
            CudaStream(self.torch_device),
            back,
            write_back_bytes_per_s=write_back_bytes_per_s,
            **options,
        )

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.torch_device))
        return event

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.torch_device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.torch_device)


@contextmanager
def page_locked(cudart: Any, address: int, size: int, refused: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Host memory the copy engine reads directly, for as long as this is entered.

    ``cudart`` is ``torch.cuda.cudart()``. Where the system refuses (usually a limit on locked memory), ``refused`` is
    called, the memory stays pageable and a UserWarning states the cost.

    Raises:
        DeviceError: on leaving, the memory could not be released.
    """
    error = int(cudart.cudaHostRegister(address, size, _PORTABLE))
    if error:
        refused()
        # Copying from pageable memory: 7-10 GB/s, by published measurements, and the CPU does half of it.
        warnings.warn(
            f"the system refused to page-lock {size / 1e9:.2f} GB of expert memory (CUDA error {error}); copies from "
            "pageable memory run at 7 to 10 GB/s at most (estimated) and keep the copier's thread busy: raise the "
            "limit on locked memory (ulimit -l) or keep fewer bytes per expert",
            stacklevel=3,
        )
        yield
        return
    try:
        yield
    finally:
        error = int(cudart.cudaHostUnregister(address))
        if error:
            raise DeviceError(
                f"releasing {size / 1e9:.2f} GB of page-locked memory failed (CUDA error {error}); end the program"
            )


DEVICE = CudaDevice
