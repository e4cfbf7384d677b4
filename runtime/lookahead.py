"""Guesses of later layers' routing from one layer's router input.

A ladder of predictors behind one interface, `Gates.scores`: each rung is a head for every (layer l, distance d), fed
what layer l's router is fed, that speaks of layer l + d. The model's own weights are read, never changed.

Shape letters: T tokens, D distances (cut at the last layer), E experts, H hidden size, R width of a trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from traces import Guesses
from traces.trace import merged

NUM_GUESSES = 4
GATES_FILE = "gates.safetensors"  # of a model directory: trained heads, no weights of the model
LADDER = {
    "router": "the router of layer l + d as it is (speculative loading of Eliseev and Mazur 2023, for d = 1)",
    "router_norm": "the same, its input scaled by layer l + d's norm in place of layer l's",
    "router_mean": "the same, plus the mean change of the router's input from layer l to l + d",
    "aligned": "a linear head, trained to match the frozen router of layer l + d",
    "mlp": "the aligned head plus a trained hidden layer that all distances share",
    "context": "the mlp with heads that also see what layer l + d's router was fed for the token before",
}
UNTRAINED = ("router", "router_norm")


Choose = Callable[[torch.Tensor], torch.Tensor]


class Gates:
    """One rung of the ladder.

    Attributes:
        lookahead: largest distance guessed at.
    """

    lookahead: int

    def start(self, sequences: int) -> None:
        """New sequences begin, that many in a batch: tokens of later visits are equally many of each, in order."""

    def saw(self, layer: int, hidden: torch.Tensor) -> None:
        """Layer ``layer`` was visited (its `scores`, if wanted, were asked for before); every visit is told."""

    def scores(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor | None = None) -> npt.NDArray[np.float16]:
        """P(routed) for layer + 1, ...: hidden [T, H] -> float16 [T, D, E], D cut at the last layer.

        ids [T, K]: what layer ``layer`` itself was routed to, for a rung that looks at it (none of `LADDER` does).
        """
        raise NotImplementedError


class Heads(NamedTuple):
    """Linear heads of one layer: weight [D, E, H], bias [D, E] or None (both float32), temperature [D] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    temperature: torch.Tensor | None = None

    @property
    def distances(self) -> int:
        return self.weight.shape[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, H] -> [T, D, E] in one product, before the temperature."""
        bias = None if self.bias is None else self.bias.flatten()
        flat = torch.nn.functional.linear(hidden.float(), self.weight.flatten(0, 1), bias)
        return flat.view(hidden.shape[0], *self.weight.shape[:2])


class Trunk(NamedTuple):
    """What `mlp` adds to a layer's linear heads: up @ silu(down @ x + bias); down [R, H], bias [R], up [D * E, R]."""

    down: torch.Tensor
    bias: torch.Tensor
    up: torch.Tensor

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, H] -> [T, D * E]."""
        inner = torch.nn.functional.silu(torch.nn.functional.linear(hidden.float(), self.down, self.bias))
        return torch.nn.functional.linear(inner, self.up)


class Context(NamedTuple):
    """What `context` puts in place of a layer's linear heads and its trunk's ``up``, plus the linear heads ``before``
    on what the next layers' routers were fed for the token before.

    weight and before [D, E, H], bias [D, E], up [D * E, R], temperature [D] or None.
    """

    weight: torch.Tensor
    before: torch.Tensor
    bias: torch.Tensor
    up: torch.Tensor
    temperature: torch.Tensor | None = None

    def logits(self, trunk: Trunk, hidden: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """hidden [T, H], before [D, T, H] -> [T, D, E], the temperature applied."""
        here = Heads(self.weight, self.bias).logits(hidden)
        known = torch.bmm(before.float(), self.before.transpose(1, 2)).transpose(0, 1)
        logits = here + known + trunk._replace(up=self.up).logits(hidden).view_as(here)
        return logits if self.temperature is None else logits / self.temperature[:, None]


def inclusion(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Probability of each expert to be among the routed ``top_k``, from router logits [..., E]; sums to ``top_k``.

    The softmax times top_k, what exceeds 1 given to the others in proportion.
    """
    probabilities = logits.float().softmax(-1) * top_k
    for _ in range(top_k - 1):
        full = probabilities >= 1
        if not bool(full.any()):
            break
        rest = probabilities.masked_fill(full, 0.0)
        left = top_k - full.sum(-1, keepdim=True)
        scale = left / rest.sum(-1, keepdim=True).clamp_min(1e-9)
        probabilities = torch.where(full, 1.0, rest * scale)
    return probabilities.clamp(0.0, 1.0)


class LinearGates(Gates):
    """Linear heads: one product gives all guesses of a visit.

    Args:
        heads: of every MoE layer; None for the last.
        top_k: routed experts per token.
        experts: of a layer.
        choose: for heads that are routers, by MoE layer: what that router ranks by, from its logits [T, E].
    """

    def __init__(
        self, heads: Sequence[Heads | None], top_k: int, experts: int, choose: Sequence[Choose] | None = None
    ) -> None:
        self.heads = heads
        self._top_k = top_k
        self._experts = experts
        self._choose = choose
        self.lookahead = max((h.distances for h in heads if h is not None), default=0)

    def logits(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, H] -> [T, D, E] on its device, the temperature applied; nothing is waited for."""
        heads = self.heads[layer]
        if heads is None:
            return torch.zeros(hidden.shape[0], 0, self._experts, device=hidden.device)
        logits = self._raw(layer, heads, hidden)
        if self._choose is not None:
            return torch.stack([self._choose[layer + 1 + d](logits[:, d]) for d in range(heads.distances)], 1)
        return logits if heads.temperature is None else logits / heads.temperature[:, None]

    def _raw(self, layer: int, heads: Heads, hidden: torch.Tensor) -> torch.Tensor:
        return heads.logits(hidden)

    def rated(self, logits: torch.Tensor) -> npt.NDArray[np.float16]:
        """What `logits` gave as `Gates.scores`; best called with logits on the host."""
        return inclusion(logits, self._top_k).cpu().numpy().astype(np.float16)

    def scores(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor | None = None) -> npt.NDArray[np.float16]:
        """As `Gates.scores`."""
        return self.rated(self.logits(layer, hidden))


class RouterGates(LinearGates):
    """The routers of the next layers as they are.

    Args:
        routers: router weights [E, H] of every MoE layer.
        top_k: routed experts per token.
        lookahead: largest distance wanted.
        biases: of the routers, [E] each, if they have any.
        choose: as in `LinearGates`.
    """

    def __init__(
        self,
        routers: Sequence[torch.Tensor],
        top_k: int,
        lookahead: int,
        biases: Sequence[torch.Tensor] | None = None,
        choose: Sequence[Choose] | None = None,
    ) -> None:
        super().__init__(router_heads(routers, lookahead, biases), top_k, routers[0].shape[0], choose)


class TrunkGates(LinearGates):
    """Linear heads plus one trunk a layer."""

    def __init__(self, heads: Sequence[Heads | None], trunks: Sequence[Trunk | None], top_k: int, experts: int) -> None:
        super().__init__(heads, top_k, experts)
        self.trunks = trunks

    def _raw(self, layer: int, heads: Heads, hidden: torch.Tensor) -> torch.Tensor:
        trunk = self.trunks[layer]
        assert trunk is not None
        logits = heads.logits(hidden)
        return logits + trunk.logits(hidden).view_as(logits)


class ContextGates(TrunkGates):
    """Heads that also see what the routers looked at were fed for the token before.

    That is known in decode, where every visit brings one token of each sequence. Where it is not (prefill, the first
    pass of a sequence) the guesses are those without it.
    """

    def __init__(
        self,
        heads: Sequence[Heads | None],
        trunks: Sequence[Trunk | None],
        contexts: Sequence[Context | None],
        top_k: int,
        experts: int,
    ) -> None:
        super().__init__(heads, trunks, top_k, experts)
        self.contexts = contexts
        first = next(h.weight for h in heads if h is not None)
        self._last = first.new_zeros(len(heads), 1, first.shape[-1])  # what routers were fed last, of each sequence
        self._known = [False] * len(heads)

    def start(self, sequences: int) -> None:
        """As `Gates.start`."""
        if sequences != self._last.shape[1]:  # else in place: a captured graph reads these very bytes
            with torch.inference_mode(False):  # else it could not be written to outside of inference mode
                self._last = self._last.new_zeros(len(self._last), sequences, self._last.shape[-1])
        self._known = [False] * len(self._known)

    def saw(self, layer: int, hidden: torch.Tensor) -> None:
        """As `Gates.saw`."""
        self._last[layer] = hidden.view(self._last.shape[1], -1, hidden.shape[-1])[:, -1]
        self._known[layer] = True

    def logits(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """As `LinearGates.logits`."""
        heads = self.heads[layer]
        later = slice(layer + 1, layer + 1 + (heads.distances if heads else 0))
        if heads is None or len(hidden) != self._last.shape[1] or not all(self._known[later]):
            return super().logits(layer, hidden)
        return self.logits_after(layer, hidden, self._last[later])

    def logits_after(self, layer: int, hidden: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """hidden [T, H], before [D, T, H]: what layers l + 1, ... were fed for the token before -> [T, D, E]."""
        context, trunk = self.contexts[layer], self.trunks[layer]
        assert context is not None and trunk is not None
        return context.logits(trunk, hidden, before)


def router_heads(
    routers: Sequence[torch.Tensor], lookahead: int, biases: Sequence[torch.Tensor] | None = None
) -> list[Heads | None]:
    """The routers of the next layers as heads."""

    def later(parts: Sequence[torch.Tensor], layer: int) -> torch.Tensor:
        return torch.stack([part.float() for part in parts[layer + 1 : layer + 1 + lookahead]])

    return [
        Heads(later(routers, layer), None if biases is None else later(biases, layer))
        if lookahead and layer + 1 < len(routers)
        else None
        for layer in range(len(routers))
    ]


def norm_heads(
    routers: Sequence[torch.Tensor],
    norms: Sequence[torch.Tensor],
    lookahead: int,
    biases: Sequence[torch.Tensor] | None = None,
) -> list[Heads | None]:
    """The routers of the next layers, fed the direction of the residual stream under their own norm's weights.

    ``norms``: weight [H] of the norm before every MoE layer. What layer l's norm multiplied by is divided out; where
    that is (nearly) nothing, the input carries nothing, and its factor stays 1.
    """
    heads: list[Heads | None] = []
    for layer, found in enumerate(router_heads(routers, lookahead, biases)):
        if found is not None:
            own = norms[layer].float()
            usable = own.abs() > 1e-3 * own.abs().max()
            factors = [
                torch.where(usable, norms[layer + d].float() / torch.where(usable, own, 1.0), 1.0)
                for d in range(1, found.distances + 1)
            ]
            found = Heads(found.weight * torch.stack(factors)[:, None], found.bias)
        heads.append(found)
    return heads


def ranked(scores: npt.NDArray[np.float16]) -> list[Guesses]:
    """The best guesses for each distance from one token's scores [D, E]; equal scores by the lower id."""
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :NUM_GUESSES]
    best = np.take_along_axis(scores, order, axis=-1)
    return [Guesses(ids, values) for ids, values in zip(order.tolist(), best.tolist(), strict=True)]


def merged_guesses(scores: npt.NDArray[np.float16]) -> list[Guesses]:
    """The guesses of a visit from the scores of its tokens [T, D, E]: of several, P(any token is routed there)."""
    tokens = [ranked(rows) for rows in scores]
    if len(tokens) == 1:
        return tokens[0]
    return [merged([t[d].experts for t in tokens], [t[d].scores for t in tokens]) for d in range(scores.shape[1])]


def rung_of(predictor: str) -> str:
    """The rung of the ladder that a run's ``predictor`` asks of the engine: ``recorded`` is the model's routers."""
    return "router" if predictor == "recorded" else predictor


def gates_for(
    predictor: str, model: torch.nn.Module, top_k: int, lookahead: int, file: Path | None = None
) -> Gates | None:
    """The rung named ``predictor`` for a loaded model; None where ``lookahead`` is 0.

    ``file`` holds the trained heads; `router` and `router_norm` need none.

    Raises:
        GateError: no such rung, no file of heads, one made for another model, or heads that look less far.
    """
    from runtime import gates  # which knows the classes above

    if not lookahead:
        return None
    return gates.ladder(model, top_k, lookahead, file, (rung_of(predictor),))[rung_of(predictor)]
