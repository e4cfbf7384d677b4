"""A routing trace in memory: what was routed, token by token, and what was guessed beforehand.

Shape letters: T tokens, S sequences, L MoE layers, E experts of a layer, K = top_k, D lookahead distances,
M guesses of one distance.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from traces.values import Halves as Halves
from traces.values import Ids as Ids
from traces.values import TraceError as TraceError
from traces.values import check_guesses, check_logits, check_routed
from traces.values import id_dtype as id_dtype
from traces.values import padding as padding
from traces.vocabulary import DECODE, PREFILL, Guesses, ModelSpec, Visit, router_order

ROUTINGS: Final = ("RECORDED", "FORCED", "SYNTHETIC")
_PREDICTOR: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ROWS: Final = 1 << 10  # tokens whose ids are Python lists at once
_LARGEST_FIELD: Final = 2**48 - 1

Lengths = npt.NDArray[np.int32]
Rows = npt.NDArray[np.int64]


class Pass(NamedTuple):
    """One forward pass.

    Attributes:
        first: its first row in the trace.
        tokens: its rows.
        phase: ``PREFILL`` or ``DECODE``, the same for all of them.
        sequence: the sequence of its first row.
        context: tokens in the KV caches before it, summed over the sequences in it.
        following: rows of a decode pass whose sequence has an earlier row: the tokens that TPOT is a mean over.
        opens: some sequence has its first row here.
    """

    first: int
    tokens: int
    phase: int
    sequence: int
    context: int
    following: int
    opens: bool


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


def merged(
    ids: Sequence[Sequence[int]] | npt.NDArray[Any], scores: Sequence[Sequence[float]] | npt.NDArray[Any]
) -> Guesses:
    """The guesses of a visit of several tokens, from those of every token, [n][m].

    The score of an expert is the probability that any token is routed to it, their choices taken as independent:
    1 - prod(1 - p), multiplied in token order and rounded to float16. Best first, equal scores by the lower id;
    experts with score 0 (padding too) are left out. Guesses of one token keep their scores.
    """
    missed: dict[int, float] = {}
    for experts, probabilities in zip(ids, scores, strict=True):
        for expert, probability in zip(experts, probabilities, strict=True):
            missed[int(expert)] = missed.get(int(expert), 1.0) * (1.0 - float(probability))
    rounded = (1.0 - np.array(list(missed.values()), np.float64)).astype(np.float16).tolist()
    ranked = sorted((-score, expert) for expert, score in zip(missed, rounded, strict=True) if score > 0)
    return Guesses([expert for _, expert in ranked], [-score for score, _ in ranked])


@dataclass(frozen=True, eq=False)
class Trace:
    """Routing of one model over sequences: one after the other, or decoding together in batches.

    Making one checks dtypes, shapes, sequences, passes and phases; ``check`` examines every id, weight and score.

    Attributes:
        model: the shape of the model that routed.
        ids: routed experts in router order, uint8 (uint16 from 256 experts) [T, L, K].
        weights: what the router gave them, float16 [T, L, K].
        sequence_lengths: int32 [S]; sequence s is the next ``sequence_lengths[s]`` rows, or as many rows as that
            where ``token_sequence`` is s.
        phase: uint8 [T], ``PREFILL`` or ``DECODE``; within a sequence prefill comes first.
        logits: router logits, float16 [T, L, E], or None.
        guesses: recorded predictors by name.
        provenance: what made the trace, plain JSON values.
        domains: kind of text, one per sequence, or empty.
        pass_lengths: int32 [passes]; pass p is the next ``pass_lengths[p]`` rows, all of one phase. Each sequence has
            one row or none of a decode pass, and neighbouring rows of a prefill pass. None: the prefill of a sequence
            is a pass, every decode token is its own.
        token_sequence: the sequence of every row, int32 [T]; None exactly if ``pass_lengths`` is: sequences stand one
            after the other.
        routing: evidence label, one of ``ROUTINGS``.

    Raises:
        TraceError: a field that breaks the format, named, with what was found and what is allowed.
    """

    model: ModelSpec
    ids: Ids
    weights: Halves
    sequence_lengths: Lengths
    phase: npt.NDArray[np.uint8]
    logits: Halves | None = None
    guesses: dict[str, GuessTable] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    domains: tuple[str, ...] = ()
    pass_lengths: Lengths | None = None
    token_sequence: Lengths | None = None
    routing: str = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.routing not in ROUTINGS:
            raise TraceError(f"routing is {self.routing!r:.80}; it must be one of {', '.join(ROUTINGS)}")
        for what, text in (("model field 'name'", self.model.name), *(("domains", d) for d in self.domains)):
            if not isinstance(text, str) or not text or not text.isprintable():
                raise TraceError(f"{what} holds {text!r:.80}; it must be a string of printable characters, not empty")
        for name, size in self.model.to_json().items():
            if isinstance(size, int) and size > _LARGEST_FIELD:
                raise TraceError(f"model field {name!r} is {size!r:.20}; it must be at most 2**48 - 1")
        _check_tables(self)
        _check_sequences(self)

    @property
    def num_tokens(self) -> int:
        return len(self.phase)

    @property
    def num_decode_tokens(self) -> int:
        return int(np.count_nonzero(self.phase == DECODE))

    def sequence_starts(self) -> Rows:
        """First row of every sequence, then T; int64 [S + 1].

        Raises:
            TraceError: the sequences decode together, so their rows alternate.
        """
        if self.token_sequence is not None:
            raise TraceError("the sequences of this trace decode together, so their rows alternate; ask rows_of")
        return self._starts

    def rows_of(self, sequence: int) -> Rows:
        """The rows of a sequence in order, int64; sequences count from 0."""
        if not 0 <= sequence < len(self.sequence_lengths):
            raise IndexError(f"sequence is {sequence}; the trace has {len(self.sequence_lengths)}, counted from 0")
        return self._order[self._starts[sequence] : self._starts[sequence + 1]]

    def next_rows(self) -> Rows:
        """The row of the next token of the same sequence, or -1 after its last; int64 [T]."""
        following = np.empty(self.num_tokens, np.int64)
        following[self._order[:-1]] = self._order[1:]
        following[self._order[self._starts[1:] - 1]] = -1
        return following

    def passes(self) -> list[Pass]:
        """Forward passes in order: as ``pass_lengths`` says, or one for the prefill of a sequence and for each decode
        token."""
        place = np.empty(self.num_tokens, np.int64)
        place[self._order] = np.arange(self.num_tokens) - np.repeat(self._starts[:-1], self.sequence_lengths)
        decode = self.phase == DECODE
        sequence = self._sequences()
        if self.pass_lengths is None:
            first = np.flatnonzero(decode | (place == 0))
        else:
            first = np.cumsum(self.pass_lengths, dtype=np.int64) - self.pass_lengths
        before = np.where(np.diff(sequence, prepend=-1) != 0, place, 0)
        before[first] = place[first]
        columns = (
            first,
            np.diff(np.append(first, self.num_tokens)),
            self.phase[first],
            sequence[first],
            np.add.reduceat(before, first),
            np.add.reduceat((decode & (place > 0)).astype(np.int64), first),
            np.logical_or.reduceat(place == 0, first),
        )
        return [Pass(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]

    def head(self, decode_tokens: int) -> Trace:
        """The rows up to the ``decode_tokens``-th decode token, and to the end of its pass.

        Sequences are kept whole, cut there, or left out (the others keep their order, numbered anew). A trace with no
        more decode tokens than that is returned as it is.

        Raises:
            TraceError: fewer than one decode token.
        """
        if decode_tokens < 1:
            raise TraceError(f"decode tokens are {decode_tokens}; keep at least 1")
        decode_rows = np.flatnonzero(self.phase == DECODE)
        if decode_tokens >= len(decode_rows):
            return self
        end = int(decode_rows[decode_tokens - 1]) + 1
        passes = 0
        if self.pass_lengths is not None:
            ends = np.cumsum(self.pass_lengths, dtype=np.int64)
            passes = int(np.searchsorted(ends, end)) + 1
            end = int(ends[passes - 1])
        kept, sequence, lengths = np.unique(self._sequences()[:end], return_inverse=True, return_counts=True)
        return replace(
            self,
            ids=self.ids[:end],
            weights=self.weights[:end],
            sequence_lengths=lengths.astype(np.int32),
            phase=self.phase[:end],
            logits=None if self.logits is None else self.logits[:end],
            guesses={n: replace(g, ids=g.ids[:end], scores=g.scores[:end]) for n, g in self.guesses.items()},
            provenance=self.provenance | {"head_decode_tokens": decode_tokens},
            domains=tuple(self.domains[i] for i in kept.tolist()) if self.domains else (),
            pass_lengths=None if self.pass_lengths is None else self.pass_lengths[:passes],
            token_sequence=None if self.token_sequence is None else sequence.astype(np.int32),
        )

    def visits(self) -> Iterator[Visit]:
        """Every visit, pass by pass and layer by layer, without guesses (a predictor fills those in)."""
        layers = range(self.model.num_layers)
        once = [1] * self.model.top_k
        rows: list[list[list[int]]] = []
        begin = end = index = 0
        for first, tokens, phase, _, context, _, opens in self.passes():
            if first + tokens > end:
                begin, end = first, first + max(tokens, _ROWS)
                rows = self.ids[begin:end].tolist()
            if tokens == 1:
                row = rows[first - begin]
                for layer in layers:
                    starts = opens and layer == 0
                    yield Visit(index, layer, phase, 1, context, row[layer], once.copy(), [], starts)
                    index += 1
            else:
                block = rows[first - begin : first - begin + tokens]
                for layer in layers:
                    experts, counts = router_order([token[layer] for token in block])
                    starts = opens and layer == 0
                    yield Visit(index, layer, phase, tokens, context, experts, counts, [], starts)
                    index += 1

    def _sequences(self) -> Rows:
        """The sequence of every row, int64 [T]."""
        if self.token_sequence is None:
            return np.repeat(np.arange(len(self.sequence_lengths)), self.sequence_lengths)
        return self.token_sequence.astype(np.int64)

    @cached_property
    def _order(self) -> Rows:
        """All rows, sequence by sequence, int64 [T]."""
        if self.token_sequence is None:
            order = np.arange(self.num_tokens)
        else:
            order = np.argsort(self.token_sequence, kind="stable")
        order.flags.writeable = False
        return order

    @cached_property
    def _starts(self) -> Rows:
        """Where every sequence starts in ``_order``, then T; int64 [S + 1]."""
        starts = np.append(0, np.cumsum(self.sequence_lengths, dtype=np.int64))
        starts.flags.writeable = False
        return starts


def check(trace: Trace) -> None:
    """Examine every value of a trace.

    Raises:
        TraceError: an id out of range or named twice, a weight that is negative or not finite, logits that are NaN,
            or a guess that is out of range, out of order, or not padded where the format says so.
    """
    experts = trace.model.num_experts
    check_routed(trace.ids, trace.weights, experts)
    if trace.logits is not None:
        check_logits(trace.logits)
    for name, table in trace.guesses.items():
        check_guesses(name, table.ids, table.scores, table.wrap, experts)


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
    phase, tokens = trace.phase, len(trace.phase)
    _check_lengths("sequence_lengths", "sequence", trace.sequence_lengths, tokens)
    if phase.max() > DECODE:
        where = int(np.argmax(phase > DECODE))
        raise TraceError(f"phase[{where}] is {phase[where]}; allowed are {PREFILL} (prefill) and {DECODE} (decode)")
    sequences = len(trace.sequence_lengths)
    if trace.domains and len(trace.domains) != sequences:
        raise TraceError(f"domains names {len(trace.domains)} sequences; give one for each of {sequences}, or none")
    if trace.pass_lengths is not None and trace.token_sequence is not None:
        _check_batches(trace.pass_lengths, trace.token_sequence, trace)
    elif trace.pass_lengths is not None or trace.token_sequence is not None:
        missing = "token_sequence" if trace.token_sequence is None else "pass_lengths"
        raise TraceError(f"{missing} is missing; give both pass_lengths and token_sequence, or neither")
    before, after = _neighbours(trace)
    back = after[(phase[after] == PREFILL) & (phase[before] == DECODE)]
    if len(back):
        raise TraceError(f"phase[{back.min()}] is prefill after decode; within a sequence prefill comes first")


def _check_lengths(name: str, thing: str, lengths: Lengths, tokens: int) -> None:
    if not len(lengths):
        raise TraceError(f"{name} is empty; a trace holds at least one {thing}")
    if lengths.min() < 1:
        where = int(np.argmax(lengths < 1))
        raise TraceError(f"{name}[{where}] is {lengths[where]}; a {thing} has at least 1 token")
    total = int(lengths.sum(dtype=np.int64))
    if total != tokens:
        raise TraceError(f"{name} sum to {total}; they must sum to the {tokens} tokens of the trace")


def _check_batches(pass_lengths: Lengths, token_sequence: Lengths, trace: Trace) -> None:
    sequences, tokens = len(trace.sequence_lengths), len(trace.phase)
    _check_shape("pass_lengths", pass_lengths, np.dtype(np.int32), (-1,), "passes")
    _check_shape("token_sequence", token_sequence, np.dtype(np.int32), (tokens,), "tokens")
    _check_lengths("pass_lengths", "pass", pass_lengths, tokens)
    outside = (token_sequence < 0) | (token_sequence >= sequences)
    if outside.any():
        where = int(np.argmax(outside))
        raise TraceError(f"token_sequence[{where}] is {token_sequence[where]}; the sequences are 0 to {sequences - 1}")
    counts = np.bincount(token_sequence, minlength=sequences)
    if (counts != trace.sequence_lengths).any():
        where = int(np.argmax(counts != trace.sequence_lengths))
        raise TraceError(
            f"sequence_lengths[{where}] is {trace.sequence_lengths[where]}, but {counts[where]} entries of "
            f"token_sequence are {where}; make them agree"
        )
    number = np.repeat(np.arange(len(pass_lengths)), pass_lengths)
    mixed = (np.diff(number) == 0) & (trace.phase[1:] != trace.phase[:-1])
    if mixed.any():
        where = int(np.argmax(mixed)) + 1
        raise TraceError(
            f"phase[{where}] is {trace.phase[where]} and the row before is not, both in pass {number[where]}; a pass "
            "has one phase"
        )
    before, after = _neighbours(trace)
    again = number[before] == number[after]
    if (twice := after[again & (trace.phase[after] == DECODE)]).size:
        where = int(twice.min())
        raise TraceError(
            f"token_sequence[{where}] is {token_sequence[where]} for the second time in pass {number[where]}; in a "
            "decode pass a sequence has at most one row"
        )
    if (apart := after[again & (after != before + 1)]).size:
        where = int(apart.min())
        raise TraceError(
            f"token_sequence[{where}] is {token_sequence[where]} again in pass {number[where]}, after another "
            "sequence; in a prefill pass the rows of a sequence stand together"
        )


def _neighbours(trace: Trace) -> tuple[Rows, Rows]:
    """Every row that has a next one of its sequence, and that next one."""
    following = trace.next_rows()
    before = np.flatnonzero(following >= 0)
    return before, following[before]
