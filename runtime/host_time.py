"""What deciding costs the host at every visit: planning and bookkeeping, with no copy and no kernel behind them.

    python -m runtime.bench --host

The executor itself runs at a model's shape, on synthetic routing with guesses; its link is instant and its experts
compute nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from runtime.copier import Arrival, CopierStats, Request
from runtime.devices.cpu import CpuDevice
from runtime.executor import Executor
from runtime.lookahead import Gates
from runtime.observe import Spans
from runtime.store import ExpertRows
from sim.machine import load_machine
from sim.spec import options
from traces import DECODE, GuessTable, ModelSpec, Trace
from traces.presets import PRESETS
from traces.synthesize import synthesize

POLICIES = ("on_demand", "speculative", "speculative:cache=heat")
SHAPE = "mixtral-8x7b"
PREDICTOR = "synthetic"
MACHINE = "rtx3090"  # its times advance the planner's clock
WARM_UP = 20  # tokens that are not counted


class InstantLink:
    """A copier whose loads are there at once."""

    def __init__(self, *buffers: ExpertRows, **pace: object) -> None:
        self._arrived: list[Arrival] = []

    def apply(
        self,
        retract: Sequence[int] = (),
        join: Sequence[int] = (),
        demand: Sequence[Request] = (),
        prefetch: Sequence[Request] = (),
        write_back: Sequence[int] = (),
    ) -> None:
        """See `runtime.copier.Copier`."""
        now = time.monotonic_ns()
        self._arrived += [Arrival(request.load, now) for request in (*demand, *prefetch)]

    def arrived(self) -> list[Arrival]:
        """Everything asked for since the last call."""
        found, self._arrived = self._arrived, []
        return found

    def wait(self, timeout_s: float) -> Arrival:
        """The oldest of them."""
        return self._arrived.pop(0)

    def drain(self) -> None:
        """Nothing is ever on its way."""

    def stats(self) -> CopierStats:
        """Nothing was copied."""
        return CopierStats(*[0] * 8)

    def close(self) -> None:
        """Nothing to end."""


class NoKernels:
    """Experts that compute nothing."""

    def compute(self, *where: object) -> int:
        return 1

    def close(self) -> None:
        """Nothing to let go of."""


class Replayed(Gates):
    """Gates that say what a trace's predictor guessed; ranking and rounding are the executor's."""

    def __init__(self, table: GuessTable, experts: int, lookahead: int) -> None:
        self._table, self._experts, self.lookahead = table, experts, lookahead
        self.token = 0

    def scores(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor | None = None) -> npt.NDArray[np.float16]:
        reach = min(self.lookahead, self._table.ids.shape[1] - 1 - layer)
        scores = np.zeros((1, reach, self._experts), np.float16)
        here = self._table.ids[self.token, layer, :reach].astype(np.int64)
        np.put_along_axis(scores[0], here, self._table.scores[self.token, layer, :reach], 1)
        return scores


class NoDevice(CpuDevice):
    """A device with nothing behind it."""

    name = "none"

    def copier(self, store: object, slots: object, **pace: object) -> InstantLink:  # type: ignore[override]
        return InstantLink()


def stand_in(spec: ModelSpec) -> torch.nn.Module:
    """MoE blocks of ``spec``'s routers without experts: all that an executor looks for in a model."""
    blocks = torch.nn.ModuleList()
    for _ in range(spec.num_layers):
        block = torch.nn.Module()
        block.gate = torch.nn.Linear(1, spec.num_experts, bias=False)
        block.experts = torch.nn.Module()
        blocks.append(block)
    return blocks


def host_us(policy: str, trace: Trace, slots: int) -> dict[str, Any]:
    """Microseconds of a decode visit on the host: from the known routing until every expert is computed, which here
    takes nothing: planning, requests to the copier, counting, the load log, the order of computing. ``visit`` is all of
    a visit, ranking the guesses and what torch does around the experts included.
    """
    run, spec = options(policy), trace.model
    gates = Replayed(trace.guesses[PREDICTOR], spec.num_experts, run.lookahead) if run.lookahead else None
    with (
        ExpertRows(1, 64) as rows,
        Executor(
            stand_in(spec),
            spec,
            SimpleNamespace(expert_bytes=rows.expert_bytes, layouts=[], count=1, row_bytes=64),
            NoDevice(),
            bits=4,
            slots=slots,
            options=run,
            machine=load_machine(MACHINE),
            gates=gates,
            experts=lambda pool: NoKernels(),
            compiled=True,
        ) as executor,
    ):
        hidden, weights = torch.zeros(1, 1), torch.ones(1, spec.top_k)
        whole = []
        for token in range(trace.num_tokens):
            ids = torch.from_numpy(trace.ids[token].astype(np.int64))
            if gates:
                gates.token = token
            executor.begin_pass(DECODE, 1, token)
            if token == WARM_UP:
                executor.spans = Spans()
            for layer in range(spec.num_layers):
                start = time.perf_counter_ns()
                executor.visit(layer, hidden, ids[layer : layer + 1], weights)
                if token >= WARM_UP:
                    whole.append(time.perf_counter_ns() - start)
            executor.end_pass()
        assert executor.spans is not None
        plan = np.array([s.ns for s in executor.spans.host]) / 1e3
        rest = np.array([s.ns for s in executor.spans.expert], float).reshape(-1, spec.top_k).sum(1) / 1e3
        both, all_of_it = plan + rest, np.array(whole) / 1e3
    return {
        "policy": policy,
        "median_us": float(np.median(both)),
        "mean_us": float(both.mean()),
        "p99_us": float(np.quantile(both, 0.99)),
        "plan_median_us": float(np.median(plan)),
        "visit_median_us": float(np.median(all_of_it)),
        "visits": len(both),
    }


def host_times(policies: Sequence[str], tokens: int = 200) -> dict[str, Any]:
    """The figures of every policy at ``SHAPE``, half of the experts in slots; one thread."""
    preset = PRESETS[SHAPE]
    trace = synthesize(preset.model, preset.statistics, tokens)
    slots = preset.model.num_experts // 2
    return {
        "evidence": "MEASURED",
        "routing": trace.routing,
        "model": preset.model.name,
        "slots": slots,
        "host": [host_us(policy, trace, slots) for policy in policies],
    }
