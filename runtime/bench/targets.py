"""What the forced cells are held to, and whether they pass: speed-ups over the ladder of Mixtral-offloading.

The same functions judge cells measured on a device and cells the simulator predicts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

RELEASED = "mixtral_offloading"
REPAIRED = ("mixtral_offloading_no_write_back", "mixtral_offloading_copy_stream", "mixtral_offloading_paper")
OURS = ("speculative", "speculative:cache=heat", "on_demand:cache=heat")
SPLIT = ("speculative:miss=split", "speculative:cache=heat,miss=split")
OTHERS = ("on_demand", "speculative:guard=0", "speculative:miss=cpu")
OVER_REPAIRED, OVER_RELEASED, NEAR_FLOOR = 1.25, 2.5, 1.10


Cells = Mapping[str, Mapping[str, Any]]  # figures of a group's cells by policy


class Target(NamedTuple):
    """``passed`` is None where a cell it needs is not there; ``why`` has the numbers."""

    name: str
    passed: bool | None
    why: str


def best(cells: Cells, policies: Iterable[str]) -> tuple[str, float] | None:
    """Of those measured, the policy with the least TPOT, and that."""
    found = [(float(cells[p]["tpot_s"]), p) for p in policies if p in cells]
    return (min(found)[1], min(found)[0]) if found else None


def over(cells: Cells, ours: Iterable[str], rungs: Iterable[str], least: float, name: str) -> Target:
    """The best of ``ours`` is ``least`` times as fast as the best of ``rungs``."""
    mine, theirs = best(cells, ours), best(cells, rungs)
    if mine is None or theirs is None:
        missing = "ours" if mine is None else "the ladder's"
        return Target(name, None, f"none of {missing} was measured")
    ratio = theirs[1] / mine[1]
    return Target(name, ratio >= least, f"{ratio:.2f} x ({mine[0]} over {theirs[0]}), wanted {least:g} x")


def near_floor(cells: Cells, name: str) -> Target:
    """One of ours without the host is near max(compute, own loads x copy time), with no more bytes copied than LRU's
    loads have; of those that pass (or else of all) the fastest is told."""
    found = []
    for policy in OURS:
        if policy in cells:
            cell = cells[policy]
            ratio = cell["tpot_s"] / max(cell["resident_tpot_s"], cell["own_loads_s"])
            loads = cell["copied"] / max(1, cell["lru_loads"])
            found.append((not (ratio <= NEAR_FLOOR and loads <= 1), cell["tpot_s"], policy, ratio, loads))
    if not found:
        return Target(name, None, "none of ours was measured")
    failed, _, policy, ratio, loads = min(found)
    compute_s, copies_s = (cells[policy][key] for key in ("resident_tpot_s", "own_loads_s"))
    return Target(
        name,
        not failed,
        f"{policy}: {ratio:.2f} x max(compute {compute_s * 1e3:.1f} ms, copies {copies_s * 1e3:.1f} ms), wanted at "
        f"most {NEAR_FLOOR:g} x; copied {loads:.2f} of LRU's loads, wanted at most 1",
    )


def mixtral(groups: Mapping[str, Cells], shape: str = "mixtral-8x7b", slots: int = 4) -> dict[str, Cells]:
    """Groups as `judged` wants them, of one shape and number of slots, synthetic routing."""
    found = {}
    for name, cells in groups.items():
        parts = name.split("/")
        if parts[:2] == ["forced", shape] and len(parts) == 5 and parts[3] == f"{slots}s":
            found[f"{parts[2]}/{parts[4]}"] = cells
    return found


def judged(groups: Mapping[str, Cells], bits: Iterable[int]) -> list[Target]:
    """All targets from cells by ``BITSb/LINK`` and policy: (a) balance points, (b) Gen4 with the host, (c) without."""
    found = []
    for width in bits:
        for link, times in (("balance1", 1), ("balance3", 3)):
            cells = groups.get(f"{width}b/{link}", {})
            found.append(over(cells, OURS, REPAIRED, OVER_REPAIRED, f"a, {width} bits, link floor {times} x compute"))
        cells = groups.get(f"{width}b/gen4", {})
        found.append(
            over(cells, SPLIT, REPAIRED, OVER_REPAIRED, f"b, {width} bits, split, over the best repaired rung")
        )
        found.append(
            over(cells, SPLIT, (RELEASED,), OVER_RELEASED, f"b, {width} bits, split, over the rung as released")
        )
        found.append(near_floor(cells, f"c, {width} bits, near the floor"))
    return found


def lines(targets: Iterable[Target]) -> list[str]:
    """For people."""
    words = {True: "pass", False: "miss", None: "not measured"}
    return [f"target {t.name}: {words[t.passed]}; {t.why}" for t in targets]
