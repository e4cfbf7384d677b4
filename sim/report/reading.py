"""Result files of a sweep or a validation, read and checked: what a page reads of them is there, and of its kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sim import choice as choices
from sim import results
from sim.spec import SpecError

Record = dict[str, Any]

MOST = 1e18  # of any number in a result
REMEDY = "name a file of sim.sweep --out or runtime.validate --out, as it was written"


class Kind(NamedTuple):
    """What a field must be; ``optional``: if it is there."""

    words: str
    fits: Callable[[Any], bool]
    optional: bool = False


class Found(NamedTuple):
    """A result file: records of a sweep, or the document of a validation."""

    records: list[Record]
    document: Record | None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -MOST < value < MOST


def _all(values: Any, fits: Callable[[Any], bool], least: int = 0) -> bool:
    return isinstance(values, list) and len(values) >= least and all(map(fits, values))


def _each(values: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(values, dict) and all(map(fits, values.values()))


def _not_negative(value: Any) -> bool:
    return _number(value) and value >= 0


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def or_null(kind: Kind) -> Kind:
    """The same, or null."""
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.fits(value))


def maybe(kind: Kind) -> Kind:
    """The same, null, or not there."""
    return or_null(kind)._replace(optional=True)


TEXT = Kind("text", lambda v: isinstance(v, str))
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
WHOLE = Kind("a whole number above 0", lambda v: isinstance(v, int) and _positive(v))
INTEGER = Kind("a whole number", lambda v: isinstance(v, int) and _number(v))
FEW = Kind("a whole number from 0 to 100000", lambda v: INTEGER.fits(v) and 0 <= v <= 100_000)
NUMBER = Kind("a number", _number)
COUNT = Kind("a number, 0 or larger", _not_negative)
ABOVE_0 = Kind("a number above 0", _positive)
OBJECT = Kind("an object", lambda v: isinstance(v, dict))
TEXTS = Kind("a list of texts", lambda v: _all(v, TEXT.fits))
NUMBERS = Kind("an object of numbers", lambda v: _each(v, _number))
SECONDS = Kind("an object of seconds", lambda v: _each(v, lambda s: s is None or _not_negative(s)))
QUANTILES = Kind("an object of lists of numbers", lambda v: _each(v, lambda q: _all(q, _number, 2)))
AMOUNTS = Kind("a list of numbers above 0", lambda v: _all(v, _positive, 1))

RUN = (
    dict.fromkeys(("tpot_s", "tokens_per_s", "vram_bytes"), ABOVE_0)
    | dict.fromkeys(("model", "machine", "evidence", "routing"), TEXT)
    | dict.fromkeys(("hits", "late", "misses", "stall_s", "stall_miss_s", "stall_late_s", "compute_busy"), COUNT)
    | {"bounds": maybe(SECONDS)}
)
RECORD = (
    {"tokens_per_s": ABOVE_0}
    | RUN
    | dict.fromkeys(("key", "policy", "regime", "trace", "trace_sha256", "driver", "version"), TEXT)
    | dict.fromkeys(("machine_sha256", "model_sha256"), TEXT)
    | dict.fromkeys(("accesses", "decode_tokens", "h2d_bytes", "link_busy"), COUNT)
    | dict.fromkeys(("bits", "slots"), WHOLE)
    | dict.fromkeys(("tokens", "context"), or_null(COUNT))
    | {"cold_sequences": FLAG, "set": maybe(TEXTS), "axes": maybe(OBJECT), "blocks": OBJECT}
    | {"scaled": maybe(OBJECT)}
    | {"shares": NUMBERS._replace(optional=True), "residuals": QUANTILES._replace(optional=True)}
)
UNTIMED = {"evidence": TEXT}  # of a record without a time per token: the page leaves it out
BLOCKS = {"ns": AMOUNTS, "tokens": AMOUNTS}
SCALED = {"layers": WHOLE, "tokens_per_s": ABOVE_0, "vram_bytes": ABOVE_0}
DOCUMENT = {
    "regret": maybe(NUMBER),
    "kendall_tau": maybe(NUMBER),
    "command": maybe(TEXT),
    "commit": maybe(TEXT),
    "machine": maybe(OBJECT),
    "profile": maybe(OBJECT),
}
CELL = {
    "policy": TEXT,
    "regime": TEXT,
    "bits": WHOLE,
    "slots": WHOLE,
    "link_gb_s": or_null(ABOVE_0),
    "load_log_equal": FLAG,
    "repeat_spread": maybe(COUNT),
    "measured": OBJECT,
    "simulated": OBJECT,
}
SIDE = RUN | {"accesses": ABOVE_0}


def read(path: str) -> Found:
    """A result file, recognised by what it holds.

    Raises:
        SpecError: neither a sweep nor a validation, or a field that is missing or of another kind.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise SpecError(f"results {path}: {why}; {REMEDY}") from None
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, dict) and "cells" in whole:
        return Found([], checked_document(path, whole))
    if isinstance(whole, dict) and "key" not in whole:
        raise SpecError(f"results {path} hold neither; {REMEDY}")
    return Found(checked_records(path, list(results.records(path))), None)


def checked_records(path: str, records: list[Record]) -> list[Record]:
    """Records of a sweep.

    Raises:
        SpecError: none, or a field that is missing or of another kind.
    """
    if not records:
        raise SpecError(f"results {path} hold no record; {REMEDY}")
    lengths: dict[tuple[Any, ...], int] = {}
    for record in records:
        if record.get("tokens_per_s", "") is None:
            check(path, "a result", record, UNTIMED)
            continue
        check(path, "a result", record, RECORD)
        check(path, "the blocks of a result", record["blocks"], BLOCKS)
        check(path, "the whole model of a result", record.get("scaled") or dict.fromkeys(SCALED, 1), SCALED)
        most = lengths.setdefault(tuple(record[name] for name in choices.SAME), len(record["blocks"]["tokens"]))
        for name in BLOCKS:
            found = len(record["blocks"][name])
            if found != most:
                raise SpecError(
                    f"results {path}: a result has {found} blocks of {name}, another of the same tokens has {most}; "
                    f"{REMEDY}"
                )
    return records


def checked_document(path: str, document: Record) -> Record:
    """A validation.

    Raises:
        SpecError: it has no cells, one lacks a time, or a field is missing or of another kind.
    """
    cells = document["cells"]
    try:
        times = [cell[side]["tpot_s"] for cell in cells for side in ("measured", "simulated")]
    except (KeyError, TypeError):
        times = [None]
    if not times or not all(times):
        raise SpecError(f"results {path}: no cells, or one without both times; {REMEDY}")
    check(path, "the validation", document, DOCUMENT)
    check(path, "the profile", document.get("profile") or {}, {"sources": maybe(OBJECT)})
    for cell in cells:
        check(path, "a cell", cell, CELL)
        for side in ("measured", "simulated"):
            check(path, f"the {side} side of a cell", cell[side], SIDE)
    return document


def check(path: str, what: str, record: Record, fields: Mapping[str, Kind]) -> None:
    """Every field is there and of its kind.

    Raises:
        SpecError: one is not.
    """
    if wrong := fault(record, fields):
        raise SpecError(f"results {path}: {what} has {wrong}; {REMEDY}")


def fault(record: Record, fields: Mapping[str, Kind]) -> str:
    """The first field that is missing or of another kind, in words; empty for none."""
    for name, kind in fields.items():
        if name not in record:
            if kind.optional:
                continue
            return f"no {name!r}"
        if not kind.fits(record[name]):
            shown = json.dumps(record[name])
            shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
            return f"{name} {shown}; it must be {kind.words}"
    return ""
