"""Devices: found by file, one interface; page-locking, also where the system refuses it."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra is not installed")

from runtime.copier import Request  # noqa: E402
from runtime.devices import DeviceError, names, open_device  # noqa: E402
from runtime.devices.cuda import TensorSlots, page_locked  # noqa: E402
from runtime.store import ExpertRows  # noqa: E402

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


class Cudart:
    """Stands in for ``torch.cuda.cudart()``; every call returns ``error``."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.calls: list[tuple] = []

    def cudaHostRegister(self, *args: int) -> int:  # noqa: N802 (CUDA's name)
        self.calls.append(("register", *args))
        return self.error

    def cudaHostUnregister(self, *args: int) -> int:  # noqa: N802
        self.calls.append(("unregister", *args))
        return self.error


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
    held = page_locked(cudart, 4096, 100)
    held.__enter__()
    assert cudart.calls == [("register", 4096, 100, 1)]
    assert not held.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert cudart.calls == [("register", 4096, 100, 1), ("unregister", 4096)]


def test_refused_page_locking_is_a_warning_that_states_the_cost():
    cudart, refused = Cudart(error=2), []
    with (
        pytest.warns(UserWarning, match=r"refused to page-lock 3.00 GB .*\(CUDA error 2\).* 7 to 10 GB/s"),
        page_locked(cudart, 4096, 3 * 10**9, lambda: refused.append(True)),
    ):
        assert refused == [True]
    assert [call[0] for call in cudart.calls] == ["register"]


def test_memory_that_cannot_be_released_is_an_error():
    cudart = Cudart()
    with pytest.raises(DeviceError, match=r"releasing 0.00 GB .* \(CUDA error 4\)"), page_locked(cudart, 4096, 100):
        cudart.error = 4


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
