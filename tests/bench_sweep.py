"""How fast sweeps are: settings/s on one thread and on all, what Python adds to a driver, and a finished sweep again.

python tests/bench_sweep.py [SETTINGS] [POLICY]

Mixtral-shaped routing of 2,000 tokens, on_demand and 10,000 settings unless named otherwise. Other work on the machine
takes from the parallel efficiency; one thread is measured before and after all of them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sim import compiled, trial
from sim.axes import axis
from sim.settings import Space
from sim.spec import Options


def main() -> None:
    """Print each figure, then all of them as one JSON line."""
    settings = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    policy = sys.argv[2] if len(sys.argv) > 2 else "on_demand"
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "mixtral.safetensors"
        command = ["traces.synthesize", "--preset", "mixtral-8x7b", "--tokens", "2000", "--out", str(trace)]
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
        overhead = python_ms(trace, policy)
        cores = len(os.sched_getaffinity(0))
        before = sweep(Path(folder), trace, policy, settings // 4, 1)
        both = sweep(Path(folder), trace, policy, settings, cores)
        again = sweep(Path(folder), trace, policy, settings, cores, fresh=False)
        after = sweep(Path(folder), trace, policy, settings // 4, 1)
    one = statistics.mean((before["settings_per_s"], after["settings_per_s"]))
    figures = {
        "policy": policy,
        "settings": both["settings"],
        "seconds": both["seconds"],
        "settings_per_s": both["settings_per_s"],
        "one_thread_per_s": [before["settings_per_s"], after["settings_per_s"]],
        "cores": cores,
        "parallel_efficiency": both["settings_per_s"] / one / cores,
        "again_s": again["wall_s"],
        **overhead,
    }
    for name, value in figures.items():
        print(f"{name:24} {value}")
    print(json.dumps(figures))


def sweep(folder: Path, trace: Path, policy: str, settings: int, jobs: int, fresh: bool = True) -> dict[str, Any]:
    """One sweep in a process of its own: slots x bits x bandwidths."""
    out = folder / f"{jobs}.jsonl"
    if fresh:
        out.unlink(missing_ok=True)
    bandwidths = ",".join(f"{5 + k * 0.1:.1f}" for k in range(settings // 20))
    flags = [
        "--trace",
        str(trace),
        "--model",
        "mixtral-8x7b",
        "--policy",
        policy,
        "--jobs",
        str(jobs),
        "--out",
        str(out),
    ]
    axes = ["--grid", "slots=2..6", "--grid", "bits=8,4,3,2", "--grid", f"machine.link.h2d_gb_s={bandwidths}"]
    begin = time.perf_counter()
    run = subprocess.run([sys.executable, "-m", "sim.sweep", *flags, *axes], check=True, capture_output=True, text=True)
    document: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return document | {"wall_s": time.perf_counter() - begin}


def python_ms(trace: Path, policy: str) -> dict[str, float]:
    """Milliseconds of one setting inside the compiled driver and around it."""
    base = {"trace": str(trace), "model": "mixtral-8x7b", "machine": "rtx3090", "policy": policy}
    space = Space(base, (axis("slots=2..6"), axis("bits=8,4,3,2"), axis("machine.link.h2d_gb_s=10,20,30")))
    cases = [space.case(chosen) for chosen in space.grid()]
    guarded, inside = compiled.guarded, [0.0]

    def timing(function: Callable[..., Any], options: Options) -> Callable[..., Any]:
        entry = guarded(function, options)

        def timed(*given: Any) -> Any:
            begin = time.perf_counter()
            found = entry(*given)
            inside[0] += time.perf_counter() - begin
            return found

        return timed

    compiled.guarded = timing
    try:
        trial.records(cases)
        inside[0] = 0.0
        begin = time.perf_counter()
        found, _, _ = trial.records(cases)
        for record in found:
            json.dumps(record)
        around = time.perf_counter() - begin - inside[0]
    finally:
        compiled.guarded = guarded
    return {"driver_ms": 1e3 * inside[0] / len(cases), "python_ms": 1e3 * around / len(cases)}


if __name__ == "__main__":
    main()
