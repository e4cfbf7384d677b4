"""`offload`: a transformers MoE model whose experts live in host memory; its own ``generate`` works as before.

from runtime import offload
model = offload("DIR", bits=4, vram="12GB", policy="speculative")
model.generate(...)
model.offload_stats()
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from runtime import models
from runtime.budget import Budget, budget, without_experts
from runtime.calibration.host import host_figures
from runtime.copier import CopierError
from runtime.devices import open_device
from runtime.executor import Executor, check_options, gates_of
from runtime.graphs import CudaGraphs, Graphs
from runtime.host_experts import computes_on_host
from runtime.lookahead import GATES_FILE
from runtime.store import HostStore, layouts_of, widths_of
from sim.bounds import fewest_loads, link_floor_ns
from sim.experiment import phase_keys
from sim.machine import HardwareProfile, load_machine, paced
from sim.planner import check_slots, group_sizes
from sim.settings import size_bytes
from sim.spec import SpecError, options
from sim.timing import Timing
from traces import DECODE, PREFILL
from traces.vocabulary import GROUP_SIZE

FAST_LINK_GB_S = 10.0  # device=cpu without a stated pace: about what host memory gives, so that waiting is short
MACHINES = {"cpu": "cpu-2core", "cuda": "rtx3090"}  # profiles for want of a named one
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def machine_for(
    name_or_file: str | None, device: str, model_name: str, widths: Sequence[int], link_gb_s: float | None
) -> HardwareProfile:
    """The profile whose times advance the planner's clock, its link at the pace asked for.

    Measured laws are used for the model and widths they were measured for; otherwise its rates.

    Raises:
        SpecError: an unknown profile, or a pace out of range.
    """
    if link_gb_s is not None and not 1e-4 <= link_gb_s <= 1000:
        raise SpecError(f"link_gb_s is {link_gb_s}; it must be 0.0001 to 1000 GB/s")
    machine = load_machine(name_or_file or MACHINES.get(device, "cpu-2core"))
    laws = machine.operators.get(model_name)
    if laws is not None and not all(str(bits) in laws.expert for bits in widths):
        machine = dataclasses.replace(machine, operators={})
    if link_gb_s is None and device == "cpu" and name_or_file is None:
        link_gb_s = FAST_LINK_GB_S
    return paced(machine, link_gb_s)


class Offloaded:
    """What `offload` attaches to a model: passes are noticed by hooks, visits done by an `Executor`.

    Attributes:
        executor: plans, copies and computes.
        budget: bytes on the device, stated beforehand.
        graphs: what captures decode steps, if anything.
    """

    graphs: Graphs | None = None

    def __init__(self, model: torch.nn.Module, executor: Executor, stated: Budget, owned: HostStore | None) -> None:
        self.executor = executor
        self.budget = stated
        self._last: dict[str, Any] = {}
        model.register_forward_pre_hook(self._begins, with_kwargs=True)
        model.register_forward_hook(self._ended)
        self._end = weakref.finalize(model, _close, executor, owned)

    def _begins(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        batch, length = given.shape[:2]
        cache = kwargs.get("past_key_values")
        before = 0 if cache is None else int(cache.get_seq_length())
        phase = DECODE if before and length == 1 else PREFILL
        self.executor.begin_pass(phase, batch * length, batch * before, batch)

    def _ended(self, module: torch.nn.Module, args: tuple[Any, ...], output: object) -> None:
        self.executor.end_pass()

    def stats(self) -> dict[str, Any]:
        """Figures since the model was offloaded: the keys of ``sim.run`` for decode, and under ``prefill``.

        With ``use_cache=False`` every pass counts as a prefill. ``hit_rate`` is hits / accesses (expert there when
        routed), ``resident_or_early`` (hits + late) / accesses, ``prefetch_precision`` prefetches used / issued;
        seconds are per token, of the forward passes alone.
        """
        if not self._end.alive:
            return self._last
        executor = self.executor
        ledger = executor.settle()
        decode, prefill = ledger.phases[DECODE], ledger.phases[PREFILL]
        tpot_s = decode.elapsed_ns / decode.passes / 1e9 if decode.passes else None
        return {
            "policy": executor.options.text,
            "bits": executor.bits,
            "slots": executor.slots,
            "evidence": "MEASURED",
            "graphs": self.graphs.counts() if self.graphs else None,
            "decode_passes": decode.passes,
            "tpot_s": tpot_s,
            "ttft_s": ledger.ttft_ns[-1] / 1e9 if ledger.ttft_ns else None,
            "hit_rate": decode.hits / decode.accesses if decode.accesses else None,
            "resident_or_early": (decode.hits + decode.late) / decode.accesses if decode.accesses else None,
            **phase_keys(decode),
            "prefill": phase_keys(prefill),
            "expert_bytes": executor.store.expert_bytes,
            "vram_bytes": self.budget.total_bytes,
            "host_bytes": executor.store.count * executor.store.row_bytes,
        }

    def bounds(self) -> dict[str, float] | None:
        """Seconds per decode token that no schedule beats: compute as measured without stalls, and the fewest loads of
        this routing with these slots over the link's speed; None before the first decode token, or unrecorded.

        Where the host computes misses, it takes off the link what it can at the rate at which it was seen to compute.
        """
        executor = self.executor
        decode = executor.ledger.phases[DECODE]
        if executor.recorder is None or not decode.passes:
            return None
        trace = executor.recorder.trace({}, "")
        run = executor.options
        landing = run.landing_slots if run.prefetches else 0
        loads = fewest_loads(trace, group_sizes(executor.spec, run, executor.slots), landing)
        link_ns = link_floor_ns(loads, executor.timing.machine, executor.store.expert_bytes)
        if decode.host_computed and link_ns:
            link_ns = loads / (loads / link_ns + decode.host_computed / decode.host_busy_ns)
        resident_s, link_s = decode.compute_ns / decode.passes / 1e9, link_ns / decode.passes / 1e9
        return {
            "all_resident_s": resident_s,
            "link_floor_s": link_s,
            "joint_floor_s": max(resident_s, link_s),
        }

    def close(self) -> None:
        """End the copier and let go of slots and store; the model cannot run afterwards, ``stats`` keeps its figures.
        A second call does nothing."""
        if self._end.alive:
            with contextlib.suppress(CopierError):  # a copier that has died has nothing more to tell
                self._last = self.stats()
        self._end()


def _close(executor: Executor, owned: HostStore | None) -> None:
    executor.close()
    if owned is not None:
        owned.close()


def offload(
    model: torch.nn.Module | str | Path,
    *,
    bits: int | Sequence[int] = 4,
    slots: int | None = None,
    policy: str = "speculative",
    vram: str | int | None = None,
    context: int = 4096,
    batch: int = 1,
    device: str = "cpu",
    group_size: int = GROUP_SIZE,
    optimize: bool = True,
    store: str | Path | None = None,
    dtype: str | None = None,
    dense_bits: int = 16,
    machine: str | None = None,
    link_gb_s: float | None = None,
    gates: str | Path | None = None,
    record: bool = False,
    record_logits: bool = False,
    graphs: bool = False,
    progress: bool = True,
) -> Any:
    """Move a model's routed experts to host memory; they are copied to slots on the device when they are needed.

    Args:
        model: a local model directory (read expert by expert), or a loaded transformers model (its experts are taken
            out of it and freed).
        bits: of the experts: 16, 8, 4, 3, 2, or one width for every MoE layer.
        slots: experts of each layer on the device; None is as many as ``vram`` leaves room for, or half of them.
        policy: a policy spec, such as ``speculative:lookahead=2``.
        vram: everything of ours on the device must fit in this: ``"12GB"`` or bytes.
        context, batch: tokens and sequences the KV caches are counted for.
        device: ``cpu`` or ``cuda``: where the dense part and the slots are.
        group_size, optimize: of quantizing; see `runtime.quantize.pack`.
        store: file that keeps the quantized experts; made if it is not there, mapped if it is.
        dtype: of the dense part and of computing: ``float32`` (None with device=cpu) or ``bfloat16`` (None elsewhere);
            a loaded model keeps its own.
        dense_bits: 16, or 4 for linear layers outside router, head and embeddings.
        machine: profile whose times advance the planner's clock; by default one of this kind of device. What it does
            not know of experts on the host is measured here, for a policy that computes some there; of the default
            nothing about the host is believed.
        link_gb_s: pace of the link, GB/s; None is the GPU's own, and 10 GB/s with device=cpu.
        gates: file of trained lookahead gates (`runtime.align`), for ``predictor=aligned``; by default the model's own.
        record, record_logits: keep the routing and guesses, for ``offloaded.bounds`` and to save a trace.
        graphs: capture decode steps as CUDA graphs where that can be (`runtime.graphs`); ``generate`` then takes a
            static KV cache.

    Returns:
        The transformers model. ``generate`` works unchanged, batches and beam search included;
        ``model.offload_stats()`` tells hit rates and times, ``model.offload_close()`` ends it, ``model.offloaded`` is
        the `Offloaded` behind both, ``model.offload_tokenizer`` the directory's tokenizer, if it has one.

    Raises:
        ModelError, StoreError, SpecError: what cannot be used; CopierError: the copier does not start.
    """
    run = options(policy)
    check_options(run)
    if graphs and record_logits:
        raise SpecError("router logits are recorded by hooks, which do not run in a graph; leave one of the two out")
    place = open_device(device)
    if graphs and place.torch_device.type != "cuda":
        raise SpecError(f"graphs are CUDA's, and device={device} has none; leave graphs out")
    limit = size_bytes(vram) if isinstance(vram, str) else vram
    packing: dict[str, Any] = {"group_size": group_size, "optimize": optimize, "progress": progress}
    packing |= {"path": None if store is None else Path(store), "order": place.order}
    if isinstance(model, torch.nn.Module):
        if hasattr(model, "offloaded"):
            raise models.ModelError("this model is offloaded already; load it again to offload it otherwise")
        if dense_bits != 16:
            raise SpecError(f"dense_bits is {dense_bits}; a loaded model keeps its dense part: name its directory")
        spec = models.spec_of_config(model.config, type(model).__name__.lower())
        loaded, tokenizer, heads = model.requires_grad_(False), None, None
    else:
        directory = Path(model)
        dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
        if dtype not in DTYPES:
            raise SpecError(f"dtype is {dtype!r}; it must be {' or '.join(DTYPES)}")
        spec = models.spec_of(directory)
        layouts_of(spec, bits, group_size)  # refused before anything is read
        loaded, tokenizer = models.load_dense(directory, DTYPES[dtype], dense_bits, optimize)
        heads = directory / GATES_FILE
    heads = Path(gates) if gates else heads
    widths = sorted(set(widths_of(spec, bits)))
    profile = machine_for(machine, device, spec.name, widths, link_gb_s)
    with without_experts(loaded):
        loaded.to(place.torch_device)
    predict = gates_of(loaded, spec, run, heads)
    layouts = layouts_of(spec, bits, group_size, place.order)
    need: dict[str, Any] = {"context": context, "batch": batch, "gates": predict, "fused": place.fused}
    stated = budget(loaded, spec, layouts, run, slots=slots, limit_bytes=limit, **need)
    check_slots(spec, stated.slots)
    timing = Timing(profile, spec, max(widths), run.replace(miss="load"))  # one that cannot time this model is refused
    measures_host = computes_on_host(run) and (machine is None or not timing.has_host)
    if isinstance(model, torch.nn.Module):
        owned = HostStore.from_model(model, spec, bits, **packing)
    else:
        owned = HostStore.build(directory, spec, bits, **packing)
    try:
        if measures_host:
            figures = host_figures(
                {max(widths): owned},
                place,
                gated=models.moe_blocks(loaded)[0].gated,
                dtype=next(p.dtype for p in loaded.parameters() if p.is_floating_point()),
                tokens=(1, 4),
                seconds=0.1,
            )
            profile = figures.into(profile, spec)
            if progress:
                print(f"on this host {figures.text()}", file=sys.stderr)
        executor = Executor(
            loaded,
            spec,
            owned,
            place,
            bits=max(widths),
            slots=stated.slots,
            options=run,
            machine=profile,
            gates=predict,
            record=0 if record or record_logits else None,
            record_logits=record_logits,
            compiled=True,
            paced=device == "cpu" or link_gb_s is not None,
        )
    except BaseException:
        owned.close()
        raise
    handle = Offloaded(loaded, executor, stated, owned)
    if graphs:
        handle.graphs = Graphs(loaded, executor, CudaGraphs(place.torch_device))
        loaded.generation_config.cache_implementation = "static"
        loaded.generation_config.disable_compile = True
    attached: dict[str, Callable[..., Any] | object] = {
        "offloaded": handle,
        "offload_stats": handle.stats,
        "offload_close": handle.close,
        "offload_tokenizer": tokenizer,
    }
    for name, value in attached.items():
        setattr(loaded, name, value)
    return loaded
