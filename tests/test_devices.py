"""Devices: found by file, one interface; page-locking, also where the system refuses it."""

from __future__ import annotations

import math
import os
import warnings

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra is not installed")

from runtime.copier import Request  # noqa: E402
from runtime.devices import DeviceError, names, open_device  # noqa: E402
from runtime.devices.cuda import Staging, TensorSlots, page_locked  # noqa: E402
from runtime.store import ExpertRows  # noqa: E402

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


class Cudart:
    """Stands in for ``torch.cuda.cudart()``; calls (the first ``times`` of them) return ``error``."""

    def __init__(self, error: int = 0, times: float = math.inf) -> None:
        self.error = error
        self.times = times
        self.calls: list[tuple] = []

    def cudaHostRegister(self, *args: int) -> int:  # noqa: N802 (CUDA's name)
        self.calls.append(("register", *args))
        return self._answer()

    def cudaHostUnregister(self, *args: int) -> int:  # noqa: N802
        self.calls.append(("unregister", *args))
        return self._answer()

    def _answer(self) -> int:
        return self.error if len(self.calls) <= self.times else 0


def test_devices_are_found_by_file():
    assert names() == ["cpu", "cuda"]
    with pytest.raises(DeviceError, match="device 'tpu' is unknown; choose one of cpu, cuda"):
        open_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(DeviceError, match="torch finds no CUDA device; choose device cpu"):
        open_device("cuda")


@pytest.mark.parametrize("name", ["cpu", CUDA])
def test_every_device_brings_an_expert_into_a_slot(name):
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    device = open_device(name)
    assert device.name == name
    device.reset_peak()
    with ExpertRows(3, 1000) as store, device.hold(store):
        store.row(2).fill_(7)
        slots = device.slots(2, 1000)
        assert slots.row(1).device == device.torch_device == slots.device
        assert (slots.num_slots, slots.expert_bytes, slots.row_bytes) == (2, 1000, 1024)
        with device.copier(store, slots, bytes_per_s=1e9, chunk_bytes=300) as copier:
            copier.apply(demand=[Request(0, 2, 1, after=device.mark())])
            assert copier.wait().load == 0
        assert (slots.row(1) == 7).all()
        assert (slots.row(0) == 0).all()
        device.synchronize()
        peak = device.peak_bytes()
        assert peak is None or peak >= 2048
        slots.close()


def test_the_cpus_link_has_no_speed_of_its_own():
    device = open_device("cpu")
    with (
        ExpertRows(1, 64) as store,
        device.slots(1, 64) as slots,
        pytest.raises(ValueError, match="no link of its own; state its speed"),
    ):
        device.copier(store, slots, bytes_per_s=math.inf, chunk_bytes=64)


def test_memory_is_page_locked_as_long_as_it_is_held_also_after_an_error():
    cudart = Cudart()
    with ExpertRows(2, 100) as store:
        address = store.row(0).data_ptr()
        held = page_locked(cudart, store)
        held.__enter__()
        assert cudart.calls == [("register", address, 256, 1)]
        assert not held.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        assert cudart.calls == [("register", address, 256, 1), ("unregister", address)]


@pytest.fixture
def mapped(tmp_path):
    """Three rows that are a file's, each of its own byte."""
    path = tmp_path / "rows"
    path.write_bytes(b"".join(bytes([i + 1]) * 128 for i in range(3)))
    with ExpertRows(3, 100, fd=os.open(path, os.O_RDWR), private=True) as store:
        yield store


def test_mapped_pages_that_cannot_be_locked_are_copied_once_into_memory_that_can(mapped):
    """No warning; the store stands on the copy from then on, which is what is unlocked in the end."""
    cudart, refused = Cudart(error=1, times=1), []
    file, descriptor = mapped.row(0).data_ptr(), mapped.fd
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with page_locked(cudart, mapped, lambda: refused.append(True)):
            copy = mapped.row(0).data_ptr()
            assert [row.unique().tolist() for row in mapped.block] == [[1], [2], [3]]
            assert not mapped.mapped and copy != file
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(descriptor)
    assert cudart.calls == [("register", file, 384, 1), ("register", copy, 384, 1), ("unregister", copy)]
    assert refused == [True]


@pytest.mark.parametrize("available", [383, None, 10**9])
def test_without_room_or_leave_to_lock_a_mapped_store_stays_where_it_is(mapped, monkeypatch, available):
    monkeypatch.setattr("runtime.devices.cuda.available_memory", lambda: available)
    cudart, refused, file = Cudart(error=1), [], mapped.row(0).data_ptr()
    with (
        pytest.warns(UserWarning, match="refused to page-lock"),
        page_locked(cudart, mapped, lambda: refused.append(True)),
    ):
        assert mapped.row(0).data_ptr() == file and mapped.mapped
    assert len(refused) == len(cudart.calls) == (2 if available == 10**9 else 1)


def test_refused_page_locking_is_a_warning_that_states_the_cost():
    """Memory that is no file's is not copied: its copy would be refused for the same reason."""
    cudart, refused = Cudart(error=2), []
    with (
        ExpertRows(3, 10**6, touch=False) as store,
        pytest.warns(UserWarning, match=r"refused to page-lock 0.00 GB .*\(CUDA error 2\).* 7 to 10 GB/s"),
        page_locked(cudart, store, lambda: refused.append(True)),
    ):
        assert refused == [True]
    assert [call[0] for call in cudart.calls] == ["register"]


def test_memory_that_cannot_be_released_is_an_error():
    cudart = Cudart()
    with (
        ExpertRows(1, 100) as store,
        pytest.raises(DeviceError, match=r"releasing 0.00 GB .* \(CUDA error 4\)"),
        page_locked(cudart, store),
    ):
        cudart.error = 4


@pytest.mark.parametrize("kinds", [(torch.int64, torch.bfloat16, torch.float32), (torch.float16, torch.int64)])
def test_small_tensors_come_to_the_host_together(kinds, monkeypatch):
    """One copy and one wait a call, whatever types; a buffer that is too small grows."""
    copies, waits = [], []
    staging = Staging(lambda: waits.append(len(copies)), pin=False)
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *args, **how: (copies.append(how), copy(*args, **how))[1])
    with torch.inference_mode():
        staging([torch.zeros(1)])
    for tokens in (1, 3, 2):
        given = [torch.arange(tokens * k).view(tokens, k).to(kind) for k, kind in enumerate(kinds, 1)]
        given.append(torch.rand(tokens, 4, 2).transpose(1, 2))  # not contiguous
        given.append(torch.zeros(tokens, 0, 3))  # nothing
        found = staging(given)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, given, strict=True))
    assert copies == [{"non_blocking": True}] * 4
    assert waits == [1, 2, 3, 4]


def test_slots_of_a_tensor():
    with TensorSlots(3, 100, torch.device("cpu")) as slots, torch.inference_mode():
        for slot in range(3):
            slots.row(slot).fill_(slot + 1)
        assert [slots.row(slot).sum().item() for slot in range(3)] == [100, 200, 300]
        assert slots.row(1).data_ptr() - slots.row(0).data_ptr() == slots.row_bytes == 128
    with pytest.raises(ValueError, match=r"after close\(\)"):
        slots.row(0)
    with TensorSlots(3, 100, torch.device("cpu")) as slots, pytest.raises(IndexError, match="there are 0 to 2"):
        slots.row(3)
    with pytest.raises(ValueError, match="both must be at least 1"):
        TensorSlots(0, 100, torch.device("cpu"))
