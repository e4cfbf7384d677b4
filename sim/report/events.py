"""A few tokens of a timeline that ``sim.run --timeline`` or ``runtime.validate --timeline`` has written."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sim.report.reading import INTEGER, NUMBER, OBJECT, TEXT, Kind, fault
from sim.spec import SpecError
from sim.timeline import COMPUTE, D2H, H2D, HOST

TRACKS = (COMPUTE, H2D, D2H, HOST)
EXPERT = re.compile(r"(?:expert )?(\d+\.\d+)")
HIT, LATE, MISS = "hit", "late", "miss"
NAMED = {"args": Kind("an object with a name", lambda v: OBJECT.fits(v) and "name" in v)}
FLOW = {"ts": NUMBER, "id": Kind("a number or text", lambda v: INTEGER.fits(v) or TEXT.fits(v))}
FIELDS = {"M": {"name": TEXT}, "X": {"tid": INTEGER, "name": TEXT, "ts": NUMBER, "dur": NUMBER}, "s": FLOW, "f": FLOW}


class Slice(NamedTuple):
    """Times in nanoseconds; ``kind`` is what it is drawn as."""

    track: str
    name: str
    kind: str
    start_ns: int
    end_ns: int


class Arrow(NamedTuple):
    """From the start of a prefetch to the compute that used it."""

    start_ns: int
    end_ns: int


@dataclass
class Process:
    """What one run of a timeline did, in order of time, with when each token ended."""

    name: str
    slices: list[Slice] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)
    ends_ns: list[int] = field(default_factory=list)

    def last(self, tokens: int) -> Process:
        """The last forward passes alone, and every copy that touches them; times start at the first of them."""
        cut = self.ends_ns[-tokens - 1] if len(self.ends_ns) > tokens else 0
        begin = min((s.start_ns for s in self.slices if s.track == COMPUTE and s.start_ns >= cut), default=cut)
        end = self.ends_ns[-1]
        kept = [
            s._replace(start_ns=s.start_ns - begin, end_ns=s.end_ns - begin)
            for s in self.slices
            if s.end_ns > begin and s.start_ns < end
        ]
        arrows = [Arrow(a.start_ns - begin, a.end_ns - begin) for a in self.arrows if begin <= a.end_ns <= end]
        return Process(self.name, kept, arrows, [e - begin for e in self.ends_ns[-tokens:]])


def read(path: str) -> list[Process]:
    """Every process of a timeline file.

    Raises:
        SpecError: no timeline, or one that ended before its first token did.
    """
    try:
        content = Path(path).read_bytes()
        text = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        document = json.loads(text)
    except OSError as error:
        raise SpecError(f"--timeline {path}: {error.strerror or error}; name a file of sim.run --timeline") from None
    except (EOFError, zlib.error, ValueError, RecursionError):
        document = None
    events = document.get("traceEvents") if isinstance(document, dict) else None
    if not isinstance(events, list) or any(map(_wrong, events)):
        raise SpecError(f"--timeline {path} is no timeline; name a file that sim.run --timeline has written")
    found = processes(events)
    if not found:
        raise SpecError(f"--timeline {path} has no complete token; write one with sim.run --timeline")
    return found


def _wrong(event: Any) -> bool:
    """Whether what `processes` reads of an event is not there, or of another kind."""
    if not isinstance(event, dict) or fault(event, {"ph": TEXT, "pid": INTEGER} | FIELDS.get(str(event.get("ph")), {})):
        return True
    names = event["ph"] == "M" and event["name"] in ("process_name", "thread_name")
    return names and bool(fault(event, NAMED | ({"tid": INTEGER} if event["name"] == "thread_name" else {})))


def processes(events: Iterable[dict[str, Any]]) -> list[Process]:
    """Processes with at least one complete token, from trace events."""
    names: dict[int, str] = {}
    tracks: dict[int, str] = {}
    slices: dict[int, list[Any]] = defaultdict(list)
    flows: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        kind, process = event["ph"], event["pid"]
        if kind == "M" and event["name"] == "process_name":
            names[process] = str(event["args"]["name"])
        elif kind == "M" and event["name"] == "thread_name":
            tracks[event["tid"]] = str(event["args"]["name"])
        elif kind == "X":
            begin = round(event["ts"] * 1000)  # nanoseconds, in which times are equal or not
            end = begin + round(event["dur"] * 1000)
            slices[process].append((event["tid"], str(event["name"]), event.get("cat"), begin, end))
        elif kind in ("s", "f"):
            flows[process][str(event["id"])].append(round(event["ts"] * 1000))
    found = []
    for process in sorted(slices):
        named = [(tracks.get(tid, ""), *rest) for tid, *rest in slices[process]]
        arrows = sorted(Arrow(*times) for times in flows[process].values() if len(times) == 2)
        one = _process(names.get(process, f"process {process}"), named, arrows)
        if one.ends_ns:
            found.append(one)
    return found


def _process(name: str, events: list[tuple[Any, ...]], arrows: list[Arrow]) -> Process:
    """Slices with what became of every expert: a hit, late, or a miss."""
    events.sort(key=lambda e: (e[3], e[4], e[0], e[1]))
    arrivals: dict[str, list[int]] = defaultdict(list)
    residents: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for track, text, _, begin, end in events:
        expert = EXPERT.match(text)
        if expert and track == H2D:
            arrivals[expert[1]].append(end)
        elif expert and track.startswith(("cache ", "landing")):
            residents[expert[1]].append((begin, end - track.startswith("cache ")))
    for ends in arrivals.values():
        ends.sort()
    used = uses(events, arrows)
    process = Process(name, arrows=arrows)
    known = planned = -1
    for track, text, category, begin, end in events:
        if track not in TRACKS:
            continue
        kind = text.partition(" ")[0]
        if track == H2D:
            kind = str(category)
            if kind == "prefetch" and not any(s <= begin < e for s, e in used[text]):
                kind = "unclaimed"
        elif track == D2H:
            kind = "write_back"
        elif kind == "attention":
            known = planned = end
        elif kind == "plan":
            planned = end
        elif kind == "expert":
            kind = outcome(EXPERT.match(text), arrivals, residents, known, planned, begin, track)
        elif kind == "head":
            process.ends_ns.append(end)
        process.slices.append(Slice(track, text, kind, begin, end))
    return process


def uses(events: list[tuple[Any, ...]], arrows: list[Arrow]) -> dict[str, list[Arrow]]:
    """The arrows of every expert, by its copies' name; a copy that was interrupted has one arrow, from its start."""
    leaving = {arrow.start_ns: arrow for arrow in arrows}
    found: dict[str, list[Arrow]] = defaultdict(list)
    for track, text, _, begin, _ in events:
        if track == H2D and begin in leaving:
            found[text].append(leaving[begin])
    return found


def outcome(
    found: re.Match[str] | None, arrivals: dict[str, list[int]], residents: dict[str, list[tuple[int, int]]],
    known: int, planned: int, begin: int, track: str,
) -> str:  # fmt: skip
    """What an expert was when its routing was known: its bytes there, on the way, or not asked for.

    A prefetch has its place before the routing is known, and keeps it through the plan (in a landing slot, to its end).
    """
    expert = found[1] if found else ""
    if track == HOST:
        return MISS
    ends = arrivals[expert]
    before = bisect_right(ends, begin)
    if not before or ends[before - 1] <= known:
        return HIT
    early = any(since < known and until >= planned for since, until in residents[expert])
    return LATE if early else MISS
