"""What the timelines worked by hand are run with.

The machine: dense part 2000, planning 1000, wake-up 500, one expert 2000 + 1000 a token, head 5000 nanoseconds. An
expert of 13,824 bytes goes in four chunks of 3456 at 1.728 bytes a nanosecond + 500: 2500 a chunk, 10,000 a load. One
chunk is submitted at a time. The way back takes 8500; a chunk that starts meanwhile takes 4500, and 3500 while the host
computes.
"""

from __future__ import annotations

import json
from io import StringIO
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from sim.experiment import Setting, pass_ends_ns, replay
from sim.ledger import Ledger
from sim.link import Copy
from sim.machine import HardwareProfile, LinkProfile, Operators
from sim.plugin import Guess, LinkView
from sim.spec import Bound, Options, options
from sim.timeline import Timeline
from traces import Trace

SHOWN = ("compute", "link", "host")
Slice = tuple[str, str, int, int]


def hand_machine(**laws: Any) -> HardwareProfile:
    """The machine above, with other laws of ``tiny`` where given."""
    values: dict[str, Any] = {
        "dense": (2e-6, 0.0, 0.0),
        "expert": {"4": (2e-6, 1e-6)},
        "head": (5e-6, 0.0),
        "host_s": {"default": 1e-6},
    }
    link = LinkProfile(1.728, 5e-7, 1.728, 5e-7, h2d_duplex_gb_s=0.864, h2d_host_gb_s=1.152)
    operators = {"tiny": Operators(**values | laws)}
    return HardwareProfile("by hand", 1.0, 1.0, link, wake_s=5e-7, operators=operators)


class Eager(NamedTuple):
    """``lookahead``: layers ahead."""

    lookahead: int = 1


def worth_its_score(params: Eager, guess: Guess, link: LinkView) -> float:
    """Every guess is issued, the likeliest first."""
    return guess.score * link.load_ns


EAGER = SimpleNamespace(__name__="tests.eager", __doc__="All.", SOURCE="tests", Params=Eager, worth=worth_its_score)


def eager(lookahead: int = 1, cache: str = "lru", **keys: Any) -> Options:
    """Options of a policy that issues every guess it gets."""
    plain = options("on_demand", cache=cache, predictor="router", chunk_bytes=3456, max_submitted=1)
    return plain.replace(policy=Bound(EAGER, Eager(lookahead)), **{"landing_slots": 1} | keys)


class Worked(NamedTuple):
    """A run's ledger, its slices (track, name, start, end in ns) by start, and the lines of its load log."""

    ledger: Ledger
    timeline: list[Slice]
    log: list[dict[str, Any]]

    def link(self) -> list[Slice]:
        """What was on the wire."""
        return [s for s in self.timeline if s[0] == "link H2D"]

    def stalls(self) -> list[Slice]:
        """When compute waited for an expert."""
        return [s for s in self.timeline if s[1].startswith("stall")]

    def loads(self) -> list[tuple[int, str, str, int, int | None]]:
        """Visit, kind, layer.expert, slot, evicted expert of every line of the log."""
        return [(r["visit"], r["kind"], f"{r['layer']}.{r['expert']}", r["slot"], r["evicted"]) for r in self.log]


class Recorder:
    """Stands in for a timeline: keeps the slices of compute, link and host in nanoseconds, and ignores the rest."""

    def __init__(self) -> None:
        self.slices: list[Slice] = []

    def slice(self, track: str, name: str, start_ns: int, end_ns: int) -> None:
        self.slices.append((track, name, start_ns, end_ns))

    def expert(self, layer: int, expert: int, start_ns: int, end_ns: int) -> None:
        self.slice("compute", f"expert {layer}.{expert}", start_ns, end_ns)

    def computed(self, layer: int, shared_ns: int, experts: list[tuple[int, int]], start_ns: int) -> None:
        if shared_ns:
            self.slice("compute", f"shared {layer}", start_ns, start_ns + shared_ns)
        start_ns += shared_ns
        for expert, length_ns in experts:
            self.expert(layer, expert, start_ns, start_ns + length_ns)
            start_ns += length_ns

    def on_link(self, copy: Copy, start_ns: int, end_ns: int) -> None:
        """What follows on without a gap is one slice."""
        name = f"{copy.layer}.{copy.expert}"
        for k in range(len(self.slices) - 1, -1, -1):
            track, other, begun, end = self.slices[k]
            if track == "link H2D":
                if (other, end) == (name, start_ns):
                    del self.slices[k]
                    start_ns = begun
                break
        self.slice("link H2D", name, start_ns, end_ns)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def by_hand(trace: Trace, run: str | Options, slots: int, machine: HardwareProfile | None = None) -> Worked:
    """Run the SimPy driver; the virtual clock must say the same."""
    if isinstance(run, str):
        run = options(run, predictor="router", chunk_bytes=3456, max_submitted=1)
    setting = Setting(trace, machine or hand_machine(), trace.model, 4, slots, run)
    recorder, log = Recorder(), StringIO()
    ledger = replay(setting, log, cast(Timeline, recorder))
    times = ledger.ttft_ns + ledger.decode_ns
    ends = pass_ends_ns(setting)
    assert sorted(end - start for start, end in zip([0, *ends], ends, strict=False)) == sorted(times)
    bare = replay(setting)
    assert (bare.ttft_ns, bare.decode_ns) == (ledger.ttft_ns, ledger.decode_ns), "watching changed the run"
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    return Worked(ledger, sorted(recorder.slices, key=lambda s: (s[2], s[3], s[0])), lines)


def guesses(routed: Any, *said: tuple[int, int, int, dict[int, float]]) -> Any:
    """Scores [T][L][1][E=4] with nothing guessed but ``said``: token, layer it is said in, distance, expert: score."""
    tokens, layers = len(routed), len(routed[0])
    reach = max((distance for _, _, distance, _ in said), default=1)
    table = [[[[0.0] * 4 for _ in range(reach)] for _ in range(layers)] for _ in range(tokens)]
    for token, layer, distance, scores in said:
        for expert, score in scores.items():
            table[token][layer][distance - 1][expert] = score
    return table
