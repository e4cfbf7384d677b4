"""Memory the engine and the copier process both see, in equal expert-sized rows.

A block has no name in any file system, so nothing can be left behind, however the processes end, and its size is
not held to that of /dev/shm. The copier process inherits the file descriptor.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch

from runtime.checkpoint import StoreError

ALIGNMENT = 64  # bytes; a cache line, and enough for every view


def aligned(expert_bytes: int) -> int:
    """Distance between two rows: ``expert_bytes`` aligned up to 64."""
    return -(-expert_bytes // ALIGNMENT) * ALIGNMENT


class ExpertRows:
    """``count`` equal expert buffers in one shared block.

    Args:
        fd: a file to map in place of new memory; rows begin at its first byte. Closed with this.
        private: writes to rows stay in this process.
        touch: have every page of new memory there at once, in place of when it is first written.

    Attributes:
        fd: file descriptor of the block, -1 once closed.
        mapped: it is a file's, not memory taken for it.
        row_bytes: distance between two rows: expert_bytes aligned up to 64.
    """

    device = torch.device("cpu")

    def __init__(
        self, count: int, expert_bytes: int, *, fd: int = -1, private: bool = False, touch: bool = True
    ) -> None:
        if count < 1 or expert_bytes < 1:
            raise ValueError(f"{count} buffers of {expert_bytes} bytes asked for; both must be at least 1")
        self.count = count
        self.expert_bytes = expert_bytes
        self.row_bytes = aligned(expert_bytes)
        self.mapped = fd >= 0
        self.fd = anonymous_file(count * self.row_bytes) if fd < 0 else fd
        try:
            access = mmap.ACCESS_COPY if private else mmap.ACCESS_WRITE
            block = np.frombuffer(mmap.mmap(self.fd, count * self.row_bytes, access=access), np.uint8)
            if touch and fd < 0:
                block.fill(0)
        except BaseException:
            self.close()
            raise
        self._block: torch.Tensor | None = torch.from_numpy(block).view(count, self.row_bytes)

    def row(self, index: int) -> torch.Tensor:
        """Buffer ``index``: uint8 [expert_bytes], shared, writable, valid as long as anything refers to it."""
        if not 0 <= index < self.count:
            raise IndexError(f"buffer {index} was asked for; there are 0 to {self.count - 1}")
        return self.block[index, : self.expert_bytes]

    @property
    def block(self) -> torch.Tensor:
        """All rows: uint8 [count, row_bytes].

        Raises:
            StoreError: after close().
        """
        if self._block is None:
            raise StoreError("a buffer was asked for after close(); keep the store open while it is used")
        return self._block

    def move_to(self, other: ExpertRows) -> None:
        """Copy every row to ``other``, of the same rows, and stand on its memory from now on; ``other`` is closed."""
        other.block.copy_(self.block)
        block, fd, mapped = other._block, other.fd, other.mapped
        other._block, other.fd = None, -1
        self.close()
        self._block, self.fd, self.mapped = block, fd, mapped

    def close(self) -> None:
        """Let go of the block; its memory is freed when the last tensor on it and the copier process are gone."""
        self._block = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()


class SlotPool(ExpertRows):
    """``num_slots`` expert-sized buffers on the device (device=cpu: shared memory)."""

    def __init__(self, num_slots: int, expert_bytes: int) -> None:
        super().__init__(num_slots, expert_bytes)

    @property
    def num_slots(self) -> int:
        return self.count


def anonymous_file(size: int) -> int:
    """File descriptor of ``size`` zero bytes that have no path: memory on Linux, an unlinked file elsewhere."""
    create: Callable[[str], int] | None = getattr(os, "memfd_create", None)
    if create is not None:
        fd = create("experts")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd


def available_memory() -> int | None:
    """Bytes this process may still take without swapping (Linux: free and reclaimable, within its cgroup)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        cached = next(
            (int(s.split()[1]) for s in (group / "memory.stat").read_text().splitlines() if s.startswith("inactive_f")),
            0,
        )
        if limit != "max":
            left = int(limit) - int((group / "memory.current").read_text()) + cached
            found = left if found is None else min(found, left)
    except OSError:
        pass  # not held to a group's limit
    return found
