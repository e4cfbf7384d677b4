"""Search of spaces too large for a grid: Optuna's TPE proposes, the sweep simulates."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from sim.axes import Axis, Range
from sim.choice import speed
from sim.settings import Space
from sim.spec import SpecError

Record = dict[str, Any]
Simulate = Callable[[list[dict[str, str]]], list[Record | None]]

SEEDED = 10


def search(space: Space, trials: int, at_once: int, seed: int, known: list[Record], simulate: Simulate) -> int:
    """Try combinations that promise more tokens/s, ``at_once`` together, the best known ones first.

    Args:
        space: its axes are searched.
        trials: combinations to propose, those already known included.
        at_once: proposed before the first of them is told.
        seed: of the sampler.
        known: records; the best of this space are the first proposals.
        simulate: gives a record, or None where a combination does not fit or cannot run.

    Returns:
        How many combinations were proposed.

    Raises:
        SpecError: optuna is not installed, or nothing varies.
    """
    try:
        optuna: Any = importlib.import_module("optuna")
    except ImportError:
        raise SpecError("--search needs optuna, which is not installed; install the extra 'search'") from None
    if not space.varied:
        raise SpecError("--search has nothing to vary; name axes with --grid KEY=VALUES")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    for chosen in best_of(space, known):
        study.enqueue_trial(chosen)
    done = 0
    while done < trials:
        asked = [study.ask() for _ in range(min(at_once, trials - done))]
        combinations = [{axis.key: _suggest(trial, axis) for axis in space.varied} for trial in asked]
        for trial, record in zip(asked, simulate(combinations), strict=True):
            if record is None or record["tokens_per_s"] is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, speed(record))
        done += len(asked)
    return done


def best_of(space: Space, known: list[Record]) -> list[dict[str, Any]]:
    """Combinations of the fastest known records that lie in the space, as Optuna's parameters."""
    axes = {axis.key: axis for axis in space.varied}
    within = []
    for record in known:
        chosen = record["axes"]
        inside = set(chosen) == set(axes) and all(_holds(axes[key], value) for key, value in chosen.items())
        if inside and record["tokens_per_s"] is not None:
            within.append(record)
    within.sort(key=lambda record: (-speed(record), record["key"]))
    return [{key: _parameter(axes[key], value) for key, value in r["axes"].items()} for r in within[:SEEDED]]


def _holds(axis: Axis, value: str) -> bool:
    if not isinstance(axis.values, Range):
        return value in axis.values
    try:
        return axis.values.low <= float(value) <= axis.values.high
    except ValueError:
        return False


def _parameter(axis: Axis, value: str) -> str | int | float:
    if not isinstance(axis.values, Range):
        return value
    return int(value) if axis.values.whole else float(value)


def _suggest(trial: Any, axis: Axis) -> str:
    values = axis.values
    if not isinstance(values, Range):
        return str(trial.suggest_categorical(axis.key, values))
    if values.whole:
        return str(trial.suggest_int(axis.key, int(values.low), int(values.high)))
    return repr(float(trial.suggest_float(axis.key, values.low, values.high, log=values.logarithmic)))
