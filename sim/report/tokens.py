"""The timeline of a few tokens as inline SVG; the page's script zooms it by moving what carries times."""

from __future__ import annotations

from sim.report.charts import mark
from sim.report.events import HIT, LATE, MISS, Process
from sim.report.markup import Markup, join, tag
from sim.timeline import COMPUTE, D2H, H2D, HOST

WIDTH, LEFT = 1000, 0
LANE, GAP, HEAD = 30, 8, 22
OUTCOMES = {HIT: 0, LATE: 2, MISS: 1}  # shapes: circle, triangle, square
LANES = {"routed": "what each routed expert was", COMPUTE: COMPUTE, H2D: "link to the device", D2H: "link to the host",
         HOST: "host computing experts"}  # fmt: skip
SAID = {
    HIT: "hit: its bytes were there when it was routed",
    LATE: "late: its load was issued earlier and not finished",
    MISS: "miss: no load had been issued",
    "demand": "demand load",
    "prefetch": "prefetch that was used",
    "unclaimed": "prefetch that was not used",
    "write_back": "copied back to the host",
    "stall": "compute waits",
    "attention": "attention, norms, router and lookahead gates",
    "plan": "the host plans",
    "shared": "shared experts",
    "head": "head and sampling",
}
KEYS = ("attention", HIT, LATE, MISS, "stall", "demand", "prefetch", "unclaimed")


def timeline(process: Process, number: int) -> Markup:
    """One process: lanes, arrows, controls and the line that describes what is selected."""
    end = process.ends_ns[-1]
    shown = process.ends_ns[0]
    present = {s.track for s in process.slices} | {"routed"}
    lanes = [lane for lane in LANES if lane in present]
    top = {lane: HEAD + i * (LANE + GAP + 14) + 14 for i, lane in enumerate(lanes)}
    height = HEAD + len(lanes) * (LANE + GAP + 14) + 6
    scale = WIDTH / shown

    rects, marks, arrows = [], [], []
    for one in process.slices:
        text = f"{one.name}: {SAID.get(one.kind, one.kind)}"
        x, width = one.start_ns * scale, max(0.4, (one.end_ns - one.start_ns) * scale)
        rects.append(
            tag("rect", tag("title", text), x=round(x, 2), width=round(width, 2), y=top[one.track], height=LANE,
                class_=f"s {one.kind}", data_s=one.start_ns / 1000, data_e=one.end_ns / 1000, data_t=text)
        )  # fmt: skip
        if one.kind in OUTCOMES:
            shape = mark(OUTCOMES[one.kind], 0, 0, f"o {one.kind}", 4)
            place = f"translate({x:.2f} {top['routed'] + LANE / 2:g})"
            title = tag("title", text)
            marks.append(tag("g", title, shape, transform=place, class_="m", data_s=one.start_ns / 1000))
    y0, y1 = top.get(H2D, 0), top[COMPUTE] + LANE
    for arrow in process.arrows:
        a, b = arrow.start_ns * scale, arrow.end_ns * scale
        path = f"M{a:.2f} {y0}C{a:.2f} {y0 - 16},{b:.2f} {y1 + 16},{b:.2f} {y1}"
        begin, end_at = arrow.start_ns / 1000, arrow.end_ns / 1000
        arrows.append(tag("path", d=path, class_="a", data_s=begin, data_e=end_at, data_y=f"{y0} {y1}"))
    names = [tag("text", LANES[lane], x=2, y=top[lane] - 3, class_="lane") for lane in lanes]
    ends = [
        tag("g", tag("line", x1=0, x2=0, y1=HEAD - 8, y2=height), transform=f"translate({e * scale:.2f} 0)",
            class_="end m", data_s=e / 1000)
        for e in process.ends_ns
    ]  # fmt: skip
    svg = tag(
        "svg", tag("g", class_="time"), *ends, *rects, *arrows, *marks, *names, viewBox=f"0 0 {WIDTH} {height}",
        class_="tokens", tabindex=0, role="application", aria_label=f"timeline: {process.name}",
        aria_describedby=f"tl{number}-help", data_end=end / 1000, data_shown=shown / 1000,
        data_tokens=" ".join(f"{e / 1000:.3f}" for e in process.ends_ns), preserveAspectRatio="none", height=height,
    )  # fmt: skip
    buttons = [
        tag("button", text, type="button", data_do=do, aria_label=label)
        for text, do, label in (
            ("+", "in", "zoom in"), ("\u2212", "out", "zoom out"), ("\u2190", "left", "earlier"),
            ("\u2192", "right", "later"), ("all", "all", "all tokens shown"),
        )
    ]  # fmt: skip
    buttons += [
        tag("button", f"token {n + 1}", type="button", data_do=f"token{n}") for n in range(len(process.ends_ns))
    ]
    about = (
        "Drag to move, Ctrl and wheel to zoom. With the keyboard: + and - zoom, arrows move, 0 shows all, "
        "n and p step from slice to slice and say what each is."
    )
    keys = [tag("li", tag("span", class_=f"swatch {k}"), SAID[k].partition(":")[0]) for k in KEYS]
    keys += [tag("li", tag("span", class_="swatch arrow-key"), "from a prefetch to its use")]
    return tag(
        "div", tag("h4", process.name), tag("div", *buttons, class_="controls"), tag("ul", *keys, class_="legend"),
        svg, tag("p", "Nothing selected.", class_="said", role="status"),
        tag("p", about, class_="hint", id=f"tl{number}-help"),
        class_="timeline",
    )  # fmt: skip


def counted(process: Process) -> str:
    """How the experts of the tokens shown came, in a sentence."""
    number = {kind: sum(s.kind == kind for s in process.slices if s.start_ns >= 0) for kind in OUTCOMES}
    tokens = len(process.ends_ns)
    return (
        f"{tokens} token{'s' * (tokens != 1)} in {process.ends_ns[-1] / 1e6:.2f} ms; hits {number[HIT]}, late "
        f"{number[LATE]}, misses {number[MISS]}, prefetches used {len(process.arrows)}."
    )


def all_of(processes: list[Process]) -> Markup:
    """Several, one below the other."""
    return join(*(timeline(one, number) for number, one in enumerate(processes)))
