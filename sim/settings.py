"""Spaces of settings: what is tried, in plain values, and which combinations fit a memory limit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import traces
from sim import machine as machines
from sim import registry
from sim.axes import Axis
from sim.experiment import Setting, at_full_depth, context_tokens, fit, memory
from sim.machine import HardwareProfile
from sim.planner import check_slots
from sim.presets import PRESETS
from sim.results import trace_sha256
from sim.spec import RUN_KEYS, Options, SpecError, convert, options, parse, plugin
from sim.timing import Timing, check_reach
from traces import ModelSpec, Trace
from traces.format import shipped

DEFAULT_MACHINE = "rtx3090"
DEFAULT_MODEL = "mixtral-8x7b"
WIDTHS = (16, 8, 4, 3, 2)
GB = {"": 10**9, "GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}


class FitError(SpecError):
    """A combination that a sweep leaves out: too large for the memory, or impossible for this model or machine."""


@dataclass(frozen=True)
class Case:
    """A setting in plain values, to be sent to another process and to be hashed.

    Attributes:
        trace, trace_sha256, tokens: a trace file, what it must contain, and how many of its decode tokens are replayed.
        machine, model: JSON texts, after all changes, the model at the trace's depth.
        spec: policy with everything that differs from a run's defaults.
        axes: what was varied, as (key, value) texts.
        changes: what was changed in machine and model, as KEY=VALUE.
        references: whether they are simulated too.
        driver: ``compiled`` or ``simpy``.
    """

    trace: str
    trace_sha256: str
    tokens: int | None
    machine: str
    model: str
    spec: str
    bits: int
    slots: int
    cold_sequences: bool = False
    context: int | None = None
    axes: tuple[tuple[str, str], ...] = ()
    changes: tuple[str, ...] = ()
    references: bool = False
    driver: str = "compiled"

    @property
    def setting(self) -> Setting:
        """The setting itself; traces, machines, models and options are shared between cases."""
        return Setting(
            trace_of(self.trace, self.trace_sha256, self.tokens),
            machine_of(self.machine),
            model_of(self.model),
            self.bits,
            self.slots,
            options_of(self.spec),
            self.cold_sequences,
            self.context,
        )


@lru_cache(maxsize=4)
def trace_of(path: str, sha256: str, tokens: int | None) -> Trace:
    """A trace by file and content.

    Raises:
        SpecError: the file holds another trace.
        TraceError: it cannot be read.
    """
    if trace_sha256(path) != sha256:
        raise SpecError(
            f"trace {path} is not the one the sweep began with (sha256 {sha256[:12]}...); copy that one here"
        )
    trace = traces.load(path)
    return trace if tokens is None else trace.head(tokens)


@lru_cache(maxsize=4096)
def machine_of(text: str) -> HardwareProfile:
    """A machine from its JSON text."""
    content = json.loads(text)
    return machines.machine_from(content["machine"], content["evidence"], {})


@lru_cache(maxsize=256)
def model_of(text: str) -> ModelSpec:
    """A model's shape from its JSON text."""
    return ModelSpec.from_json(json.loads(text))


@lru_cache(maxsize=4096)
def options_of(spec: str) -> Options:
    """Options from a complete SPEC."""
    return options(spec)


def with_keys(text: str, keys: dict[str, str]) -> str:
    """A SPEC with some keys set; nested specs get their parentheses."""
    spec = parse(text)
    merged = {**spec.keys, **keys}
    items = [
        f"{key}=({value})" if any(c in value for c in ":,=") else f"{key}={value}" for key, value in merged.items()
    ]
    return spec.name + (":" + ",".join(items) if items else "")


def resolved(text: str) -> dict[str, str]:
    """All keys of a policy SPEC, those behind a preset's name too, and its plug-in's name under ``""``."""
    spec = parse(text)
    base = parse(PRESETS[spec.name].spec) if spec.name in PRESETS else spec
    return {**base.keys, **spec.keys, "": base.name}


def size_bytes(text: str) -> int:
    """``24GB``, ``24`` (GB), ``22.3GiB`` in bytes.

    Raises:
        SpecError: not a size.
    """
    digits = text.rstrip("GMKiIBbgmk ")
    unit = text[len(digits) :].strip().upper()
    try:
        size = float(digits) * GB[unit]
        if not 0 < size < 1e18:
            raise ValueError
        return int(size)
    except (ValueError, KeyError):
        raise SpecError(f"--vram is {text!r}; write a size such as 24GB or 22.3GiB") from None


@dataclass(frozen=True)
class Space:
    """Everything a sweep may try.

    Attributes:
        base: values of `FIELDS` and keys of a SPEC that hold where no axis sets them, as texts.
        axes: what varies.
        changes: ``--set`` items, applied before an axis's.
        vram_bytes: the whole model must fit into this; slots that nobody names become the most that do, and widths that
            nobody names all that do.
        references, driver: of every case.
    """

    base: dict[str, str]
    axes: tuple[Axis, ...]
    changes: tuple[str, ...] = ()
    vram_bytes: int | None = None
    references: bool = False
    driver: str = "compiled"

    def __post_init__(self) -> None:
        keys = [axis.key for axis in self.axes]
        for key in keys:
            if keys.count(key) > 1:
                raise SpecError(f"--grid varies {key!r} twice; put all its values into one")
        for key in keys:
            kind, _, name = key.partition(".")
            texts = [v for a in self.axes if a.key == kind for v in a.listed()] or [self.base.get(kind, "")]
            if name and kind == "policy" and not any(name in _parameters(text) for text in texts):
                raise SpecError(
                    f"--grid {key}: none of the policies has it; {texts[0]} has {', '.join(_parameters(texts[0]))}"
                )

    @property
    def varied(self) -> tuple[Axis, ...]:
        """The axes, and the widths if they are to be chosen."""
        keys = [axis.key for axis in self.axes]
        if self.vram_bytes is None or "bits" in keys or "bits" in self.base:
            return self.axes
        return (*self.axes, Axis("bits", tuple(map(str, WIDTHS))))

    def size(self) -> int:
        """Combinations of the grid."""
        return math.prod(len(axis.listed()) for axis in self.varied)

    def grid(self) -> Iterator[dict[str, str]]:
        """All combinations, the last axis fastest."""
        keys = [axis.key for axis in self.varied]
        for values in itertools.product(*(axis.listed() for axis in self.varied)):
            yield dict(zip(keys, values, strict=True))

    def drawn(self, seed: int) -> Iterator[dict[str, str]]:
        """Combinations at random, without end, some of them repeatedly."""
        random = Random(seed)
        while True:
            yield {axis.key: axis.draw(random) for axis in self.varied}

    def case(self, chosen: dict[str, str]) -> Case:
        """One combination as a case.

        Raises:
            FitError: it exceeds the memory, or the model or machine cannot do it.
            SpecError: a value nobody can use.
        """
        values = self.base | chosen
        spec = complete(values)
        tokens = _whole("tokens", values["tokens"], 1) if "tokens" in values else None
        path = values.get("trace") or str(shipped())
        changes = (*self.changes, *(f"{k}={v}" for k, v in chosen.items() if k.startswith(("machine.", "model."))))
        sha256 = trace_sha256(path)
        machine, model = shapes(values["machine"], values.get("model"), path, sha256, changes)
        context = _whole("context", values["context"], 0) if "context" in values else None
        bits = _whole("bits", values.get("bits", "4"), 1)
        if bits not in WIDTHS:
            raise SpecError(f"bits is {bits}; it must be one of {', '.join(map(str, WIDTHS))}")
        cold = bool(convert("cold_sequences", values.get("cold_sequences", "0"), bool))
        shape = model_of(model)
        slots = _whole("slots", values["slots"], 1) if "slots" in values else shape.num_experts // 2
        found = Case(
            path, sha256, tokens, machine, model, spec, bits, slots, cold, context, tuple(chosen.items()), changes,
            self.references, self.driver,
        )  # fmt: skip
        if self.vram_bytes is not None and "slots" not in values:
            found = dataclasses.replace(found, slots=most_slots(found.setting, self.vram_bytes))
        _check(found.setting, self.vram_bytes)
        return found


def complete(values: dict[str, str]) -> str:
    """The policy SPEC of a combination, with every key an axis or a default sets."""
    text = values["policy"]
    named = resolved(text)
    keys: dict[str, str] = {}
    for key in ("cache", "predictor"):
        if key in values and key not in named and values[key] != RUN_DEFAULTS[key]:
            keys[key] = values[key]
    for key, value in values.items():
        kind, _, name = key.partition(".")
        if key in RUN_KEYS and key not in ("cache", "predictor"):
            keys[key] = value
        elif name and kind == "policy" and name in _parameters(text):
            keys[name] = value
        elif name and kind in ("cache", "predictor", "miss"):
            inner = keys.get(kind) or named.get(kind) or values.get(kind) or RUN_DEFAULTS[kind]
            module = registry.plugins(kind).get(parse(inner).name)
            if module is not None and name in module.Params._fields:
                keys[kind] = with_keys(inner, {name: value})
    found = with_keys(text, keys)
    chosen = options_of(found)
    if not chosen.prefetches and "predictor" in parse(found).keys:
        spec = parse(found)
        found = with_keys(spec.name, {k: v for k, v in spec.keys.items() if k != "predictor"})
    return found


RUN_DEFAULTS = {"cache": "lru", "predictor": "recorded", "miss": "load"}


def _parameters(text: str) -> tuple[str, ...]:
    return tuple(plugin("policy", resolved(text)[""], PRESETS).Params._fields) if text else ()


def _whole(name: str, text: str, least: int) -> int:
    value = int(convert(name, text, int))
    if value < least:
        raise SpecError(f"{name} is {value}; it must be at least {least}")
    return value


@lru_cache(maxsize=4096)
def shapes(machine: str, model: str | None, trace: str, sha256: str, changes: tuple[str, ...]) -> tuple[str, str]:
    """Machine and model after all changes, as JSON texts."""
    routed = trace_of(trace, sha256, None)
    named = model or (DEFAULT_MODEL if trace == str(shipped()) else "")
    shape = machines.load_model(named) if named else with_dense_part(routed.model)
    found, shape = machines.override(machines.load_machine(machine), shape, list(changes))
    shape = fit(shape, routed)
    check_reach(found, shape, routed)
    return machine_text(found), json.dumps(shape.to_json(), sort_keys=True)


def with_dense_part(model: ModelSpec) -> ModelSpec:
    """A trace's model; where that states no dense part (a preset's, a converted one), the shipped shape of its name."""
    if model.dense_bytes or model.name not in machines.names(machines.MODELS):
        return model
    known = machines.load_model(model.name)
    same = ("num_layers", "num_experts", "top_k", "hidden_size", "expert_size")
    return known if all(getattr(known, name) == getattr(model, name) for name in same) else model


def machine_text(machine: HardwareProfile) -> str:
    """A machine as JSON text: what its results are known by."""
    return json.dumps(machine.essence(), sort_keys=True)


def _check(setting: Setting, vram_bytes: int | None) -> None:
    check_width(setting)
    try:
        check_slots(setting.model, setting.slots)
        Timing(setting.machine, setting.model, setting.bits, setting.options)
    except SpecError as error:
        raise FitError(str(error)) from None
    if vram_bytes is None:
        return
    device, host = memory(at_full_depth(setting))
    if device > vram_bytes:
        raise FitError(f"{setting.slots} slots at {setting.bits} bits need more than {vram_bytes / 1e9:g} GB")
    if host > setting.machine.host_gb * 1e9:
        raise FitError(f"experts of {setting.bits} bits need more than the host's {setting.machine.host_gb:g} GB")


def check_width(setting: Setting) -> None:
    """Refuse a width that the model's experts cannot have.

    Raises:
        FitError: with the reason.
    """
    try:
        setting.model.expert_bytes(setting.bits)
    except ValueError as error:
        raise FitError(str(error)) from None


def most_slots(setting: Setting, vram_bytes: int) -> int:
    """The most slots a layer with which the whole model fits: dense weights, KV cache, slots, landing and stream slots.

    Raises:
        FitError: not even with ``top_k`` slots, or the model has no such width.
    """
    whole = at_full_depth(setting)
    least, most = whole.model.top_k, whole.model.num_experts

    def fits(slots: int) -> bool:
        return memory(dataclasses.replace(whole, slots=slots))[0] <= vram_bytes

    check_width(setting)
    found = last(least, most, fits)
    if found is None:
        raise FitError(
            f"not even {least} slots a layer fit {vram_bytes / 1e9:g} GB at {setting.bits} bits with "
            f"{context_tokens(whole):,} tokens of context"
        )
    return found


def remedy(setting: Setting, vram_bytes: int) -> str:
    """What fits where `most_slots` finds nothing: fewer bits or a shorter context; else what the least takes."""
    model, context = setting.model, context_tokens(setting)
    whole = at_full_depth(dataclasses.replace(setting, slots=model.top_k))

    def device(bits: int, tokens: int) -> int:
        return memory(dataclasses.replace(whole, bits=bits, context=tokens))[0]

    widths = [bits for bits in WIDTHS if bits < setting.bits and _possible(setting, bits)]
    fewer = [bits for bits in widths if device(bits, context) <= vram_bytes]
    shorter = last(0, context, lambda tokens: device(setting.bits, tokens) <= vram_bytes)
    found = [f"--bits {bits}" for bits in fewer[:1]] + [f"--context {tokens}" for tokens in [shorter] if tokens]
    if found:
        return " or ".join(found) + " does"
    bits = min([setting.bits, *widths])
    return f"no other width or context does: {bits} bits without any context take {device(bits, 0) / 1e9:.3g} GB"


def _possible(setting: Setting, bits: int) -> bool:
    try:
        setting.model.expert_bytes(bits)
        Timing(setting.machine, setting.model, bits, setting.options)
    except ValueError:
        return False
    return True


def last(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number that fits, if every smaller one does too; None if not even ``low``."""
    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
