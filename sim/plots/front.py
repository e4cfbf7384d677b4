"""Pareto fronts of VRAM against tokens/s, by policy and expert width."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim.plots._records import Drawn, PictureError, Record, fastest, policy_name
from sim.plots._style import COLOURS, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

READS = "runs"
NEEDS = ("tpot_s", "tokens_per_s", "vram_bytes", "bits", "slots")
VARIES = ("slots", "bits")
SIZE = (8.6, 5.0)
MOST = 6
LABELS = 10  # on one front


def place(run: Record, scaled: bool) -> tuple[float, float]:
    """VRAM in GB and tokens/s; at the full depth of the model where it was scaled."""
    figures = run["scaled"] if scaled else run
    return figures["vram_bytes"] / 1e9, figures["tokens_per_s"]


def pareto(places: list[tuple[float, float]]) -> list[int]:
    """Indices of the places that no other beats in both, by ascending VRAM."""
    front: list[int] = []
    for i in sorted(range(len(places)), key=lambda i: (places[i][0], -places[i][1])):
        if not front or places[i][1] > places[front[-1]][1]:
            front.append(i)
    return front


def mark(figure: Figure, vram_gb: float) -> None:
    """A line at a memory limit."""
    axes = figure.axes[0]
    left, right = axes.get_xlim()
    axes.set_xlim(left, max(right, vram_gb + 0.1 * (right - left)))
    axes.axvline(vram_gb, color="black", linestyle=":", lw=1.4)
    text = f"{vram_gb:g} GB"
    axes.annotate(text, (vram_gb, 1), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points")


Places = list[tuple[float, float]]


def name_fronts(axes: Axes, runs: list[Record], places: Places, fronts: dict[int, list[int]]) -> None:
    """Slots of the settings on each front, the end of each with its width; none where a mark or a name stands."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    spots = [((x - left) / (right - left), (y - low) / (high - low)) for x, y in places]
    taken: list[tuple[float, float]] = []
    ends = [(bits, front[-1]) for bits, front in fronts.items()]
    rest = [(bits, i) for bits, front in fronts.items() for i in front[:-1][:: -max(1, len(front) // LABELS)]]
    for bits, i in [*ends, *rest]:
        x, y = spots[i]
        hidden = any(-0.1 < u - x < -0.005 and 0 < v - y < 0.05 for u, v in spots)
        crowded = any(abs(u - x) < 0.1 and abs(v - y) < 0.035 for u, v in taken)
        if i == fronts[bits][-1] or not (hidden or crowded):
            text = f"{runs[i]['slots']} slots" if i != fronts[bits][-1] else f"{bits} bits, {runs[i]['slots']} slots"
            colour = COLOURS[list(fronts).index(bits) % len(COLOURS)]
            axes.annotate(text, places[i], xytext=(-5, 5), textcoords="offset points", ha="right", fontsize=7,
                          color=colour)  # fmt: skip
            taken.append((x, y))


def draw(figure: Figure, runs: list[Record]) -> Drawn:
    """A mark a result, form by policy, colour by width; a line joins those that none of its width beats."""
    scaled = all(r.get("scaled") for r in runs)
    alike: dict[tuple[str, int, float], list[Record]] = {}
    for run in sorted(runs, key=lambda r: (place(r, scaled), str(r["policy"]))):
        alike.setdefault((policy_name(run), run["bits"], place(run, scaled)[0]), []).append(run)
    shared = len(runs) > len(alike)
    runs = [fastest(group) for group in alike.values()]
    places = [place(r, scaled) for r in runs]
    if len(set(places)) < 2:
        raise PictureError("all results have one VRAM and one speed; simulate several slots or bits")
    names, widths = sorted({policy_name(r) for r in runs}), sorted({r["bits"] for r in runs})
    if len(names) > MOST:
        raise PictureError(
            f"{len(names)} policies cannot be told apart here; choose up to {MOST} with --where policy=NAME"
        )
    axes = figure.add_subplot()
    fronts: dict[int, list[int]] = {}
    for order, bits in enumerate(widths):
        colour = COLOURS[order % len(COLOURS)]
        of_width = [i for i, r in enumerate(runs) if r["bits"] == bits]
        front = [of_width[i] for i in pareto([places[i] for i in of_width])]
        xs, ys = zip(*(places[i] for i in front), strict=True)
        axes.step(xs, ys, where="post", color=colour, lw=1.2, alpha=0.6, zorder=1)
        for number, name in enumerate(names):
            chosen = [i for i in of_width if policy_name(runs[i]) == name]
            axes.scatter(
                [places[i][0] for i in chosen], [places[i][1] for i in chosen], s=34, marker=MARKERS[number],
                facecolors=[colour if i in front else "white" for i in chosen], edgecolors=colour, linewidths=1.2,
            )  # fmt: skip
        axes.plot([], [], color=colour, lw=2, label=f"{bits} bits")
        fronts[bits] = list({runs[i]["slots"]: i for i in front}.values())  # of one size, the fastest is named
    for number, name in enumerate(names):
        axes.plot([], [], linestyle="", marker=MARKERS[number], color="0.3", mfc="white", label=name)
    axes.set(xlabel="VRAM (GB)", ylabel="tokens/s")
    left, right = min(x for x, _ in places), max(x for x, _ in places)
    span = (right - left) or 1.0
    axes.set(xlim=(left - 0.22 * span, right + 0.08 * span), ylim=(0, 1.08 * max(y for _, y in places)))  # for labels
    name_fronts(axes, runs, places, fronts)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper")
    tops = {
        b: max((p for p, r in zip(places, runs, strict=True) if r["bits"] == b), key=lambda p: p[1]) for b in widths
    }
    headline = "Fastest by width: " + ", ".join(
        f"{bits} bits {speed:.1f} tokens/s in {size:.1f} GB" for bits, (size, speed) in tops.items()
    )
    notes = ["Line and filled marks: no result of that width is faster with as little VRAM."]
    if len(widths) > 1:
        notes.append("What fewer bits cost in quality is not shown.")
    if shared:
        notes.append("Of one policy's settings with equal VRAM the fastest is shown.")
    if scaled:
        layers = sorted({r["scaled"]["layers"] for r in runs})
        notes.append(f"Speed and VRAM scaled to all {', '.join(map(str, layers))} layers (ESTIMATED).")
    return Drawn(len(runs), notes, headline)
