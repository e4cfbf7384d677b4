"""What may be attached to an engine to watch it: durations for calibration, slices for a timeline."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sim.ledger import Timeline
from sim.planner import Load


@dataclass
class Spans:
    """Measured durations in nanoseconds, one entry per occurrence; what the columns are stands beside each list.

    ``dense`` runs from the end of the last expert of the visit before; it holds that visit's weighted sum too.
    ``expert`` runs from the end of the expert (or plan, or wait) before, so that no time is left out.
    """

    dense: list[tuple[int, int, int, int]] = field(default_factory=list)  # layer, tokens, context, ns
    gates: list[tuple[int, int]] = field(default_factory=list)  # tokens, ns
    host: list[tuple[int, int]] = field(default_factory=list)  # tokens, ns
    expert: list[tuple[int, int]] = field(default_factory=list)  # tokens, ns
    head: list[tuple[int, int]] = field(default_factory=list)  # tokens, ns


class EngineTimeline:
    """An engine's run as slices on the tracks the simulator's timeline has; passes follow each other without a gap.

    The link reports when a load has arrived, not when it began: a copy is shown from its issue, or from the arrival
    before it if that was later.

    Args:
        process: name of the whole.
    """

    def __init__(self, process: str) -> None:
        self.timeline = Timeline(process)
        self._origin = 0
        self._elapsed = 0
        self._issued: dict[int, int] = {}
        self._link_free = 0

    def begin_pass(self, start_ns: int) -> None:
        """A forward pass begins at ``start_ns`` (monotonic clock)."""
        self._origin = start_ns - self._elapsed

    def end_pass(self, elapsed_ns: int) -> None:
        """It took ``elapsed_ns``."""
        self._elapsed += elapsed_ns

    def compute(self, name: str, start_ns: int, end_ns: int) -> None:
        """One slice of the computing thread (monotonic clock)."""
        self.timeline.slice("compute", name, start_ns - self._origin, end_ns - self._origin)

    def serial(self, start_ns: int, end_ns: int) -> None:
        """Copies with which nothing else went on."""
        self.timeline.slice("link H2D", "serial", start_ns - self._origin, end_ns - self._origin)

    def issued(self, loads: Iterable[Load], at_ns: int) -> None:
        """These loads were handed to the copier."""
        self._issued.update((load.number, at_ns) for load in loads)

    def arrived(self, number: int, layer: int, expert: int, end_ns: int) -> None:
        """A load that is used was there at ``end_ns``."""
        start = min(end_ns, max(self._issued.pop(number, end_ns), self._link_free))
        self._link_free = max(self._link_free, end_ns)
        self.timeline.slice("link H2D", f"{layer}.{expert}", start - self._origin, end_ns - self._origin)


def merged(timelines: Sequence[Timeline]) -> str:
    """One document in Chrome's trace format, each timeline a process of its own, in this order."""
    events = []
    for number, timeline in enumerate(timelines, 1):
        for event in json.loads(timeline.text())["traceEvents"]:
            events.append(json.dumps(event | {"pid": number}, separators=(",", ":")))
    return '{"displayTimeUnit":"ns","traceEvents":[\n' + ",\n".join(events) + "\n]}\n"
