"""Part `kernels`: an expert's feed-forward from its codes, against the device's copy bandwidth and against
dequantizing first."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from runtime import forced, kernels
from runtime.bench.book import Book, UnavailableError
from runtime.bench.conditions import graph_seconds, seconds, wall_seconds
from runtime.devices import Device
from runtime.family import ActGate, ClampedGate, Gated
from runtime.quantize import ExpertLayout, ExpertViews, Workspace, forward, views
from runtime.store import ExpertRows

AIM = 0.70  # share of the measured copy bandwidth at one token
ROTATED = 320 << 20  # bytes of different experts taken in turn: more than any cache holds


class Sizes(NamedTuple):
    """``shapes``: by name hidden and expert size, biases, and the gated activation; what is measured, the most wanted
    first; ``copy``: bytes."""

    shapes: dict[str, tuple[int, int, int, Gated]]
    bits: tuple[int, ...]
    tokens: tuple[int, ...]
    copy: int
    repeats: int


SILU = ActGate(torch.nn.SiLU())
SHAPES = {"mixtral": (4096, 14336, 0, SILU), "gpt-oss": (2880, 2880, 3 * 2880, ClampedGate(1.702, 7.0))}
FULL = Sizes(SHAPES, (4, 3, 2, 8, 16), (1, 16, 4, 64, 2, 8, 32), 1 << 30, 20)
SMOKE = Sizes({"mixtral": (64, 64, 0, SILU)}, (4, 16), (1, 3), 1 << 16, 1)


def run(book: Book, device: Device, smoke: bool) -> None:
    """All cells of the part: one token at every width and shape first."""
    sizes = SMOKE if smoke else FULL
    place = device.torch_device
    found = book.cell("kernels/copy", lambda: copy_rate(place, sizes.copy))
    rate = found["gb_s"] if found else None
    made: dict[ExpertLayout, list[ExpertViews]] = {}
    cells = [(s, b, n) for n in sizes.tokens for s in sizes.shapes for b in sizes.bits]
    for shape, bits, tokens in cells:
        hidden, inner, biases, gated = sizes.shapes[shape]
        layout = ExpertLayout(hidden, inner, bits, biases=biases, order="rows")
        name = f"kernels/{shape}/{bits}b/{tokens}"
        row = book.cell(
            name, lambda x=layout, g=gated, n=tokens: measure(place, x, g, n, sizes.repeats, rate, made), needs_s=2.0
        )
        if row:
            book.say(f"{name}: {told(row)}")
    aims = {}
    for shape in sizes.shapes:
        for bits in sizes.bits:
            row = book.result(f"kernels/{shape}/{bits}b/1")
            if row and row.get("share_of_copy") is not None:
                share = row["share_of_copy"]
                aims[f"{shape}/{bits}b"] = {"share": share, "verdict": "pass" if share >= AIM else "miss"}
    if aims and sizes is FULL:
        book.note("kernels_aim", {"aim": AIM, "at_tokens": 1, "of": aims})
        words = ", ".join(f"{k} {100 * v['share']:.0f} % {v['verdict']}" for k, v in aims.items())
        book.say(f"aim: {AIM:.0%} of copy bandwidth at one token: {words}")


def told(row: dict[str, Any]) -> str:
    """One row in words."""
    parts = []
    if row.get("kernel_s"):
        share = row["share_of_copy"]
        parts.append(f"kernel {row['kernel_s'] * 1e6:.1f} us" + (f" ({100 * share:.0f} % of copy)" if share else ""))
        parts.append(f"from the host {row['kernel_wall_s'] * 1e6:.1f} us, error {row['error']:.1e}")
    else:
        parts.append(f"no kernel: {row['kernel_missing']}")
    return ", ".join([*parts, f"{row['other']} {row['other_s'] * 1e6:.1f} us"])


def copy_rate(place: torch.device, size: int) -> dict[str, Any]:
    """Bytes read and written per second by one large copy on the device, decimal GB/s; best of 5."""
    source = torch.ones(size, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    target.copy_(source)
    return {"gb_s": 2 * size / min(seconds(place, lambda: target.copy_(source), 3) for _ in range(5)) / 1e9}


def measure(
    place: torch.device,
    layout: ExpertLayout,
    gated: Gated,
    tokens: int,
    repeats: int,
    rate: float | None,
    made: dict[ExpertLayout, list[ExpertViews]],
) -> dict[str, Any]:
    """Seconds of one expert for ``tokens`` by the kernel and by the other way; several experts in turn, which are kept
    in ``made``."""
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, layout.hidden_size, generator=generator).to(place, dtype)
    count = max(2, min(24, -(-ROTATED // layout.expert_bytes))) if place.type == "cuda" else 2
    if layout.bits == 16:
        return dense(place, layout, x, count, repeats)
    if layout not in made:
        made[layout] = random_experts(place, layout, count)
    experts = made[layout]
    workspace = Workspace(layout, dtype, place)

    turns = [0]

    def other() -> None:
        turns[0] += 1
        forward(experts[turns[0] % count], x, gated, workspace)

    other()
    row: dict[str, Any] = {"tokens": tokens, "expert_bytes": layout.expert_bytes, "experts_in_turn": count}
    row |= {"other": "dequantize and multiply", "other_s": seconds(place, other, repeats)}
    try:
        return row | by_kernel(place, layout, experts, x, gated, repeats, rate)
    except (kernels.KernelError, UnavailableError) as error:
        return row | {"kernel_s": None, "share_of_copy": None, "kernel_missing": str(error)}


def by_kernel(
    place: torch.device,
    layout: ExpertLayout,
    experts: list[ExpertViews],
    x: torch.Tensor,
    gated: Gated,
    repeats: int,
    rate: float | None,
) -> dict[str, Any]:
    """The kernel's figures; ``kernel_s`` by a captured graph where that works, so that the host is out of the way.

    Raises:
        UnavailableError: no device for it, and no interpreter. KernelError: what the kernels cannot do.
    """
    if place.type == "cpu" and not kernels.interpreted():
        raise UnavailableError("Triton kernels need a GPU, or TRITON_INTERPRET=1 set before the start")
    turns, act = [0], kernels.activation(gated)

    def kernel() -> None:
        turns[0] += 1
        kernels.forward(experts[turns[0] % len(experts)], x, act)

    got = kernels.forward(experts[0], x, act)
    error = relative_error(got, experts[0], x, gated)
    row: dict[str, Any] = {"error": error, "kernel_wall_s": wall_seconds(place, kernel, repeats), "timed_by": "events"}
    row["kernel_s"] = seconds(place, kernel, repeats)
    if place.type == "cuda":
        try:
            row |= {"kernel_s": graph_seconds(place, kernel, len(experts)), "timed_by": "graph"}
        except RuntimeError as failure:
            row["graph_error"] = str(failure)[:200]
    reached = layout.expert_bytes / row["kernel_s"] / 1e9
    return row | {"gb_s": reached, "share_of_copy": reached / rate if rate else None}


def relative_error(got: torch.Tensor, expert: ExpertViews, x: torch.Tensor, gated: Gated) -> float:
    """Against float32 products of the dequantized weights."""
    expected = forward(expert, x.float(), gated, Workspace(expert.layout, torch.float32, x.device))
    return float((got.float() - expected).norm() / expected.norm())


def dense(place: torch.device, layout: ExpertLayout, x: torch.Tensor, count: int, repeats: int) -> dict[str, Any]:
    """Experts in bf16 by torch's own products."""
    shape = (2 * layout.expert_size, layout.hidden_size)
    x = x.to(torch.bfloat16)
    pairs = [
        (
            torch.randn(shape, device=place, dtype=torch.bfloat16) * 0.02,
            torch.randn(layout.hidden_size, layout.expert_size, device=place, dtype=torch.bfloat16) * 0.02,
        )
        for _ in range(min(count, 4))
    ]
    turns = [0]

    def work() -> None:
        turns[0] += 1
        gate_up, down = pairs[turns[0] % len(pairs)]
        gate, up = torch.nn.functional.linear(x, gate_up).chunk(2, -1)
        torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down)

    work()
    return {
        "tokens": len(x),
        "expert_bytes": layout.expert_bytes,
        "kernel_s": None,
        "share_of_copy": None,
        "kernel_missing": "experts in bf16 need none",
        "other": "bf16 products",
        "other_s": seconds(place, work, repeats),
    }


def random_experts(place: torch.device, layout: ExpertLayout, count: int) -> list[ExpertViews]:
    """``count`` experts on the device, each with codes of its own."""
    with ExpertRows(count, layout.expert_bytes) as rows:
        forced.fill(rows, layout)
        return [views(rows.row(i).to(place, copy=True), layout) for i in range(count)]
