"""Measure: what a bit width costs in quality, what deciding costs the host, how well the paced link keeps its pace.

    python -m runtime.bench --quality [--bits 16 --bits 4 ...] [--group-size 64 ...] [--fast] [--corpus FILE ...]
    python -m runtime.bench --host [--policy SPEC ...]
    python -m runtime.bench --link

Each part prints a table, MEASURED on this machine, and the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from runtime import models, provenance
from runtime.calibrate import OtherWork, paced_link
from runtime.copier import CopierError
from runtime.host_time import POLICIES, SHAPE, host_times
from runtime.quality import WIDTHS, quality
from runtime.store import ExpertRows
from traces.cli import Parser
from traces.vocabulary import GROUP_SIZE

PACES_GB_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
SMALL, LARGE = (
    82_944,
    16 << 20,
)  # bytes of an expert: the demonstration model's at 4 bits up to 0.5 GB/s, 16 MiB from there


def host(policies: Sequence[str]) -> dict[str, Any]:
    """Host time of a visit at Mixtral's shape, by policy."""
    found = host_times(policies)
    print(f"host time of a decode visit, {SHAPE}, {found['slots']} slots a layer, synthetic routing; MEASURED")
    print(f"{'policy':32} {'median us':>9} {'of it plan':>10} {'mean us':>8} {'p99 us':>8} {'whole visit':>11}")
    for row in found["host"]:
        print(
            f"{row['policy']:32} {row['median_us']:9.1f} {row['plan_median_us']:10.1f} {row['mean_us']:8.1f} "
            f"{row['p99_us']:8.1f} {row['visit_median_us']:11.1f}"
        )
    return found


def link() -> dict[str, Any]:
    """Error of the paced link's speed over bursts of at least a second, and how late a waiter knows of an arrival."""
    rows = []
    print("pace of the link (device=cpu), median of 3 bursts; MEASURED")
    print(f"{'stated GB/s':>11} {'expert bytes':>12} {'error %':>8} {'notice us':>9}")
    for gb_s in tqdm(PACES_GB_S, unit="pace", file=sys.stderr):
        size = SMALL if gb_s <= 0.2 else LARGE
        with ExpertRows(4, size) as store:
            rate, wait_s = paced_link(store, gb_s, seconds=1.0, most=100_000)
        rows.append({"gb_s": gb_s, "expert_bytes": size, "error": rate / gb_s - 1, "notice_s": wait_s})
        print(f"{gb_s:11g} {size:12,} {100 * rows[-1]['error']:8.3f} {wait_s * 1e6:9.1f}", flush=True)
    return {"evidence": "MEASURED", "link": rows}


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m runtime.bench", description=__doc__.splitlines()[0])
    p.add_argument("--quality", action="store_true", help="held-out perplexity at each width of the experts")
    p.add_argument("--host", action="store_true", help="host time of planning and bookkeeping, at every visit")
    p.add_argument("--link", action="store_true", help="the paced link's error, 0.02 to 2 GB/s")
    p.add_argument("--model", type=Path, default=models.DEMO, help="model directory (default: the shipped one)")
    p.add_argument("--policy", action="append", metavar="SPEC", help=f"repeatable (default: {', '.join(POLICIES)})")
    p.add_argument("--bits", type=int, action="append", choices=WIDTHS, help="repeatable (default: all)")
    p.add_argument(
        "--group-size",
        type=int,
        action="append",
        metavar="N",
        help=f"repeatable (default: {GROUP_SIZE}); misfits are left out",
    )
    p.add_argument("--fast", action="store_true", help="measure rounding to nearest too, beside HQQ's solver")
    p.add_argument("--corpus", type=Path, nargs="*", default=[], help="text files (default: Python's standard library)")
    p.add_argument("--max-tokens", type=int, default=8192, help="held-out tokens of each file (default %(default)s)")
    p.add_argument("--out", type=Path, metavar="FILE", help="write the JSON document here too")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; 2 on bad input."""
    args = parser().parse_args(argv)
    if not (args.quality or args.host or args.link):
        print("runtime.bench: say what to measure: --quality, --host or --link", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    others = OtherWork()
    document: dict[str, Any] = {}
    try:
        provenance.check_folder("--out", args.out)
        if args.quality:
            document |= quality(args)
        if args.host:
            document |= host(args.policy or POLICIES)
        if args.link:
            document |= link()
    except (ValueError, OSError, CopierError) as error:
        print(f"runtime.bench: {error}", file=sys.stderr)
        return 2
    document |= {"command": provenance.command(), "machine": provenance.machine(), "others_share": others.share()}
    if args.out:
        partial = args.out.with_name(args.out.name + ".partial")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(args.out)
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
