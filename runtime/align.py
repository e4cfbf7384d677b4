"""Train lookahead gates for a frozen model: layer-wise gate alignment on the activations of its quantized experts.

    python -m runtime.align --model DIR --corpus FILE [FILE ...] --bits 4 --out gates.safetensors

Every head (layer l, distance d) learns by itself to say what the frozen router of layer l + d says, from the input of
layer l's router; the model's weights are only read. Resumable: the same command again goes on from ``OUT.work``, which
is removed at the end. In memory at once: the quantized model, or one layer's inputs and targets, 2 H + D (2 H + 2 E +
K) bytes a training token; the other layers' wait on disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from runtime import activations, corpus, fit, gates, models, provenance
from runtime.activations import Activations, collect, windows
from runtime.copier import CopierError
from runtime.fit import LOSSES, Fitting, Scales, calibration_error, recall, sample, temperatures
from runtime.gates import GateFile
from runtime.lookahead import LADDER, UNTRAINED, ContextGates, Heads, LinearGates, inclusion, norm_heads, router_heads
from traces.cli import Parser

VALIDATED = 8  # every 8th training window is not trained on: keeping, temperatures
LOOKAHEAD = 4
TOKENS, HELD_OUT_TOKENS = 270_000, 36_000
WIDTH = 40
TRAINED = tuple(r for r in LADDER if r not in UNTRAINED)


def fit_layer(
    found: Activations, layer: int, distances: int, starts: list[Heads], how: Fitting, width: int, scales: Scales
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Tensors of one layer's trained rungs, and by distance which start its aligned head kept (-1: none)."""
    validated = _validated(found)
    train = sample(found, layer, distances, ~validated)
    held = sample(found, layer, distances, validated)
    norm = starts[0]
    change = [
        torch.nn.functional.linear(train.hidden.float().mean(0), -norm.weight[d]) + train.logits[:, d].float().mean(0)
        for d in range(distances)
    ]  # router . mean(input of l + d - scaled input of l), as the router is linear
    mean = Heads(norm.weight, scales.saved("router_mean.bias", layer, torch.stack(change)))
    heads, kept = fit.align(train, held, [mean, *starts], how, layer, scales)
    made: dict[str, Any] = {"router_mean": {"bias": mean.bias}, "aligned": {"weight": heads.weight, "bias": heads.bias}}
    if width:
        trunk = fit.add_trunk(train, held, heads, width, how, layer, scales)
        train, held = (part._replace(before=fit.before(found, layer, distances, rows))
                       for part, rows in ((train, ~validated), (held, validated)))  # fmt: skip
        context = fit.add_context(train, held, heads, trunk, how, layer, scales)
        made |= {"mlp": trunk._asdict(), "context": context._asdict()}
    tensors = {f"{rung}.{layer}.{n}": t for rung, parts in made.items() for n, t in parts.items() if t is not None}
    return tensors, kept


def _validated(found: Activations) -> npt.NDArray[np.bool_]:
    """Rows of the windows that are held out of training, [N]."""
    held: npt.NDArray[np.bool_] = found.first.cumsum() % VALIDATED == 0
    return held


def train(
    model_dir: Path,
    domains: Sequence[corpus.Domain],
    *,
    bits: int = 4,
    lookahead: int = LOOKAHEAD,
    tokens: int = TOKENS,
    held_out_tokens: int = HELD_OUT_TOKENS,
    width: int = WIDTH,
    how: Fitting | None = None,
    work: Path,
) -> GateFile:
    """Gates for a model, with their recall and calibration on text that neither they nor the model were trained on.

    Raises:
        ValueError: texts too short, or a lookahead without a target.
        ModelError, StoreError, CopierError: a model that cannot be run.
    """
    how = how or Fitting()
    spec = models.spec_of(model_dir)
    reach = min(lookahead, spec.num_layers - 1)
    if reach < 1:
        raise ValueError(
            f"{spec.name} has {spec.num_layers} MoE layer and no later one to look at; name a deeper model"
        )
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    texts = windows([d.train for d in domains], tokenizer, tokens)
    held_texts = windows([d.held_out for d in domains], tokenizer, held_out_tokens)
    if len(texts) < VALIDATED:
        raise ValueError(f"the training texts give {len(texts)} windows; {VALIDATED} are needed: use longer ones")
    work.mkdir(exist_ok=True)
    found = collect(model_dir, texts, bits, work / "train")
    held_out = collect(model_dir, held_texts, bits, work / "held_out")
    model, _ = models.load(model_dir)
    routers, biases = gates.routers_of(model), gates.biases_of(model)
    normed, as_is = norm_heads(routers, gates.norms_of(model), reach, biases), router_heads(routers, reach, biases)
    settings = [(work / "train" / "done.json").read_text(), reach, width, asdict(how), gates.routers_sha256(routers)]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    scales = Scales([fit.spread(found.inputs[layer]) for layer in range(spec.num_layers)])
    tensors = dict(scales.tensors)
    kept = 0
    for layer in tqdm(range(spec.num_layers - 1), "aligning", unit="layer", file=sys.stderr):
        start, plain = normed[layer], as_is[layer]
        assert start is not None and plain is not None
        part = work / f"layer{layer}.{key}.safetensors"
        if not part.is_file():
            made, choice = fit_layer(found, layer, start.distances, [start, plain], how, width, scales)
            made["kept"] = torch.tensor(choice)
            partial = part.with_suffix(".partial")
            save_file({n: t.contiguous() for n, t in made.items()}, partial)
            os.replace(partial, part)
        made = load_file(part)
        kept += int((made.pop("kept") >= 0).sum())
        tensors |= made
    header: dict[str, Any] = {
        "format": gates.FORMAT,
        "model": spec.name,
        "routers_sha256": gates.routers_sha256(routers),
        "lookahead": reach,
        "temperature": {},
        "bits": bits,
        "corpus": [d.name for d in domains],
        "training": {
            **asdict(how),
            "tokens": found.num_tokens,
            "validated": int(_validated(found).sum()),
            "width": width,
            "heads": sum(h.distances for h in normed if h is not None),
            "kept_initialisation": kept,
        },
        "held_out_tokens": held_out.num_tokens,
        "command": provenance.command(),
        "commit": provenance.commit(),
    }
    file = GateFile(tensors, header)
    header["temperature"] = calibrate(model, spec.top_k, reach, file, found)
    header["recall"], header["calibration_error"] = measure(model, spec.top_k, reach, file, held_out)
    return file


def logits_of(rung: LinearGates, layer: int, part: fit.Sample) -> torch.Tensor:
    """What a rung says in decode, [N, D, E], the temperature applied."""
    if isinstance(rung, ContextGates) and part.before is not None:
        return rung.logits_after(layer, part.hidden, part.before)
    return rung.logits(layer, part.hidden)


def calibrate(model: torch.nn.Module, top_k: int, reach: int, file: GateFile, found: Activations) -> dict[str, Any]:
    """Temperatures of the trained rungs, [l][d - 1], fitted on the windows kept from training."""
    result = {}
    for name, rung in gates.ladder(model, top_k, reach, file, [r for r in file.rungs() if r in TRAINED]).items():
        assert isinstance(rung, LinearGates)
        result[name] = []
        for layer, heads in enumerate(rung.heads[:-1]):
            assert heads is not None
            held = sample(found, layer, heads.distances, _validated(found), name == "context")
            said = torch.cat([logits_of(rung, layer, part) for part in held.blocks()])
            values = temperatures(said, held.ids.long()).tolist()
            result[name].append([round(v, 4) for v in values])
    return result


def measure(
    model: torch.nn.Module, top_k: int, reach: int, file: GateFile, found: Activations
) -> tuple[dict[str, Any], dict[str, Any]]:
    """By rung: recall of the first top_k guesses [l][d - 1], and the calibration error by distance, over all pairs and
    over the four best guesses."""
    recalls: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    for name, rung in gates.ladder(model, top_k, reach, file, file.rungs()).items():
        assert isinstance(rung, LinearGates)
        recalls[name] = []
        said: list[list[Any]] = [[] for _ in range(reach)]
        for layer, heads in enumerate(rung.heads[:-1]):
            assert heads is not None
            held = sample(found, layer, heads.distances, with_before=name == "context")
            logits, ids = torch.cat([logits_of(rung, layer, part) for part in held.blocks()]), held.ids.long()
            recalls[name].append([round(r, 4) for r in recall(logits, ids, top_k).tolist()])
            for d in range(heads.distances):
                said[d].append((inclusion(logits[:, d], top_k).half(), ids[:, d]))
        errors[name] = {"pairs": [], "best": []}
        for parts in said:
            scores, ids = torch.cat([p[0] for p in parts]).float(), torch.cat([p[1] for p in parts])
            errors[name]["pairs"].append(round(calibration_error(scores, ids), 4))
            errors[name]["best"].append(round(calibration_error(scores, ids, 4), 4))
    return recalls, errors


def table(header: dict[str, Any]) -> str:
    """Recall of the first top_k guesses and calibration error by distance, mean over layers."""
    lines = [f"{'held-out text':14} " + " ".join(f"{f'd = {d + 1}':>15}" for d in range(header["lookahead"]))]
    for name, layers in header["recall"].items():
        cells = []
        for d in range(header["lookahead"]):
            values = [row[d] for row in layers if len(row) > d]
            error = max(header["calibration_error"][name][kind][d] for kind in ("pairs", "best"))
            cells.append(f"{sum(values) / len(values) * 100:5.1f} % (ECE {error:.3f})"[:20])
        lines.append(f"{name:14} " + " ".join(f"{c:>15}" for c in cells))
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m runtime.align", description=__doc__.splitlines()[0])
    how = Fitting()
    p.add_argument("--model", type=Path, default=models.DEMO, metavar="DIR", help="default: the demonstration model")
    p.add_argument(
        "--corpus", type=Path, nargs="+", default=[], metavar="FILE", help="text (default: Python's standard library)"
    )
    p.add_argument("--bits", type=int, choices=(16, 8, 4, 3, 2), default=4, help="of the experts (default %(default)s)")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="the gates")
    p.add_argument("--lookahead", type=int, default=LOOKAHEAD, metavar="N", help="layers ahead (default %(default)s)")
    p.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help="of training text (default %(default)s)")
    p.add_argument(
        "--held-out-tokens", type=int, default=HELD_OUT_TOKENS, metavar="N", help="measured on (default %(default)s)"
    )
    p.add_argument(
        "--width",
        type=int,
        default=WIDTH,
        metavar="N",
        help="of mlp's trunk; 0: neither mlp nor context (default %(default)s)",
    )
    p.add_argument("--loss", choices=tuple(LOSSES), default=how.loss, help="default %(default)s")
    p.add_argument("--epochs", type=int, default=how.epochs, metavar="N", help="at most (default %(default)s)")
    p.add_argument("--seed", type=int, default=how.seed, metavar="N", help="default %(default)s")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="of the processor (default %(default)s)")
    p.add_argument("--keep-work", action="store_true", help="leave OUT.work, with the activations, in place")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    started = os.times()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    work = args.out.with_name(args.out.name + ".work")
    try:
        provenance.check_folder("--out", args.out)
        for name, least in (("lookahead", 1), ("tokens", activations.WINDOW), ("width", 0), ("epochs", 1)):
            if getattr(args, name) < least:
                raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least {least}")
        how = Fitting(args.loss, args.epochs, seed=args.seed)
        file = train(
            args.model,
            corpus.load(args.corpus),
            bits=args.bits,
            lookahead=args.lookahead,
            tokens=args.tokens,
            held_out_tokens=args.held_out_tokens,
            width=args.width,
            how=how,
            work=work,
        )
        gates.save(file, args.out)
    except (ValueError, OSError, CopierError) as error:
        print(f"runtime.align: {error}", file=sys.stderr)
        return 2
    if not args.keep_work:
        shutil.rmtree(work)
    used = os.times()
    cost = {
        "wall_s": round(used.elapsed - started.elapsed, 1),
        "cpu_s": round(sum(used[:4]) - sum(started[:4]), 1),  # its own and its ended children's
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "bytes": args.out.stat().st_size,
    }
    header = file.header
    print(f"recall of the first top_k guesses, mean over layers, {header['held_out_tokens']} held-out tokens")
    print(table(header))
    print(
        f"{header['training']['heads']} heads, {header['training']['kept_initialisation']} kept their initialisation; "
        f"{cost['wall_s']} s, {cost['cpu_s']} s of processor, {cost['peak_rss_mb']} MB; {args.out.name}: "
        f"{cost['bytes'] / 1e3:.0f} kB"
    )
    print(json.dumps({"out": str(args.out), **cost, **header}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
