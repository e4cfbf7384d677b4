"""Router inputs and routing of a quantized model on text, streamed to disk: what lookahead gates learn from.

Text is read teacher-forced in windows, each one prefill pass of the engine with every expert resident. Shape letters:
N tokens, L MoE layers, H hidden size, E experts, K routed experts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from runtime import family, models
from runtime.engine import Engine
from sim.machine import HardwareProfile, LinkProfile
from sim.spec import options
from traces.trace import id_dtype

WINDOW = 256  # tokens
UNPACED = HardwareProfile(
    "unpaced", 0, 0, LinkProfile(10.0, 0.0, 10.0, 0.0, 10.0), memory_gb_s=10.0, tflops=0.1, host_s=1e-4
)


class Window(NamedTuple):
    """Neighbouring tokens of one text, and the place of its domain in the list of domains."""

    tokens: list[int]
    domain: int


def windows(blocks_of: Sequence[Sequence[bytes]], tokenizer: Any, tokens: int, length: int = WINDOW) -> list[Window]:
    """About ``tokens`` tokens in whole windows, an equal number of each domain (where its blocks hold as many), evenly
    spread over its blocks; domains alternate.

    Raises:
        ValueError: fewer tokens than a window for each domain, or texts shorter than a window.
    """
    each = tokens // len(blocks_of) // length
    if each < 1:
        raise ValueError(f"{tokens} tokens are asked for; give each of {len(blocks_of)} texts a window of {length}")
    found: list[list[Window]] = []
    for domain, blocks in enumerate(blocks_of):
        chosen = [blocks[i * len(blocks) // min(each, len(blocks))] for i in range(min(each, len(blocks)))]
        cut: list[Window] = []
        for number, block in enumerate(chosen):
            wanted = (each * (number + 1)) // len(chosen) - (each * number) // len(chosen)
            text = block.decode("utf-8", "replace")
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            whole = len(ids) // length
            wanted = min(wanted, whole)
            starts = [i * whole // wanted * length for i in range(wanted)]
            cut += [Window(ids[start : start + length], domain) for start in starts]
        if not cut:
            raise ValueError(f"no block of text {domain + 1} holds {length} tokens; use a longer text")
        found.append(cut)
    most = max(map(len, found))
    return [cut[i] for i in range(most) for cut in found if i < len(cut)]


class Table:
    """An array [L, N, ...] in a file; a layer of it is mapped while it is looked at, and no longer."""

    def __init__(self, path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
        self.path, self.dtype, self.shape = path, np.dtype(dtype), shape

    def __getitem__(self, layer: int) -> npt.NDArray[Any]:
        """[N, ...], read-only."""
        offset = layer * self._bytes(self.shape[1])
        return np.memmap(self.path, self.dtype, "r", offset, self.shape[1:])

    def write(self, layer: int, start: int, rows: npt.NDArray[Any]) -> None:
        """``rows`` [n, ...] from row ``start`` on."""
        with self.path.open("r+b") as file:
            file.seek(layer * self._bytes(self.shape[1]) + self._bytes(start))
            file.write(np.ascontiguousarray(rows, self.dtype).tobytes())

    def blank(self) -> None:
        """A file of this size without content."""
        with self.path.open("wb") as file:
            file.truncate(self.shape[0] * self._bytes(self.shape[1]))

    def _bytes(self, rows: int) -> int:
        return rows * math.prod(self.shape[2:]) * self.dtype.itemsize


class Activations:
    """What the routers of a model saw and said, in a folder.

    Attributes:
        inputs: router inputs, float16 [L, N, H].
        logits: what routers rank by (their logits; `runtime.family.Family.preference`), float16 [L, N, E].
        ids: routed experts in router order, uint8 (uint16 from 256 experts) [L, N, K].
        domain: of every token, uint8 [N].
        first: whether a token is the first of its window, bool [N].
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int, int, int]) -> None:
        layers, tokens, hidden, experts, top_k = shape
        self.inputs = Table(folder / "inputs.bin", np.float16, (layers, tokens, hidden))
        self.logits = Table(folder / "logits.bin", np.float16, (layers, tokens, experts))
        self.ids = Table(folder / "ids.bin", id_dtype(experts), (layers, tokens, top_k))
        self.domain = np.zeros(tokens, np.uint8)
        self.first = np.zeros(tokens, bool)

    @property
    def num_tokens(self) -> int:
        return len(self.domain)

    @property
    def tables(self) -> tuple[Table, Table, Table]:
        return self.inputs, self.logits, self.ids


def collect(model_dir: Path, texts: Sequence[Window], bits: int, folder: Path, progress: bool = True) -> Activations:
    """Run ``texts`` through the model with ``bits``-bit experts and keep everything in ``folder``.

    Goes on where an interrupted call for the same texts, model and bits stopped. On disk: 2 (H + E) + K bytes a token
    and layer; in memory: the quantized model and one window.

    Raises:
        ModelError, StoreError, CopierError: a model that cannot be run.
    """
    spec = models.spec_of(model_dir)
    tokens = sum(len(w.tokens) for w in texts)
    shape = (spec.num_layers, tokens, spec.hidden_size, spec.num_experts, spec.top_k)
    key = _key(model_dir, texts, bits, shape)
    folder.mkdir(exist_ok=True)
    state = folder / "done.json"
    known = json.loads(state.read_text()) if state.is_file() else {}
    done = int(known["windows"]) if known.get("key") == key else 0
    found = Activations(folder, shape)
    if not done:
        for table in found.tables:
            table.blank()
    ends = np.cumsum([len(w.tokens) for w in texts])
    found.domain[:] = np.repeat([w.domain for w in texts], [len(w.tokens) for w in texts])
    found.first[np.append(0, ends[:-1])] = True
    if done < len(texts):
        for number, visits in enumerate(_passes(model_dir, texts[done:], bits, progress), done):
            start = int(ends[number]) - len(texts[number].tokens)
            for layer, seen in enumerate(visits):
                for table, rows in zip(found.tables, seen, strict=True):
                    table.write(layer, start, rows)
            if number % 64 == 63 or number == len(texts) - 1:
                _replace(state, json.dumps({"key": key, "windows": number + 1}))
    return found


Seen = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]


def _passes(model_dir: Path, texts: Sequence[Window], bits: int, progress: bool) -> Iterator[list[Seen]]:
    """Router inputs, logits and ids of every layer, window by window."""
    spec = models.spec_of(model_dir)
    with Engine(model_dir, bits=bits, slots=spec.num_experts, options=options("on_demand"), machine=UNPACED) as engine:
        seen: list[Seen] = []

        of = family.of(engine.model.config.model_type)

        def keep(module: torch.nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            hidden = inputs[0].flatten(0, -2).float().numpy().astype(np.float16)
            ranked_by = of.preference(module, output[0].float()).numpy().astype(np.float16)
            seen.append((hidden, ranked_by, output[2].numpy().copy()))

        handles = [b.router.register_forward_hook(keep) for b in models.moe_blocks(engine.model)]
        bar = tqdm(
            total=sum(len(w.tokens) for w in texts),
            desc=f"{bits}-bit model reads",
            unit="token",
            file=sys.stderr,
            delay=2,
            disable=not progress,
        )
        for window in texts:
            seen.clear()
            for _ in engine.generate(window.tokens, 1):
                pass
            bar.update(len(window.tokens))
            yield seen
        bar.close()
        for handle in handles:
            handle.remove()


def _key(model_dir: Path, texts: Sequence[Window], bits: int, shape: tuple[int, ...]) -> str:
    digest = hashlib.sha256(f"{model_dir.resolve()} {bits} {shape}".encode())
    for window in texts:
        digest.update(np.asarray(window.tokens, np.int32).tobytes())
    return digest.hexdigest()


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)
