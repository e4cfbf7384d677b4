"""Trained lookahead gates: their file, and the ladder of predictors for a loaded model.

A gates file is a safetensors file. Tensors, for MoE layers l from 0 to the last but one, D = min(lookahead,
layers - 1 - l): ``router_mean.l.bias`` [D, E]; ``aligned.l.weight`` [D, E, H], ``aligned.l.bias`` [D, E];
``mlp.l.down`` [R, H], ``mlp.l.bias`` [R], ``mlp.l.up`` [D * E, R]; ``context.l.weight`` [D, E, H],
``context.l.before`` [D, E, H], ``context.l.bias`` [D, E], ``context.l.up`` [D * E, R]; and ``spread.l`` [H], of the
last layer too. All are float16 but those in `PACKED`: int8, with the float16 factor of every row in a tensor of that
name plus ``.scale``. What multiplies a layer's router input was multiplied by that layer's spread
(`runtime.fit.spread`) before it was packed, so that what is rounded weighs alike. The header's ``gates`` is a JSON
object: ``format`` 2, ``model`` (its name), ``routers_sha256`` (`routers_sha256`), ``lookahead``, ``temperature`` (by
rung, [l][d - 1]), and what made it: bits, corpus, tokens, seed, loss, recall by rung.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from runtime import family, models
from runtime.lookahead import (
    LADDER,
    UNTRAINED,
    Choose,
    Context,
    ContextGates,
    Gates,
    Heads,
    LinearGates,
    RouterGates,
    Trunk,
    TrunkGates,
    norm_heads,
)

FORMAT = 2
PACKED = ("aligned.weight", "mlp.down", "mlp.up", "context.weight", "context.before", "context.up")
STATED = ("format", "model", "routers_sha256", "lookahead", "temperature")


class GateError(ValueError):
    """Lookahead gates that cannot be used; one sentence."""


@dataclass(frozen=True)
class GateFile:
    """Heads as the engine uses them.

    Attributes:
        tensors: by the names above, float32, unpacked.
        header: the JSON object.
    """

    tensors: dict[str, torch.Tensor]
    header: dict[str, Any]

    def rungs(self) -> tuple[str, ...]:
        """Rungs of the ladder that can be made of it."""
        return tuple(r for r in LADDER if r in UNTRAINED or any(n.startswith(f"{r}.") for n in self.tensors))


def kind_of(name: str) -> str:
    """``aligned.weight`` of ``aligned.3.weight``."""
    rung, _, rest = name.partition(".")
    return f"{rung}.{rest.partition('.')[2]}"


def columns(name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | float:
    """What the packed tensor ``name`` was multiplied by: the spread of the inputs it is for, shaped to broadcast."""
    layer = int(name.split(".")[1])
    if kind_of(name) == "context.before":
        return torch.stack([tensors[f"spread.{layer + 1 + d}"].float() for d in range(len(tensors[name]))])[:, None]
    return 1.0 if name.endswith(".up") else tensors[f"spread.{layer}"].float()


def pack(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as they are written: int8 with a scale for every row, or float16."""
    result = {}
    spreads = {n: t.to(torch.float16) for n, t in tensors.items() if n.startswith("spread.")}
    for name, tensor in tensors.items():
        if kind_of(name) not in PACKED:
            result[name] = tensor.to(torch.float16).contiguous()
            continue
        even = tensor.float() * columns(name, {**spreads, name: tensor})
        scale = (even.abs().amax(-1) / 127).clamp_min(6e-8).to(torch.float16)  # 6e-8: least float16 above 0
        result[name] = (even / scale.float()[..., None]).round().clamp(-127, 127).to(torch.int8).contiguous()
        result[f"{name}.scale"] = scale.contiguous()
    return result


def unpack(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float32 tensors from what `pack` made; what was unpacked once packs to the same bytes."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith(".scale"):
            continue
        wide = tensor.float()
        if tensor.dtype == torch.int8:
            wide = wide * tensors[f"{name}.scale"].float()[..., None] / columns(name, tensors)
        result[name] = wide
    return result


def save(file: GateFile, path: Path) -> None:
    """Write under another name first, then rename."""
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(pack(file.tensors), partial, {"gates": json.dumps(file.header)})
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
        wanted = torch.int8 if kind_of(name) in PACKED else torch.float16
        if tensor.dtype != wanted or not bool(tensor.isfinite().all()):
            kind = str(wanted).removeprefix("torch.")
            raise GateError(f"{path}: tensor {name!r} must hold finite {kind} numbers; train the gates again")
    try:
        return GateFile(unpack(tensors), header)
    except KeyError as error:
        raise GateError(f"{path} lacks the tensor {error}, without which others mean nothing; train again") from None


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


def biases_of(model: torch.nn.Module) -> list[torch.Tensor] | None:
    """Bias [E] that every router adds to its logits (gpt-oss); None where routers have none."""
    biases = [getattr(b.router, "bias", None) for b in models.moe_blocks(model)]
    return [b.detach() for b in biases if b is not None] or None


def choices_of(model: torch.nn.Module) -> list[Choose] | None:
    """By MoE layer, what its router ranks experts by, from its logits; None for a family that ranks by logits."""
    of = family.of(getattr(model.config, "model_type", ""))
    if all(getattr(type(of), name) is getattr(family.Family, name) for name in ("preference", "allowed")):
        return None

    def choose(router: torch.nn.Module) -> Choose:
        return lambda logits: of.allowed(router, of.preference(router, logits))

    return [choose(b.router) for b in models.moe_blocks(model)]


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
        if rung in UNTRAINED:
            made[rung] = _untrained(rung, model, top_k, lookahead)
        else:
            assert held is not None
            made[rung] = _trained(rung, model, top_k, lookahead, held)
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


def _untrained(rung: str, model: torch.nn.Module, top_k: int, lookahead: int) -> LinearGates:
    routers, biases, choose = routers_of(model), biases_of(model), choices_of(model)
    if rung == "router":
        return RouterGates(routers, top_k, lookahead, biases, choose)
    heads = norm_heads(routers, norms_of(model), lookahead, biases)
    return LinearGates(heads, top_k, routers[0].shape[0], choose)


def _trained(rung: str, model: torch.nn.Module, top_k: int, lookahead: int, held: GateFile) -> LinearGates:
    routers = routers_of(model)
    experts, device = routers[0].shape[0], routers[0].device
    heads = norm_heads(routers, norms_of(model), lookahead)
    trunks: list[Trunk | None] = [None] * len(heads)
    contexts: list[Context | None] = [None] * len(heads)
    for layer, found in enumerate(heads):
        if found is None:
            continue
        reach = found.distances

        def part(name: str, layer: int = layer) -> torch.Tensor:
            of, _, what = name.partition(".")
            full = f"{of}.{layer}.{what}"
            if full not in held.tensors:
                raise GateError(f"the gates lack the tensor {full!r}, which {rung!r} needs; train them again")
            return held.tensors[full].float().to(device)

        def temperature(rung: str, layer: int = layer, reach: int = reach) -> torch.Tensor | None:
            known = held.header["temperature"].get(rung)
            return None if known is None else torch.tensor(known[layer][:reach], device=device)

        if rung == "router_mean":
            heads[layer] = Heads(found.weight, part("router_mean.bias")[:reach], temperature(rung))
            continue
        own = rung if rung == "aligned" else "mlp"
        heads[layer] = Heads(part("aligned.weight")[:reach], part("aligned.bias")[:reach], temperature(own))
        if rung != "aligned":
            trunk = Trunk(*(part(f"mlp.{name}") for name in Trunk._fields))
            trunks[layer] = trunk._replace(up=trunk.up[: reach * experts])
        if rung == "context":
            weight, before, bias = (part(f"context.{name}")[:reach] for name in ("weight", "before", "bias"))
            contexts[layer] = Context(weight, before, bias, part("context.up")[: reach * experts], temperature(rung))
    if rung == "context":
        return ContextGates(heads, trunks, contexts, top_k, experts)
    if rung == "mlp":
        return TrunkGates(heads, trunks, top_k, experts)
    return LinearGates(heads, top_k, experts)
