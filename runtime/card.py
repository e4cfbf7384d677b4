"""The model card of the demonstration model: figures of `runtime.evaluate` as Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from runtime import corpus
from traces import ModelSpec

WINDOW = 512  # tokens
SAMPLE_TOKENS = 80
SAMPLE_TEMPERATURE = 0.8  # as the shipped trace was recorded
DEAD_SHARE = 0.005  # an expert below this share of its layer's accesses counts as dead
MEASURES = ("model", "gzip", "xz", "byte_unigram", "token_unigram")


class Source(NamedTuple):
    """What a corpus file holds, its licence, and a prompt in its manner."""

    title: str
    licence: str
    prompt: str


_FUNCTION = 'def binary_search(items: list[int], target: int) -> int:\n    """'
SOURCES = {
    "peps_publicdomain": Source(
        "Python Enhancement Proposals (python/peps)",
        "public domain / CC0-1.0",
        "Abstract\n========\n\nThis PEP proposes a new",
    ),
    "classic_books_en": Source(
        "20 English books (mlschmitt/classic-books-markdown)",
        "public domain",
        "It was late in the evening when the old captain",
    ),
    "thealgorithms_python": Source("TheAlgorithms/Python", "MIT", _FUNCTION),
    "stdlib": Source("Python's standard library", "PSF-2.0", _FUNCTION),
}


def source(domain: str) -> Source:
    """What is known of a domain; an unknown one is named as itself."""
    return SOURCES.get(domain, Source(domain, "not stated", "The "))


def table(head: Sequence[str], rows: list[list[Any]]) -> str:
    """A Markdown table: numbers to the right, floats with three decimals, None as a dash."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value

    right = [not isinstance(value, str) for value in rows[0]]
    rules = ["---:" if r else "---" for r in right]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in [list(head), rules, *rows])


def quality_table(result: dict[str, Any]) -> str:
    """Held-out text: one row per domain, and all."""
    head = ["text", "tokens", "bytes", "nats per token", *(f"{m.replace('_', ' ')}, bits/byte" for m in MEASURES)]
    parts = [*result["domains"].items(), ("all", result["overall"])]
    rows = [
        [name, f["tokens"], f["bytes"], f["nats_per_token"], *(f["bits_per_byte"][m] for m in MEASURES)]
        for name, f in parts
    ]
    return table(head, rows)


def routing_table(result: dict[str, Any]) -> str:
    """Routing: one row per layer, then the mean of the layers."""
    layers, recall = result["routing"]["layers"], result["routing"]["recall"]
    columns = [*layers.values(), *recall]
    head = ["layer", *(name.replace("_", " ") for name in layers)]
    head += [f"recall d={d}" for d in range(1, len(recall) + 1)]
    known = [[value for value in column if value is not None] for column in columns]
    means = [sum(values) / len(values) if values else None for values in known]
    rows = [[i, *(column[i] for column in columns)] for i in range(len(columns[0]))]
    return table(head, [[str(row[0]), *row[1:]] for row in rows] + [["mean", *means]])


def dead_experts(result: dict[str, Any]) -> str:
    """Whether every expert of every layer is used, in one sentence."""
    dead = result["routing"]["dead"]
    least = min(result["routing"]["layers"]["least_share"])
    if not dead:
        return f"No dead expert: the least used one of any layer takes {100 * least:.1f} % of its layer's accesses."
    names = ", ".join(f"{expert} of layer {layer}" for layer, expert in dead)
    return f"Below {100 * DEAD_SHARE:g} % of their layer's accesses: expert {names}."


def card(result: dict[str, Any], spec: ModelSpec) -> str:
    """The model card, Markdown with front matter."""
    training, domains = result["training"], result["domains"]
    data = table(
        ["text", "licence", "training bytes", "training tokens", "times read"],
        [
            [
                source(name).title,
                source(name).licence,
                f["train_bytes"],
                f["train_tokens"],
                training["tokens"] / len(domains) / f["train_tokens"],
            ]
            for name, f in domains.items()
        ],
    )
    losses = "The training log was not at hand when this card was written."
    if training["final"]:
        records = [
            f"- {k.replace('held_out_', 'held out, ')}: {v:.4f}" for k, v in training["final"].items() if k != "step"
        ]
        losses = "\n".join([_LOSSES, "", *records])
    samples = []
    for s in result["samples"]:
        fence = "~" * max(3, 1 + max(map(len, re.findall("~+", s["text"] + s["sampled"])), default=0))
        texts = f"{fence}\n{s['text']}\n{fence}\n\nsampled:\n\n{fence}\n{s['sampled']}\n{fence}\n"
        samples.append(f"{s['domain']}, prompt {json.dumps(s['prompt'])}, greedy:\n\n{texts}")
    idle = (spec.num_experts - spec.top_k) * spec.expert_weights * spec.num_layers
    return _CARD.format(
        name=spec.name,
        parameters=result["parameters"],
        active=result["parameters"] - idle,
        spec=spec,
        vocabulary=result["vocabulary"],
        data=data,
        tokens=training["tokens"],
        steps=training["steps"],
        losses=losses,
        command=training["command"],
        held_every=corpus.HELD_OUT_EVERY,
        held_bytes=corpus.BLOCK_BYTES,
        window=WINDOW,
        quality=quality_table(result),
        routed=result["routing"]["tokens"],
        dead=dead_experts(result),
        routing=routing_table(result),
        chance=spec.top_k / spec.num_experts,
        sample_tokens=SAMPLE_TOKENS,
        sample_temperature=SAMPLE_TEMPERATURE,
        samples="\n".join(samples),
    )


_LOSSES = """At the last step, losses in nats per token (train: its batch; held out: up to 32 windows) and the
balance loss (1 where experts are used evenly):"""

_CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [mixtral, mixture-of-experts, expert-offloading]
---

# {name}: a demonstration model for expert offloading

A small Mixtral, trained from scratch so that recording, simulating and running expert offloading can be tried on any
machine with real routing. It is not for use as a language model: it is far too small to be right about anything.

## Shape and tokenizer

MixtralForCausalLM, {parameters:,} parameters ({active:,} used for one token), bfloat16: {spec.num_layers} layers,
hidden size {spec.hidden_size}, {spec.num_experts} experts of inner size {spec.expert_size} in each layer,
{spec.top_k} routed per token, tied embeddings. Its own byte-level BPE tokenizer, {vocabulary:,} entries.

## Training

{data}

Every window is drawn from one of the texts, each equally likely; {tokens:,} tokens in {steps:,} steps.
Of each text every {held_every}nd block of {held_bytes:,} bytes (of a shorter text the last one) was held out.

{losses}

To train it again:

```
{command}
```

## Held-out text

{quality}

Weights unquantized, computed with in float32; windows of {window} tokens without overlap, the first prediction of a
window from one token of context. Equal fronts of the held-out blocks. gzip (level 9) and xz compress the same text,
each domain by itself and without the training text; the unigram models count bytes or tokens of the same domain's
training blocks, plus one each. Nats per token depend on the tokenizer; compare bits per byte.

## Routing

FORCED: {routed:,} held-out tokens, fed as they stand and not generated. {dead}

{routing}

- busiest, least share: of a layer's accesses, by one expert; entropy: of the shares, 1 is even.
- repeat: probability that a routed expert was also routed for the token before, in order, and as expected with all
  tokens in random order (shuffled) or those of each window (shuffled within).
- domain divergence: Jensen-Shannon, between the texts' shares of expert use.
- recall d=1, 2, ...: share of the routed experts of layer + d among the first {spec.top_k} guesses, made by that
  layer's router as it is on this layer's router input; guessing at random gives {chance:.3f}.

## Samples

{sample_tokens} tokens each: greedy, where a model this small soon repeats itself, and sampled at temperature
{sample_temperature} with seed 0.

{samples}"""
