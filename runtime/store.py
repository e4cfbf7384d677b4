"""All routed experts of a model, packed: built from a checkpoint or a loaded model, in memory or in a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from runtime import store_file
from runtime.checkpoint import Checkpoint, StoreError, identity
from runtime.family import ExpertWeights
from runtime.quantize import ExpertLayout, pack_into
from runtime.repack import Order
from runtime.rows import ALIGNMENT, ExpertRows, SlotPool, aligned, available_memory
from runtime.skeleton import moe_blocks
from traces.vocabulary import GROUP_SIZE, ExpertId, ModelSpec

__all__ = ["ALIGNMENT", "ExpertRows", "HostStore", "SlotPool", "StoreError", "check_memory"]

WIDTHS = (16, 8, 4, 3, 2)
Source = Callable[[ExpertId], ExpertWeights]


class HostStore(ExpertRows):
    """All routed experts of a model, packed; row = layer * num_experts + expert.

    Attributes:
        layouts: of the experts of each layer; ``expert_bytes`` is the largest of theirs.
        optimize: quantized by HQQ's solver; False: rounded to the nearest code.
        quantization_error: relative Frobenius error of a matrix, mean over all experts (MEASURED).
        verified: a mapped store's bytes were hashed and compared; None for one built by this process.
    """

    def __init__(
        self, spec: ModelSpec, layouts: Sequence[ExpertLayout], optimize: bool = True, *, fd: int = -1
    ) -> None:
        expert_bytes = max(layout.expert_bytes for layout in layouts)
        super().__init__(spec.num_layers * spec.num_experts, expert_bytes, fd=fd, private=fd >= 0, touch=False)
        self.spec = spec
        self.layouts = list(layouts)
        self.optimize = optimize
        self.quantization_error = 0.0
        self.verified: bool | None = None

    @property
    def layout(self) -> ExpertLayout:
        """The one layout of all layers.

        Raises:
            StoreError: layers differ.
        """
        if len(set(self.layouts)) > 1:
            raise StoreError("layers of this store have different bit widths; ask for layouts[layer]")
        return self.layouts[0]

    def index(self, expert: ExpertId) -> int:
        return expert.layer * self.spec.num_experts + expert.expert

    def describe(self) -> str:
        """One line: widths, way of quantizing, its error, bytes."""
        bits = sorted({layout.bits for layout in self.layouts}, reverse=True)
        widths = "/".join(map(str, bits))
        way = "HQQ solver" if self.optimize else "rounded to nearest"
        how = "" if bits == [16] else f", groups of {self.layouts[0].group_size}, {way}"
        checked = {None: "", True: ", sha256 checked", False: ", sha256 not checked (size and header only)"}
        return (
            f"{self.count} experts at {widths} bits{how}: {self.count * self.row_bytes / 1e9:.3f} GB, relative weight "
            f"error {self.quantization_error:.4f} (MEASURED){checked[self.verified]}"
        )

    @classmethod
    def build(
        cls,
        model_dir: str | os.PathLike[str],
        spec: ModelSpec,
        bits: int | Sequence[int],
        *,
        group_size: int = GROUP_SIZE,
        optimize: bool = True,
        order: Order = "hqq",
        progress: bool = True,
        path: Path | None = None,
        verify: bool | None = None,
    ) -> HostStore:
        """Read a transformers checkpoint expert by expert and pack each into its row.

        MoE layers are numbered in the model's own order, dense layers left out.

        Args:
            bits: of all layers, or one width for each.
            order: of the codes in their words; what is computed does not depend on it, how fast does.
            progress: a bar on standard error once it takes more than two seconds.
            path: where the store is kept: mapped if it is there, else built there, going on where a killed build
                stopped, and named when finished. None builds in memory.
            verify: as in `open`.

        Raises:
            StoreError: no such checkpoint, experts under unknown names or of another shape than ``spec`` says, a file
                that is another store, or too little memory.
            ValueError: a layout that cannot be.
        """
        layouts = layouts_of(spec, bits, group_size, order)
        packing: Any = {"bits": bits, "group_size": group_size, "optimize": optimize, "order": order}
        with Checkpoint(Path(model_dir)) as checkpoint:
            checkpoint.check(spec)
            source = checkpoint.identity() if path is not None else ""
            if path is not None and path.exists():
                return cls.open(path, spec, source, verify=verify, **packing)
            check_memory(spec, layouts)
            store, log = cls._begin(spec, layouts, optimize, path, source)
            try:
                store._fill(checkpoint.expert, log, progress)
                return store._finish(log, source)
            except BaseException:
                store.close()
                if log:
                    log.close()
                raise

    @classmethod
    def from_model(
        cls,
        model: torch.nn.Module,
        spec: ModelSpec,
        bits: int | Sequence[int],
        *,
        group_size: int = GROUP_SIZE,
        optimize: bool = True,
        order: Order = "hqq",
        progress: bool = True,
        path: Path | None = None,
        verify: bool | None = None,
    ) -> HostStore:
        """The same from a loaded model, whose experts are freed block by block as they are packed.

        Raises:
            As `build`.
        """
        layouts = layouts_of(spec, bits, group_size, order)
        packing: Any = {"bits": bits, "group_size": group_size, "optimize": optimize, "order": order}
        blocks = moe_blocks(model)
        if len(blocks) != spec.num_layers:
            raise StoreError(f"the model has {len(blocks)} MoE layers, but {spec.name} has {spec.num_layers}")
        source = identity(model) if path is not None else ""
        if path is not None and path.exists():
            store = cls.open(path, spec, source, verify=verify, **packing)
            for block in blocks:
                _free(block.experts)
            return store
        store, log = cls._begin(spec, layouts, optimize, path, source)

        def expert(which: ExpertId) -> ExpertWeights:
            if which.expert == 0 and which.layer:
                _free(blocks[which.layer - 1].experts)
            return blocks[which.layer].expert(which.expert)

        try:
            store._fill(expert, log, progress)
            _free(blocks[-1].experts)
            return store._finish(log, source)
        except BaseException:
            store.close()
            if log:
                log.close()
            raise

    @classmethod
    def open(
        cls,
        path: Path,
        spec: ModelSpec,
        source: str | None = None,
        *,
        bits: int | Sequence[int] | None = None,
        group_size: int | None = None,
        optimize: bool | None = None,
        order: Order | None = None,
        verify: bool | None = None,
    ) -> HostStore:
        """Map a finished store.

        Args:
            source: identity of the model it must be of (`Checkpoint.identity` or `runtime.checkpoint.identity`).
            bits, group_size, optimize, order: what it must be, where given.
            verify: compare the sha256 of all rows (True), or header and size only (False); None hashes up to
                ``store_file.VERIFY_UP_TO`` bytes.

        Raises:
            StoreError: not a whole store, a damaged one, or one of another model or quantization.
        """
        header = store_file.read_header(path)
        shape = spec.to_json() | {"name": header.get("spec", {}).get("name")}
        wanted: dict[str, Any] = {"version": store_file.VERSION, "spec": shape}
        if source is not None:
            wanted["source"] = source
        if bits is not None:
            wanted["bits"] = widths_of(spec, bits)
        if group_size is not None:
            wanted["group_size"] = group_size
        if optimize is not None:
            wanted["optimize"] = optimize
        store_file.check_identity(path, header, wanted)
        if order is not None:
            there = order_of(layouts_of(spec, header["bits"], header["group_size"], order))
            store_file.check_identity(path, header, {"order": there})
        layouts = layouts_of(spec, header["bits"], header["group_size"], header["order"])
        largest = max(layout.expert_bytes for layout in layouts)
        store_file.check_identity(path, header, {"row_bytes": aligned(largest)})
        fd, verified = store_file.map_rows(path, header, largest, verify)
        store = cls(spec, layouts, header["optimize"], fd=fd)
        store.quantization_error = header["error"]
        store.verified = verified
        return store

    @classmethod
    def _begin(
        cls, spec: ModelSpec, layouts: list[ExpertLayout], optimize: bool, path: Path | None, source: str
    ) -> tuple[HostStore, store_file.Progress | None]:
        if path is None:
            return cls(spec, layouts, optimize), None
        largest = max(layout.expert_bytes for layout in layouts)
        count = spec.num_layers * spec.num_experts
        log = store_file.Progress(path, _identity(spec, layouts, optimize, source), count, largest, aligned(largest))
        try:
            store = cls(spec, layouts, optimize, fd=os.dup(log.rows.fd))
        except BaseException:
            log.close()
            raise
        return store, log

    def _fill(self, source: Source, log: store_file.Progress | None, progress: bool) -> None:
        """Pack every expert that is not done."""
        target: ExpertRows = log.rows if log else self
        done = dict(log.done) if log else {}
        experts = [ExpertId(layer, e) for layer in range(self.spec.num_layers) for e in range(self.spec.num_experts)]
        bar = tqdm(experts, "packing", unit="expert", file=sys.stderr, delay=2, disable=not progress)
        for index, expert in enumerate(bar):
            if index in done:
                continue
            layout = self.layouts[expert.layer]
            row = target.row(index)
            try:
                error = pack_into(row[: layout.expert_bytes], source(expert), layout, self.optimize)
            except ValueError as refusal:
                raise StoreError(f"expert {expert.expert} of MoE layer {expert.layer}: {refusal}") from None
            row[layout.expert_bytes :] = 0
            done[index] = error
            if log:
                log.finished(index, done[index])
        self.quantization_error = sum(done.values()) / len(done)

    def _finish(self, log: store_file.Progress | None, source: str) -> HostStore:
        """Give the file its header and name, if it is one."""
        if log:
            log.publish(
                _identity(self.spec, self.layouts, self.optimize, source)
                | {
                    "count": self.count,
                    "error": self.quantization_error,
                    "sha256": store_file.sha256(log.rows),
                }
            )
            log.close()
        return self


def _identity(spec: ModelSpec, layouts: list[ExpertLayout], optimize: bool, source: str) -> dict[str, Any]:
    """The header fields that say what a store is of."""
    return {
        "version": store_file.VERSION,
        "spec": spec.to_json(),
        "source": source,
        "bits": [layout.bits for layout in layouts],
        "group_size": layouts[0].group_size,
        "optimize": optimize,
        "order": order_of(layouts),
        "row_bytes": aligned(max(layout.expert_bytes for layout in layouts)),
    }


def widths_of(spec: ModelSpec, bits: int | Sequence[int]) -> list[int]:
    """Bits of each layer.

    Raises:
        ValueError: another number of widths than of layers.
    """
    widths = [bits] * spec.num_layers if isinstance(bits, int) else list(bits)
    if len(widths) != spec.num_layers:
        raise ValueError(
            f"{len(widths)} bit widths given for {spec.num_layers} MoE layers of {spec.name}; give one each"
        )
    return widths


def order_of(layouts: Sequence[ExpertLayout]) -> Order:
    """The order of codes of a store; layers that have only one order do not count."""
    return "rows" if any(layout.order == "rows" for layout in layouts) else "hqq"


def layouts_of(
    spec: ModelSpec, bits: int | Sequence[int], group_size: int = GROUP_SIZE, order: Order = "hqq"
) -> list[ExpertLayout]:
    """Layout of each layer.

    Raises:
        ValueError: as `widths_of` and `ExpertLayout`.
    """
    widths = widths_of(spec, bits)
    made = {width: ExpertLayout.of(spec, width, group_size, order) for width in widths}
    return [made[width] for width in widths]


def check_memory(spec: ModelSpec, layouts: Sequence[ExpertLayout], available: int | None = None) -> None:
    """Refuse a store that host memory cannot hold, before anything is read.

    Args:
        available: bytes (default: what the system says; where it says nothing, nothing is refused).

    Raises:
        StoreError: with the numbers and the largest width that would fit.
    """
    available = available_memory() if available is None else available
    if available is None:
        return

    def needed(expert_bytes: int) -> int:
        rows = spec.num_layers * spec.num_experts * aligned(expert_bytes)
        return rows + 2 * spec.expert_bytes(16) + spec.dense_bytes

    need = needed(max(layout.expert_bytes for layout in layouts))
    if need <= available:
        return
    widest = max(layout.bits for layout in layouts)
    for bits in WIDTHS:
        try:
            smaller = needed(ExpertLayout.of(spec, bits, layouts[0].group_size).expert_bytes)
        except ValueError:
            continue
        if bits < widest and smaller <= available:
            advice = f"{bits} bits would fit ({smaller / 1e9:.1f} GB)"
            break
    else:
        advice = "no width would fit: use a machine with more memory, or a smaller model"
    raise StoreError(
        f"experts of {spec.name} at {widest} bits with dense weights and two experts in work need {need / 1e9:.1f} GB "
        f"of host memory, and {available / 1e9:.1f} GB are available; {advice}"
    )


def _free(experts: torch.nn.Module) -> None:
    """Take the memory of a block's experts; their shapes stay."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        setattr(experts, name, torch.nn.Parameter(parameter.to("meta"), requires_grad=False))
