"""Cache hits by slots: LRU at every size, and what knowing the future would add."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sim.plots._records import Drawn, PictureError, Record, single
from sim.plots._style import COLOURS, GREY, look, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READS = "traces"
NEEDS = ("lru.slots", "belady.bypass", "belady.forced")
VARIES = ()
SIZE = (7.6, 4.6)


def draw(figure: Figure, traces: list[Record]) -> Drawn:
    """LRU with the range over layers, Belady with and without bypass, and the share of experts that have a slot."""
    trace = single(traces, "trace")
    lru, belady = trace["lru"], trace["belady"]
    if not lru["decode_accesses"]:
        raise PictureError("the trace has no decode tokens, so no hits to draw; name one that has")
    slots, most = lru["slots"], lru["slots"][-1]
    by_layer = 100 * np.array(lru["hit_share_by_layer"], float)
    curves = {
        "Belady with bypass: the most that demand loads reach": (belady["bypass"]["hit_share"][slots[0] - 1 :], 2),
        "Belady, every miss enters": (belady["forced"]["hit_share"], 1),
        "LRU": (lru["hit_share"], 0),
    }
    axes = figure.add_subplot()
    low, high = by_layer.min(axis=0), by_layer.max(axis=0)
    axes.fill_between(slots, low, high, color=COLOURS[0], alpha=0.15, lw=0, label="LRU, least to most over layers")
    for name, (share, number) in curves.items():
        style = look(number) | ({} if len(slots) <= 16 else {"marker": ""})
        axes.plot(slots, 100 * np.array(share, float), label=name, **style)
    axes.plot(slots, [100 * n / most for n in slots], color=GREY, linestyle=":", label="slots / experts")
    axes.set(xlabel="cache slots per layer (experts)", ylabel="hits (% of decode accesses)", ylim=(0, 102))
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right")
    whole_numbers(axes)
    half = slots.index(max(slots[0], most // 2))
    at = {name: 100 * share[half] for name, (share, _) in curves.items()}
    best = max(at.values())
    headline = (
        f"With {slots[half]} of {most} experts in slots LRU hits {at['LRU']:.0f} %; knowing the future, {best:.0f} %"
    )
    caches = "emptied where a sequence starts" if trace["cold_sequences"] else "carried over between sequences"
    return Drawn(len(curves) * len(slots), [f"Hits are SIMULATED by replay without time, caches {caches}."], headline)
