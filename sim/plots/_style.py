"""Looks shared by all pictures, and the caption that says what the figures are worth."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from sim.plots._records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that stay apart in every common form of colour blindness (Okabe and Ito 2008); markers and dashes repeat it.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: Final = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (6, 2, 1, 2)))
# What a policy or predictor looks like in every picture: its place in the three lists above.
OWN: Final = {
    "on_demand": 0, "next_layer": 1, "speculative": 2, "mixtral_offloading_paper": 3,
    "mixtral_offloading_no_write_back": 4, "mixtral_offloading_copy_stream": 5, "mixtral_offloading": 6,
    "router": 0, "transition": 1, "aligned": 2, "mlp": 3, "router_mean": 4, "router_norm": 5, "previous_token": 6,
    "popularity": 7, "context": 8,
}  # fmt: skip
GREY: Final = "0.45"
FLOOR: Final = "0.88"
RC: Final[dict[str, Any]] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "sim.plot",
    "hatch.linewidth": 0.6,
}
MEANING: Final = {
    "MEASURED": "MEASURED on the engine",
    "SIMULATED": "SIMULATED on a measured profile",
    "ESTIMATED": "ESTIMATED (simulated on published values, not measured)",
}


def whole_numbers(axes: Axes, which: str = "x") -> None:
    """Ticks of x (or y) at integers only."""
    from matplotlib.ticker import MaxNLocator

    (axes.xaxis if which == "x" else axes.yaxis).set_major_locator(MaxNLocator(integer=True))


def look(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of the n-th line; after eight they come again, with hollow markers."""
    i = number % len(COLOURS)
    hollow = {"markerfacecolor": "white"} if number >= len(COLOURS) else {}
    return {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": DASHES[i], "markersize": 4.5} | hollow


def looks(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes by label: a policy or predictor keeps its own, others get what is left, in order."""
    names = list(labels)
    places: dict[str, int] = {}
    for name in names:
        own = OWN.get(name.partition(":")[0])
        if own is not None and own not in places.values():
            places[name] = own
    left = (i for i in itertools.count() if i not in places.values())
    return {name: look(places[name] if name in places else next(left)) for name in names}


def values(records: Iterable[Record], key: str) -> str:
    """All values of a key, once each."""
    found = sorted({r[key] for r in records if r.get(key) is not None}, key=lambda v: (str(type(v)), v))
    return ", ".join(str(v) for v in found)


def caption(runs: list[Record]) -> str:
    """Evidence, routing, model, machine, widths and tokens of the runs, in one sentence or two."""
    evidence = "; ".join(MEANING.get(e, e) for e in values(runs, "evidence").split(", "))
    full = {r["scaled"]["layers"] for r in runs if r.get("scaled")}
    depth = f" (cut from {', '.join(map(str, sorted(full)))} layers to the trace's)" if full else ""
    trace = values(runs, "trace")
    routing = f"{values(runs, 'routing')} routing" + (f" of {trace}" if trace else "")
    text = (
        f"{evidence}; {routing}, {values(runs, 'decode_tokens')} decode tokens. Model {values(runs, 'model')}{depth}, "
        f"{values(runs, 'bits')}-bit experts, machine {values(runs, 'machine')}"
    )
    changed = changes(runs)
    return text + (f" with {', '.join(changed)}" if changed else "") + "."


def changes(runs: list[Record]) -> list[str]:
    """What runs changed of machine and model; of a key with more than two values the least and the most."""
    found: dict[str, set[str]] = {}
    for item in {change for r in runs for change in r.get("set") or ()}:
        key, _, value = item.partition("=")
        found.setdefault(key, set()).add(value)
    texts = []
    for key in sorted(found):
        try:
            ordered = sorted(found[key], key=float)
        except ValueError:
            ordered = sorted(found[key])
        texts += [f"{key}={v}" for v in ordered] if len(ordered) < 3 else [f"{key}={ordered[0]} to {ordered[-1]}"]
    return texts


def trace_caption(traces: list[Record]) -> str:
    """Routing, model and tokens of traces; hits and shares are counted on them."""
    told = []
    for trace in traces:
        model, tokens = trace["model"], trace["tokens"]
        told.append(
            f"MEASURED (counted) on {trace['routing']} routing of {model['name']}: {model['num_layers']} MoE layers x "
            f"{model['num_experts']} experts, top-{model['top_k']}, {tokens['decode']:,} decode and "
            f"{tokens['prefill']:,} prefill tokens in {trace['sequences']:,} sequences."
        )
    return " ".join(told)


def recall_caption(recalls: list[Record]) -> str:
    """Evidence, tokens and widths of recalls, in one sentence."""
    widths = values(recalls, "bits")
    tokens = ", ".join(f"{n:,}" for n in sorted({r["tokens"] for r in recalls}))
    return f"{values(recalls, 'evidence')}, {tokens} tokens" + (f", {widths}-bit experts" if widths else "") + "."


def vram(runs: list[Record]) -> str:
    """Whether the runs had equal memory, as a sentence; empty where it is unknown."""
    sizes = sorted({r["vram_bytes"] / 1e9 for r in runs if r.get("vram_bytes")})
    if not sizes:
        return ""
    if sizes[-1] - sizes[0] <= 0.001 * sizes[-1]:
        return f"Equal VRAM: {sizes[0]:.3g} GB."
    return f"VRAM is not equal: {sizes[0]:.3g} to {sizes[-1]:.3g} GB."
