"""What to run: the Pareto front of VRAM against tokens/s, and one choice from it, which `--choice` reads elsewhere."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim import machine as machines
from sim import noise
from sim.noise import Difference
from sim.results import SCHEMA
from sim.spec import SpecError
from traces import ModelSpec

METRICS = ("tpot", "tokens_per_s")
SAME = ("trace_sha256", "tokens", "machine_sha256", "model_sha256", "context", "cold_sequences")
ROWS = 24
CHOSEN = ("policy", "bits", "slots", "chunk_bytes", "context")
MADE_FOR = ("machine", "machine_file", "machine_sha256", "model", "model_file", "set")

Record = dict[str, Any]


@dataclass(frozen=True)
class Wish:
    """What is best: ``tpot`` and ``tokens_per_s`` the fastest; ``vram:X%`` the smallest within X % of the fastest."""

    metric: str
    within: float = 0.0


def wish(text: str) -> Wish:
    """Parse ``--best``.

    Raises:
        SpecError: none of the three.
    """
    metric, _, share = text.partition(":")
    if metric in METRICS and not share:
        return Wish(metric)
    try:
        within = float(share.removesuffix("%")) / 100
        if metric == "vram" and 0 <= within < 1:
            return Wish("vram", within)
    except ValueError:
        pass
    raise SpecError(
        f"--best is {text!r}; it must be tpot, tokens_per_s, or vram:X% (smallest within X % of the fastest)"
    )


def speed(record: Record) -> float:
    """Tokens/s of the whole model."""
    return float((record.get("scaled") or record)["tokens_per_s"])


def vram(record: Record) -> int:
    """Bytes on the device for the whole model."""
    return int((record.get("scaled") or record)["vram_bytes"])


def groups(records: list[Record]) -> dict[tuple[Any, ...], list[Record]]:
    """Records that may be compared: one trace, machine and model, and one use of them."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record["tokens_per_s"] is not None:
            found.setdefault(tuple(record[name] for name in SAME), []).append(record)
    return found


def front(records: list[Record]) -> list[int]:
    """Indices of the records that no other beats in both VRAM and speed, smallest first."""
    order = sorted(range(len(records)), key=lambda i: (vram(records[i]), -speed(records[i]), records[i]["key"]))
    best, kept = 0.0, []
    for i in order:
        if speed(records[i]) > best:
            kept.append(i)
            best = speed(records[i])
    return kept


@dataclass(frozen=True)
class Choice:
    """One setting, and what it was chosen from.

    Attributes:
        records: all that were compared.
        front: indices of the Pareto front, smallest VRAM first.
        fastest, chosen: indices.
        from_fastest: difference of every record's TPOT from the fastest one's.
    """

    records: list[Record]
    front: list[int]
    fastest: int
    chosen: int
    from_fastest: list[Difference]

    def alike(self) -> list[int]:
        """Records whose speed cannot be told from the fastest one's."""
        return [i for i, d in enumerate(self.from_fastest) if i != self.fastest and not d.real]


def choose(records: list[Record], wanted: Wish, seed: int = 0) -> Choice:
    """The best of comparable records; among those no slower than the noise can tell, the smallest.

    Raises:
        SpecError: no record has a TPOT.
    """
    if not records:
        raise SpecError("no setting has a time per token; the trace must have decode tokens that follow others")
    fastest = max(range(len(records)), key=lambda i: (speed(records[i]), -vram(records[i]), records[i]["key"]))
    differences = noise.differences(records, fastest, seed)
    if wanted.metric == "vram":
        least = speed(records[fastest]) * (1 - wanted.within)
        candidates = [i for i in range(len(records)) if speed(records[i]) >= least]
    else:
        candidates = [i for i, d in enumerate(differences) if i == fastest or (d.low is not None and not d.real)]
    chosen = min(candidates, key=lambda i: (vram(records[i]), -speed(records[i]), records[i]["key"]))
    return Choice(records, front(records), fastest, chosen, differences)


def label(record: Record) -> str:
    """What the figures rest on: those carried over to all layers are estimates."""
    return "ESTIMATED" if record.get("scaled") else str(record["evidence"])


def interval_text(difference: Difference) -> str:
    """A difference in TPOT in words."""
    if difference.low is None or difference.high is None:
        return "too few tokens to tell"
    if not difference.real:
        return "no difference"
    return f"{difference.low * 100:+.1f} to {difference.high * 100:+.1f} %"


def report(choice: Choice, wanted: Wish) -> list[str]:
    """The front and the choice, for reading."""
    first = choice.records[choice.chosen]
    depth = f"all {first['scaled']['layers']} layers" if first.get("scaled") else "all layers"
    lines = [
        f"Pareto front of {len(choice.records):,} settings: {first['model']} on {first['machine']}, {depth} "
        f"({label(first)}, routing {first['routing']})",
        f"  {'VRAM GB':>8} {'tokens/s':>9} {'TPOT ms':>9} {'TPOT from fastest':>22} {'bits':>4} {'slots':>5} "
        f"{'regime':>8}  policy",
    ]
    shown = choice.front[-ROWS:]
    if len(shown) < len(choice.front):
        lines.append(f"  ... {len(choice.front) - len(shown)} smaller and slower ones")
    for i in shown:
        record = choice.records[i]
        other = "fastest" if i == choice.fastest else interval_text(choice.from_fastest[i])
        mark = ">" if i == choice.chosen else " "
        lines.append(
            f"{mark} {vram(record) / 1e9:8.2f} {speed(record):9.3f} {1e3 / speed(record):9.2f} {other:>22} "
            f"{record['bits']:4} {record['slots']:5} {record['regime']:>8}  {record['policy']}"
        )
    lines += [*widths(choice.records), *simpy(choice.records)]
    lines.append(f"intervals: 95 %, paired, {noise.SEEDS} resamples ({noise.source(first)})")
    alike = choice.alike()
    if alike:
        some = choice.records[min(alike, key=lambda i: abs(choice.from_fastest[i].mean))]
        lines.append(
            f"no difference from the fastest: {len(alike):,} other settings, such as {some['policy']} at "
            f"{some['bits']} bits, {some['slots']} slots"
        )
    why = (
        f"smallest within {wanted.within * 100:g} % of the fastest"
        if wanted.metric == "vram"
        else ("fastest" if choice.chosen == choice.fastest else "no difference from the fastest, and less VRAM")
    )
    lines.append(
        f"choice ({why}): {first['policy']}, {first['bits']} bits, {first['slots']} slots: "
        f"{speed(first):.3f} tokens/s, {vram(first) / 1e9:.2f} GB ({label(first)})"
    )
    return lines


def widths(records: list[Record]) -> list[str]:
    """The fastest setting at each width, where there are several: speed is not all that differs between them."""
    fastest: dict[int, Record] = {}
    for record in records:
        if record["bits"] not in fastest or speed(record) > speed(fastest[record["bits"]]):
            fastest[record["bits"]] = record
    if len(fastest) < 2:
        return []
    lines = ["fastest at each width (fewer bits change the model's quality, which no figure here contains):"]
    for bits in sorted(fastest, reverse=True):
        record = fastest[bits]
        lines.append(
            f"  {bits:2} bits: {speed(record):.3f} tokens/s, {vram(record) / 1e9:.2f} GB, {record['slots']} slots, "
            f"{record['policy']}"
        )
    return lines


def simpy(records: list[Record]) -> list[str]:
    """How many did not run in the compiled driver, if some did."""
    slow = sum(record["driver"] == "simpy" for record in records)
    return [f"{slow:,} settings ran in the SimPy driver"] if slow else []


def document(choice: Choice, wanted: Wish) -> dict[str, Any]:
    """The choice file: what the commands read, then what it rests on."""
    record = choice.records[choice.chosen]
    difference = choice.from_fastest[choice.chosen]
    found: dict[str, Any] = {key: record[key] for key in ("policy", "bits", "slots", "chunk_bytes")}
    if record["context"] is not None:
        found["context"] = record["context"]
    return found | {
        "schema": SCHEMA,
        "made_by": "sim.sweep",
        "best": wanted.metric if not wanted.within else f"vram:{wanted.within * 100:g}%",
        "record": record["key"],
        "trace_sha256": record["trace_sha256"],
        "machine": record["machine"],
        "machine_sha256": record["machine_sha256"],
        "model": record["model"],
        "set": record["set"],
        "tokens_per_s": speed(record),
        "vram_bytes": vram(record),
        "regime": record["regime"],
        "evidence": label(record),
        "routing": record["routing"],
        "settings": len(choice.records),
        "tpot_from_fastest": [difference.mean, difference.low, difference.high],
        "noise": noise.source(record),
    }


def write(path: str, content: dict[str, Any]) -> None:
    """A choice file, complete or not at all."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def files(named: dict[str, str | None]) -> dict[str, str]:
    """Keys of a choice file for what was named by a file: without it the name alone would not be found again.

    Args:
        named: machine and model as they were given, by a flag or an axis.
    """
    given = {f"{kind}_file": text for kind, text in named.items() if text is not None and text.endswith(".json")}
    return {key: str(Path(text).absolute()) for key, text in given.items()}


def read_choice(path: str) -> dict[str, Any]:
    """The known keys of a choice file: what was chosen (`CHOSEN`), and what for (`MADE_FOR`).

    Raises:
        SpecError: unreadable, not a JSON object, nothing chosen, or a value of the wrong kind.
    """
    keys = ", ".join(CHOSEN)
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise SpecError(f"--choice {path}: {error}; it must be a JSON file with {keys}") from None
    if not isinstance(content, dict):
        raise SpecError(f"--choice {path} holds no JSON object; it must have {keys}")
    found = {k: content[k] for k in (*CHOSEN, *MADE_FOR) if content.get(k) is not None}
    if not any(key in found for key in CHOSEN):
        raise SpecError(f"--choice {path} chooses nothing; it must have one or more of {keys}")
    for key, value in found.items():
        if key == "set":
            good, needed = type(value) is list and all(type(item) is str for item in value), "a list of strings"
        elif key == "policy" or key in MADE_FOR:
            good, needed = type(value) is str, "a string"
        else:
            good, needed = type(value) is int, "an integer"
        if not good:
            raise SpecError(f"--choice {path}: {key} is {value!r}; it must be {needed}")
    return found


def made_for_another(choice: dict[str, Any], model: ModelSpec) -> str | None:
    """One line if a choice was made for a model of another shape than the one that runs; None if not.

    Shapes are compared where the choice's model is known here, names else: a checkpoint's is its folder's.
    """
    named = choice.get("model")
    if named is None or named == model.name:
        return None
    try:
        known = machines.load_model(choice.get("model_file", named))
    except SpecError:
        return f"the choice was made for {named}; this is {model.name}"
    if _shape(known) == _shape(model):
        return None
    return f"the choice was made for {named}; {model.name} is of another shape"


def _shape(model: ModelSpec) -> tuple[int, ...]:
    layers = model.full_layers or model.num_layers
    return layers, model.num_experts, model.top_k, model.hidden_size, model.expert_size
