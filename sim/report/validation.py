"""What a validation says: whether predictions hold, what ran fastest, where the time went, and every cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sim.plots._records import get
from sim.plots.front import pareto
from sim.plots.stalls import parts_ms
from sim.plots.validation import conditions
from sim.report import charts
from sim.report.charts import Bar, Point
from sim.report.grid import Column
from sim.report.markup import Markup, badge, figure, join, pairs, tag
from sim.report.sweep import PART_NAMES

Record = dict[str, Any]

MEASURED = "MEASURED"


def both(cells: list[Record]) -> str:
    """The labels of figures that set both sides beside each other."""
    sides = sorted({str(c["simulated"]["evidence"]) for c in cells})
    return f"{MEASURED} against {', '.join(sides)}"


def error(cell: Record) -> float:
    """Simulated over measured time per token, less 1."""
    return float(cell["simulated"]["tpot_s"] / cell["measured"]["tpot_s"] - 1)


def by_link(cells: list[Record]) -> dict[Any, Record]:
    """The cell that ran fastest at every link speed."""
    best: dict[Any, Record] = {}
    for cell in cells:
        pace = cell["link_gb_s"]
        if pace not in best or cell["measured"]["tpot_s"] < best[pace]["measured"]["tpot_s"]:
            best[pace] = cell
    return {pace: best[pace] for pace in sorted(best, key=lambda p: (p is None, p))}


def words(document: Record, cells: list[Record]) -> Markup:
    """Recommendation and verdict, as sentences."""
    items = []
    for pace, cell in by_link(cells).items():
        link = "on the link as it is" if pace is None else f"over a link of {pace:g} GB/s"
        items.append(
            tag("li", f"{link}: ", tag("code", cell["policy"]), f", {cell['bits']} bits, {cell['slots']} slots a ",
                "layer: ", tag("strong", f"{cell['measured']['tokens_per_s']:.2f} tokens/s"))
        )  # fmt: skip
    errors = sorted(abs(error(c)) * 100 for c in cells)
    middle = (errors[(len(errors) - 1) // 2] + errors[len(errors) // 2]) / 2
    equal = sum(bool(c["load_log_equal"]) for c in cells)
    verdict = (
        f"The simulator's time per token is off by {middle:.1f} % in the median and {errors[-1]:.1f} % at most over "
        f"{len(cells)} cells; the engine issued exactly the loads it foretold in {equal} of them."
    )
    if document.get("regret") is not None:
        verdict += (
            f" Taking the simulator's choice in place of the engine's best costs {document['regret'] * 100:.1f} % of "
            "the time per token."
        )
    if document.get("kendall_tau") is not None:
        verdict += f" Their orders agree with Kendall's tau-b of {document['kendall_tau']:.2f}."
    where = f"{cells[0]['measured']['model']}, device {document.get('device', 'unknown')}"
    return join(
        tag("p", f"What ran fastest on this engine ({where}): ", badge(MEASURED), class_="lead"),
        tag("ul", *items),
        tag("p", verdict, " ", badge(both(cells))),
    )


def agreement(cells: list[Record], name: str) -> Markup:
    """Predicted against measured time per token."""
    policies = sorted({str(c["policy"]) for c in cells})
    points = []
    for i, cell in enumerate(cells):
        x, y = cell["measured"]["tpot_s"] * 1e3, cell["simulated"]["tpot_s"] * 1e3
        which = policies.index(str(cell["policy"]))
        text = f"{conditions(cell, cells)}: measured {x:.2f} ms, simulated {y:.2f} ms ({error(cell) * 100:+.1f} %)"
        points.append(Point(x, y, which, which, True, text, f"{name}-{i}"))
    drawn = charts.scatter(
        points, "MEASURED ms a token", "SIMULATED ms a token", [], "simulated against measured time", diagonal=True
    )
    text = "One mark a cell; on the diagonal the simulator is right. Each mark leads to its row in the table."
    keys = charts.legend(policies, [])
    return figure("Predicted against measured", both(cells), join(keys, drawn), text, f"{name}-agreement")


def front(cells: list[Record], name: str) -> Markup:
    """Measured speed against memory, where the cells differ in memory."""
    sizes = [c["measured"]["vram_bytes"] / 1e9 for c in cells]
    if len(set(sizes)) < 2:
        return tag("p", f"No Pareto front: all cells hold {max(sizes):.3g} GB on the device.", class_="hint")
    speeds = [c["measured"]["tokens_per_s"] for c in cells]
    best = pareto(list(zip(sizes, speeds, strict=True)))
    policies = sorted({str(c["policy"]) for c in cells})
    points = []
    for i, cell in enumerate(cells):
        which = policies.index(str(cell["policy"]))
        text = f"{conditions(cell, cells)}: {speeds[i]:.2f} tokens/s, {sizes[i]:.3g} GB"
        points.append(Point(sizes[i], speeds[i], which, which, i in best, text, f"{name}-{i}"))
    steps = [(sizes[i], speeds[i]) for i in best]
    drawn = charts.scatter(points, "VRAM (GB)", "tokens/s", steps, "speed against memory, one mark a cell")
    text = "Filled marks and the line: no other cell is faster in as little memory."
    keys = charts.legend(policies, [])
    return figure("Pareto front: speed against memory", MEASURED, join(keys, drawn), text, f"{name}-front")


def stalls(cells: list[Record], name: str) -> Markup:
    """Both sides of every cell, one above the other."""
    rows = []
    for cell in sorted(cells, key=lambda c: (c["link_gb_s"] or 0, c["measured"]["tpot_s"], c["policy"])):
        floor = get(cell["simulated"], "bounds.joint_floor_s")
        for side in ("measured", "simulated"):
            one = cell[side]
            text = f"{one['tpot_s'] * 1e3:.2f} ms"
            if side == "simulated":
                text += f" ({error(cell) * 100:+.1f} %)"
            rows.append(
                Bar(f"{one['evidence']} {conditions(cell, cells)}", parts_ms(one), floor * 1e3 if floor else None, text)
            )  # fmt: skip
    text = (
        "Milliseconds a decode token, measured above simulated. A stall is time in which compute waits for an expert, "
        "after no load had been issued (miss) or for one that was not finished (late). The joint floor is simulated."
    )
    return figure("Where the time of a token goes", both(cells), charts.bars(rows, PART_NAMES), text, f"{name}-stalls")


def columns(cells: list[Record]) -> list[Column]:
    """Of the table of cells."""

    def ms(side: str, key: str) -> Callable[[Record], Any]:
        return lambda c: None if get(c[side], key) is None else get(c[side], key) * 1e3

    def share(key: str) -> Callable[[Record], Any]:
        return lambda c: 100 * c["measured"][key] / c["measured"]["accesses"]

    of = f"time a token ({both(cells)})"
    return [
        Column("policy", "policy", lambda c: str(c["policy"]), "", "cell"),
        Column("bits", "bits", lambda c: c["bits"], "d", "cell"),
        Column("slots", "slots", lambda c: c["slots"], "d", "cell"),
        Column("link", "link GB/s", lambda c: c["link_gb_s"], "g", "cell"),
        Column("tokens", "tokens/s", lambda c: c["measured"]["tokens_per_s"], ".2f", MEASURED),
        Column("tpot", "measured ms", ms("measured", "tpot_s"), ".2f", of),
        Column("simulated", "simulated ms", ms("simulated", "tpot_s"), ".2f", of),
        Column("error", "error %", lambda c: error(c) * 100, "+.1f", of),
        Column("spread", "spread of repeats %", lambda c: 100 * (c.get("repeat_spread") or 0), ".1f", of),
        Column("floor", "joint floor ms", ms("simulated", "bounds.joint_floor_s"), ".2f", of),
        Column("hit", "hit %", share("hits"), ".1f", f"routed experts ({MEASURED})"),
        Column("late", "late %", share("late"), ".1f", f"routed experts ({MEASURED})"),
        Column("miss", "miss %", share("misses"), ".1f", f"routed experts ({MEASURED})"),
        Column("loads", "same loads", lambda c: "yes" if c["load_log_equal"] else "no", "", "verdict"),
        Column("regime", "regime", lambda c: str(c["regime"]), "", "verdict"),
    ]  # fmt: skip


def provenance(document: Record, cells: list[Record]) -> Markup:
    """What was run, on what, from which code."""
    machine = document.get("machine") or {}
    rows: list[tuple[str, Any]] = [
        ("command", tag("code", document.get("command", "unknown"))),
        ("commit", tag("code", document.get("commit", "unknown"))),
        ("measured on", ", ".join(f"{k} {v}" for k, v in machine.items()) or "unknown"),
        ("model", str(cells[0]["measured"]["model"])),
        ("routing", ", ".join(sorted({str(c["measured"]["routing"]) for c in cells}))),
        ("tokens, repeats", f"{document.get('tokens')} tokens a prompt, {document.get('repeats')} repeats"),
        ("decisions compared", str(document.get("decisions", "unknown"))),
    ]
    sources = (document.get("profile") or {}).get("sources") or {}
    profile = pairs([(name, str(source)) for name, source in sources.items()])
    details = tag("details", tag("summary", "where the profile's figures come from"), profile) if sources else None
    return join(pairs(rows), details)
