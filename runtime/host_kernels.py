"""Products of one token with quantized weights as they stand in the store, compiled with numba; they run without the
GIL and write no dequantized matrix.

y[n] = sum over groups j of scale[n, j] * (sum over k of code[n, j, k] * x[j, k] - zero[n, j] * sum over k of x[j, k]),
in float32. A row is summed lane by lane (one lane for each place in a group), so that the compiler needs no
horizontal sum for every group.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from runtime.family import Gated
from runtime.quantize import ExpertLayout, ExpertViews

FLOAT16_BIAS = np.float32(2.0**112)  # a float16's bits, moved to where float32 has them, are too small by this
ANY_ORDER = {"reassoc", "contract", "nsz"}  # what sums and products may be turned into

Floats = npt.NDArray[np.float32]


@njit(nogil=True, inline="always")
def _float(half):  # type: ignore[no-untyped-def]
    """A finite float16, given by its bits."""
    size = np.uint32((np.uint32(half) & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32) * FLOAT16_BIAS
    return -size if half & np.uint16(0x8000) else size


@njit(nogil=True, fastmath=ANY_ORDER, error_model="numpy")
def _rows(words, bits, values, by_row, scale, zero, x, sums, y, first, last):  # type: ignore[no-untyped-def]
    """y[first:last] of one matrix: words [R, g], scale and zero as float16 bits [G], x [K], sums [K / g], y [N].

    Which value of which word row a group is, is counted on from group to group, as `runtime.repack` says it for its
    two orders; ``by_row``: the order is "rows".
    """
    rows, size = words.shape
    per_row = sums.shape[0]
    whole = per_row // values  # word rows that one output row fills, and groups that it leaves over
    rest = per_row - whole * values
    top = np.int32(bits * (values - 1))
    mask = np.int32((1 << bits) - 1)
    lanes = np.empty(size, np.float32)
    for n in range(first, last):
        group = n * per_row
        if by_row:
            row = n * whole
            shift = top
        else:
            row = group % rows
            shift = top - np.int32(bits * (group // rows))
        zeros = np.float32(0)
        lanes[:] = 0
        for j in range(per_row):
            if by_row and j == whole * values:
                left = n * rest
                row = y.shape[0] * whole + left // values
                shift = top - np.int32(bits * (left % values))
            word, part = words[row], x[j * size : (j + 1) * size]
            factor = _float(scale[group])
            for k in range(size):
                lanes[k] += np.float32((np.int32(word[k]) >> shift) & mask) * factor * part[k]
            zeros += factor * _float(zero[group]) * sums[j]
            group += 1
            if by_row:
                shift -= np.int32(bits)
                if shift < 0:
                    row += 1
                    shift = top
            else:
                row += 1
                if row == rows:
                    row = 0
                    shift -= np.int32(bits)
        total = np.float32(0)
        for k in range(size):
            total += lanes[k]
        y[n] = total - zeros


class _Matrix(NamedTuple):
    words: npt.NDArray[np.generic]
    scale: npt.NDArray[np.uint16]
    zero: npt.NDArray[np.uint16]


class StoredExpert:
    """One quantized expert where it stands, ready to be multiplied.

    Args:
        pieces: views into its buffer (`runtime.quantize.views`), of 2, 3, 4 or 8 bits, in any order of codes.
        threads: None for one, else a pool that takes its share of a matrix's rows.
        shares: parts a matrix's rows are cut into.
    """

    def __init__(self, pieces: ExpertViews, threads: ThreadPoolExecutor | None = None, shares: int = 1) -> None:
        self._layout: ExpertLayout = pieces.layout
        self._biases = pieces.biases
        self._threads, self._shares = threads, shares
        self._matrices = [
            _Matrix(pieces.codes[i, 0].numpy(), _bits(pieces.scale[i]), _bits(pieces.zero[i])) for i in range(3)
        ]

    def product(self, x: torch.Tensor, gated: Gated) -> torch.Tensor:
        """down(gated(gate x, up x)) of x float32 [H] -> float32 [H], biases added."""
        inner, hidden = self._layout.expert_size, self._layout.hidden_size
        gate, up = self._times(0, x, inner), self._times(1, x, inner)
        if not self._layout.biases:
            return self._times(2, gated(gate, up), hidden)
        biases = self._biases.float()
        gate += biases[:inner]
        up += biases[inner : 2 * inner]
        return self._times(2, gated(gate, up), hidden) + biases[2 * inner :]

    def _times(self, i: int, x: torch.Tensor, outputs: int) -> torch.Tensor:
        layout, matrix = self._layout, self._matrices[i]
        y = torch.empty(outputs)
        sums = x.view(-1, layout.group_size).sum(1).numpy()
        codes = (matrix.words, layout.bits, layout.values, layout.order == "rows")
        same = (*codes, matrix.scale, matrix.zero, x.numpy(), sums, y.numpy())
        edges = [outputs * share // self._shares for share in range(self._shares + 1)]
        if self._threads is None:
            _rows(*same, 0, outputs)
        else:
            for done in [self._threads.submit(_rows, *same, a, b) for a, b in pairwise(edges)]:
                done.result()
        return y


def _bits(halves: torch.Tensor) -> npt.NDArray[np.uint16]:
    found: npt.NDArray[np.uint16] = halves[:, 0].view(torch.int16).numpy().view(np.uint16)
    return found
