"""Reads a load log as anybody could who has only the trace beside it, and says what is wrong with it."""

from __future__ import annotations

from typing import Any

from traces import Trace

Expert = tuple[int, int]


class LogChecker:
    """Slots as the lines of a load log fill them.

    A log tells every load and who lost a slot to it. What a claimed prefetch displaces out of a landing slot's way is
    not in it, nor what a cold start empties; so where there are landing slots, an occupant may have gone unseen, once
    for each prefetch (and each slot that a guard lends).

    Args:
        trace: its routing.
        slots: cache slots in all.
        landing_slots, guard: of the run.
        cold: the caches are emptied where a sequence starts.
        whole: visits load whole layers.
        hosted: the host may compute misses.
    """

    def __init__(
        self, trace: Trace, slots: int, landing_slots: int, guard: bool, cold: bool, whole: bool, hosted: bool
    ) -> None:
        self.visits = list(trace.visits())
        self.slots, self.landing_slots, self.guard = slots, landing_slots, guard
        self.cold, self.whole, self.hosted = cold, whole, hosted
        self.holds: dict[int, Expert] = {}
        self.unseen = self.prefetches = 0

    def read(self, lines: list[dict[str, Any]]) -> None:
        """Every visit in turn with its lines."""
        place = 0
        for visit in self.visits:
            mine = []
            while place < len(lines) and lines[place]["visit"] == visit.index:
                mine.append(lines[place])
                place += 1
            if self.cold and visit.starts_sequence:
                gone = {(r["layer"], r["expert"]) for r in mine if r["kind"] == "retract"}
                self.holds = {slot: x for slot, x in self.holds.items() if x in gone}
            self.visit(visit.layer, set(visit.experts), mine)
        assert place == len(lines), "lines out of order"
        if not self.guard:
            assert self.unseen <= self.prefetches

    def visit(self, layer: int, routed: set[int], lines: list[dict[str, Any]]) -> None:
        """The lines of one visit: retractions, then loads of what is routed, then prefetches."""
        kinds = [line["kind"] for line in lines]
        assert kinds == sorted(kinds, key=["retract", "demand", "stream", "prefetch"].index)
        left: set[tuple[int, Expert]] = set()
        loaded: set[int] = set()
        before = set(self.holds.values())
        for line in lines:
            x = (line["layer"], line["expert"])
            slot = line["slot"]
            if line["kind"] == "retract":
                assert self.holds.pop(slot) == x
                left.add((slot, x))
                continue
            if line["kind"] == "prefetch":
                self.prefetches += 1
            else:
                assert x[0] == layer
                assert x[1] in routed or self.whole, "a demand load nobody asked for"
                loaded.add(x[1])
            if x in self.holds.values():
                self.vanish(next(s for s, other in self.holds.items() if other == x))
            if line["kind"] == "stream":
                assert slot >= self.slots + self.landing_slots
                assert line["evicted"] is None
                continue
            assert slot < self.slots + self.landing_slots
            if line["evicted"] is not None:
                victim = (line.get("evicted_layer", x[0]), line["evicted"])
                assert not (victim[0] == layer and victim[1] in routed), "a routed expert is evicted"
                assert (slot, victim) in left or self.holds.pop(slot) == victim
            elif slot in self.holds:
                self.vanish(slot)
            self.holds[slot] = x
        if not self.hosted:
            for expert in routed - loaded:
                assert (layer, expert) in before, "computed without ever being loaded"

    def vanish(self, slot: int) -> None:
        """Its occupant has gone without a line."""
        assert self.landing_slots, "two experts in one slot, or one expert in two"
        del self.holds[slot]
        self.unseen += 1
