"""Tiny traces, machines and settings that several tests share."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.experiment import Setting
from sim.machine import HardwareProfile, LinkProfile, Operators
from sim.spec import options
from traces import DECODE, PREFILL, ModelSpec, Trace
from traces.trace import rank

if shutil.which("nvidia-smi") is None:  # Triton asks when it is first imported, whichever test does that
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread for torch, where a test has loaded it: results are then the same on every machine."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    yield
    if torch:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a family's small model, made when first asked for; read it only."""
    import torch
    from small_models import small_model

    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            small_model(name).to(torch.bfloat16).save_pretrained(made[name])
        return made[name]

    return of


CHUNK = 10_000  # bytes, and nanoseconds on the round machine's link


def round_machine(
    bits: int = 4,
    cooling: tuple[float, float] = (0.0, 0.0),
    displaced: tuple[float, float] = (0.0, 0.0),
    **changes: Any,
) -> HardwareProfile:
    """Measured laws of the model ``tiny`` in round nanoseconds, and a link of 1 byte a nanosecond.

    Dense part 4000 + 100 a token, one expert 3000 + 500 a token, head 2000, planning 1000, wake-up 200;
    H2D 50 a chunk + 1 a byte (2 a byte while D2H is busy), D2H 100 + 1 a byte.
    """
    laws = Operators(
        dense=(4e-6, 1e-7, 0.0),
        expert={str(bits): (3e-6, 5e-7)},
        head=(2e-6, 0.0),
        gates=(1e-7, 2e-7, 3e-7, 4e-7),
        host_s={"default": 1e-6},
        cooling={"default": cooling},
        displaced={"prefetching": displaced},
    )
    link = LinkProfile(1.0, 5e-8, 1.0, 1e-7, h2d_duplex_gb_s=0.5, h2d_host_gb_s=0.8)
    values: dict[str, Any] = {"link": link, "wake_s": 2e-7, "operators": {"tiny": laws}} | changes
    return HardwareProfile(name="round", vram_gb=1, host_gb=1, **values)


def tiny_model(layers: int = 2, experts: int = 4, top_k: int = 2) -> ModelSpec:
    """64 x 128 experts: 13,824 bytes at 4 bits (12,288 of codes, 384 groups of 4 bytes)."""
    return ModelSpec("tiny", layers, experts, top_k, 64, 128, kv_bytes=16, dense_bytes=1000)


def trace_of(
    ids: Any, lengths: list[int] | None = None, prefill: int = 0, experts: int = 4, scores: Any = None
) -> Trace:
    """A trace of ``ids`` [T][L][K]; each sequence starts with ``prefill`` prefill tokens; ``scores`` [T][L][D][E]."""
    array = np.array(ids, np.uint8)
    tokens, layers, top_k = array.shape
    lengths = lengths or [tokens]
    phase = np.concatenate([np.where(np.arange(n) < prefill, PREFILL, DECODE) for n in lengths]).astype(np.uint8)
    guesses = {} if scores is None else {"router": rank(np.array(scores, np.float64), experts)}
    return Trace(
        tiny_model(layers, experts, top_k),
        array,
        np.ones(array.shape, np.float16),
        np.array(lengths, np.int32),
        phase,
        guesses=guesses,
        routing="SYNTHETIC",
    )


def random_trace(seed: int, sequences: int = 2, length: int = 8, prefill: int = 0, **shape: int) -> Trace:
    """Routing that repeats, and guesses that are right more often than not."""
    rng = np.random.default_rng(seed)
    layers, experts, top_k = shape.get("layers", 3), shape.get("experts", 6), shape.get("top_k", 2)
    tokens = sequences * length
    liking = rng.random((layers, experts))
    wants = rng.random((tokens, layers, experts)) + liking
    ids = np.argsort(-wants, axis=-1, kind="stable")[..., :top_k]
    distances = min(4, layers)
    scores = rng.random((tokens, layers, distances, experts)) * 0.5
    for distance in range(1, distances + 1):
        for layer in range(layers - distance):
            right = rng.random((tokens, top_k)) < 0.7
            np.put_along_axis(
                scores[:, layer, distance - 1],
                ids[:, layer + distance],
                np.take_along_axis(scores[:, layer, distance - 1], ids[:, layer + distance], -1) + 0.5 * right,
                -1,
            )
    return trace_of(ids.tolist(), [length] * sequences, prefill, experts, scores)


def random_setting(seed: int) -> Setting:
    """Any policy, cache, predictor and run option on a small random trace and the round machine."""
    draw = random.Random(seed)
    prefill = draw.choice([0, 0, 3, 6])
    trace = random_trace(
        seed,
        sequences=draw.choice([1, 3]),
        length=draw.choice([7, 12]),
        prefill=prefill,
        layers=draw.choice([2, 3, 5]),
        experts=draw.choice([4, 6, 8]),
        top_k=draw.choice([1, 2, 2, 3]),
    )
    keys = {
        "cache": draw.choice(["lru", "belady"]),
        "predictor": draw.choice(["recorded", "router", "oracle"]),
        "miss": draw.choice(["load", "load", "cpu", "split"]),
        "guard": draw.choice([0, 1]),
        "stale": draw.choice(["retract", "keep"]),
        "landing_slots": draw.choice([0, 0, 1, 2, 5]),
        "stream_slots": draw.choice([1, 2, 3]),
        "chunk_bytes": draw.choice([0, -16, -3, 1000, 5000, 13824]),
        "max_submitted": draw.choice([1, 2, 3, 4]),
        "write_back": draw.choice([0, 0, 1]),
        "copy_stream": draw.choice([1, 1, 1, 0]),
    }
    looking = f"speculative:lookahead={draw.randint(1, 4)},min_score=0.05,evidence={draw.choice([0.0, 2.0])}"
    base = draw.choice(["on_demand", looking])
    text = base + ("," if ":" in base else ":") + ",".join(f"{k}={v}" for k, v in keys.items())
    machine = round_machine(
        cooling=draw.choice([(0.0, 0.0), (0.07, 2e-6), (0.3, 1e-3)]),
        displaced=draw.choice([(0.0, 0.0), (7e-7, 3e-7)]),
        wake_s=draw.choice([0.0, 2e-7, 5e-6, 3e-5]),
        host_memory_gb_s=draw.choice([3.0, 6.0]),
    )
    slots = draw.randint(trace.model.top_k, trace.model.num_experts)
    return Setting(trace, machine, trace.model, 4, slots, options(text), draw.random() < 0.4)
