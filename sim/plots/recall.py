"""How well later layers are predicted: recall by lookahead distance, a line a predictor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sim.plots._records import Drawn, Record, single
from sim.plots._style import looks, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READS = "recalls"
NEEDS = ("recall", "evidence", "tokens")
VARIES = ()
SIZE = (7.6, 4.6)
TOP_K = 2  # of reports that do not say: all are of the demonstration model


def percent(report: Record, name: str) -> npt.NDArray[np.float64]:
    """Recall of the first top_k guesses of a predictor in %, [distance - 1, layer]; NaN without a target."""
    table = np.array(report["recall"][name]["all"], float)
    found: npt.NDArray[np.float64] = 100 * table[:, :, min(report.get("top_k", TOP_K), table.shape[2]) - 1]
    return found


def means(report: Record, name: str) -> npt.NDArray[np.float64]:
    """The mean over layers, [distance - 1]; distances that no layer has are left out."""
    table = percent(report, name)
    return np.array([row[~np.isnan(row)].mean() for row in table if not np.isnan(row).all()])


def draw(figure: Figure, recalls: list[Record]) -> Drawn:
    """Means over layers; the legend has the best first."""
    report = single(recalls, "report, which is one width")
    by_name = {name: means(report, name) for name in report["recall"]}
    order = sorted(by_name, key=lambda name: (-by_name[name][0], name))
    axes = figure.add_subplot()
    style = looks(by_name)
    for name in order:
        values = by_name[name]
        axes.plot(range(1, len(values) + 1), values, label=f"{name}: {values[0]:.0f} %", **style[name])
    top_k = report.get("top_k", TOP_K)
    axes.set(xlabel="lookahead distance (MoE layers)", ylabel=f"recall@{top_k} (% of routed experts)", ylim=(0, 100))
    axes.grid(alpha=0.25)
    whole_numbers(axes)
    figure.legend(loc="outside right upper", title="one layer ahead")
    best, worst = order[0], order[-1]
    far = len(by_name[best])
    headline = (
        f"{best} names {by_name[best][0]:.0f} % of the next layer's experts and {by_name[best][-1]:.0f} % of those "
        f"{far} layers ahead; {worst} {by_name[worst][0]:.0f} %"
    )
    text = f"Share of routed experts among the first {top_k} guesses, mean over layers."
    return Drawn(sum(map(len, by_name.values())), [text], headline)
