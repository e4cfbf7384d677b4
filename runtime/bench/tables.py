"""What deciding costs the host, and how well the paced link keeps its pace: tables, MEASURED on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from runtime.calibration.link import paced_link
from runtime.host_time import SHAPE, host_times
from runtime.store import ExpertRows

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
