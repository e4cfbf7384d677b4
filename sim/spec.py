"""SPEC strings: ``name[:key=value{,key=value}]``; a nested spec stands in parentheses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from sim import registry
from sim.presets import PRESETS

AUTO_CHUNK_MULTIPLE = 4096
MOST_CHUNKS = 4096


class SpecError(ValueError):
    """A spec, option or combination that cannot be used; one sentence."""


class Spec(NamedTuple):
    """A parsed string: a name and its keys, values still strings."""

    name: str
    keys: dict[str, str]


def parse(text: str) -> Spec:
    """Split a SPEC into its name and keys.

    Raises:
        SpecError: empty name, a key without value, a key given twice, or parentheses that do not match.
    """
    name, _, rest = text.strip().partition(":")
    if not name or not name.replace("_", "").replace("-", "").isalnum():
        raise SpecError(f"spec {text!r} has no proper name; write name or name:key=value,key=value")
    keys: dict[str, str] = {}
    for item in _split(rest, text):
        key, equals, value = item.partition("=")
        key, value = key.strip(), value.strip()
        if not equals or not key or not value:
            raise SpecError(f"spec {text!r}: {item!r} is not key=value")
        if key in keys:
            raise SpecError(f"spec {text!r} gives {key!r} twice; give it once")
        if value.startswith("(") and value.endswith(")"):
            value = value[1:-1]
        keys[key] = value
    return Spec(name, keys)


def _split(rest: str, text: str) -> list[str]:
    items: list[str] = []
    depth = 0
    start = 0
    for i, char in enumerate(rest):
        depth += (char == "(") - (char == ")")
        if depth < 0:
            break
        if char == "," and depth == 0:
            items.append(rest[start:i])
            start = i + 1
    if depth:
        raise SpecError(f"spec {text!r}: the parentheses do not match")
    if rest:
        items.append(rest[start:])
    return items


@dataclass(frozen=True)
class Bound:
    """A plug-in with its parameters: ``module.function(params, ...)``."""

    module: Any
    params: Any

    @property
    def name(self) -> str:
        return str(self.module.__name__.rpartition(".")[2])

    @property
    def needs_future(self) -> bool:
        return bool(getattr(self.module, "NEEDS_FUTURE", False))

    def text(self) -> str:
        """As a spec, parameters that differ from their defaults only."""
        defaults = type(self.params)._field_defaults
        changed = [f"{k}={v}" for k, v in self.params._asdict().items() if defaults.get(k, ...) != v]
        return self.name + (":" + ",".join(changed) if changed else "")


def plugin(kind: str, name: str, others: Iterable[str] = ()) -> ModuleType:
    """The plug-in of a kind by its name; files of the kind that cannot be used are said on standard error, once.

    Raises:
        SpecError: its file cannot be used; or there is none, and what is known is listed, with ``others``.
    """
    found = registry.plugins(kind)
    if name in found.left_out:
        raise SpecError(found.left_out[name])
    if name not in found:
        raise SpecError(f"{kind} {name!r} is unknown; known are {', '.join([*found, *others])}")
    found.say_left_out()
    return found[name]


def bind(kind: str, spec: Spec) -> Bound:
    """Find the plug-in of ``kind`` and give it its parameters.

    Raises:
        SpecError: as `plugin`; an unknown key, or a value of the wrong type; what is allowed is listed.
    """
    module = plugin(kind, spec.name)
    fields = module.Params._field_defaults
    for key in spec.keys:
        if key not in fields:
            allowed = ", ".join(fields) or "none"
            raise SpecError(f"{kind} {spec.name!r} has no parameter {key!r}; its parameters: {allowed}")
    values = {k: convert(f"{spec.name}: {k}", v, type(fields[k])) for k, v in spec.keys.items()}
    return Bound(module, module.Params(**values))


def convert(where: str, value: str, kind: type) -> Any:
    """``value`` as ``kind`` (int, float, bool or str).

    Raises:
        SpecError: it is not one.
    """
    try:
        if kind is bool:
            return bool({"0": 0, "1": 1, "false": 0, "true": 1}[value.lower()])
        found = kind(value)
        if kind is float and not math.isfinite(found):
            raise ValueError
        return found
    except (ValueError, KeyError):
        names = {int: "an integer", float: "a finite number", bool: "0 or 1"}
        raise SpecError(f"{where} is {value!r}; it must be {names.get(kind, kind.__name__)}") from None


@dataclass(frozen=True)
class Options:
    """How a run is scheduled: the policy and everything around it.

    Attributes:
        policy, cache: plug-ins with parameters.
        predictor: spec of a predictor, or the name of guesses recorded in the trace.
        miss: spec of the rule for misses: all are loaded (``load``), or the host computes some.
        stale: fate of a prefetch whose layer was routed without it: ``retract`` or ``keep``.
        landing_slots: slots prefetches land in; cache slots for a policy that never prefetches; with 0, prefetches
            evict when they are issued.
        stream_slots: slots that experts of too large a visit pass through.
        write_back: copy every victim back to the host.
        copy_stream: copies run beside compute; without it they are serial with it.
        chunk_bytes: copies are cut into chunks of this size; 0 is one chunk, -N is N chunks of an expert.
        max_submitted: chunks in the copy engine's hands at once.
        guard: prefetch only while that is not slower than on_demand on the virtual link clock (`sim.guard`).
        extra_slots: cache slots more, over the first layers: what evens out the landing slots of compared policies.
    """

    policy: Bound
    cache: Bound
    predictor: str = "recorded"
    miss: str = "load"
    stale: str = "retract"
    landing_slots: int = 0
    stream_slots: int = 2
    write_back: bool = False
    copy_stream: bool = True
    chunk_bytes: int = -16
    max_submitted: int = 2
    guard: bool = False
    extra_slots: int = 0
    text: str = ""

    def __post_init__(self) -> None:
        bind("miss", parse(self.miss))
        guesser = parse(self.predictor).name
        if self.prefetches and guesser in registry.plugins("predictor").left_out:
            plugin("predictor", guesser)
        if self.stale not in ("retract", "keep"):
            raise SpecError(f"stale is {self.stale!r}; it must be retract or keep")
        for name, least in (
            ("landing_slots", 0),
            ("stream_slots", 1),
            ("chunk_bytes", -MOST_CHUNKS),
            ("max_submitted", 1),
        ):
            if getattr(self, name) < least:
                raise SpecError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.prefetches and not self.lookahead >= 1:
            raise SpecError(f"lookahead is {self.lookahead}; it must be at least 1")
        if self.whole_layer and self.copy_stream:
            raise SpecError(f"{self.policy.name} copies whole layers beside no compute; leave copy_stream=0 as it is")
        if self.whole_layer and hasattr(self.miss_rule.module, "loads"):
            raise SpecError(
                f"{self.policy.name} loads whole layers, so miss={self.miss} has nothing to say; leave it out"
            )

    @property
    def prefetches(self) -> bool:
        """Whether the policy ever loads before the routing is known."""
        return hasattr(self.policy.module, "worth")

    @property
    def miss_rule(self) -> Bound:
        """The rule for misses with its parameters."""
        return bind("miss", parse(self.miss))

    @property
    def whole_layer(self) -> bool:
        """Whether a visit loads every expert of its layer."""
        return bool(getattr(self.policy.module, "WHOLE_LAYER", False))

    @property
    def pooled(self) -> bool:
        """Whether all layers share one pool of slots."""
        return self.whole_layer or bool(getattr(self.cache.module, "POOLED", False))

    @property
    def guarded(self) -> bool:
        """Whether a guard watches the prefetching."""
        return self.guard and self.prefetches

    def without_prefetching(self) -> Options:
        """The same run on demand: what a guard compares with."""
        return self.replace(policy=bind("policy", Spec("on_demand", {})), guard=False)

    @property
    def lookahead(self) -> int:
        """Layers ahead the policy looks; 0 when it does not."""
        return int(self.policy.params.lookahead) if self.prefetches else 0

    def needs_future(self) -> list[str]:
        """Names of plug-ins in use that know future routing."""
        plugins = [self.policy, self.cache]
        predictor = parse(self.predictor)
        if self.prefetches and predictor.name in registry.plugins("predictor"):
            plugins.append(bind("predictor", predictor))
        return [p.name for p in plugins if p.needs_future]

    def chunk_size(self, expert_bytes: int) -> int:
        """Bytes of one chunk for experts of that size."""
        if self.chunk_bytes == 0:
            return expert_bytes
        if self.chunk_bytes > 0:
            return min(self.chunk_bytes, expert_bytes)
        multiple = AUTO_CHUNK_MULTIPLE if expert_bytes >= -self.chunk_bytes * AUTO_CHUNK_MULTIPLE else 64
        return min(expert_bytes, -(-expert_bytes // (-self.chunk_bytes * multiple)) * multiple)

    def replace(self, **changes: Any) -> Options:
        return dataclasses.replace(self, **changes)


RUN_KEYS = {f.name: f for f in dataclasses.fields(Options) if f.name not in ("policy", "text", "extra_slots")}


def options(text: str, cache: str = "lru", predictor: str = "recorded", **defaults: Any) -> Options:
    """Options from a policy SPEC or the name of a preset; ``cache`` and ``predictor`` for specs that name none.

    A key in the spec wins over ``defaults``, and these win over the policy's own ``OPTIONS``.

    Raises:
        SpecError: anything unknown or out of range, in one sentence.
    """
    spec = parse(text)
    keys: dict[str, str] = {}
    if spec.name in PRESETS:
        base = parse(PRESETS[spec.name].spec)
        keys, spec = {**base.keys, **spec.keys}, Spec(base.name, {})
    keys |= spec.keys
    plugin("policy", spec.name, PRESETS)
    own = {k: v for k, v in keys.items() if k not in RUN_KEYS}
    policy = bind("policy", Spec(spec.name, own))
    values: dict[str, Any] = {**own_options(policy), **defaults}
    for key, value in keys.items():
        if key in RUN_KEYS and key not in ("cache", "predictor"):
            values[key] = convert(key, value, type(RUN_KEYS[key].default))
    chosen = bind("cache", parse(keys.get("cache", cache)))
    return Options(policy=policy, cache=chosen, predictor=keys.get("predictor", predictor), text=text, **values)


def own_options(policy: Bound) -> dict[str, Any]:
    """What a policy's ``OPTIONS`` set of a run.

    Raises:
        SpecError: they are no dict, set what a policy does not, or to a value of the wrong type.
    """
    found = getattr(policy.module, "OPTIONS", {})
    kinds = {key: type(field.default) for key, field in RUN_KEYS.items() if key not in ("cache", "predictor")}
    if not isinstance(found, dict) or not all(
        key in kinds and isinstance(value, str if kinds[key] is str else int) for key, value in found.items()
    ):
        allowed = ", ".join(f"{key} ({kind.__name__})" for key, kind in kinds.items())
        raise SpecError(
            f"policy {policy.name!r} has OPTIONS = {found!r}; in {policy.module.__file__}, make it a dict of {allowed}"
        )
    return dict(found)


def comparable(texts: list[str], cache: str = "lru", predictor: str = "recorded", **defaults: Any) -> list[Options]:
    """Options of policies that are compared: all have the same slots in all, cache and landing slots together.

    A policy that never prefetches gets as many landing slots as the others, as cache slots; one with fewer landing
    slots than another gets the difference as cache slots.

    Raises:
        SpecError: as `options`.
    """
    runs = [options(text, cache, predictor, **defaults) for text in texts]
    landing = max((run.landing_slots for run in runs if run.prefetches), default=0)
    return [
        run.replace(extra_slots=landing - run.landing_slots)
        if run.prefetches
        else options(run.text, cache, predictor, **{"landing_slots": landing, **defaults})
        for run in runs
    ]
