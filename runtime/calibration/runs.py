"""Engine runs whose every step is timed, in rounds: what the laws of `runtime.calibration.operators` are fitted to."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from runtime import models
from runtime.calibration.steadiness import Control, uncollected, undisturbed, usual
from runtime.devices import open_device
from runtime.engine import Engine
from runtime.experts import Waited
from runtime.family import ModelError
from runtime.observe import Spans
from runtime.store import HostStore
from sim.machine import HardwareProfile, LinkProfile, paced
from sim.spec import Options, options
from sim.timing import Timing

DEFAULT_LINK_GB_S = 0.05
FAST_LINK_GB_S = 10.0  # of a paced link that next to nothing has to be waited for
GPU_LINK_GB_S = 25.0  # believed of a device with a link of its own: PCIe Gen4, about
CONTEXT = 200  # tokens of the longest prompt
WAITS_MS = (1.0, 2.0, 10.0)  # that a load takes, where waits are measured
HELD_OUT_WAIT_MS = 1.5
SERIAL_MS = 2.0  # that a load takes, where copies and computing take turns
TOKENS = 32  # of each engine run
POLICIES = ("on_demand", "speculative")
SERIAL = "on_demand:copy_stream=0"
TEMPERATURE = 0.8  # of the sampling, whose time is part of the head
PROMPT = (
    "import random\n\n\ndef shuffle(deck):\n    for i in range(len(deck) - 1, 0, -1):\n"
    "        j = random.randint(0, i)\n"
    "        deck[i], deck[j] = deck[j], deck[i]\n    return deck\n"
)
ROUGH = HardwareProfile(  # the planner's clock while nothing is measured yet
    "rough",
    0,
    0,
    LinkProfile(1.0, 0.0, 1.0, 0.0, 1.0),
    memory_gb_s=8.0,
    tflops=0.05,
    layer_fixed_s=5e-4,
    expert_fixed_s=5e-5,
    host_s=1e-4,
    host_memory_gb_s=4.0,
)


class TrialEngine(Engine):
    """An engine whose link can be slowed down or sped up without its planner's knowing.

    Attributes:
        load_ns: that one load takes since `pace`.
    """

    load_ns = 0

    def believe(self, gb_s: float) -> None:
        """Plan as on a link of this speed. Only before anything is generated."""
        self.timing = Timing(paced(ROUGH, gb_s), self.spec, self.bits, self.options)
        self.planner = self._kind(self.spec, self.options, self.slots, self.timing)

    def pace(self, gb_s: float) -> None:
        """The link is of this speed from now on. Only between passes."""
        self.load_ns = round(self.store.expert_bytes / gb_s)
        self.settle()
        self._collect()
        self.copier.close()
        self.copier = self._ends.enter_context(
            closing(
                self.device.copier(
                    self.store,
                    self.pool,
                    bytes_per_s=gb_s * 1e9,
                    chunk_bytes=self.options.chunk_size(self.store.expert_bytes),
                    max_submitted=self.options.max_submitted,
                )
            )
        )


class Seen(NamedTuple):
    """Spans of one pass, and the number of the look at the control before it."""

    spans: Spans
    look: int


@dataclass
class Measured:
    """Passes of engine runs, one list a run: those that laws are fitted to, and those held out.

    Attributes:
        resident, held_out: by bits, every expert in a slot.
        waits: by SPEC and ns that a load takes, half of the experts in slots; ``policies`` hold the same without waits.
        policies, policies_held_out: by SPEC, half of the experts in slots, planned for a slow link, on a fast one. Of
            these and all that follow, decode passes alone.
        serial: by ns that a load takes, half of the experts in slots, copies and computing in turns.
        gates, gates_held_out: by lookahead distance, every expert in a slot, guesses at every visit.
    """

    resident: dict[int, list[list[Seen]]] = field(default_factory=dict)
    held_out: dict[int, list[list[Seen]]] = field(default_factory=dict)
    waits: dict[tuple[str, int], list[list[Seen]]] = field(default_factory=dict)
    policies: dict[str, list[list[Seen]]] = field(default_factory=dict)
    policies_held_out: dict[str, list[list[Seen]]] = field(default_factory=dict)
    serial: dict[int, list[list[Seen]]] = field(default_factory=dict)
    gates: dict[int, list[list[Seen]]] = field(default_factory=dict)
    gates_held_out: dict[int, list[list[Seen]]] = field(default_factory=dict)


class Undisturbed(NamedTuple):
    """`Measured` without the passes in which something outside slowed the machine down."""

    resident: dict[int, list[Spans]]
    held_out: dict[int, list[Spans]]
    waits: dict[tuple[str, int], list[Spans]]
    policies: dict[str, list[Spans]]
    policies_held_out: dict[str, list[Spans]]
    serial: dict[int, list[Spans]]
    gates: dict[int, list[Spans]]
    gates_held_out: dict[int, list[Spans]]


class Runs:
    """Engine runs with spans on, in rounds.

    What a policy's planning costs is measured without the waits it leads to, whose cost is measured by itself: its
    planner believes in a link of ``gb_s``, and the link is so fast that next to nothing is waited for.

    Args:
        model_dir, bits: what is measured.
        tokens: decode tokens of each run.
        policies: SPECs whose planning is measured.
        gb_s: pace of the link for which policies plan.
        device: where.
        context: tokens of the longest prompt.
        control: looked at before and after every pass, also by others.
        stores: expert stores by bits, to be shared; built (and owned) where they are missing.

    Raises:
        ModelError, StoreError, SpecError: inputs that cannot be used.
    """

    def __init__(
        self,
        model_dir: Path,
        bits: Sequence[int],
        tokens: int = TOKENS,
        *,
        policies: Sequence[str] = POLICIES,
        gb_s: float = DEFAULT_LINK_GB_S,
        device: str = "cpu",
        context: int = CONTEXT,
        control: Control | None = None,
        stores: dict[int, HostStore] | None = None,
    ) -> None:
        self.model_dir = model_dir
        self.spec = models.spec_of(model_dir)
        if self.spec.num_layers < 2:
            raise ModelError(f"{model_dir} has one MoE layer; what a visit takes is measured from the second on")
        self.tokens = tokens
        self.device = device
        self.gb_s = gb_s if device == "cpu" else GPU_LINK_GB_S
        self.lengths = (8, 8 + context // 4, context)  # of the prompts that laws are fitted to
        self.held_out = (12, context * 3 // 5)  # and of those that test them
        self.policies = {text: options(text) for text in dict.fromkeys((*POLICIES, *policies))}
        self.rounds = 0
        self.control = control or Control()
        self.measured = Measured()
        self._owned: list[HostStore] = []
        self.stores: dict[int, HostStore] = {}
        try:
            for width in bits:
                store = (stores or {}).get(width)
                if store is None:
                    store = HostStore.build(model_dir, self.spec, width, order=open_device(device).order)
                    self._owned.append(store)
                self.stores[width] = store
        except BaseException:
            self.close()
            raise

    @property
    def widths(self) -> list[int]:
        return list(self.stores)

    def engine(self, run: Options, bits: int, slots: int, believed_gb_s: float) -> TrialEngine:
        """An engine on a fast link (on CUDA the device's own), which has warmed up; its planner believes in a slower
        one.
        """
        engine = TrialEngine(
            self.model_dir,
            bits=bits,
            slots=slots,
            options=run,
            machine=paced(ROUGH, FAST_LINK_GB_S),
            store=self.stores[bits],
            record=0,
            compiled=True,
            device=self.device,
            paced=self.device == "cpu",
        )
        engine.believe(believed_gb_s)
        if self.device != "cpu":
            engine.experts = Waited(engine.experts, engine.device)  # type: ignore[assignment]
        try:
            for _ in engine.generate(engine.tokenizer.encode(PROMPT), 6):
                pass
        except BaseException:
            engine.close()
            raise
        return engine

    def decode_spans(self, engine: TrialEngine, length: int, tokens: int) -> list[Seen]:
        """`spans` of the decode passes alone."""
        return self.spans(engine, length, tokens)[1:]

    def spans(self, engine: TrialEngine, length: int, tokens: int) -> list[Seen]:
        """What the passes of one prompt of ``length`` tokens and of ``tokens`` new ones took."""
        ids = engine.tokenizer.encode(PROMPT)
        found = []
        engine.spans = Spans()
        with uncollected():
            self.control.begin()
            for _ in engine.generate((ids * (length // len(ids) + 1))[:length], tokens, temperature=TEMPERATURE):
                self.control.look()
                found.append(Seen(engine.spans, len(self.control.looks) - 2))
                engine.spans = Spans()
        return found

    def round(self, whole: bool = True) -> None:
        """Measure everything once more; not ``whole``: without gates and serial copies."""
        found = self.measured
        every, half = self.spec.num_experts, max(self.spec.top_k, self.spec.num_experts // 2)
        few = self.tokens // 2 + 2
        for bits in self.widths:
            with self.engine(self.policies["on_demand"], bits, every, self.gb_s) as engine:
                for length in self.lengths:
                    found.resident.setdefault(bits, []).append(self.spans(engine, length, self.tokens))
                for length in self.held_out:
                    found.held_out.setdefault(bits, []).append(self.spans(engine, length, few))
        for text, run in self.policies.items():
            with self.engine(run, self.widths[0], half, self.gb_s) as engine:
                found.policies.setdefault(text, []).append(self.decode_spans(engine, 24, self.tokens))
                found.policies_held_out.setdefault(text, []).append(self.decode_spans(engine, 40, few))
                if text in POLICIES and self.device == "cpu":
                    found.policies[text].append(self.decode_spans(engine, 24, self.tokens))
                    self._wait(engine, text)
        for distance in range(1, min(4, self.spec.num_layers - 1) + 1) if whole else ():
            run = options(f"speculative:lookahead={distance},guard=0,trust=0")  # every visit looks ahead
            with self.engine(run, self.widths[0], every, self.gb_s) as engine:
                found.gates.setdefault(distance, []).append(self.decode_spans(engine, 24, few))
                found.gates_held_out.setdefault(distance, []).append(self.decode_spans(engine, 40, few))
        if whole and self.device == "cpu":
            with self.engine(options(SERIAL), self.widths[0], half, self.gb_s) as engine:
                engine.pace(engine.store.expert_bytes / SERIAL_MS / 1e6)
                found.serial.setdefault(engine.load_ns, []).append(self.decode_spans(engine, 24, few))
        self.rounds += 1

    def _wait(self, engine: TrialEngine, policy: str) -> None:
        """The same prompt over links on which a load takes longer and longer."""
        for ms in (*WAITS_MS, HELD_OUT_WAIT_MS):
            engine.pace(engine.store.expert_bytes / ms / 1e6)
            tokens = max(8, min(self.tokens, round(48 / ms)))
            self.measured.waits.setdefault((policy, round(ms * 1e6)), []).append(self.decode_spans(engine, 24, tokens))

    # --- what of it counts ------------------------------------------------------------------------------------

    def undisturbed(self) -> Undisturbed:
        """The spans of passes that were; of a kind where none was, all."""
        kept = self._kept()
        found: dict[str, dict[Any, list[Spans]]] = {}
        for kind in dataclasses.fields(self.measured):
            runs: dict[Any, list[list[Seen]]] = getattr(self.measured, kind.name)
            seen = {key: list(itertools.chain(*of_key)) for key, of_key in runs.items()}
            found[kind.name] = {key: _quiet(of_key, kept) for key, of_key in seen.items()}
        return Undisturbed(**found)

    def rounds_resident(self) -> Iterator[list[Spans]]:
        """Undisturbed decode passes with every expert in a slot at the first width, round by round."""
        kept = self._kept()
        runs, each = self.measured.resident[self.widths[0]], len(self.lengths)
        for i in range(0, len(runs), each):
            seen = itertools.chain(*runs[i : i + each])
            yield [s.spans for s in seen if kept[s.look] and s.spans.dense[0].tokens == 1]

    def kept_share(self) -> float:
        """Share of what lies between two looks at the control, during which nothing outside slowed the machine down."""
        kept = self._kept()
        return sum(kept) / len(kept)

    def _kept(self) -> list[bool]:
        looks = self.control.looks
        return undisturbed(looks, usual(looks))

    def close(self) -> None:
        """Let go of the stores that were built here."""
        for store in self._owned:
            store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _quiet(seen: Sequence[Seen], kept: Sequence[bool]) -> list[Spans]:
    """The undisturbed passes; of passes with as many tokens, among which none was, all."""
    groups: dict[int, list[Seen]] = {}
    for one in seen:
        groups.setdefault(one.spans.dense[0].tokens, []).append(one)
    return [one.spans for group in groups.values() for one in ([x for x in group if kept[x.look]] or group)]
