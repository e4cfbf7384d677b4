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

from typing import Literal

import torch

from runtime.quantize import ExpertLayout, ExpertViews

Order = Literal["hqq", "rows"]


def shapes(layout: ExpertLayout) -> tuple[tuple[int, int], ...]:
    """N, K of gate, up and down."""
    hidden, inner = layout.hidden_size, layout.expert_size
    return (inner, hidden), (inner, hidden), (hidden, inner)


def places(layout: ExpertLayout, matrix: int, order: Order) -> torch.Tensor:
    """Of every group [G]: its value's number in the word times R, plus its word row."""
    groups = torch.arange(layout.groups)
    if order == "hqq":
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


def reorder(expert: ExpertViews, old: Order, new: Order) -> None:
    """Move the codes of one expert (in its buffer) from one order to another; unused values of words become 0.

    Raises:
        ValueError: an expert in bf16, which has no codes.
    """
    layout = expert.layout
    if layout.bits == 16:
        raise ValueError("experts in bf16 have no codes to reorder; this is for 8, 4, 3 and 2 bits")
    if old == new or layout.values == 1:
        return
    shifts = torch.arange(layout.values - 1, -1, -1, device=expert.codes.device) * layout.bits
    shifts = shifts.to(layout.word).view(-1, 1, 1)
    for matrix in range(3):
        words = expert.codes[matrix]  # [1, R, g]
        values = ((words >> shifts) & ((1 << layout.bits) - 1)).view(-1, layout.group_size)  # [V * R, g]
        moved = torch.zeros_like(values)
        source, target = (places(layout, matrix, order).to(values.device) for order in (old, new))
        moved[target] = values[source]
        words.copy_((moved.view(layout.values, layout.rows, -1) << shifts).sum(0, dtype=layout.word))
