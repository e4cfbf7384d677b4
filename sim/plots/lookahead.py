"""Heat map of slots by lookahead distance: TPOT, and what the wrong distance costs at the same slots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sim.plots._records import Drawn, PictureError, Record, lookahead, needs_variation, policy_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

READS = "runs"
NEEDS = ("tpot_s", "slots")
VARIES = ("slots",)
SIZE = (9.0, 4.4)


def draw(figure: Figure, runs: list[Record]) -> Drawn:
    """Left: TPOT. Right: how much slower than the best distance at the same slots, which is marked."""
    looking = [r for r in runs if lookahead(r) is not None]
    names = sorted({policy_name(r) for r in looking})
    if len(names) > 1:
        raise PictureError(
            f"a heat map shows one policy, the results have {', '.join(names)}; choose with --where policy={names[0]}"
        )
    distances = needs_variation(looking, "lookahead", lookahead)
    slots = needs_variation(looking, "slots", lambda r: r["slots"])
    tpot_ms = np.full((len(slots), len(distances)), np.nan)
    for run in looking:
        cell = slots.index(run["slots"]), distances.index(lookahead(run))
        tpot_ms[cell] = np.nanmin([tpot_ms[cell], run["tpot_s"] * 1e3])
    slower = (tpot_ms / np.nanmin(tpot_ms, axis=1, keepdims=True) - 1) * 100
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.12})
    heat(left, tpot_ms, "time per output token (ms)", "{:.1f}")
    heat(right, slower, "slower than the row's best distance (%)", "{:.1f}")
    left.set(title=f"{names[0]}: TPOT", ylabel="cache slots per layer (experts)")
    right.set(title="Cost of another distance, same slots")
    for axes in (left, right):
        axes.set(xlabel="lookahead distance (MoE layers)", xticks=range(len(distances)), xticklabels=distances)
        axes.set(yticks=range(len(slots)), yticklabels=slots)
        axes.tick_params(length=0)
    filled = int(np.isfinite(tpot_ms).sum())
    notes = ["Outlined: the best distance of each row."]
    if len(looking) > filled:
        notes.append("Where several settings share a cell, the fastest is shown.")
    if filled < tpot_ms.size:
        notes.append("Empty cells were not simulated.")
    best = sorted({int(distances[int(np.nanargmin(row))]) for row in tpot_ms if np.isfinite(row).any()})
    far = " or ".join(map(str, best))
    headline = f"{names[0]} is fastest {far} layers ahead; the wrong distance costs up to {np.nanmax(slower):.1f} %"
    return Drawn(filled, notes, headline)


def heat(axes: Axes, table: npt.NDArray[np.float64], unit: str, form: str) -> None:
    """Cells with their figures, light is low; the lowest of each row outlined."""
    from matplotlib.patches import Rectangle

    low, high = float(np.nanmin(table)), float(np.nanmax(table))
    image: Any = axes.imshow(table, cmap="cividis_r", vmin=low, vmax=high if high > low else low + 1, aspect="auto")
    axes.figure.colorbar(image, ax=axes, label=unit)
    for row, column in zip(*np.nonzero(np.isfinite(table)), strict=True):
        dark = table[row, column] - low > 0.55 * (high - low)
        text = form.format(table[row, column])
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    for row, values in enumerate(table):
        if np.isfinite(values).any():
            best = int(np.nanargmin(values))
            axes.add_patch(Rectangle((best - 0.47, row - 0.47), 0.94, 0.94, fill=False, edgecolor="#D55E00", lw=2))
    axes.spines[:].set_visible(False)
