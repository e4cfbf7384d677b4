"""What a model needs on the device, stated beforehand to the byte, and the slots that a limit leaves room for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from runtime import models
from runtime.experts import dequantized, workspaces
from runtime.quantize import ExpertLayout
from runtime.store import ALIGNMENT
from sim.planner import group_sizes
from sim.spec import Options, SpecError
from traces import ModelSpec


@dataclass(frozen=True)
class Budget:
    """Bytes that are ours on the device; what libraries take for themselves (activations, code) comes on top.

    Attributes:
        dense_bytes: every weight and buffer outside the routed experts, in the type it is kept in.
        kv_bytes: KV caches (and other state) of ``batch`` sequences of ``context`` tokens.
        buffer_bytes: one dequantized expert, unless all are multiplied in their slots, and the stacked lookahead gates.
        slot_bytes: one slot, aligned.
        slots: cache slots per layer.
        num_slots: all slots: cache, landing and stream slots of every layer.
    """

    dense_bytes: int
    kv_bytes: int
    buffer_bytes: int
    slot_bytes: int
    slots: int
    num_slots: int
    context: int
    batch: int

    @property
    def total_bytes(self) -> int:
        return self.dense_bytes + self.kv_bytes + self.buffer_bytes + self.num_slots * self.slot_bytes

    def text(self) -> str:
        """One line, in GB (10^9 bytes) or MB."""
        sequences = f"{self.batch} x {self.context:,}" if self.batch > 1 else f"{self.context:,}"
        return (
            f"{size(self.total_bytes)} on the device: {size(self.num_slots * self.slot_bytes)} in {self.num_slots} "
            f"slots ({self.slots} a layer), {size(self.dense_bytes)} dense weights, {size(self.kv_bytes)} KV cache of "
            f"{sequences} tokens, {size(self.buffer_bytes)} buffers"
        )

    def to_json(self) -> dict[str, int]:
        return {k: int(v) for k, v in vars(self).items()} | {"total_bytes": self.total_bytes}


def size(nbytes: int) -> str:
    """``nbytes`` in decimal GB or MB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def budget(
    model: torch.nn.Module,
    spec: ModelSpec,
    layouts: Sequence[ExpertLayout],
    options: Options,
    *,
    slots: int | None,
    limit_bytes: int | None,
    context: int,
    batch: int = 1,
    gates: object = None,
    fused: bool = False,
) -> Budget:
    """The slots asked for, or the most that ``limit_bytes`` leaves room for, with everything else that must fit.

    Args:
        model: with its dense weights; its experts are not counted.
        layouts: of the experts, one a layer.
        slots: per layer; None is as many as fit, or half of the experts without a limit.
        context, batch: what the KV caches are counted for.
        gates: the lookahead gates; their tensors are counted.
        fused: experts are multiplied straight from their slots where that can be (``Device.fused``).

    Raises:
        SpecError: it does not fit; the sentence says what would. A context or batch below 1.
    """
    for name, value in (("context", context), ("batch", batch)):
        if value < 1:
            raise SpecError(f"{name} is {value}; it must be at least 1")
    widest = max(layouts, key=lambda layout: layout.expert_bytes)
    first = next(p for p in model.parameters() if p.is_floating_point() and not p.is_meta)
    gated = models.moe_blocks(model)[0].gated
    scratch = workspaces(dequantized(layouts, gated, fused), first.dtype, first.device)
    known = Budget(
        dense_bytes=tensor_bytes(dense_tensors(model)),
        kv_bytes=cache_bytes(model, spec, context, batch),
        buffer_bytes=tensor_bytes(tensors_in([scratch, gates])),
        slot_bytes=-(-widest.expert_bytes // ALIGNMENT) * ALIGNMENT,
        slots=0,
        num_slots=0,
        context=context,
        batch=batch,
    )

    def of(count: int) -> Budget:
        total = sum(group_sizes(spec, options, count)) + options.stream_slots
        total += options.landing_slots if options.prefetches else 0
        return Budget(**(vars(known) | {"slots": count, "num_slots": total}))

    del scratch
    if limit_bytes is None:
        return of(slots if slots is not None else max(spec.top_k, spec.num_experts // 2))
    wanted = [slots] if slots is not None else range(spec.num_experts, spec.top_k - 1, -1)
    for count in wanted:
        if of(count).total_bytes <= limit_bytes:
            return of(count)
    least = of(wanted[-1])
    raise SpecError(
        f"{size(limit_bytes)} are too few: {spec.name} needs {least.text()}; give more, or fewer bits, slots, "
        "context, or a narrower dense part"
    )


def dense_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """All weights and buffers of ``model`` but those of its routed experts."""
    inside = {id(t) for found in models.moe_blocks(model) for t in _own(found.block.experts)}
    return [t for t in _own(model) if id(t) not in inside and t.device.type != "meta"]


def _own(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes behind ``tensors``, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def cache_bytes(model: torch.nn.Module, spec: ModelSpec, context: int, batch: int = 1) -> int:
    """Bytes of the KV caches after ``context`` tokens, found by running one and three tokens without experts."""
    few, more = (_cache_after(model, tokens) for tokens in (1, 3))
    if few is None or more is None:  # this model's forward makes no cache by itself
        return spec.kv_bytes * spec.num_layers * context * batch
    per_token = (more - few) // 2
    return batch * (few + per_token * (context - 1))


@torch.inference_mode()
def _cache_after(model: torch.nn.Module, tokens: int) -> int | None:
    with without_experts(model):
        ids = torch.zeros(1, tokens, dtype=torch.long, device=next(model.parameters()).device)
        found = model(input_ids=ids, use_cache=True).past_key_values
    return None if found is None else tensor_bytes(tensors_in(found))


def tensors_in(thing: Any, depth: int = 0) -> list[torch.Tensor]:
    """Every tensor in a cache object: its attributes, and theirs."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    if depth > 4 or isinstance(thing, torch.nn.Module):
        return []
    if isinstance(thing, dict):
        parts: Iterable[Any] = thing.values()
    elif isinstance(thing, list | tuple):
        parts = thing
    else:
        parts = vars(thing).values() if hasattr(thing, "__dict__") else ()
    return [t for part in parts for t in tensors_in(part, depth + 1)]


class _NoExperts(torch.nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, hidden: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden)


@contextmanager
def without_experts(model: torch.nn.Module) -> Iterator[None]:
    """Meanwhile the MoE blocks' routed experts give zeros."""
    blocks = models.moe_blocks(model)
    kept = [found.block.experts for found in blocks]
    try:
        for found in blocks:
            found.block.experts = _NoExperts()
        yield
    finally:
        for found, experts in zip(blocks, kept, strict=True):
            found.block.experts = experts
