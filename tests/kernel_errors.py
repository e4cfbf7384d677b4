"""Relative errors of experts that the fused kernels compute from slots, against float64 dequantize-and-multiply.

    python tests/kernel_errors.py            every width, group, shape, type and number of tokens: minutes

Under Triton's interpreter, where torch finds no CUDA device; prints one JSON document. What follows below the gates is
for tests as well.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from runtime import kernels
from runtime.experts import SlotExperts
from runtime.family import ActGate, ClampedGate
from runtime.quantize import ExpertLayout, ExpertViews, dequantize, views
from runtime.repack import places
from runtime.store import SlotPool

BITS = (8, 4, 3, 2)
GROUPS = (16, 32, 64, 128, 256)
TOKENS = (1, 2, 3, 7, 8, 16, 17, 31, 32, 33, 64)
SHAPES = ((64, 192), (192, 320), (256, 64), (128, 256), (256, 768), (96, 160))  # hidden, inner
GATES = {
    "silu": ActGate(torch.nn.SiLU()),
    "gelu": ActGate(torch.nn.GELU()),
    "gelu_tanh": ActGate(torch.nn.GELU(approximate="tanh")),
    "relu": ActGate(torch.nn.ReLU()),
    "clamped": ClampedGate(1.702, 1.0),  # gpt-oss, its limit low enough to be met
}
SILU = kernels.activation(GATES["silu"])
TOLERANCE = 5e-3  # relative error against float64, by the largest output


def random_expert(layout: ExpertLayout, seed: int = 0) -> ExpertViews:
    """Random words (unused values of the last 3-bit words included), and scales and zeros as quantizing gives them."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randint(0, 256, (layout.expert_bytes,), generator=generator, dtype=torch.uint8)
    expert = views(buffer, layout)
    if layout.bits == 3:
        expert.codes.bitwise_and_((1 << 30) - 1)
    levels = 1 << layout.bits
    expert.scale.copy_((torch.rand(expert.scale.shape, generator=generator) + 0.5) / levels)
    expert.zero.copy_((torch.rand(expert.zero.shape, generator=generator) * 0.4 + 0.3) * levels)
    expert.biases.copy_(torch.randn(expert.biases.shape, generator=generator))
    return expert


def in_rows(expert: ExpertViews) -> ExpertViews:
    """The same expert with its codes in the order "rows", in a buffer of its own."""
    layout = dataclasses.replace(expert.layout, order="rows")
    moved = views(torch.zeros(layout.expert_bytes, dtype=torch.uint8), layout)
    for old, new in zip(expert[2:], moved[2:], strict=True):
        new.copy_(old)
    shifts = layout.bits * torch.arange(layout.values - 1, -1, -1, dtype=layout.word).view(-1, 1, 1)
    for matrix in range(3):
        values = ((expert.codes[matrix] >> shifts) & ((1 << layout.bits) - 1)).flatten(0, 1)[: layout.groups]
        placed = torch.zeros(layout.values * layout.rows, layout.group_size, dtype=layout.word)
        placed[places(layout, matrix)] = values
        words = placed.view(layout.values, layout.rows, -1) << shifts
        moved.codes[matrix].copy_(words.sum(0, dtype=layout.word))
    return moved


def on(device: str, expert: ExpertViews) -> ExpertViews:
    return ExpertViews(expert.layout, *(t.to(device) for t in expert[1:]))


def reference(expert: ExpertViews, x: torch.Tensor, act: str) -> torch.Tensor:
    gate, up, down = dequantize(expert, torch.float64)
    x, biases = x.double(), expert.biases.double()
    inner = expert.layout.expert_size
    gates, ups, downs = biases.split((inner, inner, len(down))) if len(biases) else (0, 0, 0)
    return GATES[act](x @ gate.T + gates, x @ up.T + ups) @ down.T + downs


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double().cpu() - expected).norm() / expected.norm()).item()


def layouts(groups: Iterable[int] = GROUPS, biased: bool = True) -> Iterator[ExpertLayout]:
    """All that can be; every other shape with biases."""
    for (number, (hidden, inner)), group, bits in itertools.product(enumerate(SHAPES), groups, BITS):
        try:
            biases = (2 * inner + hidden) * (number % 2) if biased else 0
            yield ExpertLayout(hidden, inner, bits, group, biases, "rows")
        except ValueError:
            continue  # this group does not divide this shape


def error_in_a_slot(layout: ExpertLayout, tokens: int, dtype: torch.dtype, act: str = "silu") -> float:
    """Of one expert in the second of two slots, computed for every one of ``tokens`` as their second choice."""
    expert = random_expert(dataclasses.replace(layout, order="hqq"), tokens)
    x = torch.randn(tokens, layout.hidden_size, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    with SlotPool(2, layout.expert_bytes) as pool:
        experts = SlotExperts(pool, [layout], GATES[act], dtype, fused=True)
        assert not experts.workspaces
        for piece, there in zip(in_rows(expert)[1:], views(pool.row(1), layout)[1:], strict=True):
            there.copy_(piece)
        ids = torch.tensor([[0, 5]] * tokens)
        out = torch.full((tokens, 2, layout.hidden_size), torch.nan)
        assert experts.compute(0, 5, 1, x, ids, ids.tolist(), out) == tokens
        experts.close()
    assert out[:, 0].isnan().all()
    return relative_error(out[:, 1], reference(expert, x, act))


def main() -> dict[str, Any]:
    begun = time.monotonic()
    worst: dict[str, float] = {}
    cells = 0
    for layout, tokens, dtype in itertools.product(layouts(), TOKENS, (torch.float32, torch.bfloat16, torch.float16)):
        act = "clamped" if layout.biases else "silu"
        key = f"{layout.bits} bits, {str(dtype).removeprefix('torch.')}"
        worst[key] = max(worst.get(key, 0.0), error_in_a_slot(layout, tokens, dtype, act))
        cells += 1
        if cells % 200 == 0:
            print(f"{cells} cells, worst {max(worst.values()):.2e}", file=sys.stderr)
    return {
        "evidence": "MEASURED",
        "on": "Triton's interpreter, one CPU thread" if kernels.interpreted() else torch.cuda.get_device_name(),
        "command": "python tests/kernel_errors.py",
        "groups": GROUPS,
        "tokens": TOKENS,
        "shapes": SHAPES,
        "cells": cells,
        "tolerance": TOLERANCE,
        "worst_relative_error": {key: float(f"{error:.3g}") for key, error in sorted(worst.items())},
        "seconds": round(time.monotonic() - begun, 1),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(), indent=1))
