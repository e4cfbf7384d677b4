"""One expert on the host, one token, one thread: the ways there are (a benchmark, not a test).

    python tests/bench_host_experts.py
    python tests/bench_host_experts.py --bits 3 --tokens 4

Minima of repeats, each on another expert than the one before. torch's int4 kernel wants its own packing, laid out for
the vectors of this CPU: timed alone, and with the packing made when it is needed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from itertools import cycle

import numpy as np
import torch

from runtime.calibration.host import silu_product
from runtime.host_experts import HostExperts
from runtime.quantize import ExpertLayout, ExpertViews, dequantize, views
from runtime.rows import ExpertRows

SHAPES = {"mixtral-8x7b": (4096, 14336, 2), "demo": (192, 256, 96)}  # hidden, inner, experts


def least_ms(compute: Callable[[int], object], experts: Iterator[int], repeats: int) -> float:
    """Milliseconds of the fastest of ``repeats`` calls, each for the next expert, after one that does not count."""
    compute(next(experts))
    times = []
    for _ in range(repeats):
        expert, start = next(experts), time.perf_counter()
        compute(expert)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def int4_packed(pieces: ExpertViews) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Codes as torch's kernel wants them, and scale and offset of each group, for the three matrices."""
    layout = pieces.layout
    packed = []
    for i, rows in enumerate((layout.expert_size, layout.expert_size, layout.hidden_size)):
        words = pieces.codes[i, 0]
        codes = torch.cat([words >> 4, words & 15]).view(rows, -1).to(torch.int32)
        scale, zero = (t[i].float().view(rows, -1) for t in (pieces.scale, pieces.zero))
        offsets = torch.stack([scale, (8 - zero) * scale], -1).transpose(0, 1).contiguous().bfloat16()
        packed.append((torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), offsets))
    return packed


def int4_product(packed: list[tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor, group: int) -> torch.Tensor:
    """The expert by torch's kernel, in bfloat16."""
    gate, up, down = ((codes, group, offsets) for codes, offsets in packed)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return product(silu_product(product(x, *gate), product(x, *up)), *down)


def ways(hidden: int, inner: int, count: int, bits: int, tokens: int) -> dict[str, float]:
    """Milliseconds by way, and relative errors against float32."""
    layout = ExpertLayout(hidden, inner, bits)
    repeats = 8 if hidden > 1000 else 300
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((tokens, hidden), np.float32))
    found: dict[str, float] = {}
    with ExpertRows(count, layout.expert_bytes) as rows:
        for i in range(count):
            rows.row(i).copy_(torch.from_numpy(rng.integers(0, 256, layout.expert_bytes, np.uint8)))
            pieces = views(rows.row(i), layout)
            pieces.scale.uniform_(0.001, 0.01)
            pieces.zero.uniform_(0, 2**bits - 1)
        gate, up, down = dequantize(views(rows.row(0), layout))
        right = silu_product(x @ gate.T, x @ up.T) @ down.T
        del gate, up, down

        def error(outputs: torch.Tensor) -> float:
            return float((outputs.float() - right).norm() / right.norm())

        for name, dtype, exact in (
            ("as_it_stands", torch.bfloat16, False),
            ("dequantized_float32", torch.float32, True),
            ("dequantized_bfloat16", torch.bfloat16, True),
        ):
            experts = HostExperts(rows, count, [layout], silu_product, dtype, exact)
            found[f"{name}_ms"] = least_ms(lambda i, e=experts: e.compute(0, i, x), cycle(range(count)), repeats)
            found[f"{name}_error"] = error(experts.compute(0, 0, x))
            experts.close()
        if bits == 4:
            short = x.bfloat16()
            packed = [int4_packed(views(rows.row(i), layout)) for i in range(count)]
            size = layout.group_size
            found["int4_packed_ms"] = least_ms(
                lambda i: int4_product(packed[i], short, size), cycle(range(count)), repeats
            )
            found["int4_packing_ms"] = least_ms(
                lambda i: int4_packed(views(rows.row(i), layout)), cycle(range(count)), min(repeats, 30) // 3
            )
            found["int4_error"] = error(int4_product(packed[0], short, size))
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--bits", type=int, choices=(8, 4, 3, 2), default=4)
    p.add_argument("--tokens", type=int, default=1, metavar="N", help="to the expert (default %(default)s)")
    args = p.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        for name, shape in SHAPES.items():
            print(json.dumps({"shape": name, **vars(args), **ways(*shape, args.bits, args.tokens)}))


if __name__ == "__main__":
    main()
