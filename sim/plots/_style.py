"""Looks shared by all pictures, and the caption that says what the figures are worth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from sim.plots._records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that stay apart in every common form of colour blindness (Okabe and Ito 2008); markers and dashes repeat it.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
DASHES: Final = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
GREY: Final = "0.45"
FLOOR: Final = "0.88"
RC: Final[dict[str, Any]] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "sim.plot",
    "hatch.linewidth": 0.6,
}
MEANING: Final = {
    "MEASURED": "MEASURED on the engine",
    "SIMULATED": "SIMULATED on a measured profile",
    "ESTIMATED": "ESTIMATED (simulated on published values, not measured)",
}


def whole_numbers(axes: Axes) -> None:
    """Ticks of x at integers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def look(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of the n-th line."""
    i = number % len(COLOURS)
    return {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": DASHES[i], "markersize": 4.5}


def values(records: Iterable[Record], key: str) -> str:
    """All values of a key, once each."""
    found = sorted({r[key] for r in records if r.get(key) is not None}, key=lambda v: (str(type(v)), v))
    return ", ".join(str(v) for v in found)


def caption(runs: list[Record]) -> str:
    """Evidence, routing, model, machine, widths and tokens of the runs, in one sentence or two."""
    evidence = "; ".join(MEANING.get(e, e) for e in values(runs, "evidence").split(", "))
    full = {r["scaled"]["layers"] for r in runs if r.get("scaled")}
    depth = f" (cut from {', '.join(map(str, sorted(full)))} layers to the trace's)" if full else ""
    trace = values(runs, "trace")
    routing = f"{values(runs, 'routing')} routing" + (f" of {trace}" if trace else "")
    text = (
        f"{evidence}; {routing}, {values(runs, 'decode_tokens')} decode tokens. Model {values(runs, 'model')}{depth}, "
        f"{values(runs, 'bits')}-bit experts, machine {values(runs, 'machine')}"
    )
    changed = sorted({change for r in runs for change in r.get("set") or ()})
    return text + (f" with {', '.join(changed)}" if changed else "") + "."


def vram(runs: list[Record]) -> str:
    """Whether the runs had equal memory, as a sentence; empty where it is unknown."""
    sizes = sorted({r["vram_bytes"] / 1e9 for r in runs if r.get("vram_bytes")})
    if not sizes:
        return ""
    if sizes[-1] - sizes[0] <= 0.001 * sizes[-1]:
        return f"Equal VRAM: {sizes[0]:.3g} GB."
    return f"VRAM is not equal: {sizes[0]:.3g} to {sizes[-1]:.3g} GB."
