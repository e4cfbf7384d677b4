"""Results as one page that opens from disk.

python -m sim.report sweep.jsonl --out report.html
python -m sim.report validation.json --timeline timeline.json.gz --out report.html
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sim import choice as choices
from sim.report import again, events, page, sweep, validation
from sim.report.page import Section, Timelines
from sim.report.reading import Found, read
from sim.run import check_target
from sim.spec import SpecError
from traces.cli import Parser

TOKENS = 3
MOST_TOKENS = 12
MOST_PROCESSES = 2

Record = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    """Flags of ``sim.report``."""
    p = Parser(prog="python -m sim.report", description="Results as one page that opens from disk.")
    p.add_argument("results", metavar="RESULTS", help="file of sim.sweep --out or runtime.validate --out")
    p.add_argument("--out", required=True, metavar="FILE.html", help="the page to write")
    p.add_argument(
        "--timeline",
        metavar="FILE.json.gz",
        help="of sim.run or runtime.validate (default: the recommendation simulated anew, if its trace is here)",
    )
    p.add_argument(
        "--tokens",
        type=int,
        default=TOKENS,
        metavar="N",
        help="last tokens of the timeline to show (default %(default)s)",
    )
    p.add_argument(
        "--best", default="tpot", metavar="WISH", help="what to recommend, as for sim.sweep (default %(default)s)"
    )
    return p


def timelines(args: argparse.Namespace, found: Found, wanted: choices.Wish) -> Timelines:
    """The tokens to show: of a file, or simulated anew.

    Raises:
        SpecError: the file is no timeline.
    """
    if args.timeline:
        return named(args.timeline, args.tokens, found)
    try:
        if found.document is not None:
            cell = preferred(found.document["cells"])
            process = again.of_cell(found.document, cell, Path(args.results).parent)
            label, text = str(cell["simulated"]["evidence"]), "the cell's own trace, its loads as in the file"
        else:
            alike = next(iter(choices.groups(found.records).values()), [])
            chosen = choices.choose(alike, wanted)
            record = sweep.in_motion(chosen)
            process = again.of_record(record)
            label, text = str(record["evidence"]), f"the first {again.TOKENS} decode tokens of the shipped trace"
            if record is not chosen.records[chosen.chosen]:
                text += "; the recommendation loads nothing, so the fastest setting that does is shown"
    except again.NotHereError as error:
        reason = f"No timeline: {error}. Give one with --timeline; sim.run --timeline writes it."
        return Timelines([], "", reason)
    return Timelines([process.last(args.tokens)], label, f"The last tokens, simulated anew for this page over {text}.")


def preferred(cells: list[Record]) -> Record:
    """The cell whose tokens are shown: of those that prefetch, the one that ran fastest on the slowest link."""
    early = [c for c in cells if c["measured"].get("prefetch_loads")] or cells
    return next(iter(validation.by_link(early).values()))


def named(path: str, count: int, found: Found) -> Timelines:
    """The first processes of a timeline file; those of a validation are named after what they are."""
    processes = events.read(path)
    shown = processes[:MOST_PROCESSES]
    records = [c["simulated"] for c in found.document["cells"]] if found.document else found.records
    labels = {str(r["evidence"]) for r in records}
    kinds = {"MEASURED" if p.name.startswith("measured") else ", ".join(sorted(labels)) for p in shown}
    rest = f"; {len(processes) - len(shown)} more runs are in it" if len(processes) > len(shown) else ""
    text = f"The last tokens of {Path(path).name}{rest}. The file names no setting: it must be a run of these results."
    return Timelines([p.last(count) for p in shown], " and ".join(sorted(kinds)), text)


def sections(args: argparse.Namespace, found: Found) -> list[Section]:
    """Everything on the page.

    Raises:
        SpecError: what the results or the timeline lack.
    """
    wanted = choices.wish(args.best)
    shown = timelines(args, found, wanted)
    if found.document is not None:
        return page.validation_sections(found.document, shown)
    return page.sweep_sections(found.records, wanted, shown)


def run(args: argparse.Namespace) -> Record:
    """Read, write the page; the returned document is the last line of output."""
    check_target("--out", args.out)
    if not 1 <= args.tokens <= MOST_TOKENS:
        raise SpecError(f"--tokens is {args.tokens}; it must be 1 to {MOST_TOKENS}")
    found = read(args.results)
    kind = "sweep" if found.document is None else "validation"
    name = Path(args.results).name
    lead = f"From {name}, schema and figures as {'sim.sweep' if kind == 'sweep' else 'runtime.validate'} wrote them."
    parts = sections(args, found)
    content = page.page(f"Expert offloading: {kind} {name}", lead, parts)
    write(args.out, content)
    print(f"{args.out}: {len(content) / 1e3:.0f} kB, {', '.join(s.heading for s in parts)}")
    return {
        "out": args.out,
        "kind": kind,
        "bytes": len(content),
        "results": len(found.records) or len((found.document or {"cells": []})["cells"]),
        "sections": [s.heading for s in parts],
    }


def write(path: str, content: bytes) -> None:
    """A file that appears under its name only when it is complete."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def main() -> int:
    """Command line entry; 2 on bad input."""
    args = parser().parse_args()
    try:
        document = run(args)
    except (SpecError, OSError) as error:
        print(f"sim.report: {error}", file=sys.stderr)
        return 2
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
