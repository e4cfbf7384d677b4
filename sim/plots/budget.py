"""Prefetch precision and TPOT against the prefetch budget: where prefetching starts to hurt."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sim.plots._records import Drawn, PictureError, Record, best_by, get, policy_name
from sim.plots._style import GREY, look, vram, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

READS = "runs"
NEEDS = ("tpot_s", "prefetch_precision", "h2d_bytes", "decode_tokens", "landing_slots")
VARIES = ("landing_slots",)
SIZE = (7.4, 6.0)
MOST = 5
LEAST_SPAN = 0.05  # of the axis of times, as a share of its upper end


def gb_per_token(run: Record) -> float:
    """Copied to the device for one decode token."""
    return float(run["h2d_bytes"] / run["decode_tokens"] / 1e9)


def draw(figure: Figure, runs: list[Record]) -> Drawn:
    """TPOT above, precision and coverage below; the budget is landing slots if they vary, else bytes copied a token."""
    by_slots = len({r["landing_slots"] for r in runs}) > 1
    if not by_slots and len({r["h2d_bytes"] for r in runs}) < 2:
        raise PictureError(
            "the results vary neither landing_slots nor h2d_bytes of a prefetching policy; simulate several "
            "landing_slots, or several values of a policy's threshold"
        )
    names = sorted({policy_name(r) for r in runs})
    if len(names) > MOST:
        raise PictureError(
            f"{len(names)} policies cannot be told apart here; choose up to {MOST} with --where policy=NAME"
        )
    budget: Callable[[Record], float] = (lambda r: float(r["landing_slots"])) if by_slots else gb_per_token
    above, below = figure.subplots(2, 1, sharex=True)
    notes: list[str] = []
    points = 0
    for number, name in enumerate(names):
        group = [r for r in runs if policy_name(r) == name]
        line = best_by(group, budget)
        at, style = list(line), look(number)
        tpot_ms = [r["tpot_s"] * 1e3 for r in line.values()]
        above.plot(at, tpot_ms, label=f"{name}: time per token", **style)
        below.plot(at, [r["prefetch_precision"] for r in line.values()], label=f"{name}: precision", **style)
        coverage = [r.get("prefetch_coverage") for r in line.values()]
        if None not in coverage:
            open_style = style | {"markerfacecolor": "white", "alpha": 0.6}
            below.plot(at, coverage, label=f"{name}: coverage", **open_style)
        best = min(range(len(at)), key=lambda i: tpot_ms[i])
        above.plot(at[best], tpot_ms[best], "o", ms=12, mfc="none", mec=style["color"], mew=1.6, label="_")
        notes.append(verdict(name, at, tpot_ms, best, by_slots))
        points += len(at)
    low, high = above.get_ylim()
    if high - low < LEAST_SPAN * high:  # or differences of nothing fill the picture
        above.set_ylim((low + high) / 2 - LEAST_SPAN * high / 2, (low + high) / 2 + LEAST_SPAN * high / 2)
    loses(above, without_prefetch(runs, budget))
    above.set(ylabel="time per output token (ms)")
    below.set(ylabel="share of loads", ylim=(0, 1.03))
    below.set_xlabel("landing slots (experts)" if by_slots else "copied to the device per token (GB)")
    if by_slots:
        whole_numbers(below)
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    said = notes[0].rstrip(".")
    notes.append(vram(runs))
    notes.append("Precision: share of prefetched loads that were used; coverage: share of would-be misses removed.")
    return Drawn(points, notes, f"Where prefetching starts to hurt: {said}")


def without_prefetch(runs: list[Record], budget: Callable[[Record], float]) -> dict[float, float]:
    """Reference TPOT in ms by budget: what never prefetching takes with the same slots.

    Raises:
        PictureError: two runs of one budget have different ones.
    """
    found: dict[float, float] = {}
    for run in sorted(runs, key=budget):
        demand_s = get(run, "bounds.demand_only_s")
        if demand_s and abs(found.setdefault(budget(run), demand_s * 1e3) / (demand_s * 1e3) - 1) > 0.001:
            raise PictureError(
                "results with the same budget have different references without prefetch (unequal VRAM or chunks); "
                "simulate them in one call, or choose one policy with --where policy=NAME"
            )
    return found


def loses(axes: Axes, reference_ms: dict[float, float]) -> None:
    """Shade where prefetching is slower than the reference."""
    if not reference_ms:
        return
    at, at_ms = list(reference_ms), list(reference_ms.values())
    low, high = axes.get_ylim()
    low, top = min(low, *at_ms), max(high, *at_ms)
    top += 0.1 * (top - low)
    axes.plot(at, at_ms, color=GREY, linestyle="--", lw=1.2, label="without prefetch (reference)")
    axes.fill_between(at, at_ms, top, color="#D55E00", alpha=0.1, lw=0, label="prefetching loses")
    axes.set_ylim(low - 0.03 * (top - low), top)


def verdict(name: str, at: list[float], tpot_ms: list[float], best: int, by_slots: bool) -> str:
    """Where a policy's TPOT is least, and whether a larger budget costs."""
    unit = ("landing slot" + "s" * (at[best] != 1)) if by_slots else "GB a token"
    text = f"{name} (ring) is fastest at {at[best]:.3g} {unit}"
    if best == len(at) - 1:
        return f"{text}, the largest budget tried."
    slower = f"{(tpot_ms[-1] / tpot_ms[best] - 1) * 100:.1f} %"
    return f"{text}; at {at[-1]:.3g} it is {'no' if slower == '0.0 %' else slower} slower."
