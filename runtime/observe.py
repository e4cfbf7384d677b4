"""What may be attached to an engine to watch it: durations for calibration, slices for a timeline."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import IO, NamedTuple

from sim.planner import PREFETCH, Load, Plan
from sim.timeline import COMPUTE, D2H, HOST, Residents, Timeline


class DenseSpan(NamedTuple):
    """From the end of the last expert of the visit before, whose weighted sum it holds, to the routing."""

    layer: int
    tokens: int
    context: int
    ns: int


class GatesSpan(NamedTuple):
    """The routing, and guesses if the planner ``looks`` at them, brought to the host."""

    tokens: int
    looks: bool
    ns: int


class HostSpan(NamedTuple):
    """Planning and bookkeeping; ``after_ns`` of it after the copier was given demand loads (0: there were none)."""

    tokens: int
    after_ns: int
    ns: int


class ExpertSpan(NamedTuple):
    """From the end of the expert (or plan, or wait) before, so that no time is left out; ``wait_ns`` just before it."""

    tokens: int
    wait_ns: int
    ns: int


class Span(NamedTuple):
    """A duration that depends on the number of tokens alone."""

    tokens: int
    ns: int


@dataclass
class Spans:
    """Measured durations in nanoseconds, one entry per occurrence.

    ``host_expert`` is of the host's own thread; ``notice_ns`` runs from the end of a load that is waited for until the
    engine goes on.
    """

    dense: list[DenseSpan] = field(default_factory=list)
    gates: list[GatesSpan] = field(default_factory=list)
    host: list[HostSpan] = field(default_factory=list)
    expert: list[ExpertSpan] = field(default_factory=list)
    head: list[Span] = field(default_factory=list)
    host_expert: list[Span] = field(default_factory=list)
    notice_ns: list[int] = field(default_factory=list)


class EngineTimeline:
    """An engine's run on the tracks the simulator's timeline has; passes follow each other without a gap.

    The link reports when a load has arrived, not when it began: a load is shown from its issue, or from the arrival
    before it if that was later, and a retracted one not at all. The queue counter holds loads on their way, the one on
    the wire included.

    Args:
        stream: text file that gets the document.
        process: name of the whole.
    """

    def __init__(self, stream: IO[str], process: str) -> None:
        self.timeline = Timeline(stream, process)
        self._origin = 0
        self._elapsed = 0
        self._issued: dict[int, tuple[Load, int]] = {}
        self._link_free = 0

    def begin_pass(self, start_ns: int) -> None:
        """A forward pass begins at ``start_ns`` (monotonic clock)."""
        self._origin = start_ns - self._elapsed

    def end_pass(self, elapsed_ns: int) -> None:
        """It took ``elapsed_ns``."""
        self._elapsed += elapsed_ns

    def end(self, wasted: int) -> None:
        """The run ends; ``wasted`` bytes were copied in vain."""
        self.timeline.end(self._elapsed, wasted)

    def compute(self, name: str, start_ns: int, end_ns: int) -> None:
        """One slice of the computing thread (monotonic clock)."""
        self.timeline.slice(COMPUTE, name, start_ns - self._origin, end_ns - self._origin)

    def expert(self, layer: int, expert: int, start_ns: int, end_ns: int) -> None:
        """A routed expert is computed."""
        self.timeline.expert(layer, expert, start_ns - self._origin, end_ns - self._origin)

    def hosted(self, layer: int, expert: int, start_ns: int, end_ns: int) -> None:
        """A routed expert was computed on the host."""
        self.timeline.slice(HOST, f"expert {layer}.{expert}", start_ns - self._origin, end_ns - self._origin)

    def planned(self, plan: Plan, at_ns: int, residents: Residents, expert_bytes: int) -> None:
        """See `Timeline.planned`."""
        for load in plan.retract:
            self._issued.pop(load.number, None)
            self.timeline.dropped(load.number, at_ns - self._origin, 0)
        self.timeline.planned(plan, at_ns - self._origin, residents, expert_bytes)

    def written_back(self, start_ns: int, end_ns: int) -> None:
        """Copies to the host with which nothing else went on."""
        self.timeline.slice(D2H, "serial", start_ns - self._origin, end_ns - self._origin)

    def issued(self, loads: Iterable[Load], at_ns: int) -> None:
        """These loads were handed to the copier."""
        self._issued.update((load.number, (load, at_ns)) for load in loads)
        self._queues(at_ns)

    def arrived(self, number: int, end_ns: int) -> None:
        """A load was there at ``end_ns``; retracted ones are passed over."""
        load, start = self._issued.pop(number, (None, 0))
        if load is None:
            return
        start = min(end_ns, max(start, self._link_free))
        self._link_free = max(self._link_free, end_ns)
        self.timeline.copied(load, start - self._origin, end_ns - self._origin)
        self._queues(end_ns)

    def _queues(self, at_ns: int) -> None:
        early = sum(load.kind == PREFETCH for load, _ in self._issued.values())
        self.timeline.queues(at_ns - self._origin, len(self._issued) - early, early)
