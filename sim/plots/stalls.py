"""Where the time of a token goes, by policy: compute, latency, and stalls after a miss or a late load."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim.plots._records import Drawn, PictureError, Record, by_label, by_name, fastest
from sim.plots._style import COLOURS, vram

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READS = "runs"
NEEDS = ("tpot_s", "compute_busy", "stall_miss_s", "stall_late_s", "tokens_per_s", "slots")
VARIES = ()
SIZE = (8.2, 4.2)
MOST = 14

# Part, colour, hatch: told apart without colour too.
PARTS = (
    ("compute", COLOURS[0], ""),
    ("latency: the rest (host, synchronisation)", "0.75", ""),
    ("stall, miss: no load was issued", COLOURS[1], "///"),
    ("stall, late: its load was under way", COLOURS[4], "..."),
)


def parts_ms(run: Record) -> list[float]:
    """Compute, latency, stall after a miss, stall for a late load; latency is what the others leave of TPOT."""
    compute_s = run["compute_busy"] * run["tpot_s"]
    stalls = [run["stall_miss_s"], run["stall_late_s"]]
    return [1e3 * s for s in (compute_s, max(0.0, run["tpot_s"] - compute_s - sum(stalls)), *stalls)]


def draw(figure: Figure, runs: list[Record]) -> Drawn:
    """One bar a policy, slowest on top; a tick in each bar is its joint floor."""
    notes = []
    groups = by_label(runs)
    if len(groups) > MOST:
        groups = by_name(runs)
        notes.append("Each policy with its fastest parameters.")
    if len(groups) > MOST:
        raise PictureError(f"{len(groups)} policies are too many for one picture; choose with --where policy=NAME")
    bars = {name: fastest(group) for name, group in groups.items()}
    names = sorted(bars, key=lambda name: (bars[name]["tpot_s"], name))
    axes = figure.add_subplot()
    left = [0.0] * len(names)
    for part, (name, colour, hatch) in enumerate(PARTS):
        widths = [parts_ms(bars[n])[part] for n in names]
        axes.barh(
            names, widths, left=left, color=colour, hatch=hatch, edgecolor="white", lw=0.5, height=0.7, label=name
        )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    floors = [(row, (bars[n].get("bounds") or {}).get("joint_floor_s")) for row, n in enumerate(names)]
    known = [(row, floor * 1e3) for row, floor in floors if floor]
    if known:
        rows, at = zip(*known, strict=True)
        lower, upper = [r - 0.42 for r in rows], [r + 0.42 for r in rows]
        axes.vlines(at, lower, upper, color="black", lw=2.2, label="joint floor: no schedule is faster")
    for row, name in enumerate(names):
        text = f"{bars[name]['tpot_s'] * 1e3:.1f} ms, {bars[name]['tokens_per_s']:.1f} tokens/s"
        axes.annotate(text, (left[row], row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set(xlabel="time per output token (ms)", xlim=(0, max(left) * 1.4))
    axes.tick_params(axis="y", length=0)
    handles, labels = axes.get_legend_handles_labels()
    ordered = sorted(zip(labels, handles, strict=True), key=lambda item: item[0].startswith("joint"))
    figure.legend([h for _, h in ordered], [n for n, _ in ordered], loc="outside lower left", ncols=3)
    best = bars[names[0]]
    waits = 100 * sum(parts_ms(best)[2:]) / sum(parts_ms(best))
    headline = f"Where the time of a token goes: the fastest, {names[0]}, waits {waits:.0f} % of it for experts"
    notes.append(f"{runs[0]['slots']} cache slots a layer. {vram(list(bars.values()))}")
    return Drawn(len(names), notes, headline)
