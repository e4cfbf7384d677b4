"""Whether the simulator orders policies as the engine does, setting by setting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sim.plots._records import Drawn, PictureError, Record, get
from sim.plots._style import looks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READS = "cells"
NEEDS = ("measured.tpot_s", "simulated.tpot_s", "policy", "bits", "slots")
VARIES = ()
SIZE = (9.4, 4.4)
INCHES_PER_SETTING = 0.8


def groups(cells: list[Record]) -> dict[tuple[Any, ...], list[Record]]:
    """Cells that differ in the policy alone, where there are several."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for cell in cells:
        found.setdefault((cell.get("link_gb_s"), cell["bits"], cell["slots"], cell.get("prompts")), []).append(cell)
    return {key: found[key] for key in sorted(found, key=str) if len(found[key]) > 1}


def height(cells: list[Record]) -> float:
    """As many inches as the settings need."""
    return max(SIZE[1], 1.6 + INCHES_PER_SETTING * len(groups(cells)))


def ranked(group: list[Record], side: str) -> list[str]:
    """Policies, fastest first."""
    return [c["policy"] for c in sorted(group, key=lambda c: (c[side]["tpot_s"], c["policy"]))]


def swapped(group: list[Record]) -> list[tuple[str, str, float, float]]:
    """Pairs the simulator has the other way round, how far the engine has them apart, and the larger spread of its
    repeats (both relative)."""
    found = []
    for i, a in enumerate(group):
        for b in group[i + 1 :]:
            ours, theirs = (a[side]["tpot_s"] - b[side]["tpot_s"] for side in ("measured", "simulated"))
            if ours * theirs < 0:
                least = min(a["measured"]["tpot_s"], b["measured"]["tpot_s"])
                spread = max(get(c, "repeat_spread") or 0.0 for c in (a, b))
                found.append((a["policy"], b["policy"], abs(ours) / least, spread))
    return found


def regret(group: list[Record]) -> float:
    """How much slower on the engine the simulator's choice is than the engine's best (relative)."""
    chosen = min(group, key=lambda c: (c["simulated"]["tpot_s"], c["policy"]))
    return float(chosen["measured"]["tpot_s"] / min(c["measured"]["tpot_s"] for c in group) - 1)


def draw(figure: Figure, cells: list[Record]) -> Drawn:
    """Two lanes a setting, engine above simulator: every policy's time beside the fastest measured one."""
    compared = groups(cells)
    if not compared:
        raise PictureError("no two cells differ in the policy alone, so there is no order; validate several --policy")
    style = looks(sorted({c["policy"] for c in cells}))
    axes = figure.add_subplot()
    names, shown = [], set()
    for row, (key, group) in enumerate(compared.items()):
        fastest = min(c["measured"]["tpot_s"] for c in group)
        axes.axhspan(row - 0.42, row + 0.42, color="0.96", lw=0)
        for cell in group:
            look = style[cell["policy"]] | {"linestyle": "", "markersize": 7}
            ours, theirs = (cell[side]["tpot_s"] / fastest for side in ("measured", "simulated"))
            half = (get(cell, "repeat_spread") or 0) / 2 * ours
            axes.plot([ours, theirs], [row - 0.2, row + 0.2], color=look["color"], lw=1.2, alpha=0.7)
            axes.errorbar(ours, row - 0.2, xerr=half, capsize=3, **look, label=None if cell["policy"] in shown
                          else cell["policy"])  # fmt: skip
            axes.plot(theirs, row + 0.2, **look | {"markerfacecolor": "white", "markeredgewidth": 1.4})
            shown.add(cell["policy"])
        link = f"{key[0]:g} GB/s, " if key[0] is not None else ""
        names.append(f"{link}{key[1]} bits, {key[2]} slots\nengine above simulator")
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axes.set(xlabel="time per token (multiples of the fastest policy on the engine in that setting)")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    figure.legend(loc="outside lower left", ncols=4)
    wrong = [pair for group in compared.values() for pair in swapped(group)]
    right = sum(ranked(g, "measured") == ranked(g, "simulated") for g in compared.values())
    text = f"The simulator orders the policies as the engine does in {right} of {len(compared)} settings"
    if wrong:
        a, b, apart, spread = max(wrong, key=lambda pair: pair[2])
        text += f"; the worst swap is {a} and {b}, {100 * apart:.1f} % apart on the engine"
        text += f", whose repeats spread {100 * spread:.1f} %"
    headline = text
    worst = 100 * max(regret(g) for g in compared.values())
    return Drawn(sum(map(len, compared.values())), [
        f"Whoever takes the simulator's fastest policy loses at most {worst:.1f} % on the engine. Filled: MEASURED, "
        "with the spread of its repeats; hollow: SIMULATED."], headline)  # fmt: skip
