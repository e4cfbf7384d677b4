"""Compare the compiled with the SimPy driver: `python tests/driver_equality.py 10000 --out FILE`.

With `--specialised`: the drivers of long runs, which have the shape of a run as literals, on settings of one shape.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from conftest import random_setting  # noqa: E402 (after the path)
from test_compiled import SPECIALISED, all_of, specialised_setting  # noqa: E402

from sim import compiled  # noqa: E402
from sim.experiment import compiled_replay, replay  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the compiled with the SimPy driver on random settings.")
    parser.add_argument("settings", type=int)
    parser.add_argument("--out", required=True)
    parser.add_argument("--specialised", action="store_true")
    args = parser.parse_args()
    if args.specialised:
        compiled.SPECIALISED_FROM = 0
    rules: Counter[str] = Counter()
    loads = visits = 0
    different = []
    for seed in range(args.settings):
        policy, guard = SPECIALISED[seed % len(SPECIALISED)]
        setting = specialised_setting(policy, guard, seed) if args.specialised else random_setting(seed)
        run = setting.options
        rules[f"{run.policy.name} {run.cache.name} {run.miss}"] += 1
        slow = replay(setting)
        visits += len(setting.trace.passes()) * setting.model.num_layers
        loads += slow.log.lines
        if all_of(compiled_replay(setting)) != all_of(slow):
            different.append({"seed": seed, "policy": run.text})
        if seed % 500 == 499:
            print(f"{seed + 1} settings, {len(different)} differ", file=sys.stderr)
    document = {
        "command": f"python tests/driver_equality.py {args.settings}{' --specialised' if args.specialised else ''}",
        "compared": "counts, every pass in nanoseconds, sha256 of the load log",
        "settings": args.settings,
        "visits": visits,
        "load_log_lines": loads,
        "rules": dict(rules),
        "different": different,
    }
    Path(args.out).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
