"""What a bit width of the experts costs in quality: held-out perplexity beside the bytes of an expert.

    python -m runtime.bench --quality [--bits 16 --bits 4 ...] [--group-size 64 ...] [--fast] [--corpus FILE ...]

The routers, attention and embeddings stay as they are; every expert is replaced by what its quantized bytes stand for.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from runtime import corpus, models
from runtime.card import WINDOW
from runtime.evaluate import HeldOut, held_out, load, nats
from runtime.quantize import dequantize, group_sizes, views
from runtime.store import HostStore
from traces.vocabulary import GROUP_SIZE, ModelSpec

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


def cells(spec: ModelSpec, bits: Sequence[int], sizes: Sequence[int], fast: bool) -> list[tuple[int, int, bool]]:
    """What to measure: (bits, group size, solver); 16 bits once, sizes that do not fit left out.

    Raises:
        ValueError: no group size fits a width.
    """
    found = []
    for width in bits:
        if width == 16:
            found.append((16, GROUP_SIZE, True))
            continue
        fitting = group_sizes(spec.hidden_size, spec.expert_size, width)
        if not set(sizes) & set(fitting):
            shown = ", ".join(map(str, fitting)) or "none"
            raise ValueError(f"no group size of {list(sizes)} fits {width} bits of {spec.name}; these do: {shown}")
        found += [
            (width, size, solver)
            for size in sizes
            if size in fitting
            for solver in ((True, False) if fast else (True,))
        ]
    return found


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of a token and bits of a byte, by width, group size, way of quantizing, and text.

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
    print(
        f"{'bits':>4} {'group':>5} {'way':>7} {'bytes of an expert':>18} {'weight error':>12} {'perplexity':>10} "
        f"{'bits/byte':>10}  bits/byte by text"
    )
    wanted = cells(spec, args.bits or WIDTHS, args.group_size or [GROUP_SIZE], args.fast)
    for bits, group, solver in tqdm(wanted, unit="cell", file=sys.stderr):
        with HostStore.build(args.model, spec, bits, group_size=group, optimize=solver, progress=False) as store:
            at_width(model, store, spec.num_experts)
            error = store.quantization_error
        loss = {name: loss_nats(model, text) for name, text in texts.items()}
        total = sum(loss.values())
        row = {
            "bits": bits,
            "group_size": None if bits == 16 else group,
            "way": None if bits == 16 else "solver" if solver else "fast",
            "expert_bytes": spec.expert_bytes(bits, group),
            "weight_error": error,
            "perplexity": math.exp(total / tokens),
            "bits_per_byte": total / math.log(2) / size,
            "domains": {name: loss[name] / math.log(2) / len(text.text) for name, text in texts.items()},
            "perplexities": {name: math.exp(loss[name] / text.tokens) for name, text in texts.items()},
        }
        rows.append(row)
        each = ", ".join(f"{name} {value:.3f}" for name, value in row["domains"].items())
        print(
            f"{bits:4} {row['group_size'] or '-':>5} {row['way'] or '-':>7} {row['expert_bytes']:18,} {error:12.4f} "
            f"{row['perplexity']:10.2f} {row['bits_per_byte']:10.4f}  {each}",
            flush=True,
        )
    return {"model": spec.name, "evidence": "MEASURED", "tokens": tokens, "window": WINDOW, "quality": rows}
