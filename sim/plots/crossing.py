"""Where prefetching starts to hurt: time per token beside on_demand, against the speed of the link."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from sim.plots._records import Drawn, PictureError, Record, best_by, by_name, needs_variation
from sim.plots._style import GREY, looks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READS = "runs"
NEEDS = ("tpot_s", "axes", "bits")
VARIES = ("set", "bits")
SIZE = (9.4, 4.8)
LINK = "machine.link.h2d_gb_s"
BASE = "on_demand"
NOTHING = 0.5  # %: a loss no larger is none

Line = list[tuple[float, float]]  # link in GB/s ascending, slower than on_demand in %


def link_gb_s(run: Record) -> float | None:
    """The link speed a sweep gave the run."""
    value = run["axes"].get(LINK)
    return None if value is None else float(value)


def slower(runs: list[Record]) -> dict[str, Line]:
    """How much slower than `BASE` every other policy is at each link speed.

    Raises:
        PictureError: the base is not among the runs.
    """
    groups = {name: best_by(group, link_gb_s) for name, group in sorted(by_name(runs).items())}
    if BASE not in groups:
        raise PictureError(f"the results lack {BASE}, which prefetching is held against; simulate it too")
    base = groups.pop(BASE)
    return {
        name: [(x, 100 * (r["tpot_s"] / base[x]["tpot_s"] - 1)) for x, r in line.items() if x in base]
        for name, line in groups.items()
    }


def crossings(line: Line) -> list[float]:
    """Link speeds at which a policy that loses turns from slower to faster or back, between neighbours on a logarithmic
    scale."""
    found: list[float] = []
    if max(y for _, y in line) <= NOTHING:
        return found
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        if (y0 > 0) != (y1 > 0):
            found.append(math.exp(math.log(x0) + (math.log(x1) - math.log(x0)) * y0 / (y0 - y1)))
    return found


def verdict(name: str, line: Line) -> str:
    """Where a policy is slower than `BASE`, in words."""
    losing = [y > 0 for _, y in line]
    worst = max(y for _, y in line)
    if worst <= NOTHING:
        return f"{name} never loses more than {NOTHING:g} %"
    if all(losing):
        return f"{name} always loses (up to {worst:.0f} %)"
    turns = crossings(line)
    if len(turns) == 1:
        side = "below" if losing[0] else "above"
        return f"{name} loses {side} {turns[0]:.3g} GB/s (up to {worst:.0f} %)"
    return f"{name} loses in places (up to {worst:.1f} %)"


def draw(figure: Figure, runs: list[Record]) -> Drawn:
    """A panel a width; above zero prefetching is slower than loading on demand."""
    needs_variation(runs, "axes", link_gb_s)
    widths = sorted({r["bits"] for r in runs}, reverse=True)
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    style = looks(sorted(by_name(runs)))
    points, said = 0, []
    for axes, bits in zip(panels, widths, strict=True):
        lines = slower([r for r in runs if r["bits"] == bits])
        for name, line in lines.items():
            axes.plot(*zip(*line, strict=True), label=name if bits == widths[0] else None, **style[name])
            for x in crossings(line):
                axes.plot(x, 0, "o", ms=10, mfc="none", mec="black", mew=1.2)
            points += len(line)
        said.append(f"{bits} bits: {', '.join(verdict(name, line) for name, line in lines.items())}.")
        axes.axhline(0, color=GREY, lw=1.2, linestyle="--", label=BASE if bits == widths[0] else None)
        axes.set_xscale("log")
        ticks = sorted({x for line in lines.values() for x, _ in line})
        axes.set(title=f"{bits}-bit experts", xlabel="link to the device (GB/s)")
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    low, high = panels[0].get_ylim()
    high = max(high, 0.15 * (high - low))
    for axes in panels:
        axes.axhspan(0, high, color="#D55E00", alpha=0.08, lw=0)
    panels[0].set(ylabel=f"time per token beside {BASE} (%)", ylim=(low, high))
    panels[-1].annotate("prefetching loses", (0.98, high), xycoords=("axes fraction", "data"), xytext=(0, -11),
                        textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    figure.legend(loc="outside lower left", ncols=4)
    headline = f"Where prefetching starts to hurt, {said[0].rstrip('.')}"
    return Drawn(points, [*said[1:], "Rings: where a policy crosses on_demand."], headline)
