"""Late loads and misses of every cell of a validation: measured beside simulated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim.plots._records import Drawn, Record
from sim.plots._style import GREY, looks
from sim.plots.validation import conditions
from sim.plots.validation import height as height

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READS = "cells"
NEEDS = (
    "measured.accesses", "simulated.accesses", "measured.late", "simulated.late", "measured.misses",
    "simulated.misses", "policy",
)  # fmt: skip
VARIES = ()
SIZE = (9.4, 4.6)


def share(cell: Record, side: str, key: str) -> float:
    """In % of accesses."""
    return 100 * float(cell[side][key]) / max(1, int(cell[side]["accesses"]))


def draw(figure: Figure, cells: list[Record]) -> Drawn:
    """Left: misses. Right: late loads. Filled is measured, hollow simulated, a line joins them."""
    ordered = sorted(cells, key=lambda c: (c["policy"], c.get("link_gb_s") or 0, c["bits"], c["slots"]))
    style = looks(sorted({c["policy"] for c in cells}))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, title in ((left, "misses", "Misses: no load was issued"), (right, "late", "Late: a load under way")):
        for row, cell in enumerate(ordered):
            ours, theirs = (share(cell, side, key) for side in ("measured", "simulated"))
            colour, marker = style[cell["policy"]]["color"], style[cell["policy"]]["marker"]
            axes.plot([ours, theirs], [row, row], color=GREY, lw=1.2, zorder=1)
            axes.plot(theirs, row, color=colour, marker=marker, ms=9, mfc="white", mew=1.4, linestyle="")
            axes.plot(ours, row, color=colour, marker=marker, ms=4.5, linestyle="")
        axes.set(title=title, xlabel="share of routed experts (%)", xlim=(-1, None))
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(axis="y", length=0)
    left.set(yticks=range(len(ordered)), yticklabels=[conditions(c, cells) for c in ordered])
    same = sum(c["measured"]["misses"] == c["simulated"]["misses"] for c in cells)
    off = max(cells, key=lambda c: abs(share(c, "simulated", "late") - share(c, "measured", "late")))
    ours, theirs = (share(off, side, "late") for side in ("measured", "simulated"))
    headline = (
        f"Misses are equal in {same} of {len(cells)} cells; late loads are farthest off in {conditions(off, cells)}: "
        f"{ours:.1f} % measured, {theirs:.1f} % simulated"
    )
    return Drawn(2 * len(cells), ["Small filled marks: MEASURED; large hollow ones: SIMULATED."], headline)
