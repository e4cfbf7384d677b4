"""Integer nanoseconds of every operator, from a machine, a model and a bit width."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from math import ceil
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sim.link import ChunkTimes
from sim.machine import HardwareProfile, LinkProfile
from sim.spec import Options, SpecError
from sim.state import Times
from traces import ModelSpec, Trace

T = TypeVar("T")

FARTHEST = 1.5  # times what a profile was measured at, up to which its laws are believed
HOST_PEAK = 0.85  # share of its memory's bandwidth a host reaches with link and processor together (estimated)


def ns(seconds: float) -> int:
    """Seconds as integer nanoseconds, rounded."""
    return round(seconds * 1e9)


def copy_ns(nbytes: int, gb_s: float, fixed_s: float) -> int:
    """One copy: fixed + ceil(bytes / bandwidth)."""
    return ns(fixed_s) + ceil(nbytes * 1_000_000_000 / round(gb_s * 1e9))


class Timing:
    """What each step of a visit takes.

    Args:
        machine: measured laws of this model win over the roofline.
        model: the shape whose times are wanted.
        bits: width of the routed experts.
        options: its lookahead adds the lookahead gates, its policy chooses the host time.

    Raises:
        SpecError: the machine has neither measured laws for this model and width nor a memory bandwidth.
    """

    def __init__(self, machine: HardwareProfile, model: ModelSpec, bits: int, options: Options) -> None:
        self.machine = machine
        self.model = model
        self.bits = bits
        self.max_submitted = options.max_submitted
        self.expert_bytes = model.expert_bytes(bits)
        self.chunks = chunk_times(machine.link, self.expert_bytes, options.chunk_size(self.expert_bytes))
        link = machine.link
        self.write_back_ns = copy_ns(self.expert_bytes, link.d2h_gb_s, link.d2h_fixed_s)
        self.wake_ns = ns(machine.wake_s)
        self.serial_ns = ns(machine.serial_s)
        self._cooling_ppm = self._cooling_max_ns = self.longer_ns = self._expert_longer_ns = 0
        self.measured = model.name in machine.operators
        self._expert: dict[int, int] = {}
        self._dense_of, self._dense_ns = (-1, -1), 0
        if self.measured:
            self._use_measured(bits, options)
        elif machine.memory_gb_s * machine.memory_efficiency and machine.tflops * machine.tflops_efficiency:
            self._use_roofline(options)
        else:
            raise SpecError(
                f"profile {machine.name!r} has measured {', '.join(machine.operators) or 'no model'} and gives no "
                f"memory_gb_s and tflops (with efficiencies) above 0 to estimate {model.name}; name another machine or "
                "model"
            )
        self._use_host(bits, options)

    def _use_host(self, bits: int, options: Options) -> None:
        """Laws of an expert computed on the host: with the link idle, and with it taking its share of the memory."""
        machine = self.machine
        laws = machine.operators.get(self.model.name)
        left = 1.0
        reached = machine.host_memory_gb_s * machine.host_memory_efficiency
        if reached:
            left = min(1.0, max(0.1, (HOST_PEAK * machine.host_memory_gb_s - machine.link.h2d_gb_s) / reached))
        self.has_host = bool(reached) or (laws is not None and str(bits) in laws.host_expert)
        if not self.has_host:
            if hasattr(options.miss_rule.module, "loads"):
                raise SpecError(
                    f"miss={options.miss} computes experts on the host, but profile {machine.name!r} says nothing "
                    "about it; calibrate this machine (python -m runtime.calibrate), give it host_memory_gb_s "
                    "(--set machine.host_memory_gb_s=80) or leave miss out"
                )
            self._host_s: Callable[[int, float], float] = lambda n, share: 0.0
        elif laws is not None and str(bits) in laws.host_expert:
            fixed, token = laws.host_expert[str(bits)]
            self._host_s = lambda n, share: (fixed + token * n) / share
        else:
            flops = machine.host_tflops * 1e12
            self._host_s = lambda n, share: (
                machine.host_expert_fixed_s
                + max(
                    self.expert_bytes / (reached * 1e9 * share),
                    2 * self.model.expert_weights * n / flops if flops else 0.0,
                )
            )
        self._left = left

    def _use_measured(self, bits: int, options: Options) -> None:
        laws = self.machine.operators[self.model.name]
        if str(bits) not in laws.expert:
            raise SpecError(
                f"profile {self.machine.name!r} has measured {self.model.name} at {', '.join(laws.expert)} bits, "
                f"not at {bits}; calibrate that width or name one of these"
            )
        fixed, per_token, per_context = laws.dense
        dense_longer_s, expert_longer_s = of_policy(laws.displaced, options) or (0.0, 0.0)
        gates_s = laws.gates[min(options.lookahead, len(laws.gates)) - 1] if options.lookahead and laws.gates else 0.0
        self.gates_ns = ns(gates_s)
        self.sync_ns = 0
        self.longer_ns = ns(dense_longer_s)
        self._expert_longer_ns = ns(expert_longer_s)
        host_s = of_policy(laws.host_s, options)
        self.host_ns = ns(self.machine.host_s if host_s is None else host_s)
        self.shared_ns = 0
        cooling_share, cooling_most_s = of_policy(laws.cooling, options) or (0.0, 0.0)
        self._cooling_ppm, self._cooling_max_ns = round(cooling_share * 1e6), ns(cooling_most_s)
        expert_fixed, expert_token = laws.expert[str(bits)]
        self._dense_s: Callable[[int, int], float] = lambda n, context: (
            fixed + per_token * n + per_context * (context + n)
        )
        self._expert_s: Callable[[int], float] = lambda n: expert_fixed + expert_token * n
        self._head_s: Callable[[int], float] = lambda n: laws.head[0] + laws.head[1] * n

    def _use_roofline(self, options: Options) -> None:
        machine, model = self.machine, self.model
        bytes_per_s = machine.memory_gb_s * 1e9 * machine.memory_efficiency
        flops = machine.tflops * 1e12 * machine.tflops_efficiency

        def weights_s(nbytes: int, weights: float, n: int) -> float:
            return max(nbytes / bytes_per_s, 2 * weights * n / flops)

        gate_bytes = 2 * model.hidden_size * model.num_experts * options.lookahead
        self.gates_ns = ns(gate_bytes / bytes_per_s)
        self.sync_ns = ns(machine.sync_s)
        self.host_ns = ns(machine.host_s)
        self.shared_ns = ns(weights_s(model.shared_bytes, model.shared_bytes / 2, 1)) if model.shared_bytes else 0
        self._dense_s = lambda n, context: (
            machine.layer_fixed_s
            + weights_s(model.attention_bytes, model.attention_bytes / 2, n)
            + model.kv_bytes * (context + n) / bytes_per_s
        )
        self._expert_s = lambda n: machine.expert_fixed_s + weights_s(self.expert_bytes, model.expert_weights, n)
        self._head_s = lambda n: machine.head_fixed_s + weights_s(model.head_bytes, model.head_bytes / 2, 1)

    def dense_ns(self, n: int, context: int) -> int:
        """Attention, norms and router of one layer for ``n`` tokens after ``context`` others."""
        if (n, context) != self._dense_of:
            self._dense_of = (n, context)
            self._dense_ns = ns(self._dense_s(n, context))
        return self._dense_ns

    def all_dense_ns(self, n: int, context: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """`dense_ns` of many contexts, the same to the bit: the law is arithmetic in ``context``."""
        seconds: Any = self._dense_s(n, context)  # type: ignore[arg-type]  # an array does as well
        found: npt.NDArray[np.int64] = np.rint(np.broadcast_to(seconds * 1e9, context.shape)).astype(np.int64)
        return found

    def routed_ns(self, n: int, context: int, looks: bool) -> int:
        """From the start of a visit until the host knows the routing, and the guesses if somebody ``looks`` at them."""
        return self.dense_ns(n, context) + self.longer_ns + (self.gates_ns if looks else 0) + self.sync_ns

    def expert_ns(self, n: int) -> int:
        """One expert on the device for ``n`` tokens, beside this policy's planning and loads."""
        if n not in self._expert:
            self._expert[n] = self.undisturbed_expert_ns(n) + self._expert_longer_ns
        return self._expert[n]

    def undisturbed_expert_ns(self, n: int) -> int:
        """The same with nothing to plan and load: what floors count."""
        return ns(self._expert_s(n))

    def host_expert_ns(self, n: int, shared: bool = False) -> int:
        """One expert for ``n`` tokens on the host; ``shared``: while the link reads the same memory."""
        return ns(self._host_s(n, self._left if shared else 1.0))

    def head_ns(self, n: int) -> int:
        """After the last layer until the next token is chosen."""
        return ns(self._head_s(n))

    def cooled_ns(self, wait_ns: int) -> int:
        """How much longer computing takes right after a wait."""
        return min(self._cooling_max_ns, wait_ns * self._cooling_ppm // 1_000_000)

    def plain_visit_ns(self) -> int:
        """A decode visit at context 0 without any stall: the unit in which the planner looks ahead."""
        experts = self.shared_ns + self.model.top_k * self.expert_ns(1)
        return self.routed_ns(1, 0, True) + self.host_ns + experts

    def tables(self) -> TimeTables:
        """The same times as the planner's functions want them."""
        chunks = self.chunks
        times = Times(
            expert_ns=[0],
            host_expert_ns=[0],
            host_shared_ns=[0],
            shared_ns=self.shared_ns,
            host_ns=self.host_ns,
            wake_ns=self.wake_ns,
            serial_ns=self.serial_ns,
            cooling_ppm=self._cooling_ppm,
            cooling_max_ns=self._cooling_max_ns,
            sync_ns=self.sync_ns,
            longer_ns=self.longer_ns,
            gates_ns=self.gates_ns,
            plain_ns=self.plain_visit_ns(),
            chunks=chunks.number,
            full_ns=chunks.full_ns,
            last_ns=chunks.last_ns,
            full_duplex_ns=chunks.full_duplex_ns,
            last_duplex_ns=chunks.last_duplex_ns,
            full_shared_ns=chunks.full_host_ns,
            last_shared_ns=chunks.last_host_ns,
            load_ns=chunks.total_ns(),
            write_back_ns=self.write_back_ns,
            max_submitted=self.max_submitted,
            expert_bytes=self.expert_bytes,
            chunk_bytes=chunks.size,
        )
        return TimeTables(self, times)


def check_reach(machine: HardwareProfile, model: ModelSpec, trace: Trace) -> None:
    """Refuse a trace that goes far beyond what the machine was measured at; see `check_within_reach`."""
    passes = list(trace.passes())
    check_within_reach(
        machine,
        model,
        max((p.tokens for p in passes), default=0),
        max((p.tokens + p.context for p in passes), default=0),
    )


def check_within_reach(machine: HardwareProfile, model: ModelSpec, tokens: int, context: int) -> None:
    """Refuse passes of so many ``tokens``, or with so much ``context``, when the machine was measured at far less.

    Raises:
        SpecError: more than `FARTHEST` times the most that was measured.
    """
    laws = machine.operators.get(model.name)
    if laws is None or not laws.reach:
        return
    asked = {"tokens": tokens, "context": context}
    beyond = {name: most for name, most in laws.reach.items() if asked[name] > FARTHEST * most}
    if not beyond:
        return
    units = {"tokens": "tokens in a pass", "context": "tokens of context"}
    measured = " and ".join(f"{most:g} {units[name]}" for name, most in beyond.items())
    found = " and ".join(str(asked[name]) for name in beyond)
    path = f"machine.operators.{model.name}.reach"
    flags = " ".join(f"--set {shlex.quote(f'{path}.{name}={asked[name]}')}" for name in beyond)
    raise SpecError(
        f"profile {machine.name!r} was measured with up to {measured}; {found} are asked for, more than {FARTHEST:g} "
        f"times as many; calibrate with --context {asked['context']}, or extrapolate with {flags}"
    )


def of_policy(known: dict[str, T], options: Options) -> T | None:
    """What was measured of the very SPEC, else of its policy, else of any that prefetches as it does, else of any."""
    kind = ("prefetching",) if options.prefetches else ()
    return next((known[name] for name in (options.text, options.policy.name, *kind, "default") if name in known), None)


class TimeTables:
    """`Times` whose tables by number of tokens grow as they are needed."""

    def __init__(self, timing: Timing, times: Times) -> None:
        self.times = times
        self._timing = timing
        self.make_room(1)

    def make_room(self, tokens: int) -> None:
        """Times for visits with up to ``tokens`` tokens to an expert."""
        timing, times = self._timing, self.times
        for n in range(len(times.expert_ns), tokens + 1):
            times.expert_ns.append(timing.expert_ns(n))
            times.host_expert_ns.append(timing.host_expert_ns(n))
            times.host_shared_ns.append(timing.host_expert_ns(n, True))


def chunk_times(link: LinkProfile, expert_bytes: int, chunk_bytes: int) -> ChunkTimes:
    """How one expert is cut and what its chunks take on this link."""
    count = ceil(expert_bytes / chunk_bytes)
    last = expert_bytes - (count - 1) * chunk_bytes
    duplex = min(link.h2d_duplex_gb_s, link.h2d_gb_s)
    host = min(link.h2d_host_gb_s or link.h2d_gb_s, link.h2d_gb_s)
    return ChunkTimes(
        number=count,
        size=chunk_bytes,
        last_size=last,
        full_ns=copy_ns(chunk_bytes, link.h2d_gb_s, link.h2d_fixed_s),
        last_ns=copy_ns(last, link.h2d_gb_s, link.h2d_fixed_s),
        full_duplex_ns=copy_ns(chunk_bytes, duplex, link.h2d_fixed_s),
        last_duplex_ns=copy_ns(last, duplex, link.h2d_fixed_s),
        full_host_ns=copy_ns(chunk_bytes, host, link.h2d_fixed_s),
        last_host_ns=copy_ns(last, host, link.h2d_fixed_s),
    )
