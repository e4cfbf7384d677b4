"""Simulate many settings, keep every result, and say which one to run.

python -m sim.sweep --policy on_demand --policy speculative --grid policy.lookahead=1,2,3 --out results.jsonl
python -m sim.sweep --vram 24GB --context 4096 --grid policy.lookahead=1..4 --best tpot --choice-out choice.json
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import Any

from sim import choice as choices
from sim import trial
from sim.axes import FIELDS, Axis, axis
from sim.results import Store
from sim.run import check_target
from sim.search import search
from sim.settings import DEFAULT_MACHINE, Case, FitError, Space, size_bytes
from sim.spec import SpecError
from traces import TraceError
from traces.cli import Parser

BATCH_S = 0.25  # of work sent at once: what a killed worker or sweep loses
MOST_IN_BATCH = 64
PROGRESS_S = 2.0
NOT_CHOSEN = ("trace", "machine", "model", "tokens", "context", "cold_sequences")
REPORTED = 3  # machines, models or traces whose fronts are printed in full

Combination = dict[str, str]
Record = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    """Flags of ``sim.sweep``."""
    p = Parser(
        prog="python -m sim.sweep",
        description="Simulate many settings, keep every result, and say which one to run.",
        epilog=f"KEY: {', '.join(FIELDS)}; any key of a SPEC (landing_slots, miss, guard, ...); policy.PARAMETER, "
        "cache.PARAMETER, predictor.PARAMETER; machine.FIELD, model.FIELD. VALUES: a,b,c (a;b;c where they have commas "
        "themselves) or a..b. Policies, caches, machines: python -m sim.run --help",
    )
    p.add_argument("--trace", metavar="FILE", help="routing trace (default: the shipped recorded one)")
    p.add_argument("--machine", metavar="NAME|FILE", help=f"default {DEFAULT_MACHINE}")
    p.add_argument("--model", metavar="NAME|FILE", help="as for sim.run")
    p.add_argument("--bits", type=int, metavar="N", help="width of the routed experts (default 4; with --vram: all)")
    p.add_argument(
        "--slots", type=int, metavar="N", help="cache slots per layer (default half; with --vram: what fits)"
    )
    p.add_argument("--policy", action="append", metavar="SPEC", help="repeatable (default speculative)")
    p.add_argument("--cache", metavar="SPEC", help="eviction, for policies that name none (default lru)")
    p.add_argument("--predictor", metavar="SPEC", help="source of guesses, likewise (default recorded)")
    p.add_argument("--tokens", type=int, metavar="N", help="first N decode tokens only")
    p.add_argument(
        "--context", type=int, metavar="N", help="tokens of KV cache (default: the trace's longest sequence)"
    )
    p.add_argument("--cold-sequences", action="store_true", help="empty the caches where a sequence starts")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a field of machine or model"
    )
    p.add_argument("--grid", action="append", default=[], metavar="KEY=VALUES", help="vary a field; repeatable")
    p.add_argument("--random", type=int, metavar="N", help="N settings at random in place of the whole grid")
    p.add_argument("--search", type=int, metavar="N", help="N settings proposed by Optuna, the best known ones first")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of anything random (default %(default)s)")
    p.add_argument("--vram", metavar="SIZE", help="memory the whole model must fit into: 24GB; decides bits and slots")
    p.add_argument("--references", action="store_true", help="simulate the references too (slower)")
    p.add_argument("--driver", choices=("compiled", "simpy"), default="compiled", help="default %(default)s")
    p.add_argument("--jobs", type=int, metavar="N", help="settings at once (default: one a core)")
    p.add_argument("--scheduler", metavar="ADDRESS", help="run on a dask.distributed cluster: tcp://HOST:PORT")
    p.add_argument(
        "--out", metavar="FILE", help="results, appended as JSON lines; what stands there is not simulated again"
    )
    p.add_argument(
        "--best", default="tpot", metavar="WHAT", help="tpot, tokens_per_s or vram:X%% (default %(default)s)"
    )
    p.add_argument("--choice-out", metavar="FILE", help="write the choice, for --choice of the other commands")
    return p


def space_of(args: argparse.Namespace) -> Space:
    """What the flags span.

    Raises:
        SpecError: a field both fixed and varied, or an axis that cannot be used.
    """
    fixed = {name: getattr(args, name) for name in (*FIELDS, "cache", "predictor") if name != "policy"}
    base = {name: str(value) for name, value in fixed.items() if value is not None and value is not False}
    base |= {"cold_sequences": "1"} if args.cold_sequences else {}
    axes = [axis(text) for text in args.grid]
    policies = args.policy or []
    for varied in axes:
        if varied.key in base or (varied.key == "policy" and policies):
            flag = varied.key.replace("_", "-")
            raise SpecError(f"--{flag} and --grid {varied.key} both set it; leave one of them out")
    if len(policies) > 1:
        axes.insert(0, Axis("policy", tuple(dict.fromkeys(policies))))
    elif all(varied.key != "policy" for varied in axes):
        base["policy"] = policies[0] if policies else "speculative"
    if all(varied.key != "machine" for varied in axes):
        base.setdefault("machine", DEFAULT_MACHINE)
    vram = None if args.vram is None else size_bytes(args.vram)
    return Space(base, tuple(axes), tuple(args.set), vram, args.references, args.driver)


class Progress:
    """Lines on standard error: how far, how fast, how long still, best so far."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.simulated = 0
        self.best: Record | None = None
        self._begin = self._said = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def add(self, found: list[Record], failed: int) -> None:
        """Count results, and say so every `PROGRESS_S`."""
        self.done += len(found) + failed
        self.simulated += len(found)
        for record in found:
            self.see(record)
        if time.monotonic() - self._said >= PROGRESS_S:
            self.say()

    def see(self, record: Record) -> None:
        """Maybe the best so far."""
        timed = record["tokens_per_s"] is not None
        if timed and (self.best is None or choices.speed(record) > choices.speed(self.best)):
            self.best = record

    def say(self) -> None:
        """Where the sweep stands."""
        self._said = time.monotonic()
        rate = self.done / max(1e-9, self.seconds)
        left = f"{(self.total - self.done) / max(1e-9, rate):.0f} s"
        if not self.done:
            print("no setting is done yet (a new driver takes some seconds to compile)", file=sys.stderr, flush=True)
            return
        line = f"{self.done:,} of {self.total:,} settings, {rate:.1f} settings/s, ETA {left}"
        if self.best is not None:
            best = self.best
            line += (
                f"; best so far {choices.speed(best):.3f} tokens/s ({best['regime']}): {best['policy']}, "
                f"{best['bits']} bits, {best['slots']} slots"
            )
        print(line, file=sys.stderr, flush=True)


@contextmanager
def executor_of(args: argparse.Namespace) -> Iterator[tuple[Executor, int]]:
    """Where settings are simulated, and how many at once: threads here, or the workers of a cluster.

    Raises:
        SpecError: no such cluster, or it has no workers; dask.distributed or numba is not installed.
    """
    if args.scheduler is None:
        if args.driver == "compiled" and importlib.util.find_spec("numba") is None:
            raise SpecError("the compiled driver needs numba: install the extra 'fast', or use --driver simpy")
        pool = ThreadPoolExecutor(args.jobs or len(os.sched_getaffinity(0)))
        try:
            yield pool, pool._max_workers
        finally:
            pool.shutdown(cancel_futures=True)
        return
    try:
        make_client: Any = importlib.import_module("dask.distributed").Client
    except ImportError:
        raise SpecError("--scheduler needs dask.distributed, not installed here; install the extra 'cluster'") from None
    try:
        client: Any = make_client(args.scheduler, timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        raise SpecError(f"--scheduler {args.scheduler}: {error or type(error).__name__}; name a running one") from None
    with client:
        workers = sum(client.nthreads().values())
        if not workers:
            raise SpecError(f"--scheduler {args.scheduler} has no workers; start: dask worker {args.scheduler}")
        pool = client.get_executor(pure=False)
        try:
            yield pool, workers
        finally:
            pool.shutdown(wait=False)


class Sweep:
    """Simulates cases by any executor and keeps their records as they come.

    Attributes:
        left_out: how many combinations were not simulated, by reason.
        wanted: keys of the records of this sweep, in the order asked for.
    """

    def __init__(self, space: Space, store: Store, executor: Executor, workers: int, progress: Progress) -> None:
        self.space, self.store, self.executor, self.workers, self.progress = space, store, executor, workers, progress
        self.left_out: Counter[str] = Counter()
        self.wanted: dict[str, None] = {}
        self._failed: dict[str, str] = {}
        self._seconds = BATCH_S

    def case(self, chosen: Combination) -> tuple[str, Case] | None:
        """A combination with its key; None if it does not fit.

        Raises:
            SpecError: a value nobody can use.
        """
        try:
            found = self.space.case(chosen)
        except FitError as error:
            self.left_out[str(error)] += 1
            return None
        return trial.key(found), found

    def cases(self, combinations: Iterable[Combination], most: int | None = None) -> dict[str, Case]:
        """Distinct cases by key, at most so many."""
        found: dict[str, Case] = {}
        for chosen in combinations:
            one = self.case(chosen)
            if one is not None:
                found.setdefault(*one)
            if most is not None and len(found) >= most:
                break
        return found

    def run(self, cases: dict[str, Case]) -> None:
        """Simulate those that are not known yet.

        Raises:
            SpecError: the cluster gave up on them.
        """
        self.wanted |= dict.fromkeys(cases)
        done = self.store.known.keys() | self._failed.keys()
        waiting = deque((key, case) for key, case in cases.items() if key not in done)
        running: dict[Future[Any], set[str]] = {}
        while waiting or running:
            while waiting and len(running) < 2 * self.workers:
                size = max(1, min(MOST_IN_BATCH, int(BATCH_S / self._seconds), len(waiting) // self.workers or 1))
                batch = [waiting.popleft() for _ in range(size)]
                future = self.executor.submit(trial.records, [case for _, case in batch])
                running[future] = {key for key, _ in batch}
            for future in wait(running, timeout=PROGRESS_S, return_when=FIRST_COMPLETED).done:
                self._keep(future, running.pop(future))
            self.progress.add([], 0)

    def _keep(self, future: Future[Any], keys: set[str]) -> None:
        try:
            found, failed, seconds = future.result()
        except AssertionError:
            raise
        except Exception as error:
            if not type(error).__module__.startswith(("distributed", "dask")):
                raise
            raise SpecError(f"the cluster gave up ({type(error).__name__}); run the same again to go on") from None
        if keys != {record["key"] for record in found} | {one.key for one in failed}:
            raise SpecError("a worker runs other code than this machine; install the same version there")
        self._seconds = max(1e-4, seconds / max(1, len(found) + len(failed)))
        self.store.append(found)
        for one in failed:
            self._failed[one.key] = one.reason
            self.left_out[one.reason] += 1
        self.progress.add(found, len(failed))

    def simulate(self, combinations: list[Combination]) -> list[Record | None]:
        """Records of combinations, for a search."""
        found = [self.case(chosen) for chosen in combinations]
        self.run(dict(one for one in found if one is not None))
        return [self.store.known.get(one[0]) if one is not None else None for one in found]

    def records(self) -> list[Record]:
        """Of everything this sweep asked for."""
        return [self.store.known[key] for key in self.wanted if key in self.store.known]


def check(args: argparse.Namespace, space: Space) -> None:
    """What can be refused before anything runs.

    Raises:
        SpecError: one sentence.
    """
    choices.wish(args.best)
    for flag, path in (("--out", args.out), ("--choice-out", args.choice_out)):
        check_target(flag, path)
    for flag in ("random", "search", "jobs"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise SpecError(f"--{flag} is {value}; it must be at least 1")
    several = [a.key for a in space.axes if a.key.partition(".")[0] in NOT_CHOSEN]
    if args.choice_out and several:
        raise SpecError(
            f"--choice-out is for one trace, machine, model and use; --grid varies {several[0]}: leave one out"
        )


def run(args: argparse.Namespace) -> Record:
    """The whole sweep; the returned document is the last line of output."""
    space = space_of(args)
    check(args, space)
    begin = time.monotonic()
    with Store(args.out) as store:
        before = len(store.known)
        with executor_of(args) as (executor, workers):
            progress = Progress(0)
            sweep = Sweep(space, store, executor, workers, progress)
            proposed = _simulate(args, sweep)
    seconds = time.monotonic() - begin
    records = sweep.records()
    for reason, count in sweep.left_out.most_common(5):
        print(f"left out {count:,}: {reason}")
    if not records:
        reason = next(iter(sweep.left_out), "nothing to simulate")
        raise SpecError(f"no setting could be simulated: {reason}")
    rate = progress.simulated / seconds if progress.simulated else None
    print(
        f"{len(records):,} settings, {progress.simulated:,} of them simulated now, in {seconds:.1f} s"
        + (f" ({rate:.1f} settings/s)" if rate else "")
    )
    return {
        "settings": len(records),
        "proposed": proposed,
        "simulated": progress.simulated,
        "found_before": before,
        "left_out": dict(sweep.left_out),
        "seconds": seconds,
        "settings_per_s": rate,
        "workers": workers,
        "drivers": dict(Counter(record["driver"] for record in records)),
        "seed": args.seed,
        "out": args.out,
        "best": _report(args, records),
    }


def _simulate(args: argparse.Namespace, sweep: Sweep) -> int:
    """Grid, random settings or a search; returns the combinations proposed."""
    space, progress = sweep.space, sweep.progress
    if args.random is not None:
        cases = sweep.cases(islice(space.drawn(args.seed), 50 * args.random), args.random)
    elif args.search is None:
        cases = sweep.cases(space.grid())
    else:
        cases = {}
    fresh = sum(key not in sweep.store.known for key in cases)
    progress.total = fresh + (args.search or 0)
    for key in cases:
        if key in sweep.store.known:
            progress.see(sweep.store.known[key])
    if cases:
        print(f"{len(cases):,} settings, {len(cases) - fresh:,} of them known", file=sys.stderr)
    sweep.run(cases)
    proposed = len(cases)
    if args.search is not None:
        known = list(sweep.store.known.values())
        proposed += search(space, args.search, sweep.workers, args.seed, known, sweep.simulate)
    if progress.simulated:
        progress.say()
    return proposed


def _report(args: argparse.Namespace, records: list[Record]) -> list[Record]:
    """Print fronts and choices, write the choice; one document for each trace, machine and model."""
    wanted = choices.wish(args.best)
    found: list[Record] = []
    named: list[dict[str, str | None]] = []
    comparable = choices.groups(records)
    for number, alike in enumerate(comparable.values()):
        chosen = choices.choose(alike, wanted, args.seed)
        lines = choices.report(chosen, wanted)
        if number < REPORTED:
            print("\n".join(["", *lines]))
        found.append(choices.document(chosen, wanted))
        axes = chosen.records[chosen.chosen].get("axes", {})
        named.append({kind: axes.get(kind, vars(args)[kind]) for kind in ("machine", "model")})
    if len(comparable) > REPORTED:
        print(f"\n{len(comparable) - REPORTED} more machines, models or traces: their choices stand in the last line")
    if args.choice_out and found:
        choices.write(args.choice_out, found[0] | choices.files(named[0]))
        print(f"wrote {args.choice_out}")
    return found


def main() -> int:
    """Command line entry; 2 on bad input, 130 if interrupted."""
    args = parser().parse_args()
    try:
        document = run(args)
    except (SpecError, TraceError, OSError) as error:
        print(f"sim.sweep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sim.sweep: interrupted; what was simulated is kept, run the same again to go on", file=sys.stderr)
        return 130
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
