"""Measure the demonstration model on held-out text, and write its model card.

    python -m runtime.evaluate --model DIR --corpus FILE [FILE ...] [--card]

Weights are used as stored, unquantized, and computed with in float32. Text is read in windows of ``WINDOW`` tokens
without overlap: every token but the first of a held-out block is predicted once, the first one of a window from a
single token of context.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tqdm import tqdm

from runtime import corpus, models, train
from runtime.card import (
    DEAD_SHARE,
    MEASURES,
    SAMPLE_TEMPERATURE,
    SAMPLE_TOKENS,
    WINDOW,
    card,
    dead_experts,
    quality_table,
    routing_table,
    source,
)
from runtime.lookahead import RouterGates
from runtime.recorder import Recorder
from traces import DECODE, ModelSpec, Trace, stats
from traces.cli import Parser

LOOKAHEAD = 4
MAX_BYTES = 32_000_000  # of a model directory that is shipped
PREDICTOR = "router"


@dataclass(frozen=True)
class HeldOut:
    """The evaluated part of one domain.

    Attributes:
        pieces: token ids uint16 [n + 1], the fronts of held-out blocks; the first token of each is only context.
        text: the bytes of all tokens that are predicted.
    """

    pieces: tuple[npt.NDArray[np.uint16], ...]
    text: bytes

    @property
    def tokens(self) -> int:
        return sum(len(piece) - 1 for piece in self.pieces)


def held_out(domain: corpus.Domain, tokenizer: Tokenizer, max_tokens: int, length: int = WINDOW) -> HeldOut:
    """Equal fronts of the held-out blocks, in whole windows unless a block is shorter, ``max_tokens`` in all.

    Raises:
        ValueError: fewer tokens than one window are asked for, nothing is held out, or the tokenizer loses bytes.
    """
    if max_tokens < length:
        raise ValueError(f"--max-tokens is {max_tokens}; evaluate at least one window of {length}")
    stride = math.ceil(len(domain.held_out) / (max_tokens // length))
    blocks = domain.held_out[::stride]
    quota = max_tokens // len(blocks) // length * length
    # In the byte-level alphabet one character of a token stands for one byte of text.
    sizes = np.array([len(tokenizer.id_to_token(i) or "") for i in range(tokenizer.get_vocab_size())])
    pieces, texts = [], []
    for block in blocks:
        data = block.decode("utf-8", "replace").encode()
        ids = train.encode(tokenizer, (block,))
        if sizes[ids].sum() != len(data):
            raise ValueError("tokenizer.json does not give text back byte for byte; use a model of runtime.train")
        piece = ids[: quota + 1]
        if len(piece) > 1:
            pieces.append(piece)
            texts.append(data[sizes[ids[0]] : sizes[piece].sum()])
    if not pieces:
        raise ValueError(f"corpus {domain.name} holds out no text of two tokens; use a longer file")
    return HeldOut(tuple(pieces), b"".join(texts))


def token_counts(tokenizer: Tokenizer, blocks: tuple[bytes, ...]) -> npt.NDArray[np.int64]:
    """How often each token occurs, int64 [vocabulary]."""
    counts = np.zeros(tokenizer.get_vocab_size(), np.int64)
    for block in blocks:
        counts += np.bincount(train.encode(tokenizer, (block,)), minlength=len(counts))
    return counts


def byte_counts(data: bytes) -> npt.NDArray[np.int64]:
    return np.bincount(np.frombuffer(data, np.uint8), minlength=256)


def unigram_bits(fitted: npt.NDArray[np.int64], found: npt.NDArray[np.int64]) -> float:
    """Bits that symbols counted in ``found`` cost under the frequencies of ``fitted``, each count plus one."""
    cost = math.log2(fitted.sum() + len(fitted)) - np.log2(fitted + 1.0)
    return float(found @ cost)


@torch.inference_mode()
def nats(
    model: torch.nn.Module, piece: npt.NDArray[np.uint16], length: int, before: Callable[[int], None]
) -> npt.NDArray[np.float64]:
    """Loss of each predicted token, float64 [n]; ``before`` is called with the tokens of each window."""
    ids = torch.from_numpy(piece.astype(np.int64))
    losses = []
    for start in range(0, len(ids) - 1, length):
        window = ids[start : start + length + 1]
        before(len(window) - 1)
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").double().numpy())
    return np.concatenate(losses)


class Recording:
    """Records what the routers do in forward passes, one sequence of decode tokens a window."""

    def __init__(self, model: torch.nn.Module, spec: ModelSpec) -> None:
        blocks = models.moe_blocks(model)
        lookahead = min(LOOKAHEAD, spec.num_layers - 1)
        gates = RouterGates([b.router.weight.detach() for b in blocks], spec.top_k, lookahead)
        self.recorder = Recorder(spec, lookahead, with_logits=False)

        def hook(layer: int) -> Callable[..., None]:
            def record(module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
                _, weights, ids = output
                hidden = inputs[0].flatten(0, -2)
                self.recorder.visit(ids, weights, None, gates.scores(layer, hidden))

            return record

        self._handles = [b.router.register_forward_hook(hook(layer)) for layer, b in enumerate(blocks)]

    def window(self, domain: str, tokens: int) -> None:
        self.recorder.start_sequences(1, domain)
        self.recorder.start_pass(tokens, DECODE)

    def trace(self) -> Trace:
        """What was recorded, teacher-forced; stops recording."""
        for handle in self._handles:
            handle.remove()
        return self.recorder.trace({}, PREDICTOR, routing="FORCED")


def domain_bits(
    domain: corpus.Domain, text: HeldOut, fitted: npt.NDArray[np.int64], model_nats: float
) -> dict[str, float]:
    """Bits that ``text`` costs by each measure.

    Compressors see it alone; unigrams are fitted on the training blocks, whose token counts are ``fitted``.
    """
    found = sum(np.bincount(piece[1:], minlength=len(fitted)) for piece in text.pieces)
    return {
        "model": model_nats / math.log(2),
        "gzip": 8.0 * len(gzip.compress(text.text, 9, mtime=0)),
        "xz": 8.0 * len(lzma.compress(text.text, preset=9 | lzma.PRESET_EXTREME)),
        "byte_unigram": unigram_bits(sum(map(byte_counts, domain.train)), byte_counts(text.text)),
        "token_unigram": unigram_bits(fitted, found),
    }


def figures(tokens: int, size: int, bits: dict[str, float]) -> dict[str, Any]:
    """The figures of a text of ``tokens`` and ``size`` bytes that costs ``bits`` in total by each measure."""
    return {
        "tokens": tokens,
        "bytes": size,
        "nats_per_token": round(bits["model"] * math.log(2) / tokens, 5),
        "bits_per_byte": {name: round(bits[name] / size, 5) for name in MEASURES},
    }


def routing(trace: Trace) -> dict[str, Any]:
    """Per-layer figures of the routing; definitions in ``traces.stats``.

    ``recall[d - 1][l]`` is of the first top_k guesses made at layer l for layer l + d; null without a target.
    """
    use = stats.use(trace.ids, trace.model.num_experts)
    shares = use / use.sum(axis=1, keepdims=True)
    repeat = stats.repeat(trace)
    divergence = stats.domain_divergence(trace)
    recall = stats.recall(trace, PREDICTOR)[..., trace.model.top_k - 1] if PREDICTOR in trace.guesses else np.empty(0)
    balance = stats.balance(trace)
    columns = {
        "busiest_share": balance.busiest_share,
        "least_share": shares.min(axis=1),
        "entropy": balance.entropy,
        "repeat_in_order": repeat.in_order,
        "repeat_shuffled": repeat.shuffled,
        "repeat_shuffled_within": repeat.shuffled_within,
    }
    if divergence is not None:
        columns["domain_divergence_bits"] = divergence
    return {
        "evidence": trace.routing,
        "tokens": trace.num_tokens,
        "layers": {name: _plain(values) for name, values in columns.items()},
        "recall": _plain(recall),
        "dead": [[int(layer), int(expert)] for layer, expert in np.argwhere(shares < DEAD_SHARE)],
    }


def _plain(values: npt.NDArray[Any]) -> list[Any]:
    """Nested lists of numbers rounded to five places, NaN as None."""
    rounded = np.where(np.isnan(values), None, np.round(values, 5).astype(object))
    return rounded.tolist()


@torch.inference_mode()
def sample(model: torch.nn.Module, tokenizer: Tokenizer, prompt: str, temperature: float = 0.0) -> str:
    """The continuation of ``prompt``: greedy at temperature 0, else sampled with seed 0."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=SAMPLE_TOKENS, **how)
    return tokenizer.decode(out[0, ids.shape[1] :].tolist())


def shipped_bytes(model_dir: Path) -> int:
    """Bytes of the model directory's files, without the card and without ``training/``, which is not shipped."""
    files = (p for p in model_dir.rglob("*") if p.is_file())
    kept = (p for p in files if p.relative_to(model_dir).parts[0] not in ("training", "README.md"))
    return sum(p.stat().st_size for p in kept)


def check_size(size: int) -> None:
    """Raises: ValueError: the model directory with its card is too large to ship."""
    if size > MAX_BYTES:
        raise ValueError(f"the model directory would hold {size:,} bytes; {MAX_BYTES:,} are allowed: no card written")


def training_facts(args: argparse.Namespace, spec: ModelSpec) -> dict[str, Any]:
    """How the model was trained: tokens, steps, last log record, and the command that trains it again.

    Raises:
        ValueError: the flags in ``--training`` contradict the model or its log, or there are neither flags nor log.
    """
    log = args.model / "training" / "log.jsonl"
    if args.training is None and not log.is_file():
        raise ValueError("training/log.jsonl is absent; state how the model was trained with --training 'FLAGS'")
    parser = train.parser()

    def refuse(message: str) -> None:
        raise ValueError(f"--training: {message}; give flags of runtime.train")

    parser.error = refuse  # type: ignore[method-assign, assignment]
    required = ["--out", args.model.name]
    flags = parser.parse_args([*required, *shlex.split(args.training or "")])
    shape = (spec.num_layers, spec.hidden_size, spec.expert_size, spec.num_experts, spec.top_k)
    names = ("layers", "hidden", "ffn", "experts", "top_k")
    for name, found in zip(names, shape, strict=True):
        if getattr(flags, name) != found:
            raise ValueError(f"--training has {name} {getattr(flags, name)}, config.json {found}; name the true flags")
    per_step = flags.batch * flags.length
    steps = math.ceil(flags.tokens / per_step)
    final = None
    if log.is_file():
        lines = log.read_text().splitlines()
        if not lines:
            raise ValueError("training/log.jsonl is empty; train first, or remove it")
        final = json.loads(lines[-1])
        if final.get("step") != steps:
            raise ValueError(
                f"training/log.jsonl ends at step {final.get('step')}, but the flags make {steps} steps of {per_step} "
                "tokens; give the flags of the finished run with --training"
            )
    defaults = vars(train.parser().parse_args(required))
    changed = {k: v for k, v in vars(flags).items() if v != defaults[k] and k not in ("corpus", "out", "threads")}
    words = ["python -m runtime.train"]
    if args.corpus:
        words.append("--corpus " + " ".join(shlex.quote(p.name) for p in args.corpus))
    words.append(f"--out {shlex.quote(args.model.name)}")
    words += [f"--{k.replace('_', '-')} {int(v) if v == int(v) else v}" for k, v in changed.items()]
    return {"tokens": steps * per_step, "steps": steps, "final": final, "command": " ".join(words)}


def load(model_dir: Path) -> tuple[torch.nn.Module, Tokenizer]:
    """The model in float32 and its tokenizer.

    Raises:
        ValueError: a file that is missing or cannot be read, or a vocabulary larger than the model's.
    """
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{model_dir} holds no tokenizer.json; name a model directory of runtime.train")
    try:
        model, _ = models.load(model_dir)
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{model_dir} cannot be loaded ({reason}); name a model directory of runtime.train") from None
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.get_vocab_size() > model.config.vocab_size:
        raise ValueError(f"tokenizer.json has {tokenizer.get_vocab_size()} tokens, the model {model.config.vocab_size}")
    return model, tokenizer


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of the model as one JSON object; with ``--card`` the card is written too."""
    spec = models.spec_of(args.model)
    domains = corpus.load(args.corpus)
    if len({d.name for d in domains}) < len(domains):
        raise ValueError("two corpus files have the same name up to the first dot; rename one")
    result: dict[str, Any] = {"model": spec.name, "window": WINDOW, "bytes": shipped_bytes(args.model)}
    if args.card:
        check_size(result["bytes"])
        result["training"] = training_facts(args, spec)
    model, tokenizer = load(args.model)
    result["parameters"] = sum(p.numel() for p in model.parameters())
    result["vocabulary"] = tokenizer.get_vocab_size()
    texts = {d.name: held_out(d, tokenizer, args.max_tokens) for d in domains}
    recording = Recording(model, spec)
    bits, train_tokens = {}, {}
    progress = tqdm(total=sum(t.tokens for t in texts.values()), unit="token", file=sys.stderr, mininterval=2)
    for domain in domains:
        text, loss = texts[domain.name], 0.0
        for piece in text.pieces:
            loss += nats(model, piece, WINDOW, lambda n, name=domain.name: recording.window(name, n)).sum()
            progress.update(len(piece) - 1)
        fitted = token_counts(tokenizer, domain.train)
        train_tokens[domain.name] = int(fitted.sum())
        bits[domain.name] = domain_bits(domain, text, fitted, loss)
    progress.close()
    result["domains"] = {
        d.name: figures(texts[d.name].tokens, len(texts[d.name].text), bits[d.name])
        | {"train_bytes": sum(map(len, d.train)), "train_tokens": train_tokens[d.name]}
        for d in domains
    }
    tokens, size = (sum(r[key] for r in result["domains"].values()) for key in ("tokens", "bytes"))
    result["overall"] = figures(tokens, size, {name: sum(b[name] for b in bits.values()) for name in MEASURES})
    result["routing"] = routing(recording.trace())
    result["samples"] = [
        {
            "domain": d.name,
            "prompt": source(d.name).prompt,
            "text": sample(model, tokenizer, source(d.name).prompt),
            "sampled": sample(model, tokenizer, source(d.name).prompt, SAMPLE_TEMPERATURE),
        }
        for d in domains
    ]
    if args.card:
        text = card(result, spec)
        result["bytes"] += len(text.encode())
        check_size(result["bytes"])
        (args.model / "README.md").write_text(text, encoding="utf-8")
    return result


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m runtime.evaluate", description=__doc__.splitlines()[0])
    p.add_argument("--model", type=Path, default=models.DEMO, help="model directory (default: the shipped one)")
    p.add_argument("--corpus", type=Path, nargs="*", default=[], help="text files (default: Python's standard library)")
    p.add_argument("--max-tokens", type=int, default=60_000, help="held-out tokens of each file (default %(default)s)")
    p.add_argument("--card", action="store_true", help="write the model card, README.md in the model directory")
    p.add_argument("--training", metavar="FLAGS", help="for the card: flags of runtime.train it was trained with")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.model = args.model.resolve()
    torch.set_num_threads(args.threads)
    try:
        result = evaluate(args)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(quality_table(result), routing_table(result), dead_experts(result), sep="\n\n")
    for s in result["samples"]:
        print(f"\n{s['domain']}: {s['prompt']}|{s['text']}")
    print(f"\nmodel directory: {result['bytes']:,} bytes {'with its' if args.card else 'without a'} card")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
