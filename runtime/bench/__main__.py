"""Measure: a device with everything of ours on it, or what bit widths cost in quality, deciding costs the host, and
how well the paced link keeps its pace.

    python -m runtime.bench --device cuda [--part NAME ...] [--out FILE]
    python -m runtime.bench --smoke
    python -m runtime.bench --expect h200
    python -m runtime.bench --quality [--bits 16 --bits 4 ...] [--group-size 64 ...] [--fast] [--corpus FILE ...]
    python -m runtime.bench --host [--policy SPEC ...]
    python -m runtime.bench --link

Tables for people, MEASURED on this machine, then one JSON document as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from runtime import models, provenance
from runtime.bench import tables
from runtime.calibration.idle import OtherWork
from runtime.copier import CopierError
from runtime.host_time import POLICIES
from runtime.quality import WIDTHS, quality
from traces.cli import Parser
from traces.vocabulary import GROUP_SIZE

PARTS = ("link", "kernels", "forced", "calibrate", "validate", "record")
BUDGET_S = 480


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m runtime.bench", description=__doc__.partition("\n\n")[0])
    p.add_argument("--device", choices=("cpu", "cuda"), help="measure everything on this device, in at most 8 minutes")
    p.add_argument("--part", action="append", choices=PARTS, help="of that only this one; repeatable")
    p.add_argument("--smoke", action="store_true", help="all parts at toy size on device=cpu")
    p.add_argument("--budget-s", type=float, default=BUDGET_S, metavar="X", help="time for all (default %(default)s)")
    p.add_argument("--trace", type=Path, metavar="FILE", help="routing to force on shapes it fits (default: synthetic)")
    p.add_argument("--keep-failed", action="store_true", help="going on with --out: failed cells are not tried again")
    p.add_argument("--expect", metavar="NAME|FILE", help="what the simulator expects of a profile for the targets")
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
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
    p.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the JSON document here too; with --device and --smoke all results, as they come, and the next call "
        "goes on with what is there (default then: bench-DEVICE.json)",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; 1 when a part failed, 2 on bad input."""
    args = parser().parse_args(argv)
    if args.smoke and args.device == "cuda":
        print("runtime.bench: --smoke runs on device=cpu; leave one of the two out", file=sys.stderr)
        return 2
    programme = args.device or args.smoke or args.part
    if not (programme or args.expect or args.quality or args.host or args.link):
        print(
            "runtime.bench: say what to measure: --device, --smoke, --expect, --quality, --host or --link",
            file=sys.stderr,
        )
        return 2
    if args.smoke or args.device != "cuda":
        torch.set_num_threads(1)
        if "triton" not in sys.modules:  # there is no GPU to compile the kernels for
            os.environ.setdefault("TRITON_INTERPRET", "1")
    transformers_logging.disable_progress_bar()
    try:
        provenance.check_folder("--out", args.out)
        if not 1 <= args.budget_s < 1e5:
            raise ValueError(f"--budget-s is {args.budget_s}; it must be 1 to 100000 seconds")
        if programme:
            from runtime.bench import programme as whole

            args.device = args.device or "cpu"
            if args.device == "cpu" and not args.smoke:
                raise ValueError("--device cpu measures toy sizes only; add --smoke, or name cuda")
            return whole.run(args)
        document = expected(args) if args.expect else measured(args)
    except (ValueError, OSError, CopierError) as error:
        print(f"runtime.bench: {error}", file=sys.stderr)
        return 2
    if args.out:
        partial = args.out.with_name(args.out.name + ".partial")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(args.out)
    print(json.dumps(document))
    return 0


def expected(args: argparse.Namespace) -> dict[str, Any]:
    """What the simulator expects of a profile."""
    from runtime.bench.expected import expect

    return expect(args.expect, args.trace) | {"command": provenance.command(), "commit": provenance.commit()}


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Quality, host time and link pace, as asked."""
    others = OtherWork()
    document: dict[str, Any] = {}
    if args.quality:
        document |= quality(args)
    if args.host:
        document |= tables.host(args.policy or POLICIES)
    if args.link:
        document |= tables.link()
    return document | {
        "command": provenance.command(),
        "machine": provenance.machine(),
        "others_share": others.share(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
