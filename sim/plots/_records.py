"""Result files as plain records: reading, choosing, and what may be compared with what."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sim.spec import SpecError, options, parse

Record = dict[str, Any]

# What a result was obtained under. Results that differ in one stand in one picture only if it shows that field.
CONDITIONS = (
    "evidence", "routing", "model", "machine", "set", "trace", "trace_sha256", "seed", "decode_tokens",
    "cold_sequences", "context", "bits", "slots",
)  # fmt: skip
# What makes one policy's setting differ from another's beyond its text.
CHOICES = ("cache", "predictor", "landing_slots", "stream_slots", "chunk_bytes")


class PictureError(ValueError):
    """A picture that cannot be drawn; one sentence says why and what to do."""


class Drawn(NamedTuple):
    """``points`` marks were drawn; ``notes`` are sentences for the caption; ``headline`` is the finding, above it."""

    points: int
    notes: list[str]
    headline: str


class Results(NamedTuple):
    """``runs``: objects of the interface contract; ``cells``: pairs of a validation, with their document's figures;
    ``traces``: what traces.inspect says; ``recalls``: what predictors recall at one width."""

    runs: list[Record]
    cells: list[Record]
    traces: list[Record]
    recalls: list[Record]


def read(paths: Iterable[str]) -> Results:
    """All results of the files, each once.

    A file is JSON lines, one JSON document (``runs``, ``baselines``, ``cells`` and ``reports`` are unfolded), or the
    saved output of a command, whose lines before the documents are passed over. A torn last line is left out and
    reported.

    Raises:
        PictureError: a file that cannot be read, a damaged line, or no result in any file.
    """
    names = list(paths)
    runs: dict[str, Record] = {}
    cells: list[Record] = []
    traces: list[Record] = []
    recalls: list[Record] = []
    for name in names:
        for document in _documents(name):
            for run in _runs(document):
                runs[run.get("key") or _identity(run)] = run
            about = {k: v for k, v in document.items() if k != "cells"}
            cells += [cell | {"validation": about} for cell in document.get("cells", ())]
            recalls += [r for r in document.get("reports", ()) if isinstance(r, dict) and "recall" in r]
            if "lru" in document and "layers" in document:
                traces.append(document)
    if not (runs or cells or traces or recalls):
        raise PictureError(f"{', '.join(names)}: no results in there; name what sim.run, sim.sweep or validation wrote")
    return Results(list(runs.values()), cells, traces, recalls)


def _documents(name: str) -> list[Record]:
    try:
        text = Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise PictureError(f"results {name!r} cannot be read ({why}); name a file of JSON lines") from None
    try:
        whole = json.loads(text)
    except ValueError:
        return _lines(name, text)
    if not isinstance(whole, dict | list):
        raise PictureError(f"results {name!r} hold {type(whole).__name__}; they must hold JSON objects")
    return [d for d in ([whole] if isinstance(whole, dict) else whole) if isinstance(d, dict)]


def _lines(name: str, text: str) -> list[Record]:
    found = []
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.startswith("{"):
            continue
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines) or text.endswith("\n"):
                raise PictureError(f"results {name!r}, line {number}: {error}; delete or repair that line") from None
            print(f"{name}: its last line is incomplete and left out", file=sys.stderr)
    return found


def _runs(document: Record) -> list[Record]:
    if "runs" in document:
        return [r for r in document["runs"] if isinstance(r, dict)]
    if "policy" not in document:
        return []
    if isinstance(document.get("trace"), str):
        document["trace"] = Path(document["trace"]).name
    if "set" not in document and "axes" in document:  # a sweep's record: what it varied of machine and model
        axes = document["axes"]
        document["set"] = [f"{k}={axes[k]}" for k in sorted(axes) if k.startswith(("machine.", "model."))]
    return [{k: v for k, v in document.items() if k != "baselines"}, *document.get("baselines", ())]


def _identity(run: Record) -> str:
    """The same for a baseline that two documents repeat."""
    fields = ("policy", *CHOICES, *CONDITIONS, "tpot_s", "load_log_sha256", "driver")
    return json.dumps([run.get(name) for name in fields])


def policy_name(run: Record) -> str:
    """The policy or preset without its parameters."""
    return str(run["policy"]).partition(":")[0]


def lookahead(run: Record) -> int | None:
    """Lookahead distance of the run's policy, from its text and its defaults; None when it never prefetches."""
    if run.get("predictor", "unknown") is None:
        return None
    if "lookahead" in run:
        return None if run["lookahead"] is None else int(run["lookahead"])
    try:
        chosen = options(run["policy"])
    except SpecError:
        written = parse(run["policy"]).keys.get("lookahead", "")
        return int(written) if written.isdigit() else None
    return chosen.lookahead if chosen.prefetches else None


def choose(runs: list[Record], wanted: Sequence[str]) -> list[Record]:
    """The runs that fit every ``KEY=VALUE``; of several values for one key, any. A policy fits by text or by name.

    Raises:
        PictureError: no ``=``, a key no run has, or nothing left.
    """
    allowed: dict[str, list[str]] = {}
    for item in wanted:
        key, equals, value = item.partition("=")
        if not equals:
            raise PictureError(f"--where {item!r} is not KEY=VALUE; write for example --where bits=4")
        allowed.setdefault(key, []).append(value)
    for key, values in allowed.items():
        if not any(key in run for run in runs):
            raise PictureError(f"--where {key}: no result has that key; keys are {', '.join(sorted(runs[0]))}")
        fitting = [r for r in runs if _value(r, key) in values or (key == "policy" and policy_name(r) in values)]
        if not fitting:
            present = ", ".join(sorted({_value(r, key) for r in runs}))
            raise PictureError(f"--where {key}={' or '.join(values)} leaves no result; there are {present}")
        runs = fitting
    return runs


def _value(run: Record, key: str) -> str:
    value = run.get(key)
    if key == "set":
        return " ".join(value or ()) or "nothing"
    return "none" if value is None else str(value)


def usable(results: list[Record], needs: Sequence[str]) -> list[Record]:
    """The results with a value for every needed key (dots lead into objects).

    Raises:
        PictureError: none has them all; the keys that are missing everywhere are named.
    """
    complete = [r for r in results if all(get(r, key) is not None for key in needs)]
    if not complete:
        missing = [key for key in needs if all(get(r, key) is None for r in results)] or list(needs)
        raise PictureError(
            f"no result has {' and '.join(missing)}; this picture needs {', '.join(needs)} in one and the same result"
        )
    if len(complete) < len(results):
        print(f"{len(results) - len(complete)} results lack {' or '.join(needs)} and are left out", file=sys.stderr)
    return complete


def get(record: Record, path: str) -> Any:
    """The value under ``a.b``; None where there is none."""
    value: Any = record
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def comparable(runs: list[Record], varies: Sequence[str]) -> None:
    """Results stand in one picture when they differ in nothing it leaves out; a key that a result lacks says nothing.

    Raises:
        PictureError: they differ in a condition the picture does not show.
    """
    for key in CONDITIONS:
        values = sorted({_value(r, key) for r in runs if key in r})
        if key not in varies and len(values) > 1:
            some = ", ".join(values[:6]) + (", ..." if len(values) > 6 else "")
            raise PictureError(
                f"the results mix {len(values)} values of {key} ({some}), which this picture cannot show; choose one "
                f"with --where {key}={values[0]}"
            )


def single(results: list[Record], what: str) -> Record:
    """The only result.

    Raises:
        PictureError: several.
    """
    if len(results) > 1:
        raise PictureError(f"this picture shows one {what}, the results hold {len(results)}; name one, or use --where")
    return results[0]


def needs_variation(runs: list[Record], key: str, of: Callable[[Record], Any]) -> list[Any]:
    """The values of ``of`` in ascending order.

    Raises:
        PictureError: fewer than two.
    """
    values = sorted({of(r) for r in runs} - {None})
    if len(values) < 2:
        found = f"all have {key} {values[0]}" if values else f"none has {key}"
        raise PictureError(f"the results do not vary {key} ({found}); simulate at least two values of {key}")
    return values


def by_label(runs: list[Record]) -> dict[str, list[Record]]:
    """Runs by policy, named with those choices in which runs of the same policy text differ."""
    same: dict[str, list[Record]] = {}
    for run in runs:
        same.setdefault(str(run["policy"]), []).append(run)
    groups: dict[str, list[Record]] = {}
    for policy, alike in same.items():
        several = [k for k in CHOICES if f"{k}=" not in policy and len({_value(r, k) for r in alike}) > 1]
        for run in alike:
            name = ", ".join([policy, *(f"{key} {_value(run, key)}" for key in several)])
            groups.setdefault(name, []).append(run)
    return groups


def by_name(runs: list[Record]) -> dict[str, list[Record]]:
    """Runs by policy or preset, parameters aside."""
    groups: dict[str, list[Record]] = {}
    for run in runs:
        groups.setdefault(policy_name(run), []).append(run)
    return groups


def fastest(runs: list[Record]) -> Record:
    """The run of least TPOT."""
    return min(runs, key=lambda r: (r["tpot_s"], r["policy"]))


def series(runs: list[Record], most: int) -> tuple[dict[str, list[Record]], bool]:
    """Runs by label, slowest first; by policy name where that makes more than ``most`` (True: folded).

    Raises:
        PictureError: more than ``most`` policy names.
    """
    groups = by_label(runs)
    folded = len(groups) > most
    if folded:
        groups = by_name(runs)
    if len(groups) > most:
        raise PictureError(
            f"{len(groups)} policies ({', '.join(sorted(groups)[:4])}, ...) cannot be told apart in one picture; "
            f"choose at most {most} with --where policy=NAME"
        )
    mean = {name: sum(r["tpot_s"] for r in group) / len(group) for name, group in groups.items()}
    return {name: groups[name] for name in sorted(groups, key=lambda n: (-mean[n], n))}, folded


def best_by(runs: list[Record], of: Callable[[Record], Any]) -> dict[Any, Record]:
    """The fastest run for every value of ``of``, values ascending."""
    best: dict[Any, Record] = {}
    for run in sorted(runs, key=lambda r: (r["tpot_s"], r["policy"])):
        best.setdefault(of(run), run)
    return {key: best[key] for key in sorted(best)}
