"""One picture of a trace: expert use, hit curves, recall. Needs matplotlib, imported when a picture is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Locator

FORMATS: Final = (".png", ".svg", ".pdf")
# Colours that stay apart in every common form of colour blindness (Okabe and Ito 2008).
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P")
_REPLAYS: Final = {"visit": "visit-atomic", "access": "access by access"}


class PictureError(ValueError):
    """A picture that cannot be drawn; one sentence says why."""


def draw(use: npt.NDArray[np.int64], figures: dict[str, Any], path: Path) -> None:
    """Write the picture of a trace: a heat map, hits by slots, and recall by distance if a predictor was recorded.

    Args:
        use: accesses of every expert, prefill and decode [L, E].
        figures: what ``traces.inspect.describe`` gives.
        path: file to write; its ending, one of ``FORMATS``, says the format. The same figures give the same bytes.

    Raises:
        PictureError: another ending, a file that cannot be written, or matplotlib is missing.
    """
    if path.suffix.lower() not in FORMATS:
        raise PictureError(f"picture {str(path)!r} ends in {path.suffix!r}; use one of {', '.join(FORMATS)}")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PictureError(f"a picture needs matplotlib ({error}); install the 'plots' extra") from error
    with mpl.rc_context({"svg.hashsalt": "trace", "font.size": 9, "axes.titlesize": 10, "legend.frameon": False}):
        panels = 3 if figures["predictors"] else 2
        figure = Figure(figsize=(4.6 * panels, 4.8), layout="constrained")
        axes = figure.subplots(1, panels, width_ratios=[1.25] + [1] * (panels - 1))
        _heat_map(axes[0], use)
        _hit_curves(axes[1], figures)
        if figures["predictors"]:
            _recall(axes[2], figures)
        figure.supxlabel(_caption(figures), x=0.01, ha="left", fontsize=8)
        try:
            figure.savefig(path, dpi=150, metadata=_no_date(path))
        except OSError as error:
            raise PictureError(
                f"picture {str(path)!r} cannot be written ({error.strerror}); name a file in a folder that exists"
            ) from error


def _no_date(path: Path) -> dict[str, None]:
    return {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})


def _heat_map(axes: Axes, use: npt.NDArray[np.int64]) -> None:
    even = use / use.sum(axis=1, keepdims=True) * use.shape[1]
    top = float(np.quantile(even, 0.995))
    image = axes.imshow(even, aspect="auto", cmap="cividis", vmin=0, vmax=top, interpolation="nearest")
    axes.figure.colorbar(
        image, ax=axes, extend="max" if even.max() > top else "neither", label="accesses, multiples of an even share"
    )
    axes.set(title="Expert use, all tokens", xlabel="expert", ylabel="MoE layer")
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.yaxis.set_major_locator(_whole_numbers())


def _whole_numbers() -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _hit_curves(axes: Axes, figures: dict[str, Any]) -> None:
    lru, belady = figures["lru"], figures["belady"]
    first = lru["slots"][0]
    if not lru["decode_accesses"]:
        axes.text(0.5, 0.5, "no decode tokens", ha="center", transform=axes.transAxes)
    else:
        bypass = belady["bypass"]["hit_share"][first - 1 :]
        curves = (
            ("Belady, with bypass", bypass, _COLOURS[2], "--"),
            ("Belady, forced admission", belady["forced"]["hit_share"], _COLOURS[1], "-."),
            (f"LRU, {_REPLAYS[lru['replay']]}", lru["hit_share"], _COLOURS[0], "-"),
        )
        marker = "o" if len(lru["slots"]) <= 16 else ""
        for name, share, colour, dashes in curves:
            axes.plot(lru["slots"], share, dashes, color=colour, label=name, marker=marker, markersize=3.5)
        even = np.array(lru["slots"]) / lru["slots"][-1]
        axes.plot(lru["slots"], even, ":", color="0.45", label="slots / experts")
        axes.legend(loc="lower right")
    axes.set(
        title="Cache hits, all layers", xlabel="slots per layer (experts)", ylabel="share of decode accesses",
        ylim=(0, 1.02),
    )  # fmt: skip
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.grid(alpha=0.25)


def _recall(axes: Axes, figures: dict[str, Any]) -> None:
    top_k = figures["model"]["top_k"]
    furthest = 1
    for i, (name, predictor) in enumerate(figures["predictors"].items()):
        recall = np.array(predictor["recall"], float)  # null becomes NaN
        m = min(top_k, recall.shape[2])
        at_m = recall[:, :, m - 1]
        known = ~np.isnan(at_m).all(axis=1)
        if not known.any():
            continue
        distances = np.flatnonzero(known) + 1
        furthest = max(furthest, int(distances[-1]))
        colour = _COLOURS[i % len(_COLOURS)]
        axes.fill_between(
            distances, np.nanmin(at_m[known], axis=1), np.nanmax(at_m[known], axis=1), color=colour, alpha=0.12, lw=0
        )
        axes.plot(
            distances, np.nanmean(at_m[known], axis=1), "-", color=colour, marker=_MARKERS[i % len(_MARKERS)],
            label=f"{name}: recall@{m}",
        )  # fmt: skip
    axes.set(
        title="Recall, mean and range over layers", xlabel="lookahead distance (MoE layers)",
        ylabel="share of routed experts", ylim=(0, 1.02), xticks=range(1, furthest + 1), xlim=(0.8, furthest + 0.2),
    )  # fmt: skip
    if axes.has_data():
        axes.legend(loc="lower left")
    axes.grid(alpha=0.25)


def _caption(figures: dict[str, Any]) -> str:
    model, tokens = figures["model"], figures["tokens"]
    caches = "emptied where a sequence starts" if figures["cold_sequences"] else "carried over between sequences"
    return (
        f"{figures['routing']} routing: {model['name']}, {model['num_layers']} MoE layers x {model['num_experts']} "
        f"experts, top-{model['top_k']}; {tokens['prefill']:,} prefill and {tokens['decode']:,} decode tokens in "
        f"{figures['sequences']:,} sequences.\nCaches per layer, empty at the start and {caches}; decode only."
    )
