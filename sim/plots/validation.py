"""Predicted against measured time per token, and the error of every cell of a validation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim.plots._records import Drawn, Record, get
from sim.plots._style import GREY, looks, values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READS = "cells"
NEEDS = ("measured.tpot_s", "simulated.tpot_s", "policy")
VARIES = ()
SIZE = (9.4, 4.6)
BAND = 0.1
ROWS = 12  # cells a picture of the usual height has room for
INCHES_PER_ROW = 0.26


def height(cells: list[Record]) -> float:
    """As many inches as the rows need."""
    return SIZE[1] + max(0, len(cells) - ROWS) * INCHES_PER_ROW


def draw(figure: Figure, cells: list[Record]) -> Drawn:
    """Left: a mark a cell beside the diagonal. Right: error of each cell, with the engine's own spread."""
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.1])
    names = sorted({c["policy"] for c in cells})
    ends = [1e3 * c[side]["tpot_s"] for c in cells for side in ("measured", "simulated")]
    low, high = min(ends) * 0.85, max(ends) * 1.18
    left.fill_between([low, high], [low * (1 - BAND), high * (1 - BAND)], [low * (1 + BAND), high * (1 + BAND)],
                      color="0.92", lw=0, label=f"within {BAND * 100:.0f} %")  # fmt: skip
    left.plot([low, high], [low, high], color=GREY, lw=1)
    ordered = sorted(cells, key=lambda c: (c["policy"], c["measured"]["tpot_s"]))
    looked = looks(names)
    for name in names:
        chosen = [c for c in cells if c["policy"] == name]
        xs, ys = ([1e3 * c[side]["tpot_s"] for c in chosen] for side in ("measured", "simulated"))
        style = {key: looked[name][key] for key in ("color", "marker", "markerfacecolor") if key in looked[name]}
        left.plot(xs, ys, linestyle="", label=name, **style)
        rows = [i for i, c in enumerate(ordered) if c["policy"] == name]
        errors = [error(c) for c in ordered if c["policy"] == name]
        spread = [100 * (get(c, "repeat_spread") or 0) / 2 for c in ordered if c["policy"] == name]
        right.errorbar(errors, rows, xerr=spread, linestyle="", capsize=3, **style)
    left.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    left.set(xlabel="MEASURED time per token (ms)", ylabel="SIMULATED time per token (ms)")
    left.set_title("Predicted against measured")
    headline = finding(cells)
    for axis in (left.xaxis, left.yaxis):
        plain_ticks(axis, low, high)
    left.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.22))
    left.set_anchor("NW")
    right.axvline(0, color=GREY, lw=1)
    right.set(
        yticks=range(len(ordered)), yticklabels=[conditions(c, cells) for c in ordered], title="Error of each cell"
    )
    right.set(xlabel="simulated / measured - 1 (%)")
    right.grid(axis="x", alpha=0.25)
    right.tick_params(axis="y", length=0)
    return Drawn(len(cells), [figures(cells), "Bars are as wide as the spread of the engine's repeats."], headline)


def error(cell: Record) -> float:
    """Simulated beside measured time per token, in %."""
    return 100 * float(cell["simulated"]["tpot_s"] / cell["measured"]["tpot_s"] - 1)


def finding(cells: list[Record]) -> str:
    """How far off the simulator is, and where most."""
    errors = sorted(abs(error(c)) for c in cells)
    middle = (errors[(len(errors) - 1) // 2] + errors[len(errors) // 2]) / 2
    worst = max(cells, key=lambda c: (abs(error(c)), conditions(c, cells)))
    return (
        f"Predicted times are {middle:.1f} % off in the median of {len(cells)} cells, {abs(error(worst)):.1f} % at "
        f"most: {conditions(worst, cells)}"
    )


def plain_ticks(axis: object, low: float, high: float) -> None:
    """1, 2, 5, 10, ... on a logarithmic axis, as plain numbers."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    marks = [m * 10.0**p for p in range(-3, 7) for m in (1, 2, 3, 5, 7) if low <= m * 10.0**p <= high]
    axis.set_major_locator(FixedLocator(marks))  # type: ignore[attr-defined]
    axis.set_minor_locator(NullLocator())  # type: ignore[attr-defined]
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))  # type: ignore[attr-defined]


def conditions(cell: Record, among: list[Record]) -> str:
    """Policy and what else tells a cell from the others."""
    parts = [str(cell["policy"])]
    for key, form in (("bits", "{} bits"), ("slots", "{} slots"), ("link_gb_s", "{:g} GB/s")):
        if cell.get(key) is not None and len({c.get(key) for c in among}) > 1:
            parts.append(form.format(cell[key]))
    return ", ".join(parts)


def figures(cells: list[Record]) -> str:
    """What the whole validation came to; computed here where cells come from several files."""
    found = sorted(abs(error(c)) for c in cells)
    middle = (found[(len(found) - 1) // 2] + found[len(found) // 2]) / 2
    text = f"Error of TPOT: median {middle:.1f} %, largest {found[-1]:.1f} %"
    equal = [c["load_log_equal"] for c in cells if c.get("load_log_equal") is not None]
    if equal:
        text += f"; load logs equal in {sum(equal)} of {len(equal)} cells"
    about = cells[0].get("validation", {})
    if about.get("kendall_tau") is not None and all(c.get("validation") == about for c in cells):
        text += f"; rank agreement (Kendall's tau-b) {about['kendall_tau']:.2f}"
    if regimes := values(cells, "regime"):
        text += f"; regimes: {regimes}"
    return text + "."
