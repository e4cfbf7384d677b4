"""A directory of safetensors files read tensor by tensor and expert by expert, under the names of the loaded model.

Names are translated by the table transformers itself loads with, so the names ``save_pretrained`` writes (an entry
per expert), the fused layout of transformers 5 and the original layout of each family are all read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from runtime import family
from runtime.family import ExpertWeights, ModelError
from runtime.skeleton import moe_blocks, read_config, skeleton
from traces.vocabulary import ExpertId, ModelSpec

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
CORNER = 8  # rows and columns of an expert's matrix that stand for it in an identity
_FUSED = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


class StoreError(ValueError):
    """A checkpoint or a store that cannot be used, or a closed block; one sentence."""


class Checkpoint:
    """The weights in a directory of safetensors files.

    Args:
        model_dir: a transformers model directory.
        model: its skeleton; made when None.

    Raises:
        ModelError: no usable configuration.
        StoreError: no weights, unreadable ones, or no routed experts among them.
    """

    def __init__(self, model_dir: Path, model: torch.nn.Module | None = None) -> None:
        self._dir = model_dir
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        self.model = skeleton(read_config(model_dir)) if model is None else model
        self.family = family.of(self.model.config.model_type)
        for path in _weight_files(model_dir):
            try:
                file = self._open.enter_context(safe_open(path, "pt"))
            except (OSError, SafetensorError) as error:
                self._open.close()
                raise StoreError(f"{path} cannot be read as safetensors ({error}); save the model again") from None
            self._files |= dict.fromkeys(file.keys(), file)
        self._blocks = moe_blocks(self.model)
        self._layers = {f"{b.name}.experts.": layer for layer, b in enumerate(self._blocks)}
        self._fused: list[dict[str, str]] = [{} for _ in self._blocks]
        self._separate: list[dict[tuple[int, str], str]] = [{} for _ in self._blocks]
        self._dense: dict[str, str] = {}
        try:
            self._sort()
        except BaseException:
            self._open.close()
            raise
        if not any(self._fused) and not any(self._separate):
            self._open.close()
            raise StoreError(f"{model_dir} holds no routed experts under a known name; save the model again")

    def _sort(self) -> None:
        """Say of every stored tensor what it is in the model."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        table = get_model_conversion_mapping(self.model)
        renamings = [t for t in table if isinstance(t, WeightRenaming)]
        converters = [t for t in table if isinstance(t, WeightConverter)]
        part = {  # source pattern of a converter -> the matrix it is
            pattern: matrix
            for converter in converters
            for target in converter.target_patterns[:1]
            if target.endswith(_FUSED[:2])
            for pattern, matrix in zip(
                converter.source_patterns, ("gate", "up") if target.endswith(_FUSED[0]) else ("down",), strict=False
            )
        }
        known = self.model.state_dict()
        for key in self._files:
            target, pattern = rename_source_key(key, renamings, converters, self.model.base_model_prefix, known)
            prefix, _, leaf = target.rpartition(".")
            layer = self._layers.get(f"{prefix}.")
            if layer is None:
                if target not in known:
                    continue
                if pattern is not None:
                    raise ModelError(
                        f"{self._dir.name} stores {target} in pieces, which cannot be read here; save it again with "
                        "save_pretrained(save_original_format=False)"
                    )
                self._dense[target] = key
            elif pattern is None:
                self._fused[layer][leaf] = key
            elif (number := _EXPERT.search(key)) and pattern in part:
                self._separate[layer][int(number[1]), part[pattern]] = key

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        self._open.close()

    def check(self, spec: ModelSpec) -> None:
        """Compare numbers and widths with ``spec``.

        Raises:
            StoreError: they differ.
        """
        layers = sum(bool(fused or separate) for fused, separate in zip(self._fused, self._separate, strict=True))
        found = (layers, self._num_experts(), *self.expert(ExpertId(0, 0)).gate.shape)
        wanted = (spec.num_layers, spec.num_experts, spec.expert_size, spec.hidden_size)
        if found != wanted:
            names = "MoE layers, experts, expert size, hidden size"
            raise StoreError(
                f"{self._dir} has {found} ({names}), but model {spec.name} has {wanted}; name its own spec"
            )

    def _num_experts(self) -> int:
        if self._separate[0]:
            return 1 + max(expert for expert, _ in self._separate[0])
        return int(next(iter(self._parts(0).values())).get_shape()[0])

    def _parts(self, layer: int) -> dict[str, Any]:
        return {leaf: self._files[key].get_slice(key) for leaf, key in self._fused[layer].items()}

    def expert(self, expert: ExpertId) -> ExpertWeights:
        """One expert in the checkpoint's dtype, canonically oriented; nothing else is read.

        Raises:
            StoreError: the checkpoint lacks one of its matrices.
        """
        layer, number = expert
        separate = self._separate[layer]
        experts = self._blocks[layer].experts
        try:
            if separate:
                keys = [separate[number, matrix] for matrix in ("gate", "up", "down")]
                return ExpertWeights(*(self._files[key].get_tensor(key) for key in keys))
            parts = self._parts(layer)
            names = _FUSED if experts.has_bias else _FUSED[:2]
            return family.split(experts, *(self.family.fused(parts, name, number) for name in names))
        except KeyError as missing:
            what = missing.args[0]
            what = what[1] if isinstance(what, tuple) else what
            raise StoreError(
                f"{self._dir} holds no {what} of expert {number} in MoE layer {layer}; the checkpoint is incomplete: "
                "save it again"
            ) from None

    def dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every other weight the model has a place for: (name in the model, tensor as stored), read as asked for."""
        for name, key in self._dense.items():
            yield name, self._files[key].get_tensor(key)

    def identity(self) -> str:
        """As `identity` gives it for the loaded model."""
        routers = {f"{b.name}." for b in self._blocks}
        digest = _Digest()
        for name, key in sorted(self._dense.items()):
            shape = self._files[key].get_slice(key).get_shape()
            if len(shape) == 1 or any(name.startswith(prefix) and _is_router(name, prefix) for prefix in routers):
                digest.add(name, self._files[key].get_tensor(key))
        for layer, block in enumerate(self._blocks):
            for number, (gate, down) in enumerate(self._corners(layer)):
                digest.add(f"{block.name}.{number}.gate", gate)
                digest.add(f"{block.name}.{number}.down", down)
        return digest.hex()

    def _corners(self, layer: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """First rows and columns of every expert's gate and down; of packed experts the first one's only."""
        separate = self._separate[layer]
        if separate:
            for number in range(self._num_experts()):
                gate, down = (separate[number, matrix] for matrix in ("gate", "down"))
                yield tuple(self._files[key].get_slice(key)[:CORNER, :CORNER] for key in (gate, down))
            return
        parts = self._parts(layer)
        if all(name in parts for name in _FUSED[:2]):
            yield from _fused_corners(
                self._blocks[layer].experts, *(parts[name] for name in _FUSED[:2]), self._num_experts()
            )
            return
        first = self.expert(ExpertId(layer, 0))
        yield first.gate[:CORNER, :CORNER], first.down[:CORNER, :CORNER]


class _Digest:
    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        self._sha.update(f"{name}{list(values.shape)}".encode())
        self._sha.update(values.numpy().tobytes())

    def hex(self) -> str:
        return self._sha.hexdigest()


def _is_router(name: str, prefix: str) -> bool:
    return name[len(prefix) :].partition(".")[0] in ("gate", "router")


def _fused_corners(
    experts: torch.nn.Module, gate_up: Any, down: Any, count: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same from fused tensors (or their slices on disk), by the flags of their module."""
    step = 1 if experts.is_concatenated else 2
    for number in range(count):
        if experts.is_transposed:
            yield gate_up[number, :CORNER, : step * CORNER][:, ::step].T, down[number, :CORNER, :CORNER].T
        else:
            yield gate_up[number, : step * CORNER, :CORNER][::step], down[number, :CORNER, :CORNER]


def identity(model: torch.nn.Module) -> str:
    """sha256 over the routers, every vector (norms, biases) outside the experts, and a corner of every expert's gate
    and down matrix: quick to read, and other in other models, fine-tuned ones included.
    """
    blocks = [f"{b.name}." for b in moe_blocks(model)]
    digest = _Digest()
    for name, tensor in sorted(model.state_dict().items()):
        if any(name.startswith(f"{prefix}experts.") for prefix in blocks):
            continue
        if tensor.dim() == 1 or any(name.startswith(prefix) and _is_router(name, prefix) for prefix in blocks):
            digest.add(name, tensor)
    for block in moe_blocks(model):
        e = block.experts
        for number, (gate, down) in enumerate(_fused_corners(e, e.gate_up_proj, e.down_proj, len(e.down_proj))):
            digest.add(f"{block.name}.{number}.gate", gate)
            digest.add(f"{block.name}.{number}.down", down)
    return digest.hex()


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
