"""Trained lookahead gates: their file, and the ladder of predictors for a loaded model.

A gates file is a safetensors file. Tensors, for MoE layers l from 0 to the last but one: ``router_mean.l.bias`` [D, E],
``aligned.l.weight`` [D, E, H], ``aligned.l.bias`` [D, E], ``mlp.l.down`` [R, H], ``mlp.l.bias`` [R], ``mlp.l.up``
[D * E, R], all float16, D = min(lookahead, layers - 1 - l). The header's ``gates`` is a JSON object: ``format`` 1,
``model`` (its name), ``routers_sha256`` (`routers_sha256`), ``lookahead``, ``temperature`` (by rung, [l][d - 1]), and
what made it: bits, corpus, tokens, seed, loss, recall by rung.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runtime import models
from runtime.lookahead import (
    LADDER,
    UNTRAINED,
    Gates,
    Heads,
    LinearGates,
    RouterGates,
    Trunk,
    TrunkGates,
    norm_heads,
)

FORMAT = 1
STATED = ("format", "model", "routers_sha256", "lookahead", "temperature")


class GateError(ValueError):
    """Lookahead gates that cannot be used; one sentence."""


@dataclass(frozen=True)
class GateFile:
    """Heads as they are on disk.

    Attributes:
        tensors: by the names above, float16.
        header: the JSON object.
    """

    tensors: dict[str, torch.Tensor]
    header: dict[str, Any]

    def rungs(self) -> tuple[str, ...]:
        """Rungs of the ladder that can be made of it."""
        return tuple(r for r in LADDER if r in UNTRAINED or any(n.startswith(f"{r}.") for n in self.tensors))


def save(file: GateFile, path: Path) -> None:
    """Write under another name first, then rename."""
    partial = path.with_name(path.name + ".partial")
    tensors = {name: tensor.to(torch.float16).contiguous() for name, tensor in file.tensors.items()}
    try:
        save_file(tensors, partial, {"gates": json.dumps(file.header)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> GateFile:
    """Read a gates file.

    Raises:
        GateError: missing, no safetensors file, no gates, of another format version, or a value that is not finite.
    """
    if not path.is_file():
        raise GateError(f"gates file {path} not found; train one with python -m runtime.align")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("gates", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise GateError(f"{path} cannot be read as a gates file ({error}); make one with runtime.align") from None
    if not isinstance(header, dict) or any(key not in header for key in STATED):
        raise GateError(f"{path} has no gates in its header; name a file made by python -m runtime.align")
    if header["format"] != FORMAT:
        raise GateError(f"{path} has gates of format {header['format']!r}; this version reads format {FORMAT}")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float16 or not bool(tensor.isfinite().all()):
            raise GateError(f"{path}: tensor {name!r} must hold finite float16 numbers; train the gates again")
    return GateFile(tensors, header)


def routers_sha256(routers: Sequence[torch.Tensor]) -> str:
    """sha256 over the shapes and bfloat16 values of all routers [E, H], in layer order: the name of a model here."""
    digest = hashlib.sha256()
    for weight in routers:
        digest.update(str(tuple(weight.shape)).encode())
        digest.update(weight.detach().cpu().to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def routers_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Router weights [E, H] of every MoE layer."""
    return [b.router.weight.detach() for b in models.moe_blocks(model)]


def norms_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Weight [H] of the norm before every MoE block; ones where the layer calls it by another name than the families
    of transformers do."""
    blocks = [b.block for b in models.moe_blocks(model)]
    before = {id(child): parent for parent in model.modules() for child in parent.children()}
    found = []
    for block, router in zip(blocks, routers_of(model), strict=True):
        norm = getattr(before.get(id(block)), "post_attention_layernorm", None)
        weight = getattr(norm, "weight", None)
        found.append(torch.ones(router.shape[1], device=router.device) if weight is None else weight.detach())
    return found


def ladder(
    model: torch.nn.Module,
    top_k: int,
    lookahead: int,
    file: Path | GateFile | None,
    rungs: Sequence[str],
) -> dict[str, Gates]:
    """The asked rungs for a loaded model, in that order.

    Raises:
        GateError: an unknown rung, no file for a trained one, a file of another model, or heads that look less far.
    """
    routers = routers_of(model)
    if unknown := [r for r in rungs if r not in LADDER]:
        raise GateError(f"predictor {unknown[0]!r} is none of the engine's: {', '.join(LADDER)}; name one of these")
    trained = [r for r in rungs if r not in UNTRAINED]
    if trained and file is None:
        raise GateError(f"predictor {trained[0]!r} needs trained gates; make a file with python -m runtime.align")
    held = load(file) if isinstance(file, Path) and trained else file if isinstance(file, GateFile) else None
    if held is not None:
        check(held, routers, lookahead if trained else 0)
        if missing := [r for r in trained if r not in held.rungs()]:
            raise GateError(f"the gates file holds {', '.join(held.rungs())}, not {missing[0]!r}; train it too")
    made: dict[str, Gates] = {}
    for rung in rungs:
        made[rung] = _rung(rung, routers, norms_of(model), top_k, lookahead, held)
    return made


def check(held: GateFile, routers: Sequence[torch.Tensor], lookahead: int) -> None:
    """Raises: GateError: the gates belong to another model, or look less far than ``lookahead``."""
    header = held.header
    if header["routers_sha256"] != routers_sha256(routers):
        raise GateError(
            f"the gates were trained for the routers of {header['model']!r} (sha256 "
            f"{str(header['routers_sha256'])[:12]}), this model has others ({routers_sha256(routers)[:12]}); train "
            "gates for it with python -m runtime.align"
        )
    if header["lookahead"] < lookahead:
        raise GateError(
            f"the gates look {header['lookahead']} layers ahead, {lookahead} are asked for; lower the lookahead, or "
            "train with a larger --lookahead"
        )


def _rung(
    rung: str,
    routers: Sequence[torch.Tensor],
    norms: Sequence[torch.Tensor],
    top_k: int,
    lookahead: int,
    held: GateFile | None,
) -> Gates:
    experts = routers[0].shape[0]
    if rung == "router":
        return RouterGates(routers, top_k, lookahead)
    heads = norm_heads(routers, norms, lookahead)
    trunks: list[Trunk | None] = []
    for layer, found in enumerate(heads):
        if found is None or held is None:
            trunks.append(None)
            continue
        device, reach = routers[0].device, found.distances
        tensors = {n: t.float().to(device) for n, t in held.tensors.items() if n.split(".")[1] == str(layer)}
        weight, bias = found.weight, None
        if rung == "router_mean":
            bias = tensors[f"router_mean.{layer}.bias"][:reach]
        elif rung in ("aligned", "mlp"):
            weight, bias = tensors[f"aligned.{layer}.weight"][:reach], tensors[f"aligned.{layer}.bias"][:reach]
        known = held.header["temperature"].get(rung)
        temperature = None if known is None else torch.tensor(known[layer][:reach], device=device)
        heads[layer] = Heads(weight, bias, temperature)
        trunk = Trunk(*(tensors[f"mlp.{layer}.{part}"] for part in Trunk._fields)) if rung == "mlp" else None
        trunks.append(trunk and trunk._replace(up=trunk.up[: reach * experts]))
    if rung == "mlp":
        return TrunkGates(heads, trunks, top_k, experts)
    return LinearGates(heads, top_k, experts)
