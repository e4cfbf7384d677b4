"""Every expert is computed on exactly its own bytes, under random delays in copier and compute, slots barely enough.

    python tests/stress.py 100000 --out notebooks/stress.json

No model: routing is random, an expert's buffer holds a pattern that is its own, and "computing" compares the slot's
bytes with it before and after a random pause. Meanwhile the copier's process is stopped and continued at random.
Every policy that runs on the engine takes part, with every fate of stale prefetches, zero to two landing slots, one to
three chunks submitted, whole and cut copies, one token and several, misses loaded and computed on the host. A load that
does not come ends the run with a list of who waits for what (`runtime.plan_runner.PATIENCE_S`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from runtime import executor as executing
from runtime.devices import open_device
from runtime.lookahead import Gates as AnyGates
from runtime.quantize import ExpertLayout
from runtime.store import ExpertRows
from sim import registry
from sim.machine import HardwareProfile, LinkProfile
from sim.presets import PRESETS
from sim.spec import SpecError, options
from traces import DECODE, PREFILL, ModelSpec

SPEC = ModelSpec("stress", 4, 8, 2, 64, 64)
MACHINE = HardwareProfile(
    "stress", 1, 1, LinkProfile(0.5, 0.0, 0.5, 0.0, 0.5), memory_gb_s=8, tflops=0.05, layer_fixed_s=1e-4, host_s=1e-5,
    host_memory_gb_s=1.0,
)  # fmt: skip


class Store(ExpertRows):
    """Rows of random bytes, each another."""

    def __init__(self) -> None:
        self.layout = ExpertLayout.of(SPEC, 2)
        super().__init__(SPEC.num_layers * SPEC.num_experts, self.layout.expert_bytes)
        self.layouts = [self.layout] * SPEC.num_layers
        rng = np.random.default_rng(0)
        for i in range(self.count):
            self.row(i).copy_(torch.from_numpy(rng.integers(0, 256, self.expert_bytes, np.uint8)))


class Block(torch.nn.Module):
    """What the executor wants to find in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(SPEC.hidden_size, SPEC.num_experts, bias=False)
        self.experts = torch.nn.Module()


class Gates(AnyGates):
    """Guesses of the routing that was drawn: right seven times in ten."""

    lookahead = 3

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self.coming = np.zeros((1, SPEC.num_layers, SPEC.top_k), np.int64)

    def scores(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor | None = None) -> np.ndarray:
        reach = max(0, min(self.lookahead, SPEC.num_layers - 1 - layer))
        shape = (len(hidden), reach, SPEC.num_experts)
        table = self._rng.random(shape) * 0.4
        for d in range(reach):
            right = self._rng.random((len(hidden), SPEC.top_k)) < 0.7
            old = np.take_along_axis(table[:, d], self.coming[:, layer + d + 1], 1)
            np.put_along_axis(table[:, d], self.coming[:, layer + d + 1], old + 0.6 * right, 1)
        return table.astype(np.float16)


class Checking:
    """Stands for the experts in their slots: compares bytes."""

    def __init__(self, pool: ExpertRows, store: Store, draw: random.Random, pause_s: float) -> None:
        self._slots = [pool.row(i).numpy() for i in range(pool.count)]
        self._store = [store.row(i).numpy() for i in range(store.count)]
        self._draw = draw
        self._pause_s = pause_s
        self.computed = 0

    def close(self) -> None:
        self._slots.clear()

    def compute(self, layer: int, expert: int, slot: int, *tokens: object) -> int:
        mine = self._store[layer * SPEC.num_experts + expert]
        for moment in ("before", "after"):
            if not np.array_equal(self._slots[slot], mine):
                raise AssertionError(f"layer {layer}, expert {expert}, slot {slot}: foreign bytes {moment} computing")
            if self._draw.random() < 0.2:
                time.sleep(self._draw.random() * self._pause_s)
        self.computed += 1
        id_rows, out = tokens[-2:]
        for row, ids in enumerate(id_rows):
            if expert in ids:
                out[row, ids.index(expert)] = expert + 1
        return 1


class Hosting:
    """Stands for the experts on the host: says of every token which expert computed it, after a random pause."""

    def __init__(self, draw: random.Random, pause_s: float) -> None:
        self._draw = draw
        self._pause_s = pause_s

    def compute(self, layer: int, expert: int, x: torch.Tensor) -> torch.Tensor:
        if self._draw.random() < 0.3:
            time.sleep(self._draw.random() * self._pause_s)
        return x + expert + 1

    def close(self) -> None:
        """Nothing to let go of."""


class Stops:
    """Stops and continues a process at random until closed."""

    def __init__(self, pid: int, seed: int, longest_s: float) -> None:
        self._pid, self._draw, self._longest_s = pid, random.Random(seed), longest_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(self._draw.random() * 4 * self._longest_s):
            os.kill(self._pid, signal.SIGSTOP)
            time.sleep(self._draw.random() * self._longest_s)
            os.kill(self._pid, signal.SIGCONT)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


def runs_here(policy: str) -> bool:
    try:
        executing.check_options(options(policy))
    except SpecError:
        return False
    return True


POLICIES = [name for name in (*registry.plugins("policy"), *PRESETS) if runs_here(name)]


def cases(draw: random.Random) -> Iterator[str]:
    """Policies with run options, for ever; each round has every policy once."""
    while True:
        for name in POLICIES:
            run = options(name)
            changes = {"max_submitted": draw.randint(1, 3), "stream_slots": draw.randint(1, 2)}
            if not run.whole_layer:
                changes |= {"miss": draw.choice(["load", "cpu", "split"])}
            if run.copy_stream:
                changes |= {"chunk_bytes": draw.choice([0, 1000, -3])}
            if run.prefetches:
                changes |= {"landing_slots": draw.randint(0, 2), "stale": draw.choice(["retract", "keep"])}
            keys = ",".join(f"{k}={v}" for k, v in changes.items() if f"{k}=" not in name)
            yield f"{name}:{keys}" if ":" not in name else f"{name},{keys}"


def run(policy: str, seed: int, passes: int, pause_s: float, store: Store) -> tuple[int, int]:
    """One run; returns (loads, experts computed).

    Raises:
        AssertionError: an expert on foreign bytes. CopierError: a load that does not come.
    """
    rng, draw = np.random.default_rng(seed), random.Random(seed)
    model = torch.nn.ModuleList(Block() for _ in range(SPEC.num_layers))
    gates = Gates(rng)
    chosen = options(policy)

    hosting = Hosting(random.Random(seed + 1), pause_s)

    def check(pool: ExpertRows) -> Checking:
        return Checking(pool, store, draw, pause_s)

    with executing.Executor(
        model, SPEC, store, open_device("cpu"), bits=2, slots=SPEC.top_k, options=chosen, machine=MACHINE,
        gates=gates if chosen.lookahead else None, experts=check, host_experts=hosting,
    ) as executor:  # fmt: skip
        checking = executor.experts
        stops = Stops(executor.copier.pid, seed, pause_s)
        try:
            context = 0
            for number in range(passes):
                if number % 40 == 0:
                    phase, tokens, context = PREFILL, draw.choice([1, 5, 12]), 0
                else:
                    phase, tokens = DECODE, draw.choice([1, 1, 1, 3])
                order = rng.random((tokens, SPEC.num_layers, SPEC.num_experts)).argsort(-1)
                gates.coming = order[..., : SPEC.top_k]
                executor.begin_pass(phase, tokens, context)
                for layer in range(SPEC.num_layers):
                    ids = torch.from_numpy(np.ascontiguousarray(gates.coming[:, layer]))
                    out = executor.visit(layer, torch.zeros(tokens, SPEC.hidden_size), ids, torch.ones(ids.shape))
                    if not torch.equal(out[:, 0], (ids + 1).sum(1).to(out.dtype)):
                        raise AssertionError(f"layer {layer}: an expert's outputs stand with another expert's tokens")
                executor.end_pass()
                context += tokens
        finally:
            stops.close()
        phases = executor.settle().phases
        return sum(p.demand_loads + p.prefetch_loads for p in phases), checking.computed


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("loads", type=int, help="how many, at least")
    p.add_argument("--passes", type=int, default=60, help="of a run (default %(default)s)")
    p.add_argument("--pause-us", type=float, default=300.0, help="longest pause (default %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path)
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    start = time.monotonic()
    loads = computed = runs = 0
    policies: set[str] = set()
    with Store() as store:
        for number, policy in enumerate(cases(random.Random(args.seed))):
            if loads >= args.loads:
                break
            found = run(policy, args.seed + number, args.passes, args.pause_us / 1e6, store)
            loads, computed, runs = loads + found[0], computed + found[1], runs + 1
            policies.add(options(policy).policy.name)
            if number % 20 == 0:
                print(f"{loads:,} loads, {runs} runs, {time.monotonic() - start:.0f} s", file=sys.stderr)
    document = {
        "evidence": "MEASURED", "command": f"python tests/stress.py {args.loads}", "loads": loads, "runs": runs,
        "experts_computed": computed, "foreign_bytes": 0, "deadlocks": 0, "policies": sorted(policies),
        "seconds": round(time.monotonic() - start, 1), "longest_pause_us": args.pause_us,
    }  # fmt: skip
    print(json.dumps(document))
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
