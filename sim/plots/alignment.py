"""Recall by layer and distance before and after alignment, and what it adds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sim.plots._records import Drawn, Record, single
from sim.plots.recall import TOP_K, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

READS = "recalls"
NEEDS = ("recall.router", "recall.aligned", "evidence", "tokens")
VARIES = ()
SIZE = (9.4, 5.0)


def draw(figure: Figure, recalls: list[Record]) -> Drawn:
    """Left: the later layer's router as it is. Middle: the aligned gate. Right: the difference in points."""
    report = single(recalls, "report, which is one width")
    before, after = (percent(report, name).T for name in ("router", "aligned"))
    gain = after - before
    left, middle, right = figure.subplots(1, 3, sharey=True)
    low = float(np.nanmin([before, after]))
    top_k = report.get("top_k", TOP_K)
    heat(left, before, low, 100, None)
    heat(middle, after, low, 100, f"recall@{top_k} (%)")
    heat(right, gain, min(0.0, float(np.nanmin(gain))), float(np.nanmax(gain)), "gain (points)")
    left.set(title="router as it is", ylabel="MoE layer that guesses")
    middle.set_title("aligned")
    right.set_title("aligned less router")
    layer, distance = np.unravel_index(int(np.nanargmax(gain)), gain.shape)
    headline = (
        f"Alignment adds {np.nanmean(gain):.1f} points of recall in the mean; most, {np.nanmax(gain):.1f}, in layer "
        f"{layer} at distance {distance + 1}; least {np.nanmin(gain):.1f}"
    )
    return Drawn(int(np.isfinite(gain).sum()), [f"Share of routed experts among the first {top_k} guesses."], headline)


def heat(axes: Axes, table: npt.NDArray[np.float64], low: float, high: float, unit: str | None) -> None:
    """Cells with their figures, light is low; grey where no layer lies so far ahead."""
    axes.set_facecolor("0.92")
    image: Any = axes.imshow(table, cmap="cividis_r", vmin=low, vmax=high, aspect="auto")
    if unit:
        axes.figure.colorbar(image, ax=axes, label=unit)
    for row, column in zip(*np.nonzero(np.isfinite(table)), strict=True):
        dark = table[row, column] - low > 0.55 * (high - low)
        text = f"{table[row, column]:.1f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "black")
    axes.set(xlabel="distance (layers)", xticks=range(table.shape[1]), xticklabels=range(1, table.shape[1] + 1))
    axes.set_yticks(range(table.shape[0]))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
