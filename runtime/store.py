"""Memory the engine and the copier process both see: every expert of a model (host) and the slots (device=cpu).

A block has no name in any file system, so nothing can be left behind, however the processes end, and its size is
not held to that of /dev/shm. The copier process inherits the file descriptor.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from runtime.quantize import ExpertLayout, pack
from traces.vocabulary import GROUP_SIZE, ExpertId, ModelSpec

ALIGNMENT = 64  # bytes; a cache line, and enough for every view


class StoreError(ValueError):
    """A checkpoint the store cannot be built from, or a closed block; one sentence."""


class ExpertRows:
    """``count`` equal expert buffers in one shared block, every page touched once.

    Attributes:
        fd: file descriptor of the block, -1 once closed.
        row_bytes: distance between two rows: expert_bytes aligned up to 64.
    """

    device = torch.device("cpu")

    def __init__(self, count: int, expert_bytes: int) -> None:
        if count < 1 or expert_bytes < 1:
            raise ValueError(f"{count} buffers of {expert_bytes} bytes asked for; both must be at least 1")
        self.count = count
        self.expert_bytes = expert_bytes
        self.row_bytes = -(-expert_bytes // ALIGNMENT) * ALIGNMENT
        self.fd = _anonymous_file(count * self.row_bytes)
        try:
            block = np.frombuffer(mmap.mmap(self.fd, count * self.row_bytes), np.uint8)
            block.fill(0)
        except BaseException:
            self.close()
            raise
        self._block: torch.Tensor | None = torch.from_numpy(block).view(count, self.row_bytes)

    def row(self, index: int) -> torch.Tensor:
        """Buffer ``index``: uint8 [expert_bytes], shared, writable, valid as long as anything refers to it."""
        if self._block is None:
            raise StoreError(f"buffer {index} was asked for after close(); keep the store open while it is used")
        if not 0 <= index < self.count:
            raise IndexError(f"buffer {index} was asked for; there are 0 to {self.count - 1}")
        return self._block[index, : self.expert_bytes]

    def close(self) -> None:
        """Let go of the block; its memory is freed when the last tensor on it and the copier process are gone."""
        self._block = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()


class SlotPool(ExpertRows):
    """``num_slots`` expert-sized buffers on the device (device=cpu: shared memory)."""

    def __init__(self, num_slots: int, expert_bytes: int) -> None:
        super().__init__(num_slots, expert_bytes)

    @property
    def num_slots(self) -> int:
        return self.count


class HostStore(ExpertRows):
    """All routed experts of a model, packed; row = layer * num_experts + expert."""

    def __init__(self, spec: ModelSpec, layout: ExpertLayout) -> None:
        super().__init__(spec.num_layers * spec.num_experts, layout.expert_bytes)
        self.spec = spec
        self.layout = layout

    def index(self, expert: ExpertId) -> int:
        return expert.layer * self.spec.num_experts + expert.expert

    @classmethod
    def build(
        cls,
        model_dir: str | os.PathLike[str],
        spec: ModelSpec,
        bits: int,
        *,
        group_size: int = GROUP_SIZE,
        optimize: bool = True,
        progress: bool = True,
    ) -> HostStore:
        """Read a transformers checkpoint expert by expert and pack each into its row.

        MoE layers are numbered in the checkpoint's own order, dense layers left out. With ``progress``, a bar on
        standard error once it takes more than two seconds.

        Raises:
            StoreError: no such checkpoint, experts under unknown names, or another shape than ``spec`` says.
        """
        store = cls(spec, ExpertLayout.of(spec, bits, group_size))
        try:
            with Checkpoint(Path(model_dir)) as checkpoint:
                checkpoint.check(spec)
                ids = [ExpertId(layer, e) for layer in range(spec.num_layers) for e in range(spec.num_experts)]
                for expert in tqdm(
                    ids, f"{bits}-bit experts", unit="expert", file=sys.stderr, delay=2, disable=not progress
                ):
                    store.row(store.index(expert)).copy_(pack(*checkpoint.expert(expert), store.layout, optimize))
        except BaseException:
            store.close()
            raise
        return store


# On-disk names of one expert's gate, up and down matrices, by family.
_SEPARATE = tuple(
    tuple(f"{prefix}.{{}}.{matrix}.weight" for matrix in matrices)
    for prefix, matrices in (
        ("block_sparse_moe.experts", ("w1", "w3", "w2")),
        ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    )
)
_PACKED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")  # [E, 2I, H], gate above up; [E, H, I]
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class Checkpoint:
    """The routed experts in a directory of safetensors files, read one at a time."""

    def __init__(self, model_dir: Path) -> None:
        self._dir = model_dir
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        for path in _weight_files(model_dir):
            try:
                file = self._open.enter_context(safe_open(path, "pt"))
            except (OSError, SafetensorError) as error:
                self._open.close()
                raise StoreError(f"{path} cannot be read as safetensors ({error}); save the model again") from None
            self._files |= dict.fromkeys(file.keys(), file)
        first = (_PACKED[0], *(names[0].format(0) for names in _SEPARATE))
        self._layers = sorted({int(m[1]) for n in self._files if n.endswith(first) and (m := _LAYER.match(n))})
        if not self._layers:
            self._open.close()
            raise StoreError(f"{model_dir} holds no routed experts under a known name (such as {', '.join(first)})")
        present = f"model.layers.{self._layers[0]}."
        self._names = next((s for s, f in zip(_SEPARATE, first[1:], strict=True) if present + f in self._files), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def check(self, spec: ModelSpec) -> None:
        """Compare numbers and widths with ``spec``."""
        found = (len(self._layers), self._num_experts(), *self.expert(ExpertId(0, 0))[0].shape)
        wanted = (spec.num_layers, spec.num_experts, spec.expert_size, spec.hidden_size)
        if found != wanted:
            names = "MoE layers, experts, expert size, hidden size"
            raise StoreError(
                f"{self._dir} has {found} ({names}), but model {spec.name} has {wanted}; name its own spec"
            )

    def _num_experts(self) -> int:
        prefix = f"model.layers.{self._layers[0]}."
        if self._names is None:
            return int(self._slice(prefix + _PACKED[0]).get_shape()[0])
        count = 0
        while prefix + self._names[0].format(count) in self._files:
            count += 1
        return count

    def expert(self, expert: ExpertId) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate [I, H], up [I, H], down [H, I] in the checkpoint's dtype."""
        prefix = f"model.layers.{self._layers[expert.layer]}."
        if self._names is None:
            gate_up, down = (self._slice(prefix + name)[expert.expert] for name in _PACKED)
            gate, up = gate_up.chunk(2)
            return gate, up, down
        gate, up, down = (self._slice(prefix + name.format(expert.expert))[:] for name in self._names)
        return gate, up, down

    def _slice(self, name: str) -> Any:
        if name not in self._files:
            raise StoreError(f"{self._dir} holds no tensor {name!r}; the checkpoint is incomplete: save it again")
        return self._files[name].get_slice(name)


def _weight_files(model_dir: Path) -> list[Path]:
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [model_dir / name for name in names]
    single = model_dir / "model.safetensors"
    if not single.is_file():
        raise StoreError(
            f"{model_dir} holds neither {single.name} nor {index.name}; name a transformers model directory"
        )
    return [single]


def _anonymous_file(size: int) -> int:
    """File descriptor of ``size`` zero bytes that have no path: memory on Linux, an unlinked file elsewhere."""
    create: Callable[[str], int] | None = getattr(os, "memfd_create", None)
    if create is not None:
        fd = create("experts")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        raise
    return fd
