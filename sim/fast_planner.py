"""The planner with its decisions compiled: what the engine asks once a visit, when numba is there."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sim import compiled
from sim.planner import Fitted, Planner
from sim.spec import Options
from sim.state import (
    CLAIMS,
    DISPLACED,
    LOOKING,
    PREFETCHES,
    RETRACTS,
    TOTAL_SCALARS,
)
from sim.timing import Timing
from traces import ModelSpec, Visit

Ints = npt.NDArray[np.int64]


class FastPlanner(Planner):
    """A `Planner` whose visits run in the compiled driver's functions; its plans are the same.

    Raises:
        CompileError: a plug-in numba cannot compile.
        SpecError: numba is not installed; or as `Planner`.
    """

    def __init__(
        self,
        model: ModelSpec,
        options: Options,
        slots: int,
        timing: Timing,
        fitted: Fitted = Fitted(),  # noqa: B008 (immutable)
        keep_time: bool = False,
        cold_sequences: bool = False,
        max_guesses: int = 0,
    ) -> None:
        super().__init__(model, options, slots, timing, fitted, keep_time, cold_sequences, max_guesses)
        module = compiled.driver(compiled.source(options))
        own = (compiled.pack(self._s, compiled.STATE), compiled.pack(self._w, compiled.WIRE))
        self._own: tuple[Any, ...] = (*own, np.array(self._c, np.int64), compiled.pack_times(self._times.times))
        self._other = self._own
        if self._shadow is not None:
            s, w, c, _ = self._shadow
            packed = (compiled.pack(s, compiled.STATE), compiled.pack(w, compiled.WIRE))
            self._other = (*packed, np.array(c, np.int64), self._own[3])
        self._parameters = compiled.Rules(options.cache.params, options.policy.params, options.miss_rule.params)
        self._step = compiled.guarded(module.step, options)
        self._views = {name: self._view(name) for name in compiled.STATE.places}
        self._room = len(self._times.times.expert_ns)

    def _view(self, name: str) -> npt.NDArray[Any]:
        """One table of the packed state."""
        whole, parts = self._own[0]
        place = compiled.STATE.place(name)
        begin, length = int(whole[place]), int(whole[place + 1])
        return (parts if name in compiled.STATE.floats else whole)[begin : begin + length]  # type: ignore[no-any-return]

    def _decide(self, visit: Visit, decode: bool, routed: int, used: int, dense_ns: int, head_ns: int) -> None:
        s, c, views = self._s, self._c, self._views
        for name in ("routed", "counts", "following") if self._following else ("routed", "counts"):
            views[name][:routed] = getattr(s, name)[:routed]
        if decode and s.n[LOOKING]:
            for d in range(c.lookahead):
                length, first = s.offer_len[d], d * c.max_guesses
                views["offer_len"][d] = length
                views["offer_id"][first : first + length] = s.offer_id[first : first + length]
                views["offer_score"][first : first + length] = s.offer_score[first : first + length]
        if max(visit.counts) >= self._room:
            self._grow(max(visit.counts))
        self._step(
            *self._own, *self._other, self._parameters, visit.index, visit.layer, decode, visit.starts_sequence,
            self._cold, routed, used, dense_ns, head_ns,
        )  # fmt: skip
        self._read(visit.layer * c.experts, routed)

    def _grow(self, tokens: int) -> None:
        """Times of visits with more tokens to an expert."""
        self._times.make_room(tokens)
        self._own = (*self._own[:3], compiled.pack_times(self._times.times))
        self._other = (*self._other[:3], self._own[3])
        self._room = len(self._times.times.expert_ns)

    def _read(self, base: int, routed: int) -> None:
        """What a plan is made of, back into the lists."""
        s, views = self._s, self._views
        s.n[:] = self._own[0][0][:TOTAL_SCALARS].tolist()
        for name in ("fate", "slot", "number", "evicted"):
            getattr(s, name)[:routed] = views[name][:routed].tolist()
        sizes = {
            "claims": s.n[CLAIMS],
            "displaced": s.n[DISPLACED],
            **dict.fromkeys(("retract_x", "retract_slot", "retract_number"), s.n[RETRACTS]),
            **dict.fromkeys(("prefetch_x", "prefetch_evicted"), s.n[PREFETCHES]),
        }
        for name, size in sizes.items():
            if size:
                getattr(s, name)[:size] = views[name][:size].tolist()
        early = [base + s.routed[i] for i in s.claims[: s.n[CLAIMS]]] + s.prefetch_x[: s.n[PREFETCHES]]
        for x in early:
            for name in ("early_slot", "early_target", "early_number", "early_worth"):
                getattr(s, name)[x] = views[name][x].item()

    def resident_slots(self, layer: int) -> dict[int, int]:
        """Experts of a layer that hold a cache slot, and which; a copy."""
        experts = self._c.experts
        self._s.slot_of[:] = self._views["slot_of"].tolist()
        return {e: slot for e in range(experts) if (slot := self._s.slot_of[layer * experts + e]) >= 0}
