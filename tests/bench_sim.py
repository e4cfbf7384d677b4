"""Speed of the drivers: `python tests/bench_sim.py [--out FILE]`. Layer-steps (visits) per second, one core, warm.

Compiled: median and fastest of 25 runs; SimPy: median of 3. Whole runs, what is made anew for each setting included.

32 layers x 8 experts, top-2, and 48 x 128, top-8 (synthetic routing), 4 and 64 slots, rtx3090, 4 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from sim.experiment import Setting, compiled_replay, fit, replay
from sim.machine import load_machine, load_model
from sim.spec import options
from traces.presets import PRESETS
from traces.synthesize import synthesize

CASES = (
    (
        "mixtral-8x7b",
        2000,
        4,
        ("on_demand", "next_layer", "confidence:lookahead=4", "walk_forward:lookahead=4", "speculative:lookahead=4"),
    ),
    ("qwen3-30b-a3b", 300, 64, ("on_demand", "confidence:lookahead=4")),
)


def rate(run: object, visits: int, repeats: int = 25) -> tuple[float, float, float]:
    """(median visits/s, visits/s of the fastest run, seconds of the first call)."""
    start = time.perf_counter()
    run()  # type: ignore[operator]
    first = time.perf_counter() - start
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()  # type: ignore[operator]
        taken.append(time.perf_counter() - start)
    return visits / median(taken), visits / min(taken), first


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the drivers.")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    load = os.getloadavg()
    found = []
    start = time.perf_counter()
    total = 0
    for i in range(5_000_000):
        total += i & 3
    loop_s = time.perf_counter() - start
    for name, tokens, slots, policies in CASES:
        preset = PRESETS[name]
        trace = synthesize(preset.model, preset.statistics, tokens, 0)
        model = fit(load_model(name), trace)
        visits = len(trace.passes()) * model.num_layers
        short = trace.head(200)
        for policy in policies:
            setting = Setting(trace, load_machine("rtx3090"), model, 4, slots, options(policy))
            brief = Setting(short, setting.machine, model, 4, slots, setting.options)
            compiled, fastest, first = rate(lambda s=setting: compiled_replay(s, logged=False), visits)
            simpy, _, _ = rate(lambda s=brief: replay(s), len(short.passes()) * model.num_layers, 3)
            row = {"model": name, "policy": policy, "compiled": compiled, "compiled_fastest": fastest, "simpy": simpy}
            row["first_s"] = first
            found.append(row)
            fast, slow = f"{compiled / 1e6:6.2f} M/s", f"{simpy / 1e3:6.1f} k/s"
            ran = f"compiled {fast} (at best {fastest / 1e6:.2f})   SimPy {slow}   first call {first:.1f} s"
            print(f"{name:16} {policy:28} {ran}")
    document = {
        "command": "python tests/bench_sim.py",
        "unit": "layer-steps per second on one core, warm; MEASURED",
        "conditions": f"{platform.machine()}, {os.cpu_count()} cores, load average before {load[0]:.2f}, Python "
        f"{platform.python_version()}, numba {version('numba')}",
        "python_loop_of_5_million_s": loop_s,
        "rows": found,
    }
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
