"""What stands in a model where its experts stood, and the experts that now live in slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from runtime.family import Gated
from runtime.quantize import ExpertLayout, ExpertViews, Workspace, forward, views
from runtime.store import SlotPool

Visited = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class OffloadedExperts(torch.nn.Module):
    """Stands where a block's experts stood; holds no weights."""

    def __init__(self, visit: Visited, layer: int) -> None:
        super().__init__()
        self._visit = visit
        self._layer = layer

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden [T, H], ids [T, K], weights [T, K] -> [T, H]."""
        return self._visit(self._layer, hidden, ids, weights)


def workspaces(kinds: Sequence[ExpertLayout], dtype: torch.dtype, device: torch.device) -> list[Workspace]:
    """Scratch for one expert of each layout; the dequantized weights are shared."""
    first = Workspace(kinds[0], dtype, device)
    return [first, *(Workspace(kind, dtype, device, share=first) for kind in kinds[1:])]


class SlotExperts:
    """Computes experts from their slots, one at a time.

    Args:
        pool: the slots.
        layouts: of the experts of each layer.
        gated: the model's gated activation.
        dtype: computed in.
    """

    def __init__(
        self, pool: SlotPool, layouts: Sequence[ExpertLayout], gated: Gated, dtype: torch.dtype = torch.float32
    ) -> None:
        self._pool = pool
        self._gated = gated
        kinds = list(dict.fromkeys(layouts))
        self._kinds = [kinds.index(layout) for layout in layouts]
        self.workspaces = workspaces(kinds, dtype, pool.device)
        self._views: dict[tuple[int, int], ExpertViews] = {}  # by slot and kind

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
        if len(id_rows) == 1:
            out[0, id_rows[0].index(expert)] = self._forward(layer, slot, hidden)[0]
            return 1
        rows, ranks = (ids == expert).nonzero(as_tuple=True)
        out[rows, ranks] = self._forward(layer, slot, hidden[rows]).to(out.dtype)
        return len(rows)

    def _forward(self, layer: int, slot: int, x: torch.Tensor) -> torch.Tensor:
        kind = self._kinds[layer]
        workspace = self.workspaces[kind]
        found = self._views.get((slot, kind))
        if found is None:
            layout = workspace.layout
            found = self._views[slot, kind] = views(self._pool.row(slot)[: layout.expert_bytes], layout)
        return forward(found, x, self._gated, workspace)

    def close(self) -> None:
        """Let go of the views."""
        self._views.clear()
