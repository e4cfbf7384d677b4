"""device=cuda: slots in one tensor of the GPU, the store page-locked, copies on streams of their own."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from runtime import kernels
from runtime.copier import BaseCopier
from runtime.cuda_copier import CudaStream, ThreadCopier
from runtime.devices import Device, DeviceError
from runtime.rows import ALIGNMENT, ExpertRows, available_memory

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


class Staging:
    """Brings small tensors to the host together: packed on the device, one copy, one wait.

    Args:
        wait: return when what was given to the device is done.
        pin: take page-locked memory; into pageable memory the copy would not be asynchronous.
    """

    def __init__(self, wait: Callable[[], None], pin: bool = True) -> None:
        self._wait = wait
        self._pin = pin
        self._here = torch.empty(0, dtype=torch.uint8)

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Views of the same types and shapes, valid until the next call."""
        wide_first = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())  # so that all are aligned
        packed = torch.cat([tensors[i].contiguous().view(-1).view(torch.uint8) for i in wide_first])
        if len(packed) > len(self._here):
            with torch.inference_mode(False):  # else it could not be written outside of inference mode
                self._here = torch.empty(len(packed), dtype=torch.uint8, pin_memory=self._pin)
        self._here[: len(packed)].copy_(packed, non_blocking=True)
        self._wait()
        found = {}
        start = 0
        for i in wide_first:
            end = start + tensors[i].nbytes
            found[i] = self._here[start:end].view(tensors[i].dtype).view(tensors[i].shape)
            start = end
        return [found[i] for i in range(len(tensors))]


class CudaDevice(Device):
    name = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise DeviceError("device cuda was asked for, but torch finds no CUDA device; choose device cpu")
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.fused = kernels.available()
        self._staging = Staging(lambda: torch.cuda.current_stream(self.torch_device).synchronize())

    def slots(self, num_slots: int, expert_bytes: int) -> TensorSlots:
        slots = TensorSlots(num_slots, expert_bytes, self.torch_device)
        self.synchronize()  # zeroed, before another stream writes into them
        return slots

    @contextmanager
    def hold(self, store: Any) -> Iterator[None]:
        with page_locked(torch.cuda.cudart(), store, self._forget_error):
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

    def to_host(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return self._staging(tensors)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.torch_device))
        return event

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.torch_device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.torch_device)


@contextmanager
def page_locked(cudart: Any, store: Any, refused: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Have the copy engine read ``store``'s memory directly, for as long as this is entered.

    Mapped pages that the system refuses to lock are copied once into memory that it locks, if there is room. Where it
    refuses that too, the memory stays as it is and a UserWarning states the cost.

    Args:
        cudart: ``torch.cuda.cudart()``.
        store: `runtime.rows.ExpertRows`.
        refused: called after every refusal.

    Raises:
        DeviceError: on leaving, the memory could not be released.
    """
    size = store.count * store.row_bytes

    def lock(rows: Any) -> int:
        error = int(cudart.cudaHostRegister(rows.row(0).data_ptr(), size, _PORTABLE))
        if error:
            refused()
        return error

    locked = store
    error = lock(store)
    if error and store.mapped and size <= (available_memory() or 0):
        locked = ExpertRows(store.count, store.expert_bytes, touch=False)
        error = lock(locked)  # before anything is copied: a limit on locked memory refuses it as well
    if error:
        if locked is not store:
            locked.close()
        # Copying from pageable memory: 7-10 GB/s, by published measurements, and the CPU does half of it.
        warnings.warn(
            f"the system refused to page-lock {size / 1e9:.2f} GB of expert memory (CUDA error {error}); copies from "
            "pageable memory run at 7 to 10 GB/s at most (estimated) and keep the copier's thread busy: raise the "
            "limit on locked memory (ulimit -l) or keep fewer bytes per expert",
            stacklevel=3,
        )
        yield
        return
    address = locked.row(0).data_ptr()
    try:
        if locked is not store:
            store.move_to(locked)
        yield
    finally:
        error = int(cudart.cudaHostUnregister(address))
        if error:
            raise DeviceError(
                f"releasing {size / 1e9:.2f} GB of page-locked memory failed (CUDA error {error}); end the program"
            )


DEVICE = CudaDevice
