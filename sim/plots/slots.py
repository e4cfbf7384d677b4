"""TPOT against cache slots by policy, with the joint floor and the references as lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim.plots._records import Drawn, Record, best_by, get, needs_variation, policy_name, series
from sim.plots._style import FLOOR, GREY, looks, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

READS = "runs"
NEEDS = ("tpot_s", "slots", "bounds.joint_floor_s")
VARIES = ("slots",)
SIZE = (8.4, 4.8)
MOST = 7

REFERENCES = (
    ("demand_only_s", "reference: on demand, LRU", (0, (1, 1))),
    ("perfect_lookahead_s", "reference: perfect guesses, LRU", "--"),
    ("perfect_lookahead_belady_s", "reference: perfect guesses, Belady", "-."),
    ("all_resident_s", "all experts resident", ":"),
)


def draw(figure: Figure, runs: list[Record]) -> Drawn:
    """A line a policy; the grey area is what no schedule reaches."""
    slots = needs_variation(runs, "slots", lambda r: r["slots"])
    lines, folded = series(runs, MOST)
    axes = figure.add_subplot()
    floors = [min(get(r, "bounds.joint_floor_s") for r in runs if r["slots"] == n) * 1e3 for n in slots]
    axes.fill_between(slots, floors, label="below the joint floor: no schedule is faster", color=FLOOR, lw=0)
    points = 0
    style = looks(lines)
    for name, group in lines.items():
        best = best_by(group, lambda r: r["slots"])
        axes.plot(list(best), [r["tpot_s"] * 1e3 for r in best.values()], label=name, **style[name])
        points += len(best)
    name, group = list(lines.items())[-1]
    shown = references(axes, group, "on_demand" not in lines)
    axes.set(xlabel="cache slots per layer (experts)", ylabel="time per output token (ms)", ylim=(0, None))
    whole_numbers(axes)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper")
    notes = [f"References: slots and lookahead distance of {name}."] if shown else []
    sizes = {n: [r["vram_bytes"] / 1e9 for r in runs if r["slots"] == n and r.get("vram_bytes")] for n in slots}
    unequal = max((max(of) - min(of) for of in sizes.values() if of), default=0.0)
    if unequal > 0.001:
        notes.append(f"VRAM at equal slots is not equal: it differs by up to {unequal:.2g} GB.")
    if folded:
        notes.append("Each policy with its fastest parameters at each size.")
    ends = [min((r for r in runs if r["slots"] == n), key=lambda r: r["tpot_s"]) for n in (slots[0], slots[-1])]
    first, last = (f"{r['tpot_s'] * 1e3:.1f} ms with {r['slots']} slots ({policy_name(r)})" for r in ends)
    return Drawn(points, notes, f"Time per token falls from {first} to {last}, the fastest at each size")


def references(axes: Axes, group: list[Record], on_demand: bool) -> bool:
    """What is left to gain for one policy, as thin grey lines; loading on demand only where no run shows it.

    True: more is drawn than the line of all experts resident.
    """
    drawn = set()
    best = best_by(group, lambda r: r["slots"])
    for key, name, dashes in REFERENCES:
        known = {n: get(r, f"bounds.{key}") for n, r in best.items()}
        at = [n for n in known if known[n]]
        if at and (on_demand or key != "demand_only_s"):
            axes.plot(at, [known[n] * 1e3 for n in at], linestyle=dashes, color=GREY, lw=1.2, label=name)
            drawn.add(key)
    return bool(drawn - {"all_resident_s"})
