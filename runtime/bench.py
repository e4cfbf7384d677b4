"""What a bit width of the experts costs in quality: held-out perplexity beside the bytes of an expert.

    python -m runtime.bench --quality [--bits 16 --bits 4 ...] [--corpus FILE ...]

The routers, attention and embeddings stay as they are; every expert is replaced by what its quantized bytes stand for.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from runtime import corpus, models
from runtime.card import WINDOW
from runtime.evaluate import HeldOut, held_out, load, nats
from runtime.quantize import dequantize, views
from runtime.store import HostStore
from traces.cli import Parser

WIDTHS = (16, 8, 4, 3, 2)


@torch.inference_mode()
def at_width(model: torch.nn.Module, store: HostStore, experts: int) -> None:
    """Give every expert the weights that its bytes in ``store`` stand for."""
    for layer, found in enumerate(models.moe_blocks(model)):
        for expert in range(experts):
            gate, up, down = dequantize(views(store.row(layer * experts + expert), store.layout))
            found.block.experts.gate_up_proj[expert] = torch.cat([gate, up])
            found.block.experts.down_proj[expert] = down


def loss_nats(model: torch.nn.Module, text: HeldOut) -> float:
    """Summed loss of the predicted tokens of one held-out text."""
    return float(sum(nats(model, piece, WINDOW, lambda n: None).sum() for piece in text.pieces))


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of a token and bits of a byte, by width and text.

    Raises:
        ValueError: a model or corpus that cannot be used.
    """
    spec = models.spec_of(args.model)
    domains = corpus.load(args.corpus)
    model, tokenizer = load(args.model)
    texts = {d.name: held_out(d, tokenizer, args.max_tokens) for d in domains}
    tokens = sum(text.tokens for text in texts.values())
    size = sum(len(text.text) for text in texts.values())
    rows = []
    print(f"{spec.name}, {tokens:,} held-out tokens of {', '.join(texts)}; MEASURED")
    print(f"{'bits':>4} {'bytes of an expert':>18} {'perplexity':>10} {'bits/byte':>10}  bits/byte by text")
    for bits in tqdm(args.bits or WIDTHS, unit="width", file=sys.stderr):
        with HostStore.build(args.model, spec, bits, progress=False) as store:
            at_width(model, store, spec.num_experts)
        loss = {name: loss_nats(model, text) for name, text in texts.items()}
        total = sum(loss.values())
        row = {
            "bits": bits,
            "expert_bytes": spec.expert_bytes(bits),
            "perplexity": math.exp(total / tokens),
            "bits_per_byte": total / math.log(2) / size,
            "domains": {name: loss[name] / math.log(2) / len(text.text) for name, text in texts.items()},
        }
        rows.append(row)
        each = ", ".join(f"{name} {value:.3f}" for name, value in row["domains"].items())
        print(
            f"{bits:4} {row['expert_bytes']:18,} {row['perplexity']:10.2f} {row['bits_per_byte']:10.4f}  {each}",
            flush=True,
        )
    return {"model": spec.name, "evidence": "MEASURED", "tokens": tokens, "window": WINDOW, "quality": rows}


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m runtime.bench", description=__doc__.splitlines()[0])
    p.add_argument("--quality", action="store_true", help="held-out perplexity at each width of the experts")
    p.add_argument("--model", type=Path, default=models.DEMO, help="model directory (default: the shipped one)")
    p.add_argument("--bits", type=int, action="append", choices=WIDTHS, help="repeatable (default: all)")
    p.add_argument("--corpus", type=Path, nargs="*", default=[], help="text files (default: Python's standard library)")
    p.add_argument("--max-tokens", type=int, default=8192, help="held-out tokens of each file (default %(default)s)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; 2 on bad input."""
    args = parser().parse_args(argv)
    if not args.quality:
        print("runtime.bench: say what to measure: --quality", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    try:
        document = quality(args)
    except (ValueError, OSError) as error:
        print(f"runtime.bench: {error}", file=sys.stderr)
        return 2
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
