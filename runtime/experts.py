"""What stands in a model where its experts stood, and the experts that now live in slots."""

from __future__ import annotations

from collections.abc import Callable

import torch

from runtime.quantize import ExpertLayout, Workspace, forward, views
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


class SlotExperts:
    """Computes experts from their slots, one at a time.

    Args:
        pool: the slots; closed with this.
        layout: of one slot's bytes.
        act: the model's activation.
    """

    def __init__(self, pool: SlotPool, layout: ExpertLayout, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._pool = pool
        self._views = [views(pool.row(i), layout) for i in range(pool.num_slots)]
        self._workspace = Workspace(layout)
        self._act = act

    def compute(
        self,
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
            out[0, id_rows[0].index(expert)] = forward(self._views[slot], hidden, self._act, self._workspace)[0]
            return 1
        rows, ranks = (ids == expert).nonzero(as_tuple=True)
        out[rows, ranks] = forward(self._views[slot], hidden[rows], self._act, self._workspace)
        return len(rows)

    def close(self) -> None:
        """Let go of the slots."""
        self._views.clear()
        self._pool.close()
