"""How use repeats: experts of a token that the token before used, beside what chance would give."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sim.plots._records import Drawn, PictureError, Record, single
from sim.plots._style import look, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READS = "traces"
NEEDS = ("layers.repeat_in_order", "layers.repeat_shuffled", "layers.repeat_shuffled_within")
VARIES = ()
SIZE = (7.6, 4.0)
LINES = (
    ("repeat_in_order", "in the order of the text", 0),
    ("repeat_shuffled_within", "each sequence shuffled: chance, once its topic is known", 4),
    ("repeat_shuffled", "all tokens shuffled: chance", 6),
)


def draw(figure: Figure, traces: list[Record]) -> Drawn:
    """A line each for the text's own order and for two kinds of chance, by layer."""
    columns = single(traces, "trace")["layers"]
    if None in columns["repeat_in_order"]:
        raise PictureError("the trace has no sequence of two decode tokens, so nothing can repeat; name a longer one")
    axes = figure.add_subplot()
    means = {}
    for key, name, number in LINES:
        share = 100 * np.array(columns[key], float)
        means[key] = float(share.mean())
        axes.plot(range(len(share)), share, label=f"{name}: mean {means[key]:.0f} %", **look(number))
    axes.set(xlabel="MoE layer", ylabel="experts the token before used (%)", ylim=(0, None))
    axes.grid(alpha=0.25)
    whole_numbers(axes)
    figure.legend(loc="outside lower left", ncols=1)
    headline = (
        f"{means['repeat_in_order']:.0f} % of a token's experts were used by the token before; chance gives "
        f"{means['repeat_shuffled']:.0f} %"
    )
    return Drawn(len(LINES) * len(columns["repeat_in_order"]), ["Decode tokens."], headline)
