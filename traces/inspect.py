"""Describe a trace: what made it, and how its routing behaves.

python -m traces.inspect [FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from traces import stats
from traces.cli import Parser
from traces.format import load, shipped
from traces.trace import Trace, TraceError
from traces.vocabulary import DECODE

_LRU_COLUMNS = 8  # slot counts shown in the table; the JSON line has them all


def describe(trace: Trace, cold_sequences: bool = False) -> dict[str, Any]:
    """All figures of a trace as one JSON object; what cannot be computed (no decode, no target) is null.

    Shares and probabilities are 0 to 1, divergence is in bits; ``recall[d - 1][l][m - 1]`` is of the first m guesses
    made at layer l for layer l + d. Their definitions: ``traces.stats``.
    """
    model = trace.model
    columns: dict[str, npt.NDArray[Any]] = {
        **stats.balance(trace)._asdict(),
        **{f"repeat_{name}": values for name, values in stats.repeat(trace)._asdict().items()},
    }
    if (divergence := stats.domain_divergence(trace)) is not None:
        columns["domain_divergence_bits"] = divergence
    accesses = trace.num_decode_tokens * model.top_k
    hits = stats.lru_hits(trace, cold_sequences)
    shares = hits / accesses if accesses else np.full(hits.shape, np.nan)
    return {
        "model": model.to_json(),
        "provenance": trace.provenance,
        "routing": trace.routing,
        "tokens": {"prefill": trace.num_tokens - trace.num_decode_tokens, "decode": trace.num_decode_tokens},
        "sequences": len(trace.sequence_lengths),
        "domains": _domains(trace),
        "router_logits": trace.logits is not None,
        "cold_sequences": cold_sequences,
        "layers": {name: _plain(values) for name, values in columns.items()},
        "lru": {
            "slots": list(range(model.top_k, model.num_experts + 1)),
            "decode_accesses": accesses * model.num_layers,
            "hits": hits.sum(axis=0).tolist(),
            "hit_share": _plain(shares.mean(axis=0)),
            "hit_share_by_layer": _plain(shares),
        },
        "predictors": {
            name: {"wrap": table.wrap, "recall": _plain(stats.recall(trace, name))}
            for name, table in trace.guesses.items()
        },
    }


def _domains(trace: Trace) -> dict[str, dict[str, int]]:
    starts = trace.sequence_starts()
    domains: dict[str, dict[str, int]] = {}
    for sequence, name in enumerate(trace.domains):
        decode = int(np.count_nonzero(trace.phase[starts[sequence] : starts[sequence + 1]] == DECODE))
        counts = domains.setdefault(name, {"sequences": 0, "prefill": 0, "decode": 0})
        counts["sequences"] += 1
        counts["prefill"] += int(trace.sequence_lengths[sequence]) - decode
        counts["decode"] += decode
    return domains


def _plain(values: npt.NDArray[Any]) -> Any:
    """Nested lists, rounded to 6 decimals, with null in place of NaN."""
    if values.ndim > 1:
        return [_plain(row) for row in values]
    if values.dtype.kind != "f":
        return values.tolist()
    return [None if math.isnan(value) else round(value, 6) for value in values.tolist()]


def report(figures: dict[str, Any]) -> list[str]:
    """The lines for people to read."""
    model, tokens, lru = figures["model"], figures["tokens"], figures["lru"]
    lines = [
        f"model       {model['name']}: {model['num_layers']} MoE layers, {model['num_experts']} experts, "
        f"top-{model['top_k']}",
        f"routing     {figures['routing']}{', with router logits' if figures['router_logits'] else ''}",
        f"tokens      {tokens['prefill']} prefill, {tokens['decode']} decode, in {figures['sequences']} sequences",
    ]
    for name, counts in figures["domains"].items():
        parts = f"{counts['prefill']} prefill, {counts['decode']} decode"
        lines.append(f"  {name}: {parts}, in {counts['sequences']} sequences")
    lines += [
        f"provenance  {json.dumps(key)[1:-1]}: {json.dumps(value)}" for key, value in figures["provenance"].items()
    ]
    shown = _spread(range(len(lru["slots"])), _LRU_COLUMNS)
    titles = {
        "busiest_share": "busiest",
        "entropy": "entropy",
        "unused": "unused",
        "repeat_in_order": "repeat",
        "repeat_shuffled": "shuffled",
        "repeat_shuffled_within": "within",
        "domain_divergence_bits": "domains",
    }
    columns = {titles[key]: values for key, values in figures["layers"].items()}
    for i in shown:
        columns[f"lru {lru['slots'][i]}"] = [layer[i] for layer in lru["hit_share_by_layer"]]
    caches = "emptied where a sequence starts" if figures["cold_sequences"] else "carried over between sequences"
    lines += [
        "",
        f"busiest: largest share of accesses (even is {1 / model['num_experts']:.3f}); entropy: of the shares, 1 is "
        "even; unused: experts never routed;",
        "repeat: share of a decode token's experts that the token before used; shuffled, within: the same with all "
        "decode tokens, or each sequence's, in random order;",
        *(["domains: how far expert use differs between them, in bits;"] if "domains" in columns else []),
        f"lru N: share of decode accesses that hit with N slots a layer, {caches}.",
        *_table("layer", columns),
    ]
    for name, predictor in figures["predictors"].items():
        lines += ["", *_recall_lines(name, predictor, model["top_k"])]
    return lines


def _recall_lines(name: str, predictor: dict[str, Any], top_k: int) -> list[str]:
    by_distance = predictor["recall"]
    guesses = len(by_distance[0][0])
    first = min(top_k, guesses)
    columns = {f"d={d}": [row[first - 1] for row in layers] for d, layers in enumerate(by_distance, 1)}
    lines = [
        f"{name}{', wraps to the next token' if predictor['wrap'] else ''}: recall@{first} by lookahead distance, "
        "guessed at layer (decode tokens)",
        *_table("layer", columns),
    ]
    for m in range(1, guesses + 1):
        means = (f"d={d} {_cell(_mean([row[m - 1] for row in layers]))}" for d, layers in enumerate(by_distance, 1))
        lines.append(f"mean recall@{m}: {', '.join(means)}")
    return lines


def _table(first: str, columns: dict[str, list[Any]]) -> list[str]:
    """A row for every layer, and their mean."""
    widths = [max(7, len(title)) for title in columns]
    lines = [f"{first:>6}  " + "  ".join(f"{title:>{w}}" for title, w in zip(columns, widths, strict=True))]
    rows: list[tuple[object, Iterable[Any]]] = list(enumerate(zip(*columns.values(), strict=True)))
    rows.append(("mean", [_mean(values) for values in columns.values()]))
    for label, cells in rows:
        lines.append(f"{label!s:>6}  " + "  ".join(f"{_cell(c):>{w}}" for c, w in zip(cells, widths, strict=True)))
    return lines


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _spread(items: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of them, the first and the last included, evenly apart."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m traces.inspect", description=(__doc__ or "").splitlines()[0])
    p.add_argument("file", metavar="FILE", nargs="?", type=Path, help="trace file (default: the shipped trace)")
    p.add_argument("--cold-sequences", action="store_true", help="empty the LRU caches where a sequence starts")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        path = args.file or shipped()
        figures = {"file": str(path), **describe(load(path), args.cold_sequences)}
    except TraceError as error:
        print(f"traces.inspect: {error}", file=sys.stderr)
        return 2
    print("\n".join([f"file        {path}", *report(figures)]))
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
