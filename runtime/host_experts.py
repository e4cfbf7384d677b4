"""Experts computed on the host from the store's own bytes, in a thread beside device and copier."""

from __future__ import annotations

import importlib.util
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from runtime.copier import CopierError
from runtime.experts import workspaces
from runtime.family import Gated
from runtime.quantize import ExpertLayout, ExpertViews, Workspace, forward, views
from sim.spec import Options

if TYPE_CHECKING:
    from runtime.host_kernels import StoredExpert

REMEMBERED = 1024  # experts whose views are kept
FUSED_TOKENS = 4  # most tokens that are multiplied one by one; more are cheaper with the weights dequantized once


class Rows(Protocol):
    """The store."""

    def row(self, index: int) -> torch.Tensor:
        """Buffer ``index``: uint8 [expert_bytes]."""


class HostCompute(Protocol):
    """What computes an expert on the host."""

    def compute(self, layer: int, expert: int, x: torch.Tensor) -> torch.Tensor:
        """x [n, H] on the host -> [n, H]."""

    def close(self) -> None:
        """Let go of everything."""


class HostExperts:
    """Computes experts from their rows in the store.

    ``exact``: with the very code that computes experts in slots on the CPU, so that it makes no difference where an
    expert is computed. Otherwise up to ``FUSED_TOKENS`` tokens are multiplied with the packed weights as they stand
    (`runtime.host_kernels`, if numba is there), in float32; experts of 16 bits without a copy.

    Args:
        store: rows, expert after expert of a layer.
        num_experts: of a layer.
        layouts: of the experts of each layer.
        gated: the model's gated activation.
        dtype: dequantized weights are made in this.
        exact: see above.
    """

    def __init__(
        self,
        store: Rows,
        num_experts: int,
        layouts: Sequence[ExpertLayout],
        gated: Gated,
        dtype: torch.dtype,
        exact: bool,
    ) -> None:
        self._store = store
        self._num_experts = num_experts
        self._layouts = list(layouts)
        self._gated = gated
        self._dtype = dtype
        self._exact = exact
        self._scratch: dict[ExpertLayout, Workspace] = {}
        self._ends = ExitStack()
        self._shares = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None
        self._row = lru_cache(REMEMBERED)(self._look_up)
        self.fused = not exact and importlib.util.find_spec("numba") is not None
        if self.fused:
            if self._shares > 1:
                self._pool = self._ends.enter_context(ThreadPoolExecutor(self._shares, "host rows"))
            for layout in dict.fromkeys(self._layouts):  # compiling takes seconds: now, not while a token is waited for
                if layout.bits != 16:
                    self.compute(self._layouts.index(layout), 0, torch.zeros(1, layout.hidden_size))

    def compute(self, layer: int, expert: int, x: torch.Tensor) -> torch.Tensor:
        """x [n, H] -> [n, H], in a dtype of its own."""
        layout = self._layouts[layer]
        pieces, stored = self._row(layer, expert)
        if layout.bits == 16 and not self._exact:
            return plain(pieces, x.to(torch.bfloat16), self._gated)
        if stored is not None and len(x) <= FUSED_TOKENS:
            return torch.stack([stored.product(token, self._gated) for token in x.float()])
        if layout not in self._scratch:
            self._scratch[layout] = self._workspace(layout)
        return forward(pieces, x, self._gated, self._scratch[layout])

    def _look_up(self, layer: int, expert: int) -> tuple[ExpertViews, StoredExpert | None]:
        """Views of an expert's row, and what multiplies it as it stands."""
        layout = self._layouts[layer]
        buffer = self._store.row(layer * self._num_experts + expert)[: layout.expert_bytes]
        pieces = views(buffer, layout)
        if not self.fused or layout.bits == 16:
            return pieces, None
        from runtime.host_kernels import StoredExpert  # imports numba

        return pieces, StoredExpert(pieces, self._pool, self._shares)

    def _workspace(self, layout: ExpertLayout) -> Workspace:
        """Scratch for the layouts of all layers is made when the first needs it; its weights are shared."""
        kinds = list(dict.fromkeys(self._layouts))
        self._scratch = dict(zip(kinds, workspaces(kinds, self._dtype, torch.device("cpu")), strict=True))
        return self._scratch[layout]

    def close(self) -> None:
        """End the threads that share rows."""
        self._ends.close()
        self._scratch.clear()
        self._row.cache_clear()


def plain(pieces: ExpertViews, x: torch.Tensor, gated: Gated) -> torch.Tensor:
    """down(gated(gate x, up x)) of an expert kept at 16 bits, multiplied as it stands: x bfloat16 [n, H] -> [n, H]."""
    layout = pieces.layout
    inner, hidden = layout.expert_size, layout.hidden_size
    gate_up, down = pieces.codes[:2].view(2 * inner, hidden), pieces.codes[2].view(hidden, inner)
    biases = pieces.biases.split([2 * inner, hidden]) if layout.biases else (None, None)
    gate, up = torch.nn.functional.linear(x, gate_up, biases[0]).chunk(2, dim=-1)
    return torch.nn.functional.linear(gated(gate, up), down, biases[1])


class Computed(NamedTuple):
    """An expert's outputs [n, H], and when it was computed (monotonic nanoseconds)."""

    outputs: torch.Tensor
    begin_ns: int
    end_ns: int


class HostJob(NamedTuple):
    """An expert of a visit that the host computes: for which tokens, and at which rank it stands with them."""

    expert: int
    rows: torch.Tensor
    ranks: torch.Tensor
    computed: Future[Computed]


class HostThread:
    """One thread that computes the experts of a visit, one after the other; another thread waits for them.

    Args:
        experts: computes; closed with this.
    """

    def __init__(self, experts: HostCompute) -> None:
        self.experts = experts
        self._jobs: deque[HostJob] = deque()
        threads = torch.get_num_threads()  # as many as the caller's: with others a product can differ in its last bits
        self._thread = ThreadPoolExecutor(1, "host experts", torch.set_num_threads, (threads,))

    def begin(self, layer: int, experts: Sequence[int], hidden: torch.Tensor, id_rows: list[list[int]]) -> None:
        """Compute these experts for the tokens routed to them; hidden [T, H] (any device), ``id_rows`` [T][K].

        Every job gets its inputs here: what happens to ``hidden`` afterwards does not matter.
        """
        ids = torch.tensor(id_rows)
        hidden = hidden.detach().to("cpu")
        for expert in experts:
            rows, ranks = (ids == expert).nonzero(as_tuple=True)
            x = hidden[rows]
            self._jobs.append(HostJob(expert, rows, ranks, self._thread.submit(self._compute, layer, expert, x)))

    @torch.no_grad()
    def _compute(self, layer: int, expert: int, x: torch.Tensor) -> Computed:
        begin = time.monotonic_ns()
        outputs = self.experts.compute(layer, expert, x)
        return Computed(outputs, begin, time.monotonic_ns())

    def done(self) -> bool:
        """Whether everything begun is computed."""
        return all(job.computed.done() for job in self._jobs)

    def take(self, timeout_s: float) -> tuple[HostJob, Computed]:
        """The next expert in the order of ``begin``, waited for.

        Raises:
            CopierError: not computed within ``timeout_s``.
            Exception: whatever computing it raised, with a note that says which expert it was.
        """
        job = self._jobs.popleft()
        try:
            return job, job.computed.result(timeout_s)
        except TimeoutError:
            raise CopierError(f"the host did not compute expert {job.expert} within {timeout_s:g} s") from None
        except Exception as error:
            error.add_note(f"while the host computed expert {job.expert}")
            raise

    def drop(self) -> None:
        """Forget what was begun: jobs that have not started never do; returns when the one that runs is done."""
        begun = [job for job in self._jobs if not job.computed.cancel()]
        self._jobs.clear()
        for job in begun:
            job.computed.exception()

    def close(self) -> None:
        """End the thread, which reads the store; a second call does nothing."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self.experts.close()


def computes_on_host(options: Options) -> bool:
    """Whether the run's rule for misses may leave an expert to the host."""
    return hasattr(options.miss_rule.module, "loads")
