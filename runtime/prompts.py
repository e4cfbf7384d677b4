"""Prompts: built in, from a file, or cut from the held-out part of a corpus."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from runtime import corpus


class Prompt(NamedTuple):
    """Text to continue, and what kind of text it is."""

    text: str
    domain: str


BUILT_IN = (
    Prompt('def moving_average(values, window):\n    """Mean of every run of `window` values.', "code"),
    Prompt("Abstract\n========\n\nThis PEP proposes a syntax for declaring that a module", "proposal"),
    Prompt("The rain had stopped before dawn, and when the old man opened the door", "prose"),
    Prompt("class Queue:\n    def __init__(self):\n        self.items = []\n", "code"),
)


def read(path: Path) -> list[Prompt]:
    """JSON lines with ``prompt`` (or ``question``, ``text``) and optional ``domain``; other files: a prompt a line.

    Raises:
        ValueError: missing or empty file, or a JSON line without a prompt.
    """
    if not path.is_file():
        raise ValueError(f"prompt file {path} not found; name a text file with one prompt a line, or JSON lines")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(Prompt(line, path.stem))
            continue
        try:
            item = json.loads(line)
            text = next(item[k] for k in ("prompt", "question", "text") if isinstance(item.get(k), str))
        except (ValueError, AttributeError, StopIteration):
            raise ValueError(f"{path.name} line {number} is no JSON object with a prompt; give each line one") from None
        prompts.append(Prompt(text, str(item.get("domain", path.stem))))
    if not prompts:
        raise ValueError(f"prompt file {path} is empty; give it at least one prompt")
    return prompts


def held_out(domains: Sequence[corpus.Domain], count: int, num_bytes: int) -> list[Prompt]:
    """``count`` prompts of about ``num_bytes``, in turn from each domain's held-out blocks, evenly spread over them."""
    prompts = []
    for i in range(count):
        domain = domains[i % len(domains)]
        per_domain = -(-count // len(domains))
        text = b"".join(domain.held_out)
        start = len(text) * (i // len(domains)) // per_domain
        start = text.find(b"\n", start) + 1
        prompts.append(Prompt(text[start : start + num_bytes].decode("utf-8", "ignore").lstrip(), domain.name))
    return prompts
