"""Fitting measured durations: laws fixed + slope x quantity, their residuals, their error on what was held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

QUANTILES = 21
Quantities = tuple[int, ...]
Samples = Iterable[tuple[Quantities, int]]  # quantities and nanoseconds of each occurrence


def trimmed_mean(samples: Sequence[float]) -> float:
    """Mean without the largest 2 %: waits that the machine, not the step, caused."""
    ordered = np.sort(np.asarray(samples, float))
    return float(ordered[: max(1, int(len(ordered) * 0.98))].mean())


def law(points: Iterable[tuple[tuple[float, ...], float, float]]) -> tuple[float, ...]:
    """Least squares of value = fixed + slopes . quantities over (quantities, value, weight); nothing below zero.

    Errors count relative to the value. A coefficient that would be negative is fixed at 0.
    """
    rows = list(points)
    design = np.array([[1.0, *q] for q, _, _ in rows])
    values = np.array([v for _, v, _ in rows])
    scale = np.array([w for _, _, w in rows]) / values
    free = list(range(design.shape[1]))
    solution: npt.NDArray[np.float64] = np.zeros(design.shape[1])
    while free:
        found, *_ = np.linalg.lstsq(design[:, free] * scale[:, None], values * scale, rcond=None)
        if (found >= 0).all():
            solution[free] = found
            break
        free.pop(int(found.argmin()))
    return tuple(float(x) for x in solution)


def grouped(samples: Samples) -> list[tuple[Quantities, float, int]]:
    """(quantities, mean in seconds, count) of samples with equal quantities."""
    groups: dict[Quantities, list[float]] = {}
    for key, ns in samples:
        groups.setdefault(key, []).append(ns / 1e9)
    return [(key, sum(values) / len(values), len(values)) for key, values in sorted(groups.items())]


def fitted(samples: Samples) -> tuple[float, ...]:
    """`law` through the means of samples with equal quantities; many samples of a kind count more."""
    return law((q, mean, count**0.5) for q, mean, count in grouped(samples))


def predicted(found: Sequence[float], quantities: Sequence[float]) -> float:
    """What a law says, in seconds."""
    return found[0] + sum(a * b for a, b in zip(found[1:], quantities, strict=True))


def residuals(samples: Samples, found: Sequence[float]) -> tuple[float, ...]:
    """Quantiles of measured / predicted, evenly spaced, without the largest 2 %."""
    ratios = np.sort([ns / 1e9 / max(1e-12, predicted(found, q)) for q, ns in samples])
    kept = ratios[: max(1, int(len(ratios) * 0.98))]
    return tuple(round(float(x), 5) for x in np.quantile(kept, np.linspace(0, 1, QUANTILES)))


def error(samples: Samples, found: Sequence[float]) -> float | None:
    """Mean over samples of how far the law is from the mean of their kind (MAPE); None without samples."""
    groups = grouped(samples)
    if not groups:
        return None
    wrong = sum(count * abs(predicted(found, q) / mean - 1) for q, mean, count in groups)
    return wrong / sum(count for _, _, count in groups)
