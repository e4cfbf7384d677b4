"""A routing trace in memory: what was routed, token by token, and what was guessed beforehand.

Shape letters: T tokens, S sequences, L MoE layers, E experts of a layer, K = top_k, D lookahead distances,
M guesses of one distance.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from traces.vocabulary import DECODE, PREFILL, ModelSpec, Visit, router_order

ROUTINGS: Final = ("RECORDED", "FORCED", "SYNTHETIC")
_MAX_EXPERTS: Final = 65535  # the largest uint16 marks a guess that does not exist
_LARGEST: Final = 0x7BFF  # bits of the largest finite float16; non-negative float16 order like their bits
_ONE: Final = 0x3C00  # bits of 1.0
_PREDICTOR: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ROWS: Final = 1 << 16  # rows of a table checked at once, so that checking a mapped file takes little memory

Ids = npt.NDArray[np.unsignedinteger[Any]]
Halves = npt.NDArray[np.float16]


class TraceError(ValueError):
    """A trace, or a file that should hold one, that breaks a rule of the format; one sentence says which."""


class Pass(NamedTuple):
    """One forward pass: rows ``first`` to ``first + tokens`` of the trace.

    ``context`` counts the tokens of ``sequence`` before the pass.
    """

    first: int
    tokens: int
    phase: int
    sequence: int
    context: int


def id_dtype(num_experts: int) -> np.dtype[Any]:
    """The dtype of expert ids: uint8 up to 255 experts, else uint16; its largest value stands for no expert.

    Raises:
        TraceError: more experts than uint16 can name.
    """
    if num_experts > _MAX_EXPERTS:
        raise TraceError(f"model field 'num_experts' is {num_experts}; a trace holds at most {_MAX_EXPERTS}")
    return np.dtype(np.uint8 if num_experts <= 255 else np.uint16)


def padding(num_experts: int) -> int:
    """The id that stands for no expert: all bits one."""
    return int(np.iinfo(id_dtype(num_experts)).max)


@dataclass(frozen=True, eq=False)
class GuessTable:
    """The ranked guesses of one predictor.

    Attributes:
        ids: uint8 or uint16 [T, L, D, M]; entry [t, l, d - 1] names experts of layer l + d, best first.
        scores: float16 [T, L, D, M], the probability that the expert is among the routed top_k there.
        wrap: past the last layer the target is layer (l + d) mod L of the next token; without it those entries
            are padding (id all ones, score 0).
    """

    ids: Ids
    scores: Halves
    wrap: bool = False


def rank(scores: npt.NDArray[np.floating[Any]], num_guesses: int, wrap: bool = False) -> GuessTable:
    """Rank the scores of all experts, [T, L, D, E] in 0..1, into the table of the best ``num_guesses``.

    Scores are rounded to float16 first; equal ones rank by the lower id. Without ``wrap``, entries past the last
    layer become padding, whatever stands there.
    """
    _, layers, distances, experts = scores.shape
    rounded = scores.astype(np.float16) + np.float16(0)  # the sum makes a negative zero positive
    ids = np.argsort(-rounded, axis=-1, kind="stable")[..., :num_guesses].astype(id_dtype(experts))
    best = np.take_along_axis(rounded, ids.astype(np.int64), axis=-1)
    if not wrap:
        for distance in range(1, distances + 1):
            first_without = max(0, layers - distance)
            ids[:, first_without:, distance - 1] = padding(experts)
            best[:, first_without:, distance - 1] = 0
    return GuessTable(ids, best, wrap)


@dataclass(frozen=True, eq=False)
class Trace:
    """Routing of one model over whole sequences, one after the other.

    Making one checks dtypes, shapes, sequences and phases; ``check`` examines every id, weight and score.

    Attributes:
        model: the shape of the model that routed.
        ids: routed experts in router order, uint8 (uint16 from 256 experts) [T, L, K].
        weights: what the router gave them, float16 [T, L, K].
        sequence_lengths: int32 [S]; sequence s is the next ``sequence_lengths[s]`` rows.
        phase: uint8 [T], ``PREFILL`` or ``DECODE``; within a sequence prefill comes first.
        logits: router logits, float16 [T, L, E], or None.
        guesses: recorded predictors by name.
        provenance: what made the trace, plain JSON values.
        domains: kind of text, one per sequence, or empty.
        routing: evidence label, one of ``ROUTINGS``.

    Raises:
        TraceError: a field that breaks the format, named, with what was found and what is allowed.
    """

    model: ModelSpec
    ids: Ids
    weights: Halves
    sequence_lengths: npt.NDArray[np.int32]
    phase: npt.NDArray[np.uint8]
    logits: Halves | None = None
    guesses: dict[str, GuessTable] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    domains: tuple[str, ...] = ()
    routing: str = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.routing not in ROUTINGS:
            raise TraceError(f"routing is {self.routing!r}; it must be one of {', '.join(ROUTINGS)}")
        for what, text in (("model field 'name'", self.model.name), *(("domains", d) for d in self.domains)):
            if not isinstance(text, str) or not text or not text.isprintable():
                raise TraceError(f"{what} holds {text!r:.80}; it must be a string of printable characters, not empty")
        _check_tables(self)
        _check_sequences(self)

    @property
    def num_tokens(self) -> int:
        return len(self.phase)

    @property
    def num_decode_tokens(self) -> int:
        return int(np.count_nonzero(self.phase == DECODE))

    def sequence_starts(self) -> npt.NDArray[np.int64]:
        """First row of every sequence, then T; int64 [S + 1]."""
        return np.concatenate([[0], np.cumsum(self.sequence_lengths, dtype=np.int64)])

    def passes(self) -> list[Pass]:
        """Forward passes in order: the prefill tokens of a sequence are one, every decode token is its own."""
        starts = self.sequence_starts()
        begins = self.phase == DECODE
        begins[starts[:-1]] = True
        first = np.flatnonzero(begins)
        tokens = np.diff(np.append(first, self.num_tokens))
        sequence = np.searchsorted(starts, first, side="right") - 1
        columns = (first, tokens, self.phase[first], sequence, first - starts[sequence])
        return [Pass(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]

    def head(self, decode_tokens: int) -> Trace:
        """The rows up to the ``decode_tokens``-th decode token: whole sequences, the last one cut there.

        A trace with no more decode tokens than that is returned as it is.

        Raises:
            TraceError: fewer than one decode token.
        """
        if decode_tokens < 1:
            raise TraceError(f"decode tokens are {decode_tokens}; keep at least 1")
        decode_rows = np.flatnonzero(self.phase == DECODE)
        if decode_tokens >= len(decode_rows):
            return self
        end = int(decode_rows[decode_tokens - 1]) + 1
        starts = self.sequence_starts()
        kept = int(np.searchsorted(starts, end))
        lengths = np.diff(np.append(starts[:kept], end)).astype(np.int32)
        return replace(
            self,
            ids=self.ids[:end],
            weights=self.weights[:end],
            sequence_lengths=lengths,
            phase=self.phase[:end],
            logits=None if self.logits is None else self.logits[:end],
            guesses={n: replace(g, ids=g.ids[:end], scores=g.scores[:end]) for n, g in self.guesses.items()},
            provenance=self.provenance | {"head_decode_tokens": decode_tokens},
            domains=self.domains[:kept],
        )

    def visits(self) -> Iterator[Visit]:
        """Every visit, pass by pass and layer by layer, without guesses (a predictor fills those in)."""
        layers = range(self.model.num_layers)
        once = [1] * self.model.top_k
        starts = self.sequence_starts().tolist()
        loaded = -1
        rows: list[list[list[int]]] = []
        index = 0
        for _, tokens, phase, sequence, context in self.passes():
            if sequence != loaded:
                loaded = sequence
                rows = self.ids[starts[sequence] : starts[sequence + 1]].tolist()
            if tokens == 1:
                row = rows[context]
                for layer in layers:
                    opens = context == 0 and layer == 0
                    yield Visit(index, layer, phase, 1, context, row[layer], once.copy(), [], opens)
                    index += 1
            else:
                block = rows[context : context + tokens]
                for layer in layers:
                    experts, counts = router_order([token[layer] for token in block])
                    opens = context == 0 and layer == 0
                    yield Visit(index, layer, phase, tokens, context, experts, counts, [], opens)
                    index += 1


def check(trace: Trace) -> None:
    """Examine every value of a trace.

    Raises:
        TraceError: an id out of range or named twice, a weight that is negative or not finite, logits that are NaN,
            or a guess that is out of range, out of order, or not padded where the format says so.
    """
    experts = trace.model.num_experts
    _check_ids("routed_ids", trace.ids, experts)
    _check_halves("routed_weights", trace.weights, _LARGEST, "finite and not negative")
    if trace.logits is not None and np.isnan(trace.logits.max()):
        raise TraceError("router_logits holds a NaN; record the routing again, with logits that are numbers")
    for name, table in trace.guesses.items():
        _check_guesses(name, table, experts)


def _check_tables(trace: Trace) -> None:
    model = trace.model
    ids = id_dtype(model.num_experts)
    tokens = trace.phase.shape[0] if trace.phase.ndim == 1 else -1
    routed = (tokens, model.num_layers, model.top_k)
    _check_shape("phase", trace.phase, np.dtype(np.uint8), (tokens,), "tokens")
    _check_shape("sequence_lengths", trace.sequence_lengths, np.dtype(np.int32), (-1,), "sequences")
    _check_shape("routed_ids", trace.ids, ids, routed, "tokens, layers, top_k")
    _check_shape("routed_weights", trace.weights, np.dtype(np.float16), routed, "tokens, layers, top_k")
    if trace.logits is not None:
        shape = (tokens, model.num_layers, model.num_experts)
        _check_shape("router_logits", trace.logits, np.dtype(np.float16), shape, "tokens, layers, experts")
    for name, table in trace.guesses.items():
        if not _PREDICTOR.fullmatch(name):
            raise TraceError(f"predictor name {name!r:.80} is not allowed; use 1 to 64 letters, digits, '_' or '-'")
        ranked = (tokens, model.num_layers, -1, -1)
        letters = "tokens, layers, distances, guesses"
        _check_shape(f"guesses.{name}.ids", table.ids, ids, ranked, letters)
        _check_shape(f"guesses.{name}.scores", table.scores, np.dtype(np.float16), table.ids.shape, letters)
        _, layers, distances, guesses = table.ids.shape
        if not 1 <= distances <= layers:
            raise TraceError(f"guesses.{name}.ids has {distances} distances; allowed are 1 to {layers}, the layers")
        if not 1 <= guesses <= model.num_experts:
            raise TraceError(
                f"guesses.{name}.ids has {guesses} guesses of a distance; allowed are 1 to {model.num_experts}, "
                "the experts"
            )


def _check_shape(
    name: str, array: npt.NDArray[Any], dtype: np.dtype[Any], shape: tuple[int, ...], letters: str
) -> None:
    """Compare dtype and shape; -1 allows any size."""
    if array.dtype != dtype:
        raise TraceError(f"{name} is {array.dtype}; it must be {dtype}")
    if array.ndim != len(shape) or any(want not in (-1, found) for want, found in zip(shape, array.shape, strict=True)):
        allowed = ", ".join("any" if size == -1 else str(size) for size in shape)
        raise TraceError(f"{name} has shape {list(array.shape)}; it must be [{allowed}] ({letters})")


def _check_sequences(trace: Trace) -> None:
    lengths, phase = trace.sequence_lengths, trace.phase
    if not len(lengths):
        raise TraceError("sequence_lengths is empty; a trace holds at least one sequence")
    if lengths.min() < 1:
        where = int(np.argmax(lengths < 1))
        raise TraceError(f"sequence_lengths[{where}] is {lengths[where]}; a sequence has at least 1 token")
    total = int(lengths.sum(dtype=np.int64))
    if total != len(phase):
        raise TraceError(f"sequence_lengths sum to {total}; they must sum to the {len(phase)} tokens of the trace")
    if phase.max() > DECODE:
        where = int(np.argmax(phase > DECODE))
        raise TraceError(f"phase[{where}] is {phase[where]}; allowed are {PREFILL} (prefill) and {DECODE} (decode)")
    back = np.append(False, (phase[1:] == PREFILL) & (phase[:-1] == DECODE))
    back[trace.sequence_starts()[:-1]] = False
    if back.any():
        where = int(np.argmax(back))
        raise TraceError(f"phase[{where}] is prefill after decode; within a sequence prefill comes first")
    if trace.domains and len(trace.domains) != len(lengths):
        raise TraceError(f"domains names {len(trace.domains)} sequences; give one for each of {len(lengths)}, or none")


def _check_ids(name: str, ids: Ids, experts: int) -> None:
    """Every id below ``experts``, and none twice in the last dimension."""
    if ids.max() >= experts:
        where = np.unravel_index(int(np.argmax(ids >= experts)), ids.shape)
        raise TraceError(f"{name}{_at(where)} is {ids[where]}; the model's experts are 0 to {experts - 1}")
    rows = ids.reshape(-1, ids.shape[-1])
    for start in range(0, len(rows), _ROWS):
        ranks = np.ascontiguousarray(rows[start : start + _ROWS].T)
        twice = np.zeros(ranks.shape[1], bool)
        for later in range(1, len(ranks)):
            twice |= (ranks[:later] == ranks[later]).any(axis=0)
        if twice.any():
            where = np.unravel_index(start + int(np.argmax(twice)), ids.shape[:-1])
            raise TraceError(f"{name}{_at(where)} names an expert twice, {ids[where].tolist()}; name each once")


def _check_halves(name: str, values: Halves, largest: int, allowed: str) -> None:
    """Every float16 has bits up to ``largest``: not negative (negative zero included), not NaN, not above it."""
    bits = values.view(np.uint16)
    if bits.max() > largest:
        where = np.unravel_index(int(np.argmax(bits > largest)), values.shape)
        raise TraceError(f"{name}{_at(where)} is {values[where]}; it must be {allowed}")


def _check_guesses(name: str, table: GuessTable, experts: int) -> None:
    layers, distances = table.ids.shape[1:3]
    for distance in range(1, distances + 1):
        targets = layers if table.wrap else layers - distance
        column = f"guesses.{name} at distance {distance}: "
        ids, scores = table.ids[:, :, distance - 1], table.scores[:, :, distance - 1]
        none, no_score = ids[:, targets:], scores[:, targets:]
        if (none != padding(experts)).any() or no_score.view(np.uint16).any():
            raise TraceError(
                f"{column}a guess from layer {targets} or later has no target; pad it with id {padding(experts)} and "
                "score 0, or declare wrap"
            )
        ids, scores = ids[:, :targets], scores[:, :targets]
        if not ids.size:
            continue
        _check_ids(f"{column}ids", ids, experts)
        _check_halves(f"{column}scores", scores, _ONE, "between 0 and 1")
        bits = scores.view(np.uint16)
        unranked = (bits[..., 1:] > bits[..., :-1]) | (
            (bits[..., 1:] == bits[..., :-1]) & (ids[..., 1:] < ids[..., :-1])
        )
        if unranked.any():
            where = np.unravel_index(int(np.argmax(unranked)), unranked.shape)[:-1]
            raise TraceError(
                f"{column}scores{_at(where)} {scores[where].tolist()} of ids {ids[where].tolist()} are not ranked; put "
                "the highest score first and equal scores by lower id"
            )


def _at(where: tuple[np.intp, ...]) -> str:
    return str([int(i) for i in where])
