"""The timeline document: one run worked by hand, and what must hold of every document (Chrome's trace event format)."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from by_hand import eager, guesses, hand_machine
from conftest import random_setting, trace_of

from sim.experiment import Setting, planner, predictor, replay
from sim.ledger import Ledger
from sim.planner import Load, Plan
from sim.timeline import BATCH, Residents, Timeline, merge
from sim.timing import Timing

Event = dict[str, Any]


class Watched(Timeline):
    """Compares its books with the planner's after every plan."""

    def planned(self, plan: Plan, at_ns: int, residents: Residents, expert_bytes: int) -> None:
        super().planned(plan, at_ns, residents, expert_bytes)
        layer = plan.visit.layer
        mine = {one.expert: slot for slot, one in self._resident.items() if one.group == layer}
        assert mine == residents(layer), f"visit {plan.visit.index}"


def drawn(setting: Setting, kind: type[Timeline] = Timeline) -> tuple[Ledger, str]:
    """The ledger and the document of one run."""
    stream = io.StringIO()
    timeline = kind(stream, "simulated")
    ledger = replay(setting, timeline=timeline)
    timeline.close()
    return ledger, stream.getvalue()


def tracks_of(events: list[Event]) -> dict[tuple[int, int], str]:
    return {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}


def ns(microseconds: float) -> int:
    return round(microseconds * 1000)


def slices_by_track(events: list[Event]) -> dict[str, list[tuple[int, int, str]]]:
    """(start, end, name) of every slice of every track, by start."""
    tracks = tracks_of(events)
    found: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for e in events:
        if e["ph"] == "X":
            start = ns(e["ts"])
            found[tracks[e["pid"], e["tid"]]].append((start, start + ns(e["dur"]), e["name"]))
    return {track: sorted(slices) for track, slices in found.items()}


def check(text: str) -> list[Event]:
    """What the format asks of any document; returns its events."""
    document = json.loads(text)
    assert document["displayTimeUnit"] == "ns"
    events = document["traceEvents"]
    tracks = tracks_of(events)
    numbers = [tid for _, tid in tracks]
    assert len(numbers) == len(set(numbers)), "Perfetto looks threads up by their number alone"
    for e in events:
        assert e["ph"] in "MXCsf"
        if e["ph"] != "M":
            assert e["ts"] >= 0
            assert (e["pid"], e["tid"]) in tracks
        if e["ph"] == "C":
            assert all(isinstance(v, int) and v >= 0 for v in e["args"].values())
    for process in {e["pid"] for e in events}:
        for track, slices in slices_by_track([e for e in events if e["pid"] == process]).items():
            for (_, end, name), (start, _, following) in itertools.pairwise(slices):
                assert end <= start, f"{following} begins at {start} on {track}, where {name} lasts until {end}"
    check_arrows(events, tracks)
    return events


def check_arrows(events: list[Event], tracks: dict[tuple[int, int], str]) -> None:
    """Every arrow has both ends, each at the start of a slice: a prefetch, and the expert it was for, later."""
    starts = {(e["pid"], e["tid"], ns(e["ts"])): e for e in events if e["ph"] == "X"}
    ends: dict[tuple[int, str, str], dict[str, Event]] = defaultdict(dict)
    for e in events:
        if e["ph"] in "sf":
            assert e["ph"] not in ends[e["id"], e["cat"], e["name"]]
            ends[e["id"], e["cat"], e["name"]][e["ph"]] = e
    for pair in ends.values():
        begin, end = pair["s"], pair["f"]
        assert end["bp"] == "e" and begin["pid"] == end["pid"] and begin["ts"] <= end["ts"]
        copied, computed = (starts[e["pid"], e["tid"], ns(e["ts"])] for e in (begin, end))
        assert tracks[begin["pid"], begin["tid"]] == "link H2D" and copied["cat"] == "prefetch"
        assert tracks[end["pid"], end["tid"]] == "compute" and computed["name"] == f"expert {copied['name']}"


def last_counts(events: list[Event], name: str) -> dict[str, int]:
    last: dict[str, int] = {}
    at: dict[str, float] = defaultdict(float)
    for e in events:
        if e["ph"] == "C" and e["name"] == name:
            for key in e["args"]:
                assert e["ts"] >= at[key]
                at[key] = e["ts"]
            last |= e["args"]
    return last


def two_layers() -> Setting:
    """Top-1, a slot a layer and one to land in; token 1 routes 0 and 1, token 2 routes 0 and 2; guesses 1.1 and 1.3."""
    routed = [[[0], [1]], [[0], [2]]]
    trace = trace_of(routed, scores=guesses(routed, (0, 0, 1, {1: 0.9}), (1, 0, 1, {3: 0.9})))
    return Setting(trace, hand_machine(), trace.model, 4, 1, eager())


def test_two_tokens_by_hand() -> None:
    """Token 1, layer 0: planned at 3000, effects 3500: 0.0 on the link until 13500, then the prefetch 1.1 until 23500.
    0.0 is computed 13500-16500. Layer 1: known 18500, planned 19500; 1.1 comes at 23500 and is computed until 26500;
    the head ends at 31500. At 19500 1.1 leaves the landing slot 2 as a landing slot, which stays its slot in the cache;
    slot 1, never used, is where the next one lands.
    Token 2, layer 0: planned 34500, 0.0 is resident, 34500-37500; 1.3 is on the link from 35000. Layer 1: known 39500,
    planned 40500, effects 41000: 1.3 is retracted with its third chunk on the wire until 42500; 1.2, which evicts 1.1,
    follows until 52500 and is computed until 55500; the head ends at 60500.
    """
    ledger, text = drawn(two_layers())
    assert ledger.decode_ns == [31500, 29000]
    found = slices_by_track(check(text))
    assert found == {
        "compute": [
            (0, 2000, "attention 0"),
            (2000, 3000, "plan 0"),
            (3000, 13500, "stall 0"),
            (13500, 16500, "expert 0.0"),
            (16500, 18500, "attention 1"),
            (18500, 19500, "plan 1"),
            (19500, 23500, "stall 1"),
            (23500, 26500, "expert 1.1"),
            (26500, 31500, "head"),
            (31500, 33500, "attention 0"),
            (33500, 34500, "plan 0"),
            (34500, 37500, "expert 0.0"),
            (37500, 39500, "attention 1"),
            (39500, 40500, "plan 1"),
            (40500, 52500, "stall 1"),
            (52500, 55500, "expert 1.2"),
            (55500, 60500, "head"),
        ],
        "link H2D": [
            (3500, 13500, "0.0"),
            (13500, 23500, "1.1"),
            (35000, 42500, "1.3"),
            (42500, 52500, "1.2"),
        ],
        "landing, place 0": [(3000, 19500, "1.1 in slot 2"), (34500, 40500, "1.3 in slot 1")],
        "cache 0, place 0": [(3000, 60500, "0.0 in slot 0")],
        "cache 1, place 0": [(19500, 40500, "1.1 in slot 2"), (40500, 60500, "1.2 in slot 2")],
    }
    events = json.loads(text)["traceEvents"]
    assert [(e["ph"], ns(e["ts"])) for e in events if e["ph"] in "sf"] == [("s", 13500), ("f", 23500)]
    assert [(ns(e["ts"]), e["args"]) for e in events if e["name"] == "bytes"] == [
        (3000, {"useful": 13824}),
        (19500, {"useful": 2 * 13824}),
        (40500, {"useful": 3 * 13824}),
        (41000, {"wasted": 3 * 3456}),
    ]
    assert [(ns(e["ts"]), *e["args"].values()) for e in events if e["name"] == "queue"] == [
        (3500, 1, 1),
        (11000, 0, 1),
        (20000, 1, 0),
        (21000, 0, 0),
        (35000, 0, 1),
        (41000, 1, 0),
        (50000, 0, 0),
    ]
    kinds = [(e["name"], e["cat"]) for e in events if e["ph"] == "X" and "cat" in e]
    assert kinds == [("0.0", "demand"), ("1.1", "prefetch"), ("1.3", "prefetch"), ("1.2", "demand")]


def test_a_preempted_prefetch_is_two_stretches_and_one_arrow() -> None:
    """Three layers: 2.3 is guessed from layer 0 and right; layer 1's demand load comes between its chunks."""
    routed = [[[0], [1], [3]]]
    trace = trace_of(routed, scores=guesses(routed, (0, 0, 2, {3: 0.9})))
    setting = Setting(trace, hand_machine(), trace.model, 4, 1, eager(lookahead=2))
    found = slices_by_track(check(drawn(setting)[1]))["link H2D"]
    assert [name for _, _, name in found] == ["0.0", "2.3", "1.1", "2.3"]
    assert found[1][1] == found[2][0] and found[2][1] == found[3][0]
    assert found[1][1] - found[1][0] + found[3][1] - found[3][0] == 10000


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_every_document_of_random_runs(first: int) -> None:
    """Non-overlap, arrows, counters that end at the ledger's totals, and no more residents than slots."""
    for seed in range(first, first + 20):
        setting = random_setting(seed)
        ledger, text = drawn(setting, Watched)
        events = check(text)
        assert ledger == replay_times(setting), f"seed {seed}: watching changed the run"
        wasted = sum(c.wasted_bytes for c in ledger.phases)
        useful = sum(c.h2d_bytes for c in ledger.phases) - wasted
        assert ({"useful": 0, "wasted": 0} | last_counts(events, "bytes")) == {"useful": useful, "wasted": wasted}, seed
        last_counts(events, "queue")
        arrows = sum(e["ph"] == "s" for e in events)
        assert arrows == sum(c.prefetch_used for c in ledger.phases), f"seed {seed}"
        slots = planner(setting, Timing(setting.machine, setting.model, setting.bits, setting.options)).num_slots
        check_residents(events, slots)
        busy = sum(end - start for start, end, _ in slices_by_track(events).get("link H2D", []))
        assert busy >= sum(c.link_busy_ns for c in ledger.phases), f"seed {seed}"


def replay_times(setting: Setting) -> Any:
    """The ledger of a run nobody watches, comparable with another."""
    bare = replay(setting)

    class Same:
        def __eq__(self, other: object) -> bool:
            assert isinstance(other, Ledger)
            return (bare.phases, bare.decode_ns, bare.ttft_ns, bare.log.sha256) == (
                other.phases,
                other.decode_ns,
                other.ttft_ns,
                other.log.sha256,
            )

    return Same()


def check_residents(events: list[Event], slots: int) -> None:
    """At no time two experts in one slot, nor more than there are slots."""
    by_slot: dict[int, list[tuple[int, int]]] = defaultdict(list)
    changes = []
    for track, slices in slices_by_track(events).items():
        if track.startswith(("cache", "landing")):
            for start, end, name in slices:
                by_slot[int(name.rpartition(" ")[2])].append((start, end))
                changes += [(start, 1), (end, -1)]
    for used in by_slot.values():
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(sorted(used)))
    assert max(by_slot, default=0) < slots
    assert max(itertools.accumulate(change for _, change in sorted(changes)), default=0) <= slots


def test_nothing_at_all_is_a_document() -> None:
    stream = io.StringIO()
    Timeline(stream, 'a "name"').close()
    names = [e["args"]["name"] for e in check(stream.getvalue())]
    assert names == ['a "name"', "compute", "link H2D"]


def test_times_are_exact_nanoseconds() -> None:
    """Up to 2**52, that is 52 days."""
    stream = io.StringIO()
    timeline = Timeline(stream, "long")
    times = sorted({0, 1, 999, 1000, 1001, *(2**power - 1 for power in range(52)), *(10**k + 7 for k in range(15))})
    for start, end in itertools.pairwise(times):
        timeline.slice("compute", "x", start, end)
    timeline.close()
    assert all(re.fullmatch(r"\d+\.\d{3}", t) for t in re.findall(r'"(?:ts|dur)":([^,}]+)', stream.getvalue()))
    found = slices_by_track(check(stream.getvalue()))["compute"]
    assert [(start, end) for start, end, _ in found] == list(itertools.pairwise(times))


def test_the_document_is_written_as_it_comes() -> None:
    """What is held back does not grow with the run."""
    stream = io.StringIO()
    timeline = Timeline(stream, "many")
    for number in range(20 * BATCH):
        timeline.slice("compute", "x", number, number + 1)
        timeline.wasted(number, 1)
        held = len(timeline._slices) // 4 + len(timeline._others)
        assert held <= 2 * BATCH + 4
    assert stream.getvalue().count('"X"') >= 19 * BATCH


def test_the_same_bytes_again(tmp_path: Path) -> None:
    """Two processes whose strings hash differently write the same document."""
    code = "import sys; from test_timeline import *; print(digest())"
    digests = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(["tests", "."])}
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            cwd=Path(__file__).parent.parent,
        )
        digests.append(done.stdout)
    assert digests == [digest() + "\n"] * 2


def digest() -> str:
    return hashlib.sha256("".join(drawn(random_setting(seed))[1] for seed in range(8)).encode()).hexdigest()


def test_documents_side_by_side() -> None:
    """Twelve processes in one file: tracks and arrows of each keep their own numbers, and nothing is lost."""
    texts = [drawn(two_layers())[1] for _ in range(12)]
    stream = io.StringIO()
    merge([io.StringIO(text) for text in texts], stream)
    events = check(stream.getvalue())
    assert sorted({e["pid"] for e in events}) == list(range(1, 13))
    alone = json.loads(texts[0])["traceEvents"]
    for process in range(1, 13):
        mine = [e for e in events if e["pid"] == process and e["name"] != "process_sort_index"]
        assert [e | {"pid": 1, "tid": 0, "id": 0} for e in mine] == [e | {"tid": 0, "id": 0} for e in alone]
    stream = io.StringIO()
    merge([], stream)
    assert json.loads(stream.getvalue())["traceEvents"] == []
    with pytest.raises(ValueError, match="no timeline"):
        merge([io.StringIO("[]")], io.StringIO())


def test_serial_copies_stand_one_after_the_other_on_their_own_tracks() -> None:
    """As released: both directions in turn, then compute, whose wait is a stall."""
    trace = trace_of([[[0]], [[1]]], scores=guesses([[[0]], [[1]]]))
    keys = {"copy_stream": 0, "write_back": 1, "landing_slots": 0}
    setting = Setting(trace, hand_machine(), trace.model, 4, 1, eager().replace(**keys))
    found = slices_by_track(check(drawn(setting)[1]))
    (_, first, _), (start, end, name) = found["link H2D"]
    assert name == "0.1" and found["link D2H"] == [(end, end + 8500, "slot 0")]
    assert (start, end + 8500, "stall 0") in found["compute"]
    assert first <= start


def test_the_engines_timeline_has_the_same_tracks() -> None:
    """Arrivals out of order, a retracted load and a second pass; clocks start anywhere."""
    observe = pytest.importorskip("runtime.observe")
    setting = two_layers()
    stream = io.StringIO()
    engine = observe.EngineTimeline(stream, "measured")
    decide = planner(setting, Timing(setting.machine, setting.model, setting.bits, setting.options))
    predict = predictor(setting)
    assert predict is not None
    clock = 10**12
    for number, visit in enumerate(setting.trace.visits()):
        if visit.layer == 0:
            engine.begin_pass(clock)
        visit.guesses = predict(visit, number // 2)
        plan = decide.plan(visit)
        engine.compute(f"attention {visit.layer}", clock, clock + 1000)
        engine.planned(plan, clock + 1000, decide.resident_slots, 10)
        engine.issued([*plan.demand, *plan.prefetch], clock + 1000)
        for load in [*plan.prefetch, *plan.demand]:
            engine.arrived(load.number, clock + 3000 - number)
        engine.arrived(999, clock + 1)
        engine.expert(visit.layer, visit.experts[0], clock + 3000, clock + 4000)
        clock += 5000
        if visit.layer == 1:
            engine.end_pass(10_000)
            clock += 77
    engine.end(5)
    engine.timeline.close()
    events = check(stream.getvalue())
    found = slices_by_track(events)
    assert {"compute", "link H2D", "cache 0, place 0", "cache 1, place 0"} <= set(found)
    assert found["compute"][-1][1] == 19_000
    assert last_counts(events, "bytes")["wasted"] == 5
    assert last_counts(events, "queue") == {"demand": 0, "prefetch": 0}


def test_an_arrow_starts_only_where_a_prefetch_was_seen() -> None:
    """A load that nobody saw on the link, or that was dropped, leaves no half of an arrow."""
    stream = io.StringIO()
    timeline = Timeline(stream, "x")
    load = Load(0, 1, 0, "prefetch", None, 0, 1, 1.0, 5)
    timeline.copied(load, 0, 10)
    timeline.dropped(5, 10, 0)
    timeline._claimed = {1: 5, 2: 6}
    timeline.expert(0, 1, 20, 30)
    timeline.expert(0, 2, 30, 40)
    timeline.close()
    assert not [e for e in check(stream.getvalue()) if e["ph"] in "sf"]
