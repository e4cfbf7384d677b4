"""What a measurement depends on besides the code: card, driver, link, clocks, versions; and how it is timed."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from runtime import provenance

_ASKED = (
    "name", "driver_version", "vbios_version", "pcie.link.gen.current", "pcie.link.gen.max", "pcie.link.width.current",
    "pcie.link.width.max", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit",
    "temperature.gpu", "memory.total", "memory.used", "persistence_mode",
)  # fmt: skip
_PACKAGES = ("torch", "transformers", "triton", "numpy", "hqq", "simpy", "numba", "safetensors", "accelerate")


def card_now() -> dict[str, Any]:
    """What the system reports of the card at this moment; empty where it reports nothing."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}
    line = done.stdout.strip().split("\n")[0]
    if done.returncode or not line:
        return {"error": (done.stderr or done.stdout).strip()[:200]}
    return dict(zip(_ASKED, (word.strip() for word in line.split(",")), strict=False))


def conditions(device: str) -> dict[str, Any]:
    """Everything that is the same for a whole call."""
    found: dict[str, Any] = {
        "device": device,
        "machine": provenance.machine(),
        "commit": provenance.commit(),
        "command": provenance.command(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    if device == "cuda":
        about = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "card": about.name,
            "card_memory_gb": about.total_memory / 1e9,
            "capability": f"{about.major}.{about.minor}",
            "multiprocessors": about.multi_processor_count,
            "l2_bytes": getattr(about, "L2_cache_size", None),
            "cuda": torch.version.cuda,
            "system_reports": card_now(),
        }
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def card_name(device: str) -> str:
    """The device in a few words."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def seconds(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """Seconds of one ``work``, the mean of ``repeats`` in a row, by the device's clock where it has one."""
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - start) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / repeats


def wall_seconds(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """Seconds of one ``work`` by the host's clock, the device waited for at both ends."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


def graph_seconds(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """Seconds of one ``work`` with the host out of the way: ``repeats`` of it captured in a CUDA graph, best of 5.

    Raises:
        RuntimeError: it cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream(device).wait_stream(stream)
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            work()
    graph.replay()
    torch.cuda.synchronize(device)
    return min(seconds(device, graph.replay, 1) for _ in range(5)) / repeats
