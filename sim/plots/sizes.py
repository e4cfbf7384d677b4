"""Where the time of a token goes, by policy and cache slots: compute, host, and both kinds of stall."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim.plots._records import Drawn, PictureError, Record, best_by, by_name, needs_variation
from sim.plots.stalls import PARTS, parts_ms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READS = "runs"
NEEDS = ("tpot_s", "compute_busy", "stall_miss_s", "stall_late_s", "slots")
VARIES = ("slots",)
SIZE = (9.4, 5.2)
MOST = 4
WIDTH = 0.8  # of all bars of one size


def draw(figure: Figure, runs: list[Record]) -> Drawn:
    """A group of bars for every size, a bar a policy with its name above."""
    slots = needs_variation(runs, "slots", lambda r: r["slots"])
    groups = by_name(runs)
    if len(groups) > MOST:
        raise PictureError(f"{len(groups)} policies are too many; choose at most {MOST} with --where policy=NAME")
    best = {name: best_by(group, lambda r: r["slots"]) for name, group in sorted(groups.items())}
    axes = figure.add_subplot()
    step = WIDTH / len(best)
    for order, (name, by_size) in enumerate(best.items()):
        at = [slots.index(n) + (order + 0.5) * step - WIDTH / 2 for n in by_size]
        bottom = [0.0] * len(at)
        for part, (label, colour, hatch) in enumerate(PARTS):
            heights = [parts_ms(r)[part] for r in by_size.values()]
            axes.bar(
                at, heights, bottom=bottom, width=0.86 * step, color=colour, hatch=hatch, edgecolor="white", lw=0.5,
                label=label if order == 0 else None,
            )  # fmt: skip
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        for x, top in zip(at, bottom, strict=True):
            axes.annotate(name, (x, top), xytext=(0, 3), textcoords="offset points", ha="center", rotation=90,
                          fontsize=7.5)  # fmt: skip
    top = max(r["tpot_s"] for r in runs) * 1e3
    axes.set(xlabel="cache slots per layer (experts)", ylabel="time per output token (ms)", ylim=(0, 1.38 * top))
    axes.set(xticks=range(len(slots)), xticklabels=slots)
    axes.tick_params(axis="x", length=0)
    figure.legend(loc="outside lower left", ncols=2)
    headline = finding(best, slots)
    return Drawn(sum(map(len, best.values())), ["Each policy with its fastest parameters at each size."], headline)


def finding(best: dict[str, dict[int, Record]], slots: list[int]) -> str:
    """How much of the fastest policy's time is stall with the fewest and the most slots."""
    said = []
    for n in (slots[0], slots[-1]):
        name, run = min(((p, b[n]) for p, b in best.items() if n in b), key=lambda item: item[1]["tpot_s"])
        share = 100 * sum(parts_ms(run)[2:]) / sum(parts_ms(run))
        said.append(f"{share:.0f} % of a token with {n} slots (fastest: {name}, {run['tpot_s'] * 1e3:.1f} ms)")
    return f"Waiting for experts takes {said[0]}, {said[1]}"
