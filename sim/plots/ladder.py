"""The ladder of baselines, rung by rung up to ours, beside the bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim.plots._records import Drawn, PictureError, Record, fastest, get, policy_name
from sim.plots._style import looks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READS = "runs"
NEEDS = ("tpot_s", "bounds.joint_floor_s")
VARIES = ()
SIZE = (9.4, 5.4)
MOST = 12
RUNGS = (
    "mixtral_offloading", "mixtral_offloading_no_write_back", "mixtral_offloading_copy_stream",
    "mixtral_offloading_paper", "on_demand", "speculative",
)  # fmt: skip
SAID = {
    "mixtral_offloading": "as released",
    "mixtral_offloading_no_write_back": "+ no write-back",
    "mixtral_offloading_copy_stream": "+ copy stream",
    "mixtral_offloading_paper": "+ its paper's speculation",
}
BOUNDS = (
    ("all_resident_s", "all experts resident", ":"),
    ("joint_floor_s", "joint floor: no schedule is faster", "-"),
    ("perfect_lookahead_belady_s", "reference: perfect guesses, Belady", "-."),
    ("perfect_lookahead_s", "reference: perfect guesses, LRU", "--"),
)


def order(run: Record) -> tuple[int, float]:
    """Place on the ladder, then slowest first."""
    name = policy_name(run)
    return (RUNGS.index(name) if name in RUNGS else len(RUNGS), -run["tpot_s"])


def title(run: Record) -> str:
    """What a bar is called: the rung's name, with what its text sets beside slots."""
    name, _, keys = str(run["policy"]).partition(":")
    kept = [k for k in keys.split(",") if k and not k.startswith("landing_slots=")]
    return SAID.get(name, name) + (f"\n{', '.join(kept)}" if kept else "")


def draw(figure: Figure, runs: list[Record]) -> Drawn:
    """A bar a rung with its time and what it gains on the first; lines at the bounds of the last."""
    runs = sorted({r["policy"]: fastest([x for x in runs if x["policy"] == r["policy"]]) for r in runs}.values(),
                  key=order)  # fmt: skip
    if not 2 <= len(runs) <= MOST:
        raise PictureError(f"a ladder has 2 to {MOST} rungs, the results {len(runs)}; choose with --where policy=TEXT")
    first, last = runs[0], min((r for r in runs), key=lambda r: r["tpot_s"])
    axes = figure.add_subplot()
    style = looks(policy_name(r) for r in runs)
    for row, run in enumerate(runs):
        tpot_ms = run["tpot_s"] * 1e3
        axes.barh(row, tpot_ms, height=0.62, color=style[policy_name(run)]["color"], edgecolor="black", lw=0.6)
        gain = "" if run is first else f", {(first['tpot_s'] / run['tpot_s'] - 1) * 100:+.0f} % tokens/s"
        axes.annotate(f"{tpot_ms:.1f} ms{gain}", (tpot_ms, row), xytext=(4, 0), textcoords="offset points",
                      va="center", fontsize=8, zorder=5, bbox={"facecolor": "white", "lw": 0, "pad": 0.8})  # fmt: skip
    for key, name, dashes in BOUNDS:
        value = get(last, f"bounds.{key}")
        if value:
            axes.axvline(value * 1e3, color="0.25", linestyle=dashes, lw=1.5, label=f"{name}: {value * 1e3:.1f} ms",
                         zorder=3)  # fmt: skip
    axes.set(yticks=range(len(runs)), yticklabels=[title(r) for r in runs], xlabel="time per output token (ms)")
    axes.set(xlim=(0, 1.25 * max(r["tpot_s"] for r in runs) * 1e3), ylim=(len(runs) - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower left", ncols=2)
    headline = finding(runs, last)
    return Drawn(
        len(runs), [f"{first['slots']} cache slots a layer. Bounds and references are those of the fastest."], headline
    )


def finding(runs: list[Record], last: Record) -> str:
    """Gain over the first rung, how much of it the second one has, and what is left to the floor."""
    first, second = runs[0], runs[1]
    total = first["tpot_s"] / last["tpot_s"] - 1
    saved = (first["tpot_s"] - second["tpot_s"]) / (first["tpot_s"] - last["tpot_s"]) if total else 0.0
    floor = last["tpot_s"] / get(last, "bounds.joint_floor_s")
    return (
        f"{last['policy']} makes {100 * total:.0f} % more tokens/s than {title(first)}; {100 * saved:.0f} % of the "
        f"time it saves comes with {title(second)}; it takes {floor:.1f} times the floor"
    )
