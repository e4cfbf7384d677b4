"""Make a synthetic trace with stated statistics, for models nobody can record here.

python -m traces.synthesize --preset mixtral-8x7b --tokens 2000 --out FILE

Every layer draws the experts of a token by how recently it used them and by how popular they are, so that the depths
of its LRU stack, and with them the hit curve of every cache size, come out as asked. Layers are independent of each
other, which real ones are not. A built-in predictor guesses with the recall asked for, and calibrated scores.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from traces import stats
from traces.cli import Parser
from traces.format import save
from traces.guessing import guess
from traces.presets import PRESETS, Preset, Statistics, StatisticsError, repeating
from traces.trace import Trace, TraceError, id_dtype
from traces.vocabulary import DECODE, ModelSpec

PREDICTOR = "synthetic"
_FLAGS = {
    "tail": "how fast use falls with the LRU depth beyond the stated shares",
    "skew": "exponent of the Zipf law of popularity, 0 is even",
    "domains": "kinds of text",
    "drift": "share of popularity that is each domain's own, 0 to 1",
    "sequence_length": "decode tokens of a sequence",
    "distances": "lookahead distances of the predictor, 0 for none",
    "guesses": "guesses of one distance, 0 for twice top_k",
    "recall_step": "recall lost with each further layer of lookahead",
}
_ROUNDS = 24  # of fitting
_CHAINS = 64  # layers drawn at once in fitting, copies included
_PER_ROUND, _PER_DEPTH = 60_000, 500  # accesses of a round of fitting at least, and for every stack depth
_CHUNK = 128  # tokens whose random numbers are drawn at once
_MOST_TOKENS = 1_000_000

Floats = npt.NDArray[np.float64]


def synthesize(
    model: ModelSpec, statistics: Statistics, tokens: int, seed: int = 0, provenance: dict[str, Any] | None = None
) -> Trace:
    """A trace of ``tokens`` decode tokens; the same arguments give the same trace.

    Args:
        model: shape; its layers, experts and top_k are used.
        statistics: what the routing and the guesses are like.
        tokens: decode tokens, cut into sequences of ``statistics.sequence_length``; there is no prefill.
        seed: of every random number.
        provenance: added to the provenance of the trace.

    Raises:
        StatisticsError: statistics or sizes that cannot be had.
    """
    if not 1 <= tokens <= _MOST_TOKENS or seed < 0:
        raise StatisticsError(f"tokens is {tokens} and seed {seed}; allowed are 1 to {_MOST_TOKENS}, and 0 or more")
    statistics.check(model)
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(5)]
    popularity = log_popularity(model, statistics, streams[0])
    wanted = statistics.depth_shares(model)
    weights = _fit(model, statistics, popularity, wanted, streams[1])
    layers = _Layers(model, statistics, popularity, streams[2])
    ids = layers.draw(weights, tokens).astype(id_dtype(model.num_experts))
    parts = -np.sort(-streams[3].exponential(size=ids.shape), axis=-1)
    full, rest = divmod(tokens, statistics.sequence_length)
    lengths = np.array([statistics.sequence_length] * full + [rest] * (rest > 0), np.int32)
    guesses = {}
    if statistics.distances:
        guesses[PREDICTOR] = guess(ids, model.num_experts, statistics, streams[4])
    return Trace(
        model,
        ids,
        (parts / parts.sum(axis=-1, keepdims=True)).astype(np.float16),
        lengths,
        np.full(tokens, DECODE, np.uint8),
        guesses=guesses,
        provenance={
            "generator": "traces.synthesize",
            "seed": seed,
            "tokens": tokens,
            "statistics": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(statistics).items()},
            **(provenance or {}),
        },
        domains=tuple(f"synthetic-{i % statistics.domains}" for i in range(len(lengths))),
        routing="SYNTHETIC",
    )


def log_popularity(model: ModelSpec, statistics: Statistics, rng: np.random.Generator) -> Floats:
    """Logarithm of each expert's popularity, up to a constant, [domains, L, E].

    A Zipf law over a random order of the layer's experts: -skew * log(rank). ``drift`` mixes the order all domains
    share with one of the domain's own.
    """
    shape = (statistics.domains + 1, model.num_layers, model.num_experts)
    logs = np.log1p(rng.permuted(np.broadcast_to(np.arange(model.num_experts), shape), axis=-1))
    mixed: Floats = -statistics.skew * ((1 - statistics.drift) * logs[0] + statistics.drift * logs[1:])
    return mixed


class _Layers:
    """All layers of a model, each with its experts from the most to the least recently used."""

    def __init__(self, model: ModelSpec, statistics: Statistics, popularity: Floats, rng: np.random.Generator) -> None:
        self.top_k = model.top_k
        self.length = statistics.sequence_length
        self.popularity = popularity
        self.rng = rng
        self.token = 0
        order = np.broadcast_to(np.arange(model.num_experts), (model.num_layers, model.num_experts))
        self.recent = rng.permuted(order, axis=1)
        self.depth_counts = np.zeros(model.num_experts, np.int64)

    def draw(self, weights: Floats, tokens: int) -> npt.NDArray[np.int64]:
        """Route ``tokens`` more tokens, [tokens, L, K]; counts the stack depths drawn in ``depth_counts``.

        An expert's odds are its weight by recency [E] times its popularity: the K largest of their logarithms plus
        Gumbel noise are a draw without replacement. Their router order is random.
        """
        layers, experts = self.recent.shape
        log_weights, k = np.log(weights), self.top_k
        result = np.empty((tokens, layers, k), np.int64)
        for start in range(0, tokens, _CHUNK):
            count = min(_CHUNK, tokens - start)
            noise = self.rng.gumbel(size=(count, layers, experts)) + log_weights
            shuffled = np.argsort(self.rng.random((count, layers, k)), axis=-1)
            for i in range(count):
                domain = self.token // self.length % len(self.popularity)
                keys = noise[i] + np.take_along_axis(self.popularity[domain], self.recent, axis=1)
                depths = np.argpartition(keys, experts - k, axis=1)[:, experts - k :]
                depths = np.take_along_axis(np.sort(depths, axis=1), shuffled[i], axis=1)
                routed = np.take_along_axis(self.recent, depths, axis=1)
                stays = np.ones((layers, experts), bool)
                np.put_along_axis(stays, depths, False, axis=1)
                rest = self.recent[stays].reshape(layers, experts - k)
                self.recent = np.concatenate([routed[:, ::-1], rest], axis=1)
                self.depth_counts += np.bincount(depths.ravel(), minlength=experts)
                result[start + i] = routed
                self.token += 1
        return result


def _fit(
    model: ModelSpec, statistics: Statistics, popularity: Floats, wanted: Floats, rng: np.random.Generator
) -> Floats:
    """Weights by recency [E] whose draws have the ``wanted`` shares of stack depths, popularity included.

    Each round draws, with copies of the layers where they are few, compares, and corrects the logarithms of the weights
    by smaller and smaller steps; the mean of the later rounds is taken.
    """
    copies = -(-_CHAINS // model.num_layers)
    many = replace(model, num_layers=copies * model.num_layers)
    layers = _Layers(many, statistics, np.tile(popularity, (1, copies, 1)), rng)
    tokens = max(_PER_ROUND, _PER_DEPTH * model.num_experts) // (many.num_layers * model.top_k) + 1
    logs = np.log(wanted)
    later = []
    for i in range(_ROUNDS):
        layers.depth_counts[:] = 0
        layers.draw(np.exp(logs), tokens)
        found = layers.depth_counts + 1.0
        logs += np.log(wanted / (found / found.sum())) / (1 + i / 3)
        logs -= logs.mean()
        if i >= _ROUNDS // 2:
            later.append(logs.copy())
    weights: Floats = np.exp(np.mean(later, axis=0))
    return weights


def measure(trace: Trace) -> dict[str, Any]:
    """The figures of a synthetic trace that its preset's targets name."""
    top_k, experts = trace.model.top_k, trace.model.num_experts
    accesses = trace.ids.size
    visit, access = (stats.hits_by_slots(stats.depths(trace, replay=r), experts).sum(axis=0) for r in stats.REPLAYS)
    figures: dict[str, Any] = {
        "repeat": float(np.nanmean(stats.repeat(trace).in_order)) if trace.num_tokens > 1 else None,
        **{f"lru_visit_{n}": float(visit[n - 1] / accesses) for n in range(top_k, experts + 1)},
        **{f"lru_access_{n}": float(access[n - 1] / accesses) for n in range(top_k, experts + 1)},
    }
    for name, bypass in (("belady", False), ("belady_bypass", True)):
        hits = stats.belady_hits(trace, bypass).sum(axis=0)
        figures |= {f"{name}_{n}": float(hits[n - 1] / accesses) for n in range(top_k, experts + 1)}
    balance = stats.balance(trace)
    figures |= {"busiest_share": float(balance.busiest_share.mean()), "entropy": float(balance.entropy.mean())}
    divergence = stats.domain_divergence(trace)
    figures["domain_divergence_bits"] = None if divergence is None else float(divergence.mean())
    for name, table in trace.guesses.items():
        at_k = stats.recall(trace, name)[:, :, min(top_k, table.ids.shape[3]) - 1]
        for distance, by_layer in enumerate(at_k, 1):
            known = by_layer[~np.isnan(by_layer)]
            if not len(known):
                continue
            figures |= {f"recall_d{distance}_mean": float(known.mean()), f"recall_d{distance}_best": float(known.max())}
            targets = range(distance, trace.model.num_layers)
            figures |= {f"recall_d{distance}_layer_{t}": float(v) for t, v in zip(targets, known, strict=True)}
        figures["score_error"] = score_error(trace, name)
    return figures


def score_error(trace: Trace, predictor: str, bins: int = 10) -> float:
    """Mean distance between scores and the share of such guesses that were routed, over equal bins of score."""
    table = trace.guesses[predictor]
    layers, distances = table.ids.shape[1:3]
    scores, routed = [], []
    for distance in range(1, distances + 1):
        guessed = table.ids[:, : layers - distance, distance - 1]
        scores.append(table.scores[:, : layers - distance, distance - 1].astype(np.float64).ravel())
        routed.append((guessed[..., None] == trace.ids[:, distance:, None, :]).any(axis=-1).ravel())
    score, hit = np.concatenate(scores), np.concatenate(routed)
    which = np.minimum((score * bins).astype(int), bins - 1)
    gaps = np.bincount(which, weights=score - hit, minlength=bins)
    return float(np.abs(gaps).sum() / max(1, len(score)))


def fit_table(preset: Preset, figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Every target of a preset beside what the trace has; ``within`` is null for a target that is only reported."""
    rows = []
    for target in preset.targets:
        got = figures.get(target.figure)
        far = None if got is None else abs(got - target.value)
        within = None if target.tolerance is None or far is None else bool(far <= target.tolerance)
        rows.append({**target._asdict(), "got": None if got is None else round(got, 4), "within": within})
    return rows


def report(trace: Trace, preset: Preset, rows: list[dict[str, Any]], figures: dict[str, Any]) -> list[str]:
    """The lines for people to read."""
    model = trace.model
    lines = [
        f"SYNTHETIC   {model.name}: {model.num_layers} MoE layers, {model.num_experts} experts, top-{model.top_k}; "
        f"{trace.num_tokens} decode tokens in {len(trace.sequence_lengths)} sequences",
        *(f"  {name}: {text}" for name, text in preset.sources.items()),
    ]
    if rows:
        lines += ["", f"{'figure':<22} {'target':>7} {'got':>7}  allowed"]
    for row in rows:
        allowed = "reported only" if row["tolerance"] is None else f"+-{row['tolerance']}"
        outside = "  OUTSIDE" if row["within"] is False else ""
        got = "-" if row["got"] is None else f"{row['got']:.3f}"
        lines.append(f"{row['figure']:<22} {row['value']:>7.3f} {got:>7}  {allowed}{outside}")
    other = ("repeat", "busiest_share", "entropy", "domain_divergence_bits", "recall_d1_mean", "score_error")
    known = [f"{name} {figures[name]:.3f}" for name in other if figures.get(name) is not None]
    return [*lines, "", "all in all  " + ", ".join(known)]


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m traces.synthesize", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--preset", choices=PRESETS, help="model shape and statistics")
    p.add_argument(
        "--model", metavar="FILE", type=Path, help="JSON of a model, as in sim/models; needed without a preset"
    )
    p.add_argument("--tokens", type=int, default=2000, metavar="N", help="decode tokens (default: 2000)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="trace to write")
    p.add_argument("--repeat", type=float, help="share of a token's experts that the token before used")
    p.add_argument("--recall", type=float, help="recall@top_k one layer ahead, the same for every layer")
    for name, text in _FLAGS.items():
        kind = type(getattr(Statistics(), name))
        p.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N" if kind is int else "X", help=text)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        preset = _chosen(args)
        about = {"preset": args.preset, "sources": preset.sources, "evidence": "SYNTHETIC: no model routed so"}
        print(f"traces.synthesize: {args.tokens} tokens of {preset.model.name} ...", file=sys.stderr)
        trace = synthesize(preset.model, preset.statistics, args.tokens, args.seed, about)
        save(trace, args.out)
    except (TraceError, StatisticsError) as error:
        print(f"traces.synthesize: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"traces.synthesize: {args.out} cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    figures = measure(trace)
    rows = fit_table(preset, figures)
    print("\n".join([*report(trace, preset, rows, figures), f"written     {args.out}"]))
    print(json.dumps({"file": str(args.out), "routing": trace.routing, "model": trace.model.to_json(),
                      "provenance": trace.provenance, "fit": rows, "figures": figures}))  # fmt: skip
    return 0


def _chosen(args: argparse.Namespace) -> Preset:
    """The preset, or a model with assumed statistics, changed as the flags say."""
    model = _read_model(args.model) if args.model else None
    if args.preset:
        preset = PRESETS[args.preset]
        shapes = [(m.num_layers, m.num_experts, m.top_k) for m in (preset.model, model or preset.model)]
        if shapes[0] != shapes[1]:
            raise StatisticsError(
                f"model {str(args.model)!r} has the shape {shapes[1]} (layers, experts, top_k), the preset "
                f"{shapes[0]}; leave one of them out"
            )
        preset = replace(preset, model=model or preset.model)
    elif model:
        preset = Preset(model, Statistics(), {"all": "ASSUMED: the defaults of this program"})
    else:
        raise StatisticsError(f"neither --preset nor --model is given; choose a preset ({', '.join(PRESETS)})")
    changes = {name: getattr(args, name) for name in _FLAGS if getattr(args, name) is not None}
    if args.repeat is not None:
        changes["recent"] = repeating(args.repeat, preset.model.top_k)
    if args.recall is not None:
        changes["recall"] = (args.recall,)
    if not changes:
        return preset
    set_by_flags = f"SET by flags, whatever is said above: {', '.join(changes)}"
    return replace(
        preset,
        statistics=replace(preset.statistics, **changes),
        sources=preset.sources | {"flags": set_by_flags},
    )


def _read_model(path: Path) -> ModelSpec:
    try:
        content = json.loads(path.read_bytes())
        shape = content.get("model", content) if isinstance(content, dict) else content
        if not isinstance(shape, dict):
            raise ValueError("it must be an object")
        return ModelSpec.from_json(shape)
    except OSError as error:
        raise StatisticsError(f"model {str(path)!r} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise StatisticsError(f"model {str(path)!r} is not a model's JSON: {error}") from error


if __name__ == "__main__":
    raise SystemExit(main())
