"""What the device reaches at most: copying within its memory, multiplying matrices."""

from __future__ import annotations

import time

import torch

from runtime.devices import Device


def memory_gb_s(device: Device) -> float:
    """Bytes read and written per second by a large copy on the device (a processor's: on one thread), decimal GB/s."""
    source = torch.ones(64_000_000, dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        device.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        device.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * len(source) / min(times) / 1e9


def tflops(device: Device) -> float:
    """A matrix product on the device: bfloat16 of 4096; on a processor float32 of 768, on one thread."""
    cpu = device.torch_device.type == "cpu"
    size = 768 if cpu else 4096
    a = torch.ones(size, size, dtype=torch.float32 if cpu else torch.bfloat16, device=device.torch_device)
    times = []
    for _ in range(5):
        device.synchronize()
        start = time.perf_counter()
        a @ a
        device.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e12
