"""A stand-in for CUDA graphs on the CPU, as strict as they are.

Every operation given to torch between ``begin`` and ``end`` is noted with the very tensors it reads and writes, and
with the numbers Python had at that moment; ``replay`` does them again on the same memory. As on a GPU, nothing counts
as done by noting it: results are overwritten, and what was written in place is put back, when noting ends; and what
would make the host wait is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}


def _tensors(found: Any) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    return [t for part in found for t in _tensors(part)] if isinstance(found, list | tuple) else []


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All of the memory behind a tensor, writable in any mode."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict[str, Any], Any]] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # storages written in place: now, before
        self.made: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func._schema.name}")
        for tensor in _written(func, args, kwargs):
            place = tensor.untyped_storage().data_ptr()
            if place not in self.before and place not in self.made:
                whole = _bytes(tensor)
                self.before[place] = whole, whole.clone()
        out = func(*args, **kwargs)
        if not _is_view(func):
            known = {t.untyped_storage().data_ptr() for t in _tensors(list(args) + list(kwargs.values()))}
            for tensor in _tensors(out):
                if tensor.untyped_storage().data_ptr() not in known:
                    self.made[tensor.untyped_storage().data_ptr()] = tensor
        self.operations.append((func, args, kwargs, out))
        return out


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class TapeGraph:
    def __init__(self, log: list[str]) -> None:
        self._log = log
        self._operations: list[tuple[Any, tuple, dict[str, Any], Any]] = []

    def begin(self) -> None:
        self._tape = _Tape()
        self._tape.__enter__()

    def end(self) -> None:
        tape, self._operations = self._tape, self._tape.operations
        tape.__exit__(None, None, None)
        with torch.inference_mode(False), torch.no_grad():
            for whole, before in tape.before.values():
                whole.copy_(before)
            for tensor in tape.made.values():
                _bytes(tensor).fill_(0xFB)
        self._log.append(f"noted {len(self._operations)}")

    def replay(self) -> None:
        self._log.append("replay")
        for func, args, kwargs, out in self._operations:
            if _is_view(func):
                continue
            again = func(*args, **kwargs)
            if not _written(func, args, kwargs):
                for old, new in zip(_tensors(out), _tensors(again), strict=True):
                    old.copy_(new)


class Tapes:
    """A maker of such graphs; transformers is told that a stream is capturing, as it would ask CUDA."""

    def __init__(self, monkeypatch: Any) -> None:
        self.log: list[str] = []
        self._patch = monkeypatch

    def graph(self) -> TapeGraph:
        return TapeGraph(self.log)

    @contextmanager
    def around(self) -> Iterator[None]:
        self.log.append("around")
        yield
