"""What experts cost on the host: alone, and while the link reads the same memory.

figures = host_figures({4: store}, open_device("cpu"), link=profile.link)
profile = figures.into(profile, store.spec)
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from runtime.copier import BaseCopier, Request
from runtime.devices import Device
from runtime.family import Gated
from runtime.host_experts import HostExperts, HostThread
from runtime.store import HostStore
from sim.machine import HardwareProfile, LinkProfile
from sim.spec import options
from sim.timing import HOST_PEAK
from traces import ModelSpec

TOKENS = (1, 2, 4, 16)  # to an expert; the law passes through the first
ROUNDS = 5  # in which host and link are measured alone and together
SLOTS = 4  # that a link without an engine behind it copies into, in turn


@dataclass(frozen=True)
class HostFigures:
    """Medians, MEASURED.

    Attributes:
        seconds: by bits and tokens: one expert with nothing else going on.
        handover_s: from giving an expert to the host's thread until its outputs are known, less the computing.
        slowdown: seconds of an expert while the link copies without a pause, over seconds alone; 1 if not measured.
        link_gb_s, link_beside_gb_s: the link alone, and while the host computes without a pause; 0 if not measured.
        threads: of the host's computing.
    """

    seconds: dict[int, dict[int, float]]
    handover_s: float
    slowdown: float
    link_gb_s: float
    link_beside_gb_s: float
    threads: int

    def laws(self) -> dict[str, tuple[float, float]]:
        """`sim.machine.Operators.host_expert`: by bits, fixed and per token; exact at the fewest tokens measured."""
        found = {}
        for bits, by_tokens in self.seconds.items():
            (first, least), *others = sorted(by_tokens.items())
            steps = [((n - first) / s, (s - least) / s) for n, s in others]  # errors count relative to the time
            slope = max(0.0, sum(n * s for n, s in steps) / sum(n * n for n, _ in steps)) if steps else 0.0
            slope = min(slope, least / first)
            found[str(bits)] = (least - slope * first, slope)
        return found

    def text(self) -> str:
        """What one token costs, in half a line."""
        return "an expert takes " + ", ".join(
            f"{by_tokens[min(by_tokens)] * 1e3:.3f} ms at {bits} bits" for bits, by_tokens in self.seconds.items()
        )

    def into(self, profile: HardwareProfile, spec: ModelSpec) -> HardwareProfile:
        """The profile with everything that times experts on the host.

        Of the host's memory that much bandwidth is assumed which link and host took together: with `HOST_PEAK` it
        gives the measured slowdown again. Other models and widths are timed by the rate at which an expert was read.
        """
        laws = self.laws()
        bits = next(iter(self.seconds))
        fixed, per_token = laws[str(bits)]
        read_gb_s = spec.expert_bytes(bits) / (fixed + per_token) / 1e9
        memory_gb_s = (read_gb_s / self.slowdown + profile.link.h2d_gb_s) / HOST_PEAK
        share = min(1.0, self.link_beside_gb_s / self.link_gb_s) if self.link_gb_s else 0.0
        operators = dict(profile.operators)
        if spec.name in operators:
            operators[spec.name] = dataclasses.replace(operators[spec.name], host_expert=laws)
        about = f"measured: experts of {spec.name} on {self.threads} thread{'s' * (self.threads > 1)} of the host"
        sources = {
            "host_memory_gb_s": f"{about}; bandwidth that the link and an expert took together, over {HOST_PEAK:g}",
            "host_memory_efficiency": f"{about}; at {bits} bits one reads {read_gb_s:.4g} GB/s alone, and takes "
            f"{self.slowdown:.3f} times as long while the link copies",
            "host_tflops": f"{about}; from what a further token costs",
            "host_expert_fixed_s": f"{about}; from giving one to the thread until its outputs are known",
            "link.h2d_host_gb_s": f"{about}; the link reached {share:.1%} of its pace meanwhile"
            if self.link_gb_s
            else "not measured",
        }
        return dataclasses.replace(
            profile,
            link=dataclasses.replace(profile.link, h2d_host_gb_s=share * profile.link.h2d_gb_s),
            host_memory_gb_s=memory_gb_s,
            host_memory_efficiency=read_gb_s / memory_gb_s,
            host_tflops=2 * spec.expert_weights / per_token / 1e12 if per_token else 0.0,
            host_expert_fixed_s=self.handover_s,
            operators=operators,
            sources=profile.sources | sources,
        )


def silu_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The usual gated activation."""
    return torch.nn.functional.silu(gate) * up


def host_figures(
    stores: Mapping[int, HostStore],
    device: Device,
    *,
    link: LinkProfile | None = None,
    paced: bool = True,
    gated: Gated = silu_product,
    dtype: torch.dtype = torch.float32,
    tokens: Sequence[int] = TOKENS,
    seconds: float = 0.5,
) -> HostFigures:
    """Compute experts of every store in an engine's own thread, each time another one, so that no cache keeps them.

    Args:
        stores: by bits; the first is measured beside the link too.
        device: of the engine; decides with which code the host computes.
        link: pace of the link beside which is measured; None leaves that out.
        paced: hold the link to ``link``'s pace; False: the device's own.
        gated, dtype: of the model.
        tokens: to an expert.
        seconds: for each figure, about; three experts at least.
    """
    found: dict[int, dict[int, float]] = {}
    handovers: list[float] = []
    slowdown, rates = 1.0, (0.0, 0.0)
    for bits, store in stores.items():
        exact = device.torch_device.type == "cpu"
        experts = HostExperts(store, store.spec.num_experts, store.layouts, gated, dtype, exact)
        with closing(HostThread(experts)) as thread:
            work = _Work(thread, store)
            found[bits] = {}
            for n in tokens:
                spans = work.repeated(n, seconds)
                found[bits][n] = statistics.median(s for s, _ in spans)
                handovers += [whole - s for s, whole in spans]
            if link is not None and len(found) == 1:
                slowdown, rates = _beside_link(work, store, device, link, paced, seconds)
    return HostFigures(found, statistics.median(handovers), slowdown, *rates, torch.get_num_threads())


def _beside_link(
    work: _Work, store: HostStore, device: Device, link: LinkProfile, paced: bool, seconds: float
) -> tuple[float, tuple[float, float]]:
    """How many times as long an expert takes for one token while the link copies, at least 1; decimal GB/s of the link
    alone and meanwhile. The three are measured in turn, several times, so that a busy machine disturbs them alike.
    """
    expert_s = work.once(1)[0]
    part_s = seconds / ROUNDS
    with device.hold(store), closing(device.slots(SLOTS, store.expert_bytes)) as slots:
        copier = device.copier(
            store,
            slots,
            bytes_per_s=link.h2d_gb_s * 1e9 if paced else math.inf,
            fixed_s=link.h2d_fixed_s if paced else 0.0,
            chunk_bytes=options("on_demand").chunk_size(store.expert_bytes),
        )
        with closing(copier):
            load_s = store.expert_bytes / link.h2d_gb_s / 1e9
            pump = _Pump(copier, store, 2 + math.ceil(2 * max(0.01, expert_s) / load_s))
            ratios, alone, beside = [], [], []
            for _ in range(ROUNDS):
                quiet_s = statistics.median(s for s, _ in work.repeated(1, part_s))
                alone.append(pump.beside(lambda: time.sleep(0.005), part_s)[0])
                gb_s, spans = pump.beside(lambda: work.once(1)[0], part_s)
                beside.append(gb_s)
                ratios.append(statistics.median(spans) / quiet_s)
    return max(1.0, statistics.median(ratios)), (statistics.median(alone), statistics.median(beside))


class _Work:
    """Experts given to a host's thread one by one, every time another."""

    def __init__(self, thread: HostThread, store: HostStore) -> None:
        self._thread, self._store = thread, store
        self._next = 0

    def once(self, n: int) -> tuple[float, float]:
        """One expert for ``n`` tokens: seconds of computing, and until its outputs are known."""
        spec = self._store.spec
        layer, expert = divmod(self._next % self._store.count, spec.num_experts)
        self._next += 1
        start = time.monotonic_ns()
        self._thread.begin(layer, [expert], torch.ones(n, spec.hidden_size), [[expert]] * n)
        _, computed = self._thread.take(60.0)
        end = time.monotonic_ns()
        return (computed.end_ns - computed.begin_ns) / 1e9, (end - start) / 1e9

    def repeated(self, n: int, seconds: float) -> list[tuple[float, float]]:
        """`once` for that long, and three times at least, after one that does not count."""
        self.once(n)
        start, spans = time.monotonic(), [self.once(n)]
        while len(spans) < 3 or time.monotonic() - start < seconds:
            spans.append(self.once(n))
        return spans


class _Pump:
    """Keeps a link busy with loads while something else is done.

    Args:
        depth: loads given to it ahead.
    """

    def __init__(self, copier: BaseCopier, store: HostStore, depth: int) -> None:
        self._copier, self._store, self._depth = copier, store, depth
        self._issued = 0

    def beside(self, work: Callable[[], float | None], seconds: float) -> tuple[float, list[float]]:
        """Do ``work`` for that long; returns the link's decimal GB/s meanwhile and what ``work`` returned."""
        done: list[float] = []
        ends: list[int] = []
        first, start = self._issued, time.monotonic()
        while len(ends) < 3 or time.monotonic() - start < seconds:
            missing = self._depth - (self._issued - first - len(ends))
            numbers = range(self._issued, self._issued + missing)
            self._copier.apply(demand=[Request(i, i % self._store.count, i % SLOTS) for i in numbers])
            self._issued += max(0, missing)
            done.append(work() or 0.0)
            ends += [arrival.end_ns for arrival in self._copier.arrived()]
        self._copier.drain()
        self._copier.arrived()
        return self._store.expert_bytes * (len(ends) - 1) / (ends[-1] - ends[0]), done
