"""What stands in a model where its experts stood, and the experts that now live in slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from runtime import kernels
from runtime.devices import Device
from runtime.family import Gated
from runtime.quantize import ExpertLayout, ExpertViews, Workspace, forward, views
from runtime.store import SlotPool

Visited = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class OffloadedExperts(torch.nn.Module):
    """Stands where a block's experts stood; holds no weights."""

    def __init__(self, visit: Visited, layer: int) -> None:
        super().__init__()
        self.visit = visit
        self._layer = layer

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden [T, H], ids [T, K], weights [T, K] -> [T, H]."""
        return self.visit(self._layer, hidden, ids, weights)


def workspaces(kinds: Sequence[ExpertLayout], dtype: torch.dtype, device: torch.device) -> list[Workspace]:
    """Scratch for one expert of each layout; the dequantized weights are shared."""
    made: list[Workspace] = []
    for kind in kinds:
        made.append(Workspace(kind, dtype, device, share=made[0] if made else None))
    return made


def dequantized(layouts: Sequence[ExpertLayout], gated: Gated, fused: bool) -> list[ExpertLayout]:
    """The layouts, each once, whose experts are dequantized before they are multiplied."""
    kinds = dict.fromkeys(layouts)
    return [kind for kind in kinds if not (fused and kernels.activation_for(kind, gated))]


class SlotExperts:
    """Computes experts from their slots, one at a time, on the stream that is current.

    What a slot holds may change once the work given to that stream so far is done.

    Args:
        pool: the slots.
        layouts: of the experts of each layer.
        gated: the model's gated activation.
        dtype: computed in.
        fused: multiply straight from the slot with `runtime.kernels` where they can; else dequantize and multiply.
    """

    def __init__(
        self,
        pool: SlotPool,
        layouts: Sequence[ExpertLayout],
        gated: Gated,
        dtype: torch.dtype = torch.float32,
        fused: bool = False,
    ) -> None:
        self._pool = pool
        self._gated = gated
        self._layouts = list(layouts)
        self._dtype = dtype
        kinds = dequantized(layouts, gated, fused)
        self.workspaces = dict(zip(kinds, workspaces(kinds, dtype, pool.device), strict=True))
        self._acts = {kind: kernels.activation(gated) for kind in dict.fromkeys(layouts) if kind not in kinds}
        self._views: dict[tuple[int, ExpertLayout], ExpertViews] = {}
        self._id_rows: list[list[int]] = []  # the routing that the three below are of
        self._order = torch.empty(0)
        self._first: dict[int, int] = {}
        self._count: Counter[int] = Counter()
        if pool.device.type == "cuda":
            for layout, act in self._acts.items():
                kernels.compile_for(self._expert(0, layout), act, dtype)

    def compute(
        self,
        layer: int,
        expert: int,
        slot: int,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        id_rows: list[list[int]],
        out: torch.Tensor,
    ) -> int:
        """Write ``expert``'s rows of ``out`` [T, K, H], from hidden [T, H] and ids [T, K] (``id_rows``: the same as
        lists); returns how many tokens it had.
        """
        found = self._expert(slot, self._layouts[layer])
        if len(id_rows) == 1:
            rank = id_rows[0].index(expert)
            self._forward(found, hidden, out[:, rank])
            return 1
        if id_rows is not self._id_rows:
            self._group(ids, id_rows)
        first, count = self._first[expert], self._count[expert]
        at = self._order[first : first + count]
        made = self._forward(found, hidden[at // ids.shape[1]])
        out.view(-1, out.shape[-1])[at] = made.to(out.dtype)
        return count

    def _group(self, ids: torch.Tensor, id_rows: list[list[int]]) -> None:
        """Sort a visit's routing by expert on the device; sizes come from the host, so that nothing is waited for."""
        self._id_rows = id_rows
        self._order = ids.flatten().argsort(stable=True)
        self._count = Counter(expert for row in id_rows for expert in row)
        first = 0
        for expert in sorted(self._count):
            self._first[expert] = first
            first += self._count[expert]

    def _expert(self, slot: int, layout: ExpertLayout) -> ExpertViews:
        found = self._views.get((slot, layout))
        if found is None:
            found = self._views[slot, layout] = views(self._pool.row(slot)[: layout.expert_bytes], layout)
        return found

    def _forward(self, expert: ExpertViews, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [n, H] -> [n, H], written to ``out`` if given, of any float dtype."""
        act = self._acts.get(expert.layout)
        if act is not None:
            return kernels.forward(expert, x.to(self._dtype), act, out)
        made = forward(expert, x, self._gated, self.workspaces[expert.layout])
        return made if out is None else out.copy_(made)

    def close(self) -> None:
        """Let go of the views."""
        self._views.clear()


class Waited:
    """Experts that are waited for one by one, so that a span is an expert's own time on a device of its own."""

    def __init__(self, experts: SlotExperts, device: Device) -> None:
        self._experts, self._device = experts, device

    def compute(self, *where: Any) -> int:
        tokens = self._experts.compute(*where)
        done = self._device.mark()
        if done is not None:
            done.synchronize()  # of computing alone: copies go on
        return tokens

    def close(self) -> None:
        self._experts.close()
