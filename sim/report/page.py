"""The whole page: what is said of every group of results, its style, its one script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sim import choice as choices
from sim.choice import Wish
from sim.report import grid, sweep, tokens, validation
from sim.report.events import Process
from sim.report.markup import Markup, badge, figure, join, tag
from sim.spec import SpecError

HERE = Path(__file__).parent
MOST_BYTES = 3_000_000
MOST_ROWS = 1500
MOST_GROUPS = 6
LABELS = (
    "MEASURED: on the engine. SIMULATED: by the simulator on a measured profile. ESTIMATED: by the simulator on "
    "published values, or carried over to layers that were not simulated. Routing is RECORDED from a model, FORCED or "
    "SYNTHETIC."
)

Record = dict[str, Any]


class Timelines(NamedTuple):
    """Processes to show, what their times are, and a sentence on where they come from; or why there are none."""

    processes: Sequence[Process]
    evidence: str
    source: str


class Section(NamedTuple):
    """A part of the page with a heading and a place in its table of contents."""

    name: str
    heading: str
    body: Markup


def sweep_sections(records: list[Record], wanted: Wish, timelines: Timelines) -> list[Section]:
    """One section for every trace, machine and model, then the timeline.

    Raises:
        SpecError: no setting has a time per token.
    """
    groups = list(choices.groups(records).values())
    if not groups:
        raise SpecError("no setting has a time per token; the trace must have decode tokens that follow others")
    found = []
    for number, alike in enumerate(groups[:MOST_GROUPS]):
        found.append(_group(f"s{number}", *limited(alike, wanted), wanted))
    left = len(groups) - MOST_GROUPS
    if left > 0:
        text = f"{left} more traces, machines or models are in the file; split it to see them."
        found.append(Section("left", "Not shown", tag("p", text)))
    return [*found, timeline_section(timelines)]


def limited(records: list[Record], wanted: Wish) -> tuple[list[Record], int]:
    """Records a page can hold, fastest first, and how many are left out: front, choice and the fastest stay."""
    records = sorted(records, key=lambda r: (-choices.speed(r), choices.vram(r), r["key"]))
    if len(records) <= MOST_ROWS:
        return records, 0
    chosen = choices.choose(records, wanted)
    kept = {*chosen.front, chosen.chosen, chosen.fastest}
    others = (i for i in range(len(records)) if i not in kept)
    kept |= set(islice(others, max(0, MOST_ROWS - len(kept))))
    return [records[i] for i in sorted(kept)], len(records) - len(kept)


def _group(name: str, records: list[Record], left_out: int, wanted: Wish) -> Section:
    found = choices.choose(records, wanted)
    chosen = found.records[found.chosen]
    marked = dict.fromkeys(found.front, "front")
    rest = f" {left_out:,} slower settings are left out." if left_out else ""
    text = f"{len(records):,} settings.{rest} "
    body = join(
        sweep.words(found, wanted),
        sweep.fits(found),
        sweep.front(found, name),
        sweep.stalls(found, name),
        sweep.bounds(chosen),
        tag("h3", "All settings ", badge(sweep.evidence(records))),
        tag("p", text, "The recommendation is outlined, the Pareto front bold."),
        grid.table(name, sweep.columns(records), records, marked, found.chosen),
        tag("h3", "Provenance"),
        sweep.provenance(records),
    )
    return Section(name, f"{chosen['model']} on {chosen['machine']}", body)


def validation_sections(document: Record, timelines: Timelines) -> list[Section]:
    """A validation's one section, then the timeline."""
    cells = document["cells"]
    body = join(
        validation.words(document, cells),
        validation.agreement(cells, "v"),
        validation.front(cells, "v"),
        validation.stalls(cells, "v"),
        tag("h3", "All cells ", badge(validation.both(cells))),
        grid.table("v", validation.columns(cells), cells, {}, None),
        tag("h3", "Provenance"),
        validation.provenance(document, cells),
    )
    name = f"{cells[0]['measured']['model']} on {cells[0]['measured']['machine']}: simulated against measured"
    return [Section("v", name, body), timeline_section(timelines)]


def timeline_section(timelines: Timelines) -> Section:
    """A few tokens, or why they are not here."""
    heading = "A few tokens, in time"
    if not timelines.processes:
        return Section("timeline", heading, tag("p", timelines.source))
    said = " ".join(f"{p.name}: {tokens.counted(p)}" for p in timelines.processes)
    drawn = tokens.all_of(list(timelines.processes))
    body = figure("Compute and link", timelines.evidence, drawn, f"{said} {timelines.source}", "timeline-figure")
    return Section("timeline", heading, body)


def page(title: str, lead: str, sections: Sequence[Section]) -> bytes:
    """The document; the same sections give the same bytes.

    Raises:
        SpecError: it would be larger than a page should be.
    """
    style = (HERE / "page.css").read_text()
    script = (HERE / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    links = (tag("li", tag("a", s.heading, href=f"#{s.name}")) for s in sections)
    parts = (tag("section", tag("h2", s.heading, id=s.name), s.body) for s in sections)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    body = tag(
        "body",
        tag("header", tag("h1", title), tag("p", lead), tag("nav", tag("ul", *links), aria_label="sections")),
        tag("main", *parts),
        tag("footer", tag("p", LABELS)),
        tag("script", Markup(script)),
    )
    content = f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n".encode()
    if len(content) >= MOST_BYTES:
        raise SpecError(
            f"the page would have {len(content) / 1e6:.1f} MB, and {MOST_BYTES / 1e6:g} MB is the limit; give a file "
            "with fewer machines, or fewer --tokens"
        )
    return content
