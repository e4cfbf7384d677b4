"""Describe a trace: what made it, and how its routing behaves.

python -m traces.inspect [FILE] [--replay visit|access] [--plot PICTURE]
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

from traces import picture, stats
from traces.cli import Parser
from traces.format import load, shipped
from traces.stats import Counts
from traces.trace import Trace, TraceError
from traces.vocabulary import DECODE

_LRU_COLUMNS = 6  # slot counts shown for every layer; the JSON line has them all
_CURVE_ROWS = 16  # slot counts shown of the mean over layers
_REPLAYS = {"visit": "visit-atomic replay", "access": "access-by-access replay"}
_S = 1.3e-8  # rough time per (token, layer, expert, rank)
_MOVES = 0.01  # a difference in misses between the replays that is worth a warning


def describe(trace: Trace, cold_sequences: bool = False, replay: str = "visit") -> dict[str, Any]:
    """All figures of a trace as one JSON object; what cannot be computed (no decode, no target) is null.

    Shares and probabilities are 0 to 1, divergence is in bits; ``recall[d - 1][l][m - 1]`` is of the first m guesses
    made at layer l for layer l + d. ``lru`` is of the chosen ``replay``, ``belady`` always visit-atomic. Their
    definitions: ``traces.stats``. ``layers.use[l][e]`` counts the accesses of every expert, prefill and decode.
    """
    model = trace.model
    depths = stats.depths(trace, cold_sequences)
    reuse = stats.reuse(trace, depths, cold_sequences)
    columns: dict[str, npt.NDArray[Any]] = {
        "use": stats.use(trace.ids, model.num_experts),
        **stats.balance(trace)._asdict(),
        **{f"repeat_{name}": values for name, values in stats.repeat(trace)._asdict().items()},
        **{f"reuse_{name}": values for name, values in reuse._asdict().items()},
    }
    if (divergence := stats.domain_divergence(trace)) is not None:
        columns["domain_divergence_bits"] = divergence
    start = depths.shape[2]  # slots that hold every visit
    by_replay = {"visit": depths, "access": stats.depths(trace, cold_sequences, "access")}
    accesses = {name: (of >= 0).sum(axis=(0, 2)) for name, of in by_replay.items()}
    lru = {name: stats.hits_by_slots(of, model.num_experts) for name, of in by_replay.items()}
    belady = {name: stats.belady_hits(trace, name == "bypass", cold_sequences) for name in ("forced", "bypass")}
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
            "replay": replay,
            "decode_accesses": int(accesses[replay].sum()),
            **_curve(lru[replay], accesses[replay], start),
            "hit_share_by_layer": _plain(_shares(lru[replay][:, start - 1 :], accesses[replay][:, None])),
            "by_replay": {name: _curve(hits, accesses[name], start) for name, hits in lru.items()},
            "replay_moves_misses": _moved({r: accesses[r].sum() - lru[r].sum(axis=0) for r in stats.REPLAYS}, start),
        },
        "belady": {
            "replay": "visit",
            "forced": _curve(belady["forced"], accesses["visit"], start),
            "bypass": _curve(belady["bypass"], accesses["visit"], 1),
        },
        "predictors": {
            name: {"wrap": table.wrap, "recall": _plain(stats.recall(trace, name))}
            for name, table in trace.guesses.items()
        },
    }


def _curve(hits: Counts, accesses: Counts, start: int) -> dict[str, Any]:
    """Hits of all layers with ``start`` slots and more, from hits [L, E] and accesses [L]."""
    kept = hits[:, start - 1 :].sum(axis=0)
    slots = list(range(start, hits.shape[1] + 1))
    return {"slots": slots, "hits": kept.tolist(), "hit_share": _plain(_shares(kept, accesses.sum()))}


def _shares(hits: Counts, accesses: Counts) -> npt.NDArray[np.float64]:
    shares: npt.NDArray[np.float64] = np.divide(hits, accesses, out=np.full(hits.shape, np.nan), where=accesses > 0)
    return shares


def _moved(misses: dict[str, Counts], start: int) -> dict[str, Any] | None:
    """Where access-by-access replay changes the misses [E] of visit-atomic replay most: the slots, by which share."""
    visit, access = (misses[replay][start - 1 :] for replay in stats.REPLAYS)
    if not visit.any():
        return None
    share = (access - visit) / np.maximum(visit, 1)
    most = int(np.argmax(np.abs(share)))
    return {"slots": start + most, "share": round(float(share[most]), 6)}


def _domains(trace: Trace) -> dict[str, dict[str, int]]:
    domains: dict[str, dict[str, int]] = {}
    for sequence, name in enumerate(trace.domains):
        decode = int(np.count_nonzero(trace.phase[trace.rows_of(sequence)] == DECODE))
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
        "reuse_visits_median": "visits",
        "reuse_visits_p90": "(p90)",
        "reuse_experts_median": "experts",
        "reuse_experts_p90": "(p90) ",
        "domain_divergence_bits": "domains",
    }
    columns = {title: figures["layers"][key] for key, title in titles.items() if key in figures["layers"]}
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
        "visits, experts: reuse distance of decode accesses, median and 90th percentile: visits of the layer back to "
        "the one",
        "that last used the expert (1: the visit before), and other experts used since;",
        f"lru N: share of decode accesses that hit with N slots a layer, {_REPLAYS[lru['replay']]}, {caches}.",
        *_table("layer", columns),
        *_curve_lines(figures),
    ]
    for name, predictor in figures["predictors"].items():
        lines += ["", *_recall_lines(name, predictor, model["top_k"])]
    return lines


def _curve_lines(figures: dict[str, Any]) -> list[str]:
    """Mean hit shares of LRU and Belady by slot count, and a warning when the choice of replay matters."""
    lru, belady = figures["lru"], figures["belady"]
    if not lru["decode_accesses"]:
        return []
    by_slots = {
        **{f"lru, {name}": curve["hit_share"] for name, curve in lru["by_replay"].items()},
        "belady": belady["forced"]["hit_share"],
        "bypass": belady["bypass"]["hit_share"][lru["slots"][0] - 1 :],
    }
    lines = [
        "",
        "share of decode accesses that hit, all layers: LRU in visit-atomic and access-by-access replay; Belady with",
        "forced admission, and with bypass (visit-atomic, from empty caches; bypass: the most that demand loads reach)",
        f"{'slots':>6}  " + "  ".join(f"{title:>11}" for title in by_slots),
    ]
    for i in _spread(range(len(lru["slots"])), _CURVE_ROWS):
        cells = "  ".join(f"{_cell(values[i]):>11}" for values in by_slots.values())
        lines.append(f"{lru['slots'][i]:>6}  {cells}")
    moved = lru["replay_moves_misses"]
    if moved and abs(moved["share"]) > _MOVES:
        sense = "more" if moved["share"] > 0 else "fewer"
        lines.append(
            f"warning: access-by-access replay has {abs(moved['share']):.1%} {sense} misses than visit-atomic "
            f"replay with {moved['slots']} slots; say which of them a hit count is from"
        )
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


def _announce(trace: Trace) -> None:
    """Say on standard error that a large trace takes a while."""
    seconds = trace.num_decode_tokens * trace.model.num_layers * trace.model.num_experts * trace.model.top_k * _S
    if seconds > 5:
        print(
            f"traces.inspect: {trace.num_decode_tokens} decode tokens; this takes about {seconds:.0f} s",
            file=sys.stderr,
        )


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m traces.inspect", description=(__doc__ or "").splitlines()[0])
    p.add_argument("file", metavar="FILE", nargs="?", type=Path, help="trace file (default: the shipped trace)")
    p.add_argument("--cold-sequences", action="store_true", help="empty the caches where a sequence starts")
    p.add_argument(
        "--replay",
        choices=stats.REPLAYS,
        default=stats.REPLAYS[0],
        help="one LRU access is a visit, all its experts at once (default), or one expert after the other",
    )
    p.add_argument(
        "--plot", metavar="PICTURE", type=Path, help=f"draw expert use, hits and recall ({', '.join(picture.FORMATS)})"
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        path = args.file or shipped()
        trace = load(path)
        _announce(trace)
        figures = {"file": str(path), **describe(trace, args.cold_sequences, args.replay)}
        if args.plot:
            picture.draw(stats.use(trace.ids, trace.model.num_experts), figures, args.plot)
    except (TraceError, picture.PictureError) as error:
        print(f"traces.inspect: {error}", file=sys.stderr)
        return 2
    print("\n".join([f"file        {path}", *report(figures), *([f"picture     {args.plot}"] if args.plot else [])]))
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
