"""What a sweep says: the recommendation in words, the Pareto front, where the time goes, and all settings."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from sim import choice as choices
from sim import noise
from sim.choice import Choice, Wish
from sim.plots._records import fastest, get, policy_name
from sim.plots.stalls import parts_ms
from sim.report import charts
from sim.report.charts import Bar, Point
from sim.report.grid import Column
from sim.report.markup import Child, Markup, badge, figure, join, pairs, plain_table, tag

Record = dict[str, Any]

SHAPES = 6  # policies with a mark of their own; the rest share one
BARS = 14
BUDGETS_GB = (6, 8, 10, 12, 16, 24, 32, 48, 80)
PART_NAMES = ("compute", "latency (host, synchronisation)", "stall after a miss", "stall for a late load")
BOUNDS = {
    "all_resident_s": "all experts resident: compute alone",
    "link_floor_s": "link floor: the fewest loads any schedule with these slots needs",
    "joint_floor_s": "joint floor: no schedule is faster",
    "demand_only_s": "reference: on demand, LRU, same slots",
    "perfect_lookahead_s": "reference: perfect guesses at the same distance, LRU",
    "perfect_lookahead_belady_s": "reference: the same with Belady eviction",
    "zero_overhead_s": "reference: no time for planning, waking and synchronising",
}


def evidence(records: list[Record]) -> str:
    """The label of figures that come from several records."""
    return ", ".join(sorted({choices.label(r) for r in records}))


def own(record: Record) -> str:
    """The label of figures at the trace's own depth."""
    return str(record["evidence"])


def depth(record: Record) -> str:
    """Which layers tokens/s and VRAM are of."""
    return f"all {record['scaled']['layers']} layers" if record.get("scaled") else "all layers"


def setting_text(record: Record) -> str:
    """Policy, width and slots in words."""
    return f"{record['policy']}, {record['bits']} bits, {record['slots']} slots a layer"


def columns(records: list[Record]) -> list[Column]:
    """Of the table; whole-model figures apart from those of the layers that were simulated."""
    whole = depth(records[0])
    layers = "the trace's layers" if records[0].get("scaled") else "all layers"

    def ms(path: str) -> Any:
        return lambda r: None if get(r, path) is None else get(r, path) * 1e3

    def share(key: str) -> Any:
        return lambda r: 100 * r[key] / r["accesses"] if r["accesses"] else None

    found = [
        Column("policy", "policy", lambda r: str(r["policy"]), "", "setting"),
        Column("bits", "bits", lambda r: r["bits"], "d", "setting"),
        Column("slots", "slots", lambda r: r["slots"], "d", "setting"),
        Column("tokens", "tokens/s", choices.speed, ".2f", whole),
        Column("vram", "VRAM GB", lambda r: choices.vram(r) / 1e9, ".2f", whole),
        Column("tpot", "TPOT ms", ms("tpot_s"), ".2f", f"a token, {layers}"),
        Column("floor", "joint floor ms", ms("bounds.joint_floor_s"), ".2f", f"a token, {layers}"),
        Column("miss_stall", "stall, miss ms", ms("stall_miss_s"), ".2f", f"a token, {layers}"),
        Column("late_stall", "stall, late ms", ms("stall_late_s"), ".2f", f"a token, {layers}"),
        Column("hit", "hit %", share("hits"), ".1f", "routed experts"),
        Column("late", "late %", share("late"), ".1f", "routed experts"),
        Column("miss", "miss %", share("misses"), ".1f", "routed experts"),
        Column("gb", "GB/token", lambda r: r["h2d_bytes"] / max(1, r["decode_tokens"]) / 1e9, ".3f", "link"),
        Column("busy", "busy %", lambda r: 100 * r["link_busy"], ".0f", "link"),
        Column("regime", "regime", lambda r: str(r["regime"]), "", "what it is"),
        Column("evidence", "evidence", choices.label, "", "what it is"),
        Column("routing", "routing", lambda r: str(r["routing"]), "", "what it is"),
    ]
    varied = sorted({key for r in records for key in r.get("axes") or {}} - {"policy", "bits", "slots"})
    return [*found, *(Column(key, key, axis(key), "", "varied") for key in varied)]


def axis(key: str) -> Callable[[Record], str]:
    """What a record has of something that the sweep varied."""
    return lambda r: str((r.get("axes") or {}).get(key, ""))


def words(found: Choice, wanted: Wish) -> Markup:
    """The recommendation, as sentences."""
    records, chosen = found.records, found.records[found.chosen]
    best, label = found.records[found.fastest], choices.label(chosen)
    whole = depth(chosen)
    if wanted.metric == "vram":
        why = f"It needs the least memory within {wanted.within * 100:g} % of the fastest."
    elif found.chosen == found.fastest:
        why = f"It is the fastest of {len(records):,} settings."
    else:
        apart = choices.interval_text(found.from_fastest[found.chosen])
        why = f"Its time per token shows {apart} from the fastest ({setting_text(best)}), and it needs less memory."
    lead = tag(
        "p", "Run ", tag("code", chosen["policy"]), f" with experts of {chosen['bits']} bits and {chosen['slots']} "
        f"cache slots a layer: ", tag("strong", f"{choices.speed(chosen):.2f} tokens/s"), " in ",
        tag("strong", f"{choices.vram(chosen) / 1e9:.2f} GB"), f" of VRAM ({whole}). ", badge(label), class_="lead",
    )  # fmt: skip
    floor = get(chosen, "bounds.joint_floor_s")
    where = "over the trace's layers" if chosen.get("scaled") else "over all layers"
    stall = chosen["stall_s"] / chosen["tpot_s"]
    time = (
        f"A token takes {chosen['tpot_s'] * 1e3:.2f} ms {where}, {stall * 100:.0f} % of it waiting for experts; "
        f"the regime is {chosen['regime']}."
    )
    if floor:
        time += (
            f" No schedule with these slots takes less than {floor * 1e3:.2f} ms (joint floor), so at most "
            f"{(chosen['tpot_s'] / floor - 1) * 100:.0f} % more speed is left to any schedule."
        )
    others = len(found.alike())
    same = f" Settings that cannot be told from the fastest on this trace: {others:,}." if others else ""
    if not chosen["h2d_bytes"]:
        same += " Every expert has a slot there: nothing is loaded, and the policy makes no difference."
    widths = choices.widths(records)
    return join(
        lead,
        tag("p", why, same, " ", badge(label)),
        tag("p", time, " ", badge(own(chosen))),
        compared(chosen, records),
        by_width(widths, label) if widths else None,
        tag("p", "To simulate it again: ", tag("code", command(chosen), class_="command")),
    )  # fmt: skip


def by_width(lines: list[str], label: str) -> Markup:
    """The lines of `choice.widths`, as a list under the first."""
    items = (tag("li", line.strip()) for line in lines[1:])
    return join(tag("p", lines[0].capitalize(), " ", badge(label)), tag("ul", *items))


def in_motion(found: Choice) -> Record:
    """The setting whose tokens are worth seeing: the recommendation, or the fastest that loads anything."""
    loading = [r for r in found.records if r["h2d_bytes"]]
    chosen = found.records[found.chosen]
    return chosen if chosen["h2d_bytes"] or not loading else fastest(loading)


def compared(chosen: Record, records: list[Record]) -> Markup:
    """Against the best setting of every other policy of the same width in no more memory."""
    rivals: dict[str, Record] = {}
    for record in records:
        mine = policy_name(record) == policy_name(chosen)
        if not mine and record["bits"] == chosen["bits"] and choices.vram(record) <= choices.vram(chosen) * 1.001:
            name = policy_name(record)
            if name not in rivals or choices.speed(record) > choices.speed(rivals[name]):
                rivals[name] = record
    if not rivals:
        return join()
    items = [
        tag("li", f"{(choices.speed(chosen) / choices.speed(r) - 1) * 100:+.1f} % tokens/s against ",
            tag("code", r["policy"]), f" ({choices.speed(r):.2f} tokens/s with {r['slots']} slots)")
        for r in sorted(rivals.values(), key=lambda r: (-choices.speed(r), r["policy"]))[:5]
    ]  # fmt: skip
    intro = f"At the same {chosen['bits']} bits, in no more memory: "
    return join(tag("p", intro, badge(evidence([chosen, *rivals.values()]))), tag("ul", *items))


def command(record: Record) -> str:
    """What simulates the setting again; a trace of one's own must be named."""
    parts = ["python", "-m", "sim.run", "--machine", record["machine"], "--model", record["model"]]
    parts += ["--bits", str(record["bits"]), "--slots", str(record["slots"]), "--policy", record["policy"]]
    for change in record.get("set") or []:
        parts += ["--set", change]
    return shlex.join(map(str, parts))


def fits(found: Choice) -> Markup:
    """What to run within common amounts of memory, from the front."""
    rows: list[list[Child]] = []
    last = -1
    for budget in BUDGETS_GB:
        inside = [i for i in found.front if choices.vram(found.records[i]) <= budget * 1e9]
        if inside and inside[-1] != last:
            last = inside[-1]
            r = found.records[last]
            speed, size = f"{choices.speed(r):.2f}", f"{choices.vram(r) / 1e9:.2f}"
            rows.append([f"{budget} GB", speed, size, r["bits"], r["slots"], tag("code", r["policy"])])
    if not rows:
        return join()
    head = ["device memory", "tokens/s", "VRAM GB", "bits", "slots", "policy"]
    title = tag("h3", "If this is the memory you have ", badge(evidence(found.records)))
    note = "The fastest setting tried that fits, of any width; what fewer bits cost in quality is not in these figures."
    return join(title, plain_table(head, rows), tag("p", note, class_="hint"))


def front(found: Choice, name: str) -> Markup:
    """VRAM against speed: shape by policy, colour by width, filled where nothing beats it."""
    records = found.records
    by_speed = sorted(records, key=lambda r: (-choices.speed(r), r["policy"]))
    names = list(dict.fromkeys(policy_name(r) for r in by_speed))
    own_mark = names[:SHAPES]
    widths = sorted({r["bits"] for r in records})
    on_front = set(found.front)
    points = []
    order = sorted(range(len(records)), key=lambda i: (i in on_front, i))
    for i in order:
        r = records[i]
        text = f"{setting_text(r)}: {choices.speed(r):.2f} tokens/s, {choices.vram(r) / 1e9:.2f} GB"
        shape = own_mark.index(policy_name(r)) if policy_name(r) in own_mark else SHAPES
        points.append(
            Point(choices.vram(r) / 1e9, choices.speed(r), shape, widths.index(r["bits"]), i in on_front, text,
                  f"{name}-{i}", i == found.chosen)
        )  # fmt: skip
    steps = [(choices.vram(records[i]) / 1e9, choices.speed(records[i])) for i in found.front]
    drawn = charts.scatter(points, "VRAM (GB)", "tokens/s", steps, "speed against memory, one mark a setting")
    shapes = own_mark + (["other policies"] if len(names) > SHAPES else [])
    keys = charts.legend(shapes, [f"{bits} bits" for bits in widths])
    label = evidence(records)
    text = (
        f"Speed and memory of {depth(records[0])}. Filled marks and the line: no other setting is faster in as little "
        "memory; each leads to its row in the table. The ring is the recommendation. What fewer bits cost in quality "
        "is not shown."
    )
    return figure("Pareto front: speed against memory", label, join(keys, drawn), text, f"{name}-front")


def stalls(found: Choice, name: str) -> Markup:
    """Where a token's time goes, by policy, a chart for each width; that of the recommendation stands open."""
    chosen = found.records[found.chosen]
    parts = []
    for bits in sorted({r["bits"] for r in found.records}, reverse=True):
        best: dict[str, Record] = {}
        for record in found.records:
            if record["bits"] == bits:
                text = str(record["policy"])
                best[text] = fastest([record, *([best[text]] if text in best else [])])
        shown = sorted(best.values(), key=lambda r: (r["tpot_s"], r["policy"]))
        if bits == chosen["bits"] and chosen in shown[BARS:]:
            shown = [*shown[: BARS - 1], chosen]
        rows = [bar(r, r is chosen) for r in shown[:BARS]]
        summary = f"{bits} bits: the fastest setting of {len(rows)} of {len(best)} policies"
        parts.append(
            tag("details", tag("summary", summary), charts.bars(rows, PART_NAMES), open=bits == chosen["bits"])
        )  # fmt: skip
    label = ", ".join(sorted({own(r) for r in found.records}))
    where = "the trace's layers" if chosen.get("scaled") else "all layers"
    text = (
        f"Milliseconds a decode token over {where}. A stall is time in which compute waits for an expert, after no "
        "load had been issued (miss) or for one that was not finished (late). Slots differ where the bar says so."
    )
    return figure("Where the time of a token goes", label, join(*parts), text, f"{name}-stalls")


def bar(record: Record, chosen: bool) -> Bar:
    """One setting's bar."""
    floor = get(record, "bounds.joint_floor_s")
    text = f"{record['tpot_s'] * 1e3:.1f} ms, {record['slots']} slots, {choices.vram(record) / 1e9:.1f} GB"
    return Bar(str(record["policy"]), parts_ms(record), floor * 1e3 if floor else None, text, chosen)


def bounds(record: Record) -> Markup:
    """The recommendation's time per token beside everything it can be held against."""
    known = [(text, get(record, f"bounds.{key}")) for key, text in BOUNDS.items()]
    rows: list[list[Child]] = [[text, f"{s * 1e3:.2f}", f"{record['tpot_s'] / s:.2f}"] for text, s in known if s]
    rows.insert(0, [f"{setting_text(record)}", f"{record['tpot_s'] * 1e3:.2f}", "1.00"])
    title = tag("h3", "Bounds beside the recommendation ", badge(own(record)))
    where = "the trace's layers" if record.get("scaled") else "all layers"
    note = f"Time per token over {where}. A reference is another schedule's time, no bound."
    return join(title, plain_table(["", "TPOT ms", "times as long"], rows), tag("p", note, class_="hint"))


def provenance(records: list[Record]) -> Markup:
    """What the figures depend on, once each."""
    first = records[0]
    changes = ", ".join(first.get("set") or []) or "nothing"
    versions = sorted({str(r["version"]) for r in records})
    cold = "emptied where a sequence starts" if first["cold_sequences"] else "carried from sequence to sequence"
    return pairs(
        [
            ("routing", f"{first['routing']}: {first['trace']}, {first['decode_tokens']:,} decode tokens"),
            ("trace sha256", tag("code", first["trace_sha256"])),
            ("model", join(first["model"], " ", tag("code", first["model_sha256"]))),
            ("machine", join(first["machine"], " ", tag("code", first["machine_sha256"]))),
            ("changed by --set", changes),
            ("context", "the trace's longest sequence" if first["context"] is None else f"{first['context']} tokens"),
            ("caches", cold),
            ("drivers", ", ".join(sorted({str(r["driver"]) for r in records}))),
            ("code versions (sha256)", join(*(tag("code", v, " ") for v in versions))),
            ("intervals", f"95 %, paired: {noise.source(first)}"),
        ]
    )  # fmt: skip
