"""Bare pointers into numpy arrays for compiled drivers: no reference counts, no checks of indices. Imports numba."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic


@intrinsic
def pointer(context: Any, array: Any) -> Any:
    """The address of a contiguous array's first element; the array must outlive its use."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.make_array(signature.args[0])(context, builder, value=args[0]).data

    kind: Any = types.CPointer
    return kind(array.dtype)(array), generate
