"""How fast a timeline is written and how large it is; run by hand: python tests/bench_timeline.py

Writes the slices of a run of 32 layers x top-2 again and again into (a) a stream that forgets, (b) a gzip file as
`sim.run --timeline` opens it; then times a run with and without a timeline. Medians of five, and the range; processor
time, so that neighbours on the machine count less.
"""

from __future__ import annotations

import gzip
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from conftest import random_trace, round_machine

from sim.experiment import Setting, replay
from sim.run import written
from sim.spec import options
from sim.timeline import Timeline

REPEATS = 5
SLICES = 400_000


class Forgetful(io.StringIO):
    """Keeps nothing of what is written."""

    def write(self, text: str) -> int:
        return len(text)


class Kept(Timeline):
    """Notes the calls that draw slices."""

    def __init__(self) -> None:
        super().__init__(Forgetful(), "kept")
        self.calls: list[tuple[str, str, int, int]] = []

    def slice(self, track: str, name: str, start_ns: int, end_ns: int) -> None:
        self.calls.append((track, name, start_ns, end_ns))


def setting(length: int) -> Setting:
    trace = random_trace(1, sequences=1, length=length, layers=32, experts=8)
    run = options("speculative:lookahead=2,landing_slots=4,guard=0,predictor=router")
    return Setting(trace, round_machine(), trace.model, 4, 4, run)


def seconds(work: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return times


def shown(what: str, rates: list[float]) -> None:
    print(f"{what:48} {statistics.median(rates):6.2f} M slices/s ({min(rates):.2f} to {max(rates):.2f})")


def main() -> None:
    kept = Kept()
    replay(setting(100), timeline=kept)
    period = max(end for _, _, _, end in kept.calls)
    calls = []
    while len(calls) < SLICES:
        shift = len(calls) // len(kept.calls) * period
        calls += [(track, name, start + shift, end + shift) for track, name, start, end in kept.calls]
    calls = calls[:SLICES]

    def write(stream: io.TextIOBase) -> None:
        timeline = Timeline(stream, "bench")  # type: ignore[arg-type]
        for call in calls:
            timeline.slice(*call)
        timeline.close()

    shown("text", [SLICES / s / 1e6 for s in seconds(lambda: write(Forgetful()))])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.json.gz"

        def packed() -> None:
            with written(str(path)) as stream:
                write(stream)  # type: ignore[arg-type]

        shown("text, gzip, file", [SLICES / s / 1e6 for s in seconds(packed)])
        size = path.stat().st_size
        plain = len(gzip.decompress(path.read_bytes()))
        print(f"{'a slice':48} {size / SLICES:6.2f} bytes gzipped, {plain / SLICES:.1f} plain")

        whole = setting(300)
        drawn = 0

        def watched() -> None:
            nonlocal drawn
            with written(str(path)) as stream:
                assert stream is not None
                timeline = Timeline(stream, "bench")
                replay(whole, timeline=timeline)
                timeline.close()

        with_it = seconds(watched)
        without = seconds(lambda: replay(whole))
        text = gzip.decompress(path.read_bytes()).decode()
        drawn, events = text.count('"ph":"X"'), text.count('"ph":')
        print(
            f"a run of 300 tokens, 32 layers: {statistics.median(without):.2f} s without, "
            f"{statistics.median(with_it):.2f} s with a timeline of {drawn} slices, {events} events in all; "
            f"{path.stat().st_size / drawn:.2f} bytes a slice, {path.stat().st_size / events:.2f} an event"
        )


if __name__ == "__main__":
    main()
