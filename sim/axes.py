"""What varies in a sweep, and in which values.

An axis is ``KEY=VALUES``. KEY is a field of a setting (`FIELDS`), a key of a SPEC (``landing_slots``), a parameter of a
plug-in (``policy.lookahead``, ``cache.decay``) or a field of machine or model (``machine.link.h2d_gb_s``).
VALUES stand between commas (between semicolons where a value has commas itself); ``A..B`` is a range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from sim import registry
from sim.spec import RUN_KEYS, SpecError

FIELDS = ("trace", "machine", "model", "policy", "bits", "slots", "context", "tokens", "cold_sequences")


class Range(NamedTuple):
    """Numbers from ``low`` to ``high``, both included; whole ones or any."""

    low: float
    high: float
    whole: bool

    @property
    def logarithmic(self) -> bool:
        """Whether numbers are drawn evenly on a logarithmic scale: the range spans a factor of 10."""
        return not self.whole and self.low > 0 and self.high >= 10 * self.low

    def draw(self, random: Random) -> str:
        """One of them."""
        if self.whole:
            return str(random.randint(int(self.low), int(self.high)))
        if self.logarithmic:
            return repr(math.exp(random.uniform(math.log(self.low), math.log(self.high))))
        return repr(random.uniform(self.low, self.high))


@dataclass(frozen=True)
class Axis:
    """One key and its values: texts, or a range."""

    key: str
    values: tuple[str, ...] | Range

    def listed(self) -> tuple[str, ...]:
        """All values.

        Raises:
            SpecError: a range of numbers that are not whole.
        """
        if not isinstance(self.values, Range):
            return self.values
        if not self.values.whole:
            raise SpecError(
                f"--grid {self.key} is a range of any numbers, which no grid exhausts; list values, or add --random N"
            )
        return tuple(str(n) for n in range(int(self.values.low), int(self.values.high) + 1))

    def draw(self, random: Random) -> str:
        """One value at random."""
        return self.values.draw(random) if isinstance(self.values, Range) else random.choice(self.values)


def axis(text: str) -> Axis:
    """Parse ``KEY=VALUES``.

    Raises:
        SpecError: no key or value, a key that does not exist, or an empty range.
    """
    key, equals, rest = text.partition("=")
    key = key.strip()
    if not equals or not key or not rest.strip():
        raise SpecError(f"--grid {text!r}: write KEY=VALUE,VALUE,... or KEY=LOW..HIGH")
    kind, _, name = key.partition(".")
    plugins = registry.plugins(kind) if kind in registry.PACKAGES else registry.Plugins()
    known = bool(name) and (
        kind in ("machine", "model") or any(name in module.Params._fields for module in plugins.values())
    )
    if not (key in FIELDS or key in RUN_KEYS or known):
        parameters = (
            ""
            if not plugins
            else f"; parameters of a {kind}: "
            + ", ".join(sorted({field for module in plugins.values() for field in module.Params._fields}))
        )
        parameters += "".join(f"; {sentence}" for sentence in plugins.left_out.values())
        raise SpecError(
            f"--grid key {key!r} is unknown; known are {', '.join((*FIELDS, *RUN_KEYS))}, policy.PARAMETER, "
            f"cache.PARAMETER, predictor.PARAMETER, machine.FIELD and model.FIELD{parameters}"
        )
    values = tuple(v.strip() for v in (rest.split(";") if ";" in rest else _outside_parentheses(rest)))
    if not all(values):
        raise SpecError(f"--grid {text!r} has an empty value")
    if len(values) == 1 and ".." in values[0]:
        return Axis(key, _range(key, values[0]))
    return Axis(key, tuple(dict.fromkeys(values)))


def _outside_parentheses(text: str) -> list[str]:
    parts, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _range(key: str, text: str) -> Range:
    low, _, high = text.partition("..")
    try:
        first, last = float(low), float(high)
    except ValueError:
        first, last = 1.0, 0.0
    if not first <= last or math.isinf(last - first):
        raise SpecError(f"--grid {key}={text}: a range is LOW..HIGH, two numbers with LOW not above HIGH")
    whole = "." not in low and "." not in high and "e" not in (low + high).lower()
    return Range(first, last, whole)
