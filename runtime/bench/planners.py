"""Compiling the planners of many policies at once, beside other work: each takes numba tens of seconds."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence

from sim.spec import SpecError, options

WAIT_S = 80.0  # from the start; what is not compiled by then is decided in plain Python
_CODE = "import sys; from runtime.bench.planners import compile_one; compile_one(sys.argv[1])"


def compile_one(policy: str) -> None:
    """Have the compiled planner of a policy in numba's cache on disk."""
    from sim.fast_planner import FastPlanner
    from sim.machine import load_machine, load_model
    from sim.timing import Timing
    from traces import DECODE, Visit

    run, model = options(policy), load_model("mixtral-8x7b")
    planner = FastPlanner(model, run, 4, Timing(load_machine("h200"), model, 4, run))
    planner.plan(Visit(0, 0, DECODE, 1, 0, [0, 1], [1, 1]))


class Ready:
    """Processes that compile, one a policy that prefetches; none where numba is missing or nothing is ``wanted``."""

    def __init__(self, policies: Sequence[str], wanted: bool) -> None:
        self._until = time.monotonic() + WAIT_S
        self._work: dict[str, subprocess.Popen[bytes]] = {}
        if not wanted or importlib.util.find_spec("numba") is None:
            return
        for policy in policies:
            if _prefetches(policy):
                command = [sys.executable, "-c", _CODE, policy]
                self._work[policy] = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )

    def is_compiled(self, policy: str) -> bool:
        """Whether it is in the cache, waited for as long as `WAIT_S` after the start allows."""
        work = self._work.get(policy)
        if work is None:
            return False
        try:
            return work.wait(max(0.0, self._until - time.monotonic())) == 0
        except subprocess.TimeoutExpired:
            return False

    def close(self) -> None:
        """End those that still run."""
        for work in self._work.values():
            if work.poll() is None:
                work.kill()
            work.wait()


def _prefetches(policy: str) -> bool:
    try:
        return options(policy).prefetches
    except SpecError:
        return False
