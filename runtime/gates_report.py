"""How well the ladder of predictors guesses: recall on held-out text, by width, domain, layer and distance.

    python -m runtime.gates_report --gates FILE --corpus FILE [FILE ...] --bits 4 --bits 2 --out recall.json

Text is read teacher-forced in windows by the model with experts at each width; the gates may have been trained at
another. Predictors that know only what was routed before count over the same tokens, in the same order.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from runtime import activations, corpus, gates, models, provenance
from runtime.activations import Activations
from runtime.align import logits_of
from runtime.copier import CopierError
from runtime.fit import calibration_error, sample
from runtime.gates import GateFile
from runtime.lookahead import GATES_FILE, ContextGates, LinearGates, inclusion
from sim.experiment import guess_table
from traces import DECODE, GuessTable, ModelSpec, Trace, stats
from traces.cli import Parser
from traces.trace import rank

ID_ONLY = ("previous_token", "popularity", "transition")
GUESSES = 4


def scores_of(rung: LinearGates, found: Activations, spec: ModelSpec, lookahead: int) -> npt.NDArray[np.float16]:
    """P(routed) for every token as in decode: float16 [N, L, D, E], 0 past the last layer."""
    table = np.zeros((found.num_tokens, spec.num_layers, lookahead, spec.num_experts), np.float16)
    for layer, heads in enumerate(rung.heads[:-1]):
        assert heads is not None
        start = 0
        for part in sample(found, layer, heads.distances, with_before=isinstance(rung, ContextGates)).blocks():
            scores = inclusion(logits_of(rung, layer, part), spec.top_k).numpy()
            table[start : start + len(scores), layer, : heads.distances] = scores
            start += len(scores)
    return table


def forced(found: Activations, spec: ModelSpec, guesses: dict[str, GuessTable], domains: Sequence[str]) -> Trace:
    """What was routed as a trace, a sequence for every window."""
    starts = np.flatnonzero(found.first)
    lengths = np.diff(np.append(starts, found.num_tokens))
    ids = np.stack([found.ids[layer] for layer in range(spec.num_layers)], axis=1)
    return Trace(
        spec,
        ids,
        np.full(ids.shape, 1 / spec.top_k, np.float16),
        lengths.astype(np.int32),
        np.full(found.num_tokens, DECODE, np.uint8),
        guesses=guesses,
        domains=tuple(domains[found.domain[i]] for i in starts),
        routing="FORCED",
    )


def errors(scores: npt.NDArray[np.float16], trace: Trace) -> list[dict[str, float]]:
    """Calibration error by distance, over all pairs and over the best guesses."""
    result = []
    for d in range(scores.shape[2]):
        layers = trace.model.num_layers - 1 - d
        said = torch.from_numpy(scores[:, :layers, d].astype(np.float32)).flatten(0, 1)
        ids = torch.from_numpy(trace.ids[:, d + 1 :].astype(np.int64)).flatten(0, 1)
        result.append(
            {
                "pairs": round(calibration_error(said, ids), 4),
                "best": round(calibration_error(said, ids, GUESSES), 4),
            }
        )
    return result


def recalls(trace: Trace, name: str, domain: str | None = None) -> list[Any]:
    """[d - 1][l][m - 1], rounded; null without a target; of one domain's sequences, or of all."""
    if domain is not None:
        rows = np.concatenate([trace.rows_of(s) for s, d in enumerate(trace.domains) if d == domain])
        of = [s for s, d in enumerate(trace.domains) if d == domain]
        table = trace.guesses[name]
        trace = Trace(
            trace.model,
            trace.ids[rows],
            trace.weights[rows],
            trace.sequence_lengths[of],
            trace.phase[rows],
            guesses={name: GuessTable(table.ids[rows], table.scores[rows], table.wrap)},
            routing=trace.routing,
        )
    values = stats.recall(trace, name)[..., :GUESSES]
    return np.where(np.isnan(values), None, np.round(values, 4).astype(object)).tolist()


def report(
    model_dir: Path, domains: Sequence[corpus.Domain], file: GateFile, bits: int, tokens: int, work: Path
) -> dict[str, Any]:
    """Recall of every predictor at one width, over all text and by domain, and calibration errors of the ladder.

    Raises:
        GateError, ModelError, StoreError, CopierError, ValueError: gates, model or texts that cannot be used.
    """
    spec = models.spec_of(model_dir)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    texts = activations.windows([d.held_out for d in domains], tokenizer, tokens)
    model, _ = models.load(model_dir)
    reach = int(file.header["lookahead"])
    rungs = gates.ladder(model, spec.top_k, reach, file, file.rungs())
    found = activations.collect(model_dir, texts, bits, work)
    names = [d.name for d in domains]
    bare = forced(found, spec, {}, names)
    guesses, calibration = {}, {}
    for name, rung in rungs.items():
        assert isinstance(rung, LinearGates)
        scores = scores_of(rung, found, spec, reach)
        guesses[name] = rank(scores, min(GUESSES, spec.num_experts))
        calibration[name] = errors(scores, bare)
    for name in ID_ONLY:
        table = guess_table(bare, f"{name}:reach={reach}")
        guesses[name] = GuessTable(table.ids[:, :, :reach], table.scores[:, :, :reach])
    trace = forced(found, spec, guesses, names)
    return {
        "evidence": "MEASURED on teacher-forced held-out text",
        "bits": bits,
        "gates_bits": file.header["bits"],
        "tokens": found.num_tokens,
        "top_k": spec.top_k,
        "recall": {n: {"all": recalls(trace, n)} | {d: recalls(trace, n, d) for d in names} for n in guesses},
        "calibration_error": calibration,
    }


def mean(recall: list[Any], d: int, m: int) -> float:
    """Mean over layers, distances counted from 1."""
    values = [row[m - 1] for row in recall[d - 1] if row[m - 1] is not None]
    return float(np.mean(values))


def table(found: dict[str, Any], top_k: int) -> str:
    """Recall of the first top_k guesses in percent by distance, for every domain; then recall@m of the next layer."""
    reach = len(next(iter(found["recall"].values()))["all"])
    texts = list(next(iter(found["recall"].values())))
    lines = [f"{found['bits']} bits, gates trained at {found['gates_bits']}: recall@{top_k} in %, mean over layers"]
    lines.append(f"{'':15} " + " ".join(f"{t[: 6 * reach - 1]:>{6 * reach - 1}}" for t in texts))
    for name, by_text in found["recall"].items():
        cells = [" ".join(f"{mean(by_text[t], d, top_k) * 100:5.1f}" for d in range(1, reach + 1)) for t in texts]
        lines.append(f"{name:15} " + " ".join(cells))
    return "\n".join(lines)


def draw(reports: Sequence[dict[str, Any]], top_k: int, path: Path) -> None:
    """Recall by distance and by layer at the first width, and by width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.8), constrained_layout=True)
    first = reports[0]
    reach = len(next(iter(first["recall"].values()))["all"])
    distances = range(1, reach + 1)
    for number, (name, by_text) in enumerate(first["recall"].items()):
        style = ":" if name in ID_ONLY else "-"
        color = f"C{number}"
        left.plot(
            distances,
            [mean(by_text["all"], d, top_k) * 100 for d in distances],
            style,
            marker="o",
            color=color,
            label=name,
        )
        if name not in ID_ONLY:
            nearest = [None if row[top_k - 1] is None else row[top_k - 1] * 100 for row in by_text["all"][0]]
            middle.plot(range(len(nearest) - 1), nearest[:-1], marker=".", color=color, label=name)
            falling = sorted(reports, key=lambda r: -r["bits"])
            widths = [str(r["bits"]) for r in falling]
            values = [mean(r["recall"][name]["all"], min(3, reach), top_k) * 100 for r in falling]
            right.plot(widths, values, marker="o", color=color, label=name)
    left.set(xlabel="distance d (layers ahead)", ylabel=f"recall@{top_k} in %", xticks=list(distances))
    left.set_title(f"mean over layers, {first['bits']} bits")
    left.set_ylim(bottom=0)
    left.legend(fontsize=8, loc="lower left", ncols=2)
    middle.set(xlabel="layer l that guesses", ylabel=f"recall@{top_k} in %")
    middle.set_title(f"next layer (d = 1), {first['bits']} bits")
    right.set(xlabel="bits of the experts", ylabel=f"recall@{top_k} in %")
    right.set_title(f"d = {min(3, reach)}, gates trained at {first['gates_bits']} bits")
    figure.suptitle(f"{first['tokens']} held-out tokens, teacher-forced, MEASURED", fontsize=10)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    figure.savefig(partial, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)
    pyplot.close(figure)
    os.replace(partial, path)


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m runtime.gates_report", description=__doc__.splitlines()[0])
    p.add_argument("--model", type=Path, default=models.DEMO, metavar="DIR", help="default: the demonstration model")
    p.add_argument("--gates", type=Path, metavar="FILE", help="default: gates.safetensors of the model")
    p.add_argument(
        "--corpus", type=Path, nargs="+", default=[], metavar="FILE", help="text (default: Python's standard library)"
    )
    p.add_argument("--bits", type=int, action="append", choices=(16, 8, 4, 3, 2), help="repeatable (default 4)")
    p.add_argument("--tokens", type=int, default=12_000, metavar="N", help="held-out tokens (default %(default)s)")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="of the processor (default %(default)s)")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON, one object a width")
    p.add_argument("--picture", type=Path, metavar="FILE", help="the same as a picture")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    work = args.out.with_name(args.out.name + ".work")
    try:
        provenance.check_folder("--out", args.out)
        provenance.check_folder("--picture", args.picture)
        domains = corpus.load(args.corpus)
        file = gates.load(args.gates or args.model / GATES_FILE)
        work.mkdir(exist_ok=True)
        reports = []
        for bits in args.bits or [4]:
            reports.append(report(args.model, domains, file, bits, args.tokens, work / str(bits)))
            print(table(reports[-1], models.spec_of(args.model).top_k), end="\n\n", flush=True)
        made = {"command": provenance.command(), "commit": provenance.commit(), "reports": reports}
        partial = args.out.with_name(args.out.name + ".partial")
        partial.write_text(json.dumps(made) + "\n")
        os.replace(partial, args.out)
        if args.picture:
            draw(reports, models.spec_of(args.model).top_k, args.picture)
    except (ValueError, OSError, CopierError) as error:
        print(f"runtime.gates_report: {error}", file=sys.stderr)
        return 2
    shutil.rmtree(work)
    print(json.dumps({"out": str(args.out), "bits": [r["bits"] for r in reports], "tokens": reports[0]["tokens"]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
