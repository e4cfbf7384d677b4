"""What recall is worth: time per token against how well the next layer is predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sim.plots._records import Drawn, PictureError, Record, fastest, get, policy_name
from sim.plots._style import GREY, looks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READS = "runs"
NEEDS = ("tpot_s",)
VARIES = ("predictor",)
SIZE = (8.6, 4.8)
MADE = "noisy_oracle"  # the predictor whose recall is set; its runs make the line


def draw(figure: Figure, runs: list[Record]) -> Drawn:
    """A line over made-up recalls, a mark for every predictor, and the time without prefetch."""
    guessing = sorted((r for r in runs if r.get("recall") is not None), key=lambda r: (r["recall"], r["predictor"]))
    without = [r for r in runs if r.get("predictor") is None]
    names = {policy_name(r) for r in guessing}
    if len(names) != 1 or not without:
        raise PictureError(
            f"this picture shows one policy with recalls beside a run without prefetch; the results have "
            f"{', '.join(sorted(names)) or 'no recall'} and {len(without)} without; see sim.explore.with_recall"
        )
    base_s = min(r["tpot_s"] for r in without)
    made = [r for r in guessing if r["predictor"].startswith(f"({MADE}") or r["predictor"].startswith(MADE)]
    real = [r for r in guessing if r not in made]
    axes = figure.add_subplot()
    text = f"{policy_name(without[0])}, no guesses: {1e3 * base_s:.2f} ms"
    axes.axhline(1e3 * base_s, color="black", linestyle="--", lw=1.2, label=text)
    if made:
        x, y = zip(*((100 * r["recall"], 1e3 * r["tpot_s"]) for r in made), strict=True)
        axes.plot(x, y, color=GREY, lw=1.3, marker=".", label="so many guesses right, at random")
    for name, style in looks(r["predictor"] for r in real).items():
        run = fastest([r for r in real if r["predictor"] == name])
        text = f"{name}: {100 * run['recall']:.0f} %, {1e3 * run['tpot_s']:.2f} ms"
        marked = style | {"linestyle": "", "markersize": 9}
        axes.plot(100 * run["recall"], 1e3 * run["tpot_s"], label=text, **marked)
    times = [1e3 * r["tpot_s"] for r in runs]
    span = max(times) - min(times)
    axes.set(ylim=(min(times) - 0.15 * span, max(times) + 0.15 * span))
    axes.set(xlabel="recall one layer ahead (% of routed experts)", ylabel="time per output token (ms)")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper")
    notes = ["The axis of times does not start at 0."]
    if floor_s := get(guessing[0], "bounds.joint_floor_s"):
        notes.append(f"The joint floor is {1e3 * floor_s:.1f} ms.")
    return Drawn(len(guessing), notes, finding(guessing, real, base_s, policy_name(without[0])))


def finding(guessing: list[Record], real: list[Record], base_s: float, base: str) -> str:
    """What the best predictor saves, and what the best recall shown does."""
    said = []
    for run in ([fastest(real)] if real else []) + [guessing[-1]]:
        name = run["predictor"] if run in real else "made-up"
        said.append(
            f"{name} guesses of {100 * run['recall']:.0f} % recall save {100 * (1 - run['tpot_s'] / base_s):.1f} %"
        )
    return f"Beside {base}, {', '.join(dict.fromkeys(said))} of a token"
