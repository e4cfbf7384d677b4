"""Who is used: the share of every expert in its layer, beside an even share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sim.plots._records import Drawn, Record, single
from sim.plots._style import whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READS = "traces"
NEEDS = ("layers.use", "model")
VARIES = ()
SIZE = (7.6, 4.6)
WRITTEN = 16  # experts up to which every cell has its figure


def draw(figure: Figure, traces: list[Record]) -> Drawn:
    """A row a layer, a column an expert; 1 is an even share."""
    counts = np.array(single(traces, "trace")["layers"]["use"], float)
    layers, experts = counts.shape
    even = counts / np.maximum(1, counts.sum(axis=1, keepdims=True)) * experts
    top = float(np.quantile(even, 0.995))
    axes = figure.add_subplot()
    image = axes.imshow(even, cmap="cividis_r", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="accesses (multiples of an even share)")
    if experts <= WRITTEN:
        for row, column in np.ndindex(layers, experts):
            dark = even[row, column] > 0.6 * top
            axes.text(
                column, row, f"{even[row, column]:.1f}", ha="center", va="center", fontsize=8,
                color="white" if dark else "black",
            )  # fmt: skip
    axes.set(xlabel="expert", ylabel="MoE layer")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    whole_numbers(axes)
    whole_numbers(axes, "y")
    layer, expert = np.unravel_index(int(even.argmax()), even.shape)
    unused = int((counts == 0).sum())
    idle = f"{unused} of {counts.size} experts are never used" if unused else "No expert is idle"
    headline = f"{idle}; the busiest, expert {expert} of layer {layer}, has {even.max():.1f} times an even share"
    return Drawn(counts.size, ["All tokens, prefill and decode."], headline)
