"""Time per token by predictor and width, beside the same schedule's cheapest guesses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim.plots._records import Drawn, PictureError, Record, fastest, policy_name
from sim.plots._style import GREY, look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READS = "runs"
NEEDS = ("tpot_s", "predictor", "bits")
VARIES = ("predictor", "bits")
SIZE = (8.2, 4.4)
BASE = "router"


def draw(figure: Figure, runs: list[Record]) -> Drawn:
    """A column a predictor, a mark a width: how many % less time than with `BASE`."""
    names = {policy_name(r) for r in runs}
    if len(names) > 1:
        raise PictureError(f"the results have {', '.join(sorted(names))}; choose one with --where policy=NAME")
    widths = sorted({r["bits"] for r in runs}, reverse=True)
    table = {}
    for bits in widths:
        of = [r for r in runs if r["bits"] == bits]
        best = {name: fastest([r for r in of if r["predictor"] == name]) for name in {r["predictor"] for r in of}}
        if BASE not in best:
            raise PictureError(f"no result at {bits} bits has predictor {BASE}, which the others are held against")
        table[bits] = {name: 100 * (1 - r["tpot_s"] / best[BASE]["tpot_s"]) for name, r in best.items()}
    everywhere = set.intersection(*(set(row) for row in table.values()))
    order = sorted(everywhere, key=lambda name: (table[widths[0]][name], name))
    axes = figure.add_subplot()
    axes.axhline(0, color=GREY, lw=1.2)
    for number, (bits, row) in enumerate(table.items()):
        at = [i + 0.14 * (number - (len(table) - 1) / 2) for i in range(len(order))]
        axes.plot(at, [row[name] for name in order], **look(number) | {"linestyle": "", "markersize": 7},
                  label=f"{bits}-bit experts")  # fmt: skip
    axes.set(xticks=range(len(order)), xticklabels=order, ylabel=f"time per token saved beside {BASE} (%)")
    axes.set(xlabel="predictor (oracle: perfect guesses)" if "oracle" in order else "predictor")
    axes.grid(axis="y", alpha=0.25)
    axes.legend(loc="upper left")
    named = [name for name in order if name not in (BASE, "oracle")]
    best = named[-1] if named else order[-1]
    gains = [row[best] for row in table.values()]
    text = f"{best} guesses save {min(gains):.1f} to {max(gains):.1f} % of a token beside {BASE}"
    if "oracle" in order:
        perfect = [row["oracle"] for row in table.values()]
        text += f"; perfect ones would save {min(perfect):.1f} to {max(perfect):.1f} %"
    headline = text
    return Drawn(len(order) * len(widths), [f"{runs[0]['slots']} cache slots a layer, policy {names.pop()}."], headline)
