"""Machines and model shapes: loaded by name or file, changed field by field with ``--set``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sim.spec import SpecError
from traces import ModelSpec

PROFILES = Path(__file__).parent / "profiles"
MODELS = Path(__file__).parent / "models"
MOST_S = 60.0  # that a step may take


@dataclass(frozen=True)
class LinkProfile:
    """The host-device connection, page-locked copies.

    Attributes:
        h2d_gb_s, d2h_gb_s: decimal GB/s of each direction alone.
        h2d_fixed_s, d2h_fixed_s: fixed cost of one copy (chunk).
        h2d_duplex_gb_s: H2D while D2H is busy.
        h2d_host_gb_s: H2D while the host computes experts from the same memory; 0 is as fast as alone.
    """

    h2d_gb_s: float
    h2d_fixed_s: float
    d2h_gb_s: float
    d2h_fixed_s: float
    h2d_duplex_gb_s: float
    h2d_host_gb_s: float = 0.0


@dataclass(frozen=True)
class Operators:
    """Measured laws of one model on one machine: seconds = fixed + slope x quantity.

    Attributes:
        dense: fixed, per token, per token of context: one layer's attention, norms and router, with the copy that
            brings the routing to the host.
        expert: by bits: fixed, per token, for one expert.
        head: fixed, per token: after the last layer until the next token is chosen and embedded.
        gates: by lookahead distance (1, 2, ...): all guesses up to that distance, added to ``dense``.
        host_s: planning and bookkeeping of one visit by policy or SPEC; ``prefetching`` for others that look ahead,
            ``default`` for the rest.
        displaced: by the same names: a visit's dense part takes so much longer, and every expert, than with nothing to
            plan, load or guess: that has displaced their data and code from the processor's caches. Measured in
            decode, at the first width.
        host_expert: like ``expert``, computed on the host.
        cooling: by the same names: computing after a wait takes longer by this share of the wait, and at most by so
            many seconds: caches hold less of the model and the program then.
        reach: most ``tokens`` in a pass and most ``context`` that were measured; absent: not known.
        control_s: a fixed piece of work (`runtime.calibration.steadiness`) took so long meanwhile; 0: not known.
        residuals: by operator (``dense``, ``expert``, ``host``, ``link``): quantiles of measured / predicted time,
            evenly spaced from the smallest to the largest; what `sim.noise` jitters timings by. Absent: a stated width.
    """

    dense: tuple[float, float, float]
    expert: dict[str, tuple[float, float]]
    head: tuple[float, float]
    gates: tuple[float, ...] = ()
    host_s: dict[str, float] = field(default_factory=dict)
    displaced: dict[str, tuple[float, float]] = field(default_factory=dict)
    host_expert: dict[str, tuple[float, float]] = field(default_factory=dict)
    cooling: dict[str, tuple[float, float]] = field(default_factory=dict)
    reach: dict[str, float] = field(default_factory=dict)
    control_s: float = 0.0
    residuals: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class HardwareProfile:
    """What a machine takes: published or measured.

    Attributes:
        vram_gb, host_gb: memory on the device and beside it.
        memory_gb_s, memory_efficiency: device memory bandwidth and the share of it a kernel reaches.
        tflops, tflops_efficiency: 16-bit arithmetic and the share of it reached.
        layer_fixed_s, expert_fixed_s, head_fixed_s: launches of one layer's dense part, one expert, the head.
        sync_s: bringing the routing to the host, once per layer.
        host_s: planning one visit.
        wake_s: waking the copier after a plan, and the waiting engine after an arrival; charged once a plan.
        serial_s: where copies and computing take turns, until the end of copies in one direction is known.
        host_memory_gb_s, host_memory_efficiency: bandwidth of the host's memory and the share of it an expert computed
            there reaches; what the link takes meanwhile is lost to it. 0: the host computes no experts.
        host_tflops, host_expert_fixed_s: arithmetic the host reaches on experts (0: no limit), and a fixed cost of
            each.
        evidence: ``ESTIMATED`` (published figures) or ``MEASURED``.
        operators: measured laws by model name; they replace the roofline for that model.
        sources: where each value comes from, by dotted field name.
    """

    name: str
    vram_gb: float
    host_gb: float
    link: LinkProfile
    memory_gb_s: float = 0.0
    memory_efficiency: float = 0.65
    tflops: float = 0.0
    tflops_efficiency: float = 0.5
    layer_fixed_s: float = 0.0
    expert_fixed_s: float = 0.0
    head_fixed_s: float = 0.0
    sync_s: float = 0.0
    host_s: float = 0.0
    wake_s: float = 0.0
    serial_s: float = 0.0
    host_memory_gb_s: float = 0.0
    host_memory_efficiency: float = 0.6
    host_tflops: float = 0.0
    host_expert_fixed_s: float = 0.0
    evidence: str = "ESTIMATED"
    operators: dict[str, Operators] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The profile file's content."""
        values = dataclasses.asdict(self)
        evidence, sources = values.pop("evidence"), values.pop("sources")
        return {"machine": values, "evidence": evidence, "sources": sources}

    def essence(self) -> dict[str, Any]:
        """The file's content without sources and without what has its default value: what results are known by, so
        that a field which a later version adds, and by default changes nothing, makes them no strangers.
        """
        values = _beyond_defaults(self)
        values.pop("sources", None)
        return {"machine": values, "evidence": values.pop("evidence", self.evidence)}


def _beyond_defaults(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _beyond_defaults(item) for key, item in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    found = {}
    for one in dataclasses.fields(value):
        default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        if getattr(value, one.name) != default:
            found[one.name] = _beyond_defaults(getattr(value, one.name))
    return found


def names(folder: Path) -> list[str]:
    """Names of the shipped profiles or models."""
    return sorted(p.stem for p in folder.glob("*.json"))


def _read(kind: str, folder: Path, name_or_file: str) -> dict[str, Any]:
    path = Path(name_or_file)
    if path.suffix != ".json":
        path = folder / f"{name_or_file}.json"
    if not path.is_file():
        known = ", ".join(names(folder))
        raise SpecError(f"{kind} {name_or_file!r} not found; name one of {known}, or a .json file")
    try:
        content = json.loads(path.read_text())
        values = content[kind]
        if not isinstance(values, dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise SpecError(f"{path.name} is no {kind} file: it must be JSON with an object {kind!r}") from None
    found: dict[str, Any] = content
    return found


def load_machine(name_or_file: str) -> HardwareProfile:
    """A shipped profile by name, or a profile file.

    Raises:
        SpecError: not found, not a profile, or an unknown or missing field.
    """
    content = _read("machine", PROFILES, name_or_file)
    return machine_from(content["machine"], content.get("evidence", "ESTIMATED"), content.get("sources", {}))


def machine_from(values: Any, evidence: Any, sources: Any) -> HardwareProfile:
    """Build a profile from a profile file's parts.

    Raises:
        SpecError: a field is unknown, missing or of another kind.
    """
    known = {f.name for f in dataclasses.fields(HardwareProfile)} - {"evidence", "sources"}
    values = _complete("machine", values, HardwareProfile)
    unknown = set(values) - known
    if unknown:
        raise SpecError(f"machine field {sorted(unknown)[0]!r} is unknown; known are {', '.join(sorted(known))}")
    for name, text in (("machine.name", values["name"]), ("evidence", evidence)):
        if not isinstance(text, str):
            raise SpecError(f"{name} is {text!r:.80}; it must be a string")
    link = _complete("machine.link", values["link"], LinkProfile)
    speeds = {name: _positive(f"machine.link.{name}", v) for name, v in link.items()}
    strange = speeds.keys() - {f.name for f in dataclasses.fields(LinkProfile)}
    if strange:
        raise SpecError(f"machine.link has the field {min(strange)!r}, which is unknown; leave it out")
    laws = {m: _complete(f"machine.operators.{m}", law, Operators) for m, law in values.get("operators", {}).items()}
    plain = {k: v for k, v in values.items() if k not in ("link", "operators", "name")}
    numbers: dict[str, Any] = {k: _positive(f"machine.{k}", v) for k, v in plain.items()}
    return HardwareProfile(
        name=values["name"],
        link=LinkProfile(**speeds),
        operators={model: _operators(f"machine.operators.{model}", law) for model, law in laws.items()},
        evidence=evidence,
        sources=_object("sources", sources),
        **numbers,
    )


def _object(where: str, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise SpecError(f"{where} is {values!r:.80}; it must be an object")
    return values


def _complete(where: str, values: Any, of: type) -> dict[str, Any]:
    """Refuse what is no object, lacks a field that the class has no default for, or has no object where it has one."""
    found = _object(where, values)
    for one in dataclasses.fields(of):
        if one.name in found:
            if str(one.type).startswith("dict"):
                _object(f"{where}.{one.name}", found[one.name])
        elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise SpecError(f"{where}.{one.name} is missing; a profile must have it")
    return found


def _operators(where: str, law: dict[str, Any]) -> Operators:
    def seconds(key: str, numbers: Any, length: int = 0) -> tuple[float, ...]:
        if not isinstance(numbers, list | tuple) or (length and len(numbers) != length):
            raise SpecError(f"{where}.{key} is {numbers!r}; it must be a list of {length or 'any number of'} seconds")
        return tuple(_positive(f"{where}.{key}", number) for number in numbers)

    fixed, token, context = seconds("dense", law["dense"], 3)

    def pairs(key: str) -> dict[str, tuple[float, float]]:
        found = {name: seconds(f"{key}.{name}", numbers, 2) for name, numbers in law.get(key, {}).items()}
        return {name: (first, second) for name, (first, second) in found.items()}

    head = seconds("head", law["head"], 2)
    return Operators(
        dense=(fixed, token, context),
        expert=pairs("expert") if law["expert"] else {},
        head=(head[0], head[1]),
        gates=seconds("gates", law.get("gates", ())),
        host_s={policy: _positive(f"{where}.host_s.{policy}", s) for policy, s in law.get("host_s", {}).items()},
        displaced=pairs("displaced"),
        host_expert=pairs("host_expert"),
        cooling=pairs("cooling"),
        control_s=_positive(f"{where}.control_s", law.get("control_s", 0.0)),
        reach=_reach(f"{where}.reach", law.get("reach", {})),
        residuals={name: _ratios(f"{where}.residuals.{name}", r) for name, r in law.get("residuals", {}).items()},
    )


def _reach(where: str, values: Any) -> dict[str, float]:
    if not isinstance(values, dict) or not set(values) <= {"tokens", "context"}:
        raise SpecError(f"{where} is {values!r}; it must be an object of tokens and context")
    return {name: _positive(f"{where}.{name}", value) for name, value in values.items()}


RESIDUALS = ("dense", "expert", "host", "link")


def _ratios(where: str, values: Any) -> tuple[float, ...]:
    if where.rpartition(".")[2] not in RESIDUALS:
        raise SpecError(f"{where} is of no operator; residuals are of {', '.join(RESIDUALS)}")
    if not isinstance(values, list | tuple) or len(values) < 2:
        raise SpecError(f"{where} is {values!r}; it must be a list of at least two quantiles of measured / predicted")
    ratios = tuple(_positive(where, value) for value in values)
    if list(ratios) != sorted(ratios) or ratios[0] <= 0:
        raise SpecError(f"{where} must be above 0 and rise from quantile to quantile")
    if not 0.1 <= ratios[len(ratios) // 2] <= 10:
        raise SpecError(f"{where} has the median {ratios[len(ratios) // 2]:g}; measured / predicted is 0.1 to 10 there")
    return ratios


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e18:
        raise SpecError(f"{name} is {value!r}; it must be a number, 0 or larger")
    if value > MOST_S and name.endswith("_s") and not name.endswith("_gb_s"):
        raise SpecError(f"{name} is {value!r} seconds; it must be at most {MOST_S:g}")
    as_alone = value == 0 and name.endswith("h2d_host_gb_s")
    if name.endswith("_gb_s") and ".link." in name and value < 1e-9 and not as_alone:
        raise SpecError(f"{name} is {value!r}; a bandwidth must be above 0")
    return float(value)


def paced(machine: HardwareProfile, gb_s: float | None) -> HardwareProfile:
    """The machine with its link at ``gb_s`` in both directions, as an engine paces it; unchanged for None."""
    if gb_s is None:
        return machine
    link = dataclasses.replace(machine.link, h2d_gb_s=gb_s, d2h_gb_s=gb_s, h2d_duplex_gb_s=gb_s)
    return dataclasses.replace(machine, link=link)


def load_model(name_or_file: str) -> ModelSpec:
    """A shipped model shape by name, or a file.

    Raises:
        SpecError: not found or not a model shape.
    """
    try:
        return ModelSpec.from_json(_read("model", MODELS, name_or_file)["model"])
    except SpecError:
        raise
    except ValueError as error:
        raise SpecError(str(error)) from None


def override(machine: HardwareProfile, model: ModelSpec, items: list[str]) -> tuple[HardwareProfile, ModelSpec]:
    """Apply ``--set machine.link.h2d_gb_s=52`` style changes.

    Raises:
        SpecError: not KEY=VALUE, an unknown field, or a value of the wrong kind.
    """
    for item in items:
        key, equals, text = item.partition("=")
        root, _, path = key.partition(".")
        if not equals or root not in ("machine", "model") or not path:
            raise SpecError(f"--set {item!r}: write machine.FIELD=VALUE or model.FIELD=VALUE")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if root == "machine":
            values = machine.to_json()
            _assign(values["machine"], path, value, key)
            sources = machine.sources | {path: "set by the user"}
            machine = machine_from(values["machine"], "ESTIMATED", sources)
        else:
            fields = model.to_json()
            _assign(fields, path, value, key)
            try:
                model = ModelSpec.from_json(fields)
            except ValueError as error:
                raise SpecError(f"--set {item}: {error}") from None
    return machine, model


def _assign(values: dict[str, Any], path: str, value: Any, key: str) -> None:
    """Set the field at a dotted path; names on the way, such as a model's, may have dots themselves."""
    holder, name = _place(values, path, key)
    holder[name] = value


def _place(values: dict[str, Any], path: str, key: str) -> tuple[dict[str, Any], str]:
    if path in values and not isinstance(values[path], dict):
        return values, path
    refused = SpecError(f"--set {key}: there is no field {path!r}; fields: {', '.join(values)}")
    for name in sorted(values, key=len):
        if isinstance(values[name], dict) and path.startswith(f"{name}."):
            try:
                return _place(values[name], path.removeprefix(f"{name}."), key)
            except SpecError as error:
                refused = error
    raise refused
