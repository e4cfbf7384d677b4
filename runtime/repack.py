"""The order of a quantized matrix's groups in its words: HQQ's, or row by row, which a kernel reads once and in a line.

HQQ's order ("hqq") puts the groups r, r + R, r + 2R, ... into word row r. At 8, 4 and 2 bits these usually belong to
rows N/V apart; at 3 bits R = ceil(G/10) is no multiple of a row's groups, so a word's ten values are of unrelated rows
and columns, and a kernel that makes whole output rows reads every word ten times.

In the order "rows" a word row holds V neighbouring groups of one output row: word rows n*q to n*q + q - 1 are the
first q*V groups of row n (q = K/g // V); what is left of each row follows, row after row, V groups to a word row.
Same words, same sizes to the byte, same scales and zeros in the same places: only codes move.

Shape letters as in ``runtime.quantize``; N x K is one matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch

if TYPE_CHECKING:
    from runtime.quantize import ExpertLayout

Order = Literal["hqq", "rows"]
ORDERS: tuple[Order, ...] = get_args(Order)


def shapes(layout: ExpertLayout) -> tuple[tuple[int, int], ...]:
    """N, K of gate, up and down."""
    hidden, inner = layout.hidden_size, layout.expert_size
    return (inner, hidden), (inner, hidden), (hidden, inner)


def places(layout: ExpertLayout, matrix: int) -> torch.Tensor:
    """Of every group [G]: its value's number in the word times R, plus its word row."""
    groups = torch.arange(layout.groups)
    if layout.order == "hqq":
        return groups  # group v * R + r is value v of word row r
    rows, columns = shapes(layout)[matrix]
    row_groups = columns // layout.group_size
    whole, rest = divmod(row_groups, layout.values)
    row, column = groups // row_groups, groups % row_groups
    left_over = row * rest + column - whole * layout.values
    in_row = column < whole * layout.values
    word = torch.where(
        in_row,
        row * whole + column // layout.values,
        rows * whole + left_over.div(layout.values, rounding_mode="floor"),
    )
    value = torch.where(in_row, column % layout.values, left_over % layout.values)
    return value * layout.rows + word


def spread(layout: ExpertLayout, unpacked: torch.Tensor, grouped: torch.Tensor) -> None:
    """Codes of three matrices as they stand in words of the order "rows", [3, V, R, g], to ``grouped`` [3, G, g]."""
    values, size = layout.values, layout.group_size
    for matrix, (rows, columns) in enumerate(shapes(layout)):
        whole, rest = divmod(columns // size, values)
        target = grouped[matrix].view(rows, columns // size, size)
        words = unpacked[matrix].transpose(0, 1)  # [R, V, g]
        if whole:
            target[:, : whole * values] = words[: rows * whole].reshape(rows, whole * values, size)
        if rest:
            left_over = words[rows * whole :].reshape(-1, size)[: rows * rest]
            target[:, whole * values :] = left_over.view(rows, rest, size)
