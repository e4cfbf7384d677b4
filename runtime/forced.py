"""Forced routing: an engine of a model's exact shape with random weights, whose routing and guesses a trace says.

Speed does not depend on what the weights are, so nothing is downloaded: bytes are copied, experts computed, and
attention, router, gates and head run as they would; only which experts a token goes to comes from the trace. Copies,
kernels, planner, executor and copier are the engine's own. What is measured is MEASURED; its routing is FORCED (of a
recorded trace) or SYNTHETIC.

Shape letters: T tokens, L MoE layers, E experts of a layer, K routed of them, D lookahead distances.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from runtime.budget import without_experts
from runtime.devices import Device, Slots
from runtime.executor import Executor, Looked, check_options, gates_of
from runtime.experts import SlotExperts
from runtime.lookahead import NUM_GUESSES, LinearGates
from runtime.observe import Spans
from runtime.quantize import ExpertLayout, pack, views
from runtime.repack import Order
from runtime.skeleton import moe_blocks, skeleton, spec_of_skeleton
from runtime.store import HostStore, check_memory, layouts_of
from sim.ledger import Counts, Ledger, LoadLog
from sim.machine import HardwareProfile
from sim.spec import Options
from traces import DECODE, PREFILL, GuessTable, ModelSpec, Trace
from traces.trace import id_dtype, rank
from traces.vocabulary import GROUP_SIZE

GUESSES = "forced"  # the one predictor of a forced trace
PERFECT = "perfect"  # guesses that are the routing itself
DISTANCES = 4
_BLOCK = 1 << 20  # words filled at a time
_QUANTIZED = 512  # widths of the expert that is really quantized, for its scales
_SCALE = 0.02  # of random dense weights, as models are initialised


class Shape(NamedTuple):
    """A transformers model type and what its default configuration is changed by."""

    model_type: str
    changes: dict[str, Any]


_TOY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES = {
    "mixtral-8x7b": Shape("mixtral", {}),
    "gpt-oss-20b": Shape("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "mixtral-toy": Shape("mixtral", _TOY | {"num_hidden_layers": 4, "num_local_experts": 8}),
    "gpt-oss-toy": Shape(
        "gpt_oss",
        _TOY | {"num_hidden_layers": 3, "num_local_experts": 8, "head_dim": 16, "sliding_window": 8},
    ),
}


class ForcedError(ValueError):
    """A trace or shape that cannot be forced; one sentence."""


# --- weights ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
    """A model without experts: its dense part on a device, random.

    Attributes:
        model, spec: the transformers model and its shape.
        experts: what stood where an engine's experts stand, one a block; they say how experts are gated.
    """

    model: torch.nn.Module
    spec: ModelSpec
    experts: list[torch.nn.Module]

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weights."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def restore(self) -> None:
        """Put back what an engine replaced."""
        for found, experts in zip(moe_blocks(self.model), self.experts, strict=True):
            found.block.experts = experts


@torch.no_grad()
def dense(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Dense:
    """The dense part of ``SHAPES[name]``: norms 1, everything else normal around 0.

    Raises:
        ForcedError: no such shape.
    """
    from transformers import AutoConfig

    if name not in SHAPES:
        raise ForcedError(f"shape {name!r} is unknown; choose one of {', '.join(SHAPES)}")
    model = skeleton(AutoConfig.for_model(SHAPES[name].model_type, **SHAPES[name].changes), dtype)
    spec = spec_of_skeleton(model, name)
    experts = [found.experts for found in moe_blocks(model)]
    kept = {id(p) for module in experts for p in module.parameters()}
    generator = torch.Generator(device=device).manual_seed(seed)
    for path, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None or id(parameter) in kept:
                continue
            tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            if "norm" in path.rpartition(".")[2]:
                tensor.fill_(1.0)
            else:
                tensor.normal_(0.0, _SCALE, generator=generator)
            module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    model.tie_weights()
    with without_experts(model):
        model.to(device).eval()
    return Dense(model, spec, experts)


def random_store(
    spec: ModelSpec, bits: int, group_size: int = GROUP_SIZE, seed: int = 0, order: Order = "hqq"
) -> HostStore:
    """Every expert of a model with random codes of its own, and the scales of weights that were really quantized.

    Raises:
        ForcedError: 16 bits, which have no codes.
        StoreError: host memory cannot hold them. ValueError: a layout that cannot be.
    """
    if bits == 16:
        raise ForcedError("experts at 16 bits have no codes to draw; choose 8, 4, 3 or 2 bits")
    layouts = layouts_of(spec, bits, group_size, order)
    check_memory(spec, layouts)
    store = HostStore(spec, layouts, optimize=False)
    try:
        fill(store, layouts[0], seed)
    except BaseException:
        store.close()
        raise
    return store


def fill(rows: Any, layout: ExpertLayout, seed: int = 0) -> None:
    """Random codes, and scales of quantized normal weights, in every row of ``rows`` (a host store or `ExpertRows`)."""
    template = _template(layout, seed)
    mask = np.uint64(0x3FFFFFFF3FFFFFFF if layout.bits == 3 else 0xFFFFFFFFFFFFFFFF)  # ten values of three bits a word

    def one(index: int) -> None:
        row = rows.row(index)[: layout.expert_bytes].numpy()
        words = row[: layout.scale_offset].view(np.uint64)
        draw = np.random.Generator(np.random.SFC64([seed, index]))
        for start in range(0, len(words), _BLOCK):
            part = words[start : start + _BLOCK]
            part[:] = draw.integers(0, mask, len(part), np.uint64, endpoint=True)
            part &= mask
        row[layout.scale_offset :] = template[layout.scale_offset :]
        rows.block[index, layout.expert_bytes :] = 0

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(one, range(rows.count)))


def _template(layout: ExpertLayout, seed: int) -> npt.NDArray[np.uint8]:
    """An expert's bytes without codes: scales and zeros of a small quantized expert, again and again, and biases."""
    generator = torch.Generator().manual_seed(seed)
    inner, hidden = (min(_QUANTIZED, size) for size in (layout.expert_size, layout.hidden_size))
    small = replace(layout, hidden_size=hidden, expert_size=inner, biases=0, order="hqq")
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    matrices = [torch.randn(shape, generator=generator) * layout.hidden_size**-0.5 for shape in shapes]
    found = views(pack(*matrices, small, optimize=False), small)
    buffer = torch.zeros(layout.expert_bytes, dtype=torch.uint8)
    whole = views(buffer, layout)
    for target, source in ((whole.scale, found.scale), (whole.zero, found.zero)):
        flat, count = source.flatten(), target.numel()
        target.view(-1).copy_(flat.repeat(-(-count // len(flat)))[:count])
    whole.biases.copy_(torch.randn(layout.biases, generator=generator) * _SCALE)
    return buffer.numpy()


# --- routing ------------------------------------------------------------------------------------------------------


def scores_of(table: GuessTable, experts: int) -> npt.NDArray[np.float16]:
    """Guesses as scores of all experts, float16 [T, L, D, E]; 0 for those not guessed."""
    scores = np.zeros((*table.ids.shape[:3], experts + 1), np.float16)
    np.put_along_axis(scores, np.minimum(table.ids, experts).astype(np.int64), table.scores, -1)  # padding goes last
    return scores[..., :experts]


def perfect_scores(ids: npt.NDArray[Any], experts: int, distances: int = DISTANCES) -> npt.NDArray[np.float16]:
    """Scores of a predictor that knows: 1 for what is routed, ids [T, L, K] -> float16 [T, L, D, E]."""
    tokens, layers, _ = ids.shape
    distances = min(distances, layers - 1)
    scores = np.zeros((tokens, layers, distances, experts), np.float16)
    for d in range(1, distances + 1):
        np.put_along_axis(scores[:, : layers - d, d - 1], ids[:, d:].astype(np.int64), np.float16(1), -1)
    return scores


def forced_trace(source: Trace, spec: ModelSpec, tokens: int, guesses: str = "") -> Trace:
    """One sequence of ``tokens`` decode tokens for ``spec``, routed (and guessed) as ``source`` says.

    A source of fewer layers is laid over the model again and again, each time from another place in it, so that no
    two layers are routed alike; guesses across a seam are left out (score 0). A source of too few tokens is refused.

    Args:
        guesses: a predictor of ``source``, ``perfect``, or "" for its only one (none: nothing is guessed).

    Raises:
        ForcedError: other experts or top_k than the model's, too few tokens, or guesses it has not got.
    """
    model = source.model
    if (model.num_experts, model.top_k) != (spec.num_experts, spec.top_k):
        raise ForcedError(
            f"the trace routes top-{model.top_k} of {model.num_experts} experts, {spec.name} top-{spec.top_k} of "
            f"{spec.num_experts}; name a trace of that shape"
        )
    rows = np.flatnonzero(source.phase == DECODE)
    if len(rows) < tokens:
        raise ForcedError(f"the trace has {len(rows)} decode tokens, {tokens} are wanted; ask for fewer")
    name = guesses or next(iter(source.guesses), "")
    if name not in ("", PERFECT, *source.guesses):
        raise ForcedError(f"the trace has guesses of {', '.join(source.guesses) or 'nobody'}, not of {name!r}")
    layers, copies = model.num_layers, -(-spec.num_layers // model.num_layers)
    ids = np.empty((tokens, spec.num_layers, spec.top_k), id_dtype(spec.num_experts))
    weights = np.empty(ids.shape, np.float16)
    known = None if name in ("", PERFECT) else scores_of(source.guesses[name], model.num_experts)
    distances = DISTANCES if known is None else known.shape[2]
    scores = np.zeros((tokens, spec.num_layers, distances, spec.num_experts), np.float16)
    for copy in range(copies):
        from_rows = rows[(copy * (len(rows) // copies) + np.arange(tokens)) % len(rows)]
        first, last = copy * layers, min((copy + 1) * layers, spec.num_layers)
        ids[:, first:last] = source.ids[from_rows, : last - first]
        weights[:, first:last] = source.weights[from_rows, : last - first]
        if known is not None:
            scores[:, first:last] = known[from_rows, : last - first]
            for d in range(1, distances + 1):
                scores[:, max(first, last - d) : last, d - 1] = 0
    if name == PERFECT:
        scores = perfect_scores(ids, spec.num_experts)
    return routed(spec, ids, weights, scores if name else None, source, name, copies)


def routed(
    spec: ModelSpec,
    ids: npt.NDArray[Any],
    weights: npt.NDArray[np.float16],
    scores: npt.NDArray[np.float16] | None,
    source: Trace,
    name: str = "",
    copies: int = 1,
) -> Trace:
    """A trace of one sequence of decode tokens; guesses are cut to what the engine looks at."""
    tokens = len(ids)
    table = {} if scores is None else {GUESSES: rank(scores, min(NUM_GUESSES, spec.num_experts))}
    return Trace(
        spec,
        ids,
        weights,
        np.array([tokens], np.int32),
        np.full(tokens, DECODE, np.uint8),
        guesses=table,
        provenance={"of": source.model.name, "routing": source.routing, "guesses": name, "laid_over": copies},
        routing="SYNTHETIC" if source.routing == "SYNTHETIC" else "FORCED",
    )


def window(trace: Trace, first: int) -> Trace:
    """The decode tokens from ``first`` on, as a sequence of their own."""
    tables = {n: replace(g, ids=g.ids[first:], scores=g.scores[first:]) for n, g in trace.guesses.items()}
    lengths, phase = np.array([trace.num_tokens - first], np.int32), trace.phase[first:]
    ids, weights = trace.ids[first:], trace.weights[first:]
    return replace(trace, ids=ids, weights=weights, sequence_lengths=lengths, phase=phase, guesses=tables)


def with_sweep(trace: Trace) -> tuple[Trace, int]:
    """``trace`` after tokens that route to every expert once, and how many those are: what fills all slots."""
    spec = trace.model
    count = -(-spec.num_experts // spec.top_k)
    each = (np.arange(count * spec.top_k) % spec.num_experts).reshape(count, 1, spec.top_k)
    each = np.broadcast_to(each, (count, spec.num_layers, spec.top_k)).astype(trace.ids.dtype)
    ids = np.concatenate([each, trace.ids])
    weights = np.concatenate([np.full(each.shape, 1 / spec.top_k, np.float16), trace.weights])
    return routed(spec, ids, weights, None, trace), count


class Routing(LinearGates):
    """What a trace says of the rows that run now; as lookahead gates, its guesses.

    Args:
        trace: routing, and guesses under ``GUESSES`` where somebody looks ahead.
        lookahead: distances wanted.
        device: of the ids and weights.
        gates: real ones, run for their time; what they say is dropped.

    Attributes:
        rows, layer: of the visit that is made now.
    """

    def __init__(self, trace: Trace, lookahead: int, device: torch.device, gates: LinearGates | None) -> None:
        self.lookahead = lookahead
        self._gates = gates
        self.ids = torch.from_numpy(trace.ids.astype(np.int64)).to(device)
        self.weights = torch.from_numpy(trace.weights.astype(np.float32)).to(device)
        self._layers, self._count = trace.model.num_layers, trace.model.num_experts
        table = trace.guesses.get(GUESSES)
        self._scores = None if table is None else scores_of(table, self._count)
        self.rows, self.layer = slice(0, 0), 0

    def logits(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Of the real gates."""
        assert self._gates is not None
        return self._gates.logits(layer, hidden)

    def rated(self, logits: torch.Tensor) -> npt.NDArray[np.float16]:
        """As `Gates.scores`: rated as ever, and then what the trace says."""
        assert self._gates is not None
        self._gates.rated(logits)
        reach = min(self.lookahead, self._layers - 1 - self.layer)
        if self._scores is None:
            return np.zeros((len(logits), reach, self._count), np.float16)
        return self._scores[self.rows, self.layer, :reach]


# --- engine -------------------------------------------------------------------------------------------------------


class Held:
    """A device that holds the store already, so that engines made one after the other do not page-lock it again."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def hold(self, store: Any) -> AbstractContextManager[None]:
        return nullcontext()


class ForcedExecutor(Executor):
    """An executor whose visits go where the trace says; what the router chose is dropped."""

    routing: Routing

    def meet(self, layer: int, looked: Looked) -> torch.Tensor:
        routing = self.routing
        routing.layer = layer
        weights = routing.weights[routing.rows, layer].to(looked.weights.dtype)
        return super().meet(layer, looked._replace(ids=routing.ids[routing.rows, layer], weights=weights))


Wrap = Callable[[SlotExperts, Slots], Any]


@dataclass
class Run:
    """One forced run.

    Attributes:
        trace, options, slots, machine: its setting; ``first``: decode passes that were not measured.
        ledger: of all passes; ``counts``: of the measured ones.
        copied: experts' worth of bytes that went over the link in the measured passes, retracted ones' part included.
        log: the whole load log.
        spans: durations of the measured passes, where they were asked for.
        planner: class that decided.
    """

    trace: Trace
    options: Options
    slots: int
    machine: HardwareProfile
    first: int
    ledger: Ledger
    counts: Counts
    copied: float
    log: str
    spans: Spans | None
    planner: str

    @property
    def tpot_s(self) -> float:
        """Mean seconds of the measured decode passes."""
        return float(np.mean(self.ledger.decode_ns[self.first :])) / 1e9

    @property
    def loads(self) -> int:
        """Demand loads and prefetches issued in the measured passes."""
        return self.counts.demand_loads + self.counts.prefetch_loads


class ForcedEngine:
    """A dense part, a store and a device; every run has slots, planner and copier of its own.

    Args:
        dense: the model.
        bits: of its experts, 8, 4, 3 or 2.
        device: where it runs.
        compiled: as `Executor`.
        group_size, seed: of `random_store`.

    Raises:
        ForcedError, StoreError: what `random_store` refuses.
    """

    def __init__(
        self,
        dense: Dense,
        bits: int,
        device: Device,
        *,
        compiled: bool = True,
        group_size: int = GROUP_SIZE,
        seed: int = 0,
    ) -> None:
        self.dense, self.bits, self.device = dense, bits, device
        self.compiled = compiled
        self._ends = ExitStack()
        self.store = random_store(dense.spec, bits, group_size, seed, device.order)
        self._ends.callback(self.store.close)
        try:
            self._ends.enter_context(device.hold(self.store))
        except BaseException:
            self._ends.close()
            raise

    @property
    def spec(self) -> ModelSpec:
        return self.dense.spec

    def run(
        self,
        trace: Trace,
        options: Options,
        slots: int,
        machine: HardwareProfile,
        *,
        first: int = 0,
        paced: bool = True,
        spans: bool = False,
        wrap: Wrap | None = None,
        compiled: bool | None = None,
    ) -> Run:
        """Decode along ``trace``.

        Args:
            first: decode passes before those that are measured.
            machine: pace of the link (``paced``) and times of the planner's clock.
            spans: keep durations.
            wrap: gives what stands in place of the experts' `SlotExperts`, for checks and for waiting.
            compiled: in place of the engine's.

        Raises:
            ForcedError: a trace of another shape, of sequences that decode together, or with nothing left to measure.
            SpecError: a policy the engine does not run.
        """
        if trace.model.num_layers != self.spec.num_layers or trace.token_sequence is not None:
            raise ForcedError("forced routing needs a trace of the model's depth, one sequence after the other")
        if not 0 <= first < trace.num_decode_tokens:
            raise ForcedError(f"{first} of {trace.num_decode_tokens} decode tokens are not to be measured; leave some")
        check_options(options)
        place = self.device.torch_device
        gates: Any = gates_of(self.dense.model, self.spec, options)  # a linear rung: the routers as they are
        routing = Routing(trace, options.lookahead, place, gates)
        text = io.StringIO()
        self.dense.restore()
        with ForcedExecutor(
            self.dense.model,
            self.spec,
            self.store,
            Held(self.device),  # type: ignore[arg-type]
            bits=self.bits,
            slots=slots,
            options=options,
            machine=machine,
            gates=routing if gates is not None else None,
            compiled=self.compiled if compiled is None else compiled,
            paced=paced,
        ) as executor:
            if wrap is not None:
                executor.experts = wrap(executor.experts, executor.pool)
            executor.routing = routing
            executor.ledger.log = LoadLog(text)
            counts = executor.ledger.phases[DECODE]
            before, copied = replace(counts), 0
            for passed in self._passes(executor, trace):
                if passed == first:
                    before, copied = replace(counts), _copied(executor)
                    executor.spans = Spans() if spans else None
            found = executor.finish()
            after = {k: getattr(counts, k) - getattr(before, k) for k in Counts.__slots__}  # type: ignore[attr-defined]
            return Run(
                trace,
                options,
                slots,
                machine,
                first,
                found,
                Counts(**after),
                (_copied(executor) - copied) / self.store.expert_bytes,
                text.getvalue(),
                executor.spans,
                type(executor.planner).__name__,
            )

    @torch.inference_mode()
    def _passes(self, executor: ForcedExecutor, trace: Trace) -> Iterator[int]:
        """Run every pass; before each, how many decode passes have ended."""
        cache, token, done = None, 1, 0
        place = self.device.torch_device
        for forward in trace.passes():
            yield done
            cache = None if forward.opens else cache
            executor.routing.rows = slice(forward.first, forward.first + forward.tokens)
            executor.begin_pass(forward.phase, forward.tokens, forward.context)
            ids = torch.full((1, forward.tokens), token, device=place)
            out = self.dense.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            token = int(out.logits[0, -1].argmax())
            executor.end_pass()
            done += forward.phase != PREFILL

    def close(self) -> None:
        """Let go of the store; a second call does nothing."""
        self._ends.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _copied(executor: Executor) -> int:
    """Bytes the copier was given so far."""
    stats = executor.copier.stats()
    return stats.demand_bytes + stats.prefetch_bytes


class Checked:
    """Experts that are compared, before they are computed, with the bytes they must have.

    Raises (when computing):
        ForcedError: a slot holds other bytes than its expert's.
    """

    def __init__(self, experts: SlotExperts, pool: Slots, store: HostStore) -> None:
        self._experts, self._pool, self._store = experts, pool, store
        self.compared = 0

    def compute(self, layer: int, expert: int, slot: int, *where: Any) -> int:
        row = self._store.row(layer * self._store.spec.num_experts + expert)
        if not torch.equal(self._pool.row(slot), row.to(self._pool.device)):
            raise ForcedError(f"slot {slot} does not hold the bytes of expert {expert} of layer {layer}")
        self.compared += 1
        return self._experts.compute(layer, expert, slot, *where)

    def close(self) -> None:
        self._experts.close()
