"""Lookahead gates of one layer, fitted to what the frozen routers of the next layers said: no back-propagation through
the model, every layer by itself.

Shape letters: N tokens, D distances, E experts, K routed experts, H hidden size, R width of the trunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from runtime import gates
from runtime.activations import Activations, Table
from runtime.lookahead import Context, Heads, Trunk, inclusion

BATCH = 512
BLOCK = 16_384  # tokens judged at once
BINS = 15
TEMPERATURES = tuple(2 ** (i / 8) for i in range(-32, 17))  # 1/16 to 4


class Sample(NamedTuple):
    """One layer's inputs and what it should say: hidden [N, H], logits [N, D, E], ids [N, D, K], and what the next
    layers' routers were fed for the token before, before [D, N, H] (zeros for the first of a window; None: left out).
    As narrow as they were read, float32 and int64 in what `rows` gives."""

    hidden: torch.Tensor
    logits: torch.Tensor
    ids: torch.Tensor
    before: torch.Tensor | None = None

    def rows(self, index: torch.Tensor | slice) -> Sample:
        before = None if self.before is None else self.before[:, index].float()
        return Sample(self.hidden[index].float(), self.logits[index].float(), self.ids[index].long(), before)

    def blocks(self) -> Iterator[Sample]:
        """All rows, ``BLOCK`` at a time."""
        for start in range(0, len(self.hidden), BLOCK):
            yield self.rows(slice(start, start + BLOCK))


def sample(
    found: Activations,
    layer: int,
    distances: int,
    rows: npt.NDArray[np.bool_] | None = None,
    with_before: bool = False,
) -> Sample:
    """What layer ``layer`` saw, and what its next ``distances`` layers' routers said."""
    later = range(layer + 1, layer + 1 + distances)
    chosen = np.arange(found.num_tokens) if rows is None else np.flatnonzero(rows)

    def read(table: Table, of: int) -> torch.Tensor:
        return torch.from_numpy(table[of][chosen])

    logits = torch.stack([read(found.logits, i) for i in later], 1)
    ids = torch.stack([read(found.ids, i) for i in later], 1)
    fed = before(found, layer, distances, rows) if with_before else None
    return Sample(read(found.inputs, layer), logits, ids, fed)


def before(found: Activations, layer: int, distances: int, rows: npt.NDArray[np.bool_] | None = None) -> torch.Tensor:
    """What the next ``distances`` layers' routers were fed for the token before each of ``rows``, float16 [D, N, H]."""
    chosen = np.arange(found.num_tokens) if rows is None else np.flatnonzero(rows)
    later = range(layer + 1, layer + 1 + distances)
    fed = torch.stack([torch.from_numpy(found.inputs[i][np.maximum(chosen - 1, 0)]) for i in later])
    fed[:, torch.from_numpy(found.first[chosen])] = 0
    return fed


def kl(said: torch.Tensor, of: Sample) -> torch.Tensor:
    """KL divergence from the router's softmax, up to its entropy, [D]."""
    return -(of.logits.softmax(-1) * said.log_softmax(-1)).sum(-1).mean(0)


def top_k(said: torch.Tensor, of: Sample) -> torch.Tensor:
    """Cross-entropy on the routed experts, [D]."""
    return -said.log_softmax(-1).gather(-1, of.ids).mean((0, 2))


def ranking(said: torch.Tensor, of: Sample) -> torch.Tensor:
    """Pairwise logistic loss: a routed expert above each that is not, [D]."""
    routed = said.gather(-1, of.ids)
    pairs = torch.nn.functional.softplus(said[..., None, :] - routed[..., :, None])
    own = torch.nn.functional.one_hot(of.ids, said.shape[-1]).sum(-2, keepdim=True)
    others = said.shape[-1] - of.ids.shape[-1]
    return (pairs * (1 - own)).sum((-1, -2)).mean(0) / (others * of.ids.shape[-1])


LOSSES: dict[str, Callable[[torch.Tensor, Sample], torch.Tensor]] = {"kl": kl, "top_k": top_k, "ranking": ranking}


def recall(said: torch.Tensor, ids: torch.Tensor, guesses: int) -> torch.Tensor:
    """Share of the routed experts [N, D, K] among the first ``guesses`` of scores or logits [N, D, E], by distance."""
    best = said.topk(min(guesses, said.shape[-1]), -1).indices
    return (ids[..., :, None] == best[..., None, :]).any(-1).float().mean((0, 2))


def calibration_error(scores: torch.Tensor, ids: torch.Tensor, guesses: int = 0) -> float:
    """Expected calibration error of P(routed) [N, D, E], in ``BINS`` equal bins: the mean distance between what was
    said and how often it was so, over all (token, expert) pairs or, with ``guesses``, over the best of each token."""
    routed = torch.zeros_like(scores).scatter_(-1, ids, 1.0)
    if guesses:
        best = scores.topk(min(guesses, scores.shape[-1]), -1).indices
        scores, routed = scores.gather(-1, best), routed.gather(-1, best)
    said, was = scores.flatten(), routed.flatten()
    bins = (said * BINS).long().clamp_max(BINS - 1)
    gap = torch.zeros(BINS).index_add_(0, bins, said - was)
    return float(gap.abs().sum() / len(said))


def temperatures(said: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """By distance, what to divide logits by so that `inclusion` is likeliest to say what was routed, [D]."""
    routed = torch.zeros_like(said).scatter_(-1, ids, 1.0)
    losses = []
    for temperature in TEMPERATURES:
        scores = inclusion(said / temperature, ids.shape[-1]).clamp(1e-3, 1 - 1e-3)
        loss = torch.nn.functional.binary_cross_entropy(scores, routed, reduction="none")
        losses.append(loss.mean((0, 2)))
    return torch.tensor(TEMPERATURES)[torch.stack(losses).argmin(0)]


@dataclass
class Fitting:
    """How heads are fitted.

    Attributes:
        loss: one of `LOSSES`.
        epochs: over the training tokens; what was best on held-out ones is kept.
        rate: peak learning rate of linear heads (Adam), falling to zero as a cosine; a trunk's is half of it.
        seed: of batches and of the trunk's start.
    """

    loss: str = "ranking"
    epochs: int = 8
    rate: float = 4e-3
    seed: int = 0

    def descend(
        self,
        parameters: list[torch.Tensor],
        said: Callable[[Sample], torch.Tensor],
        train: Sample,
        held: Sample,
        layer: int,
        rate: float,
        improved: Callable[[torch.Tensor], None],
    ) -> None:
        """Adam on ``parameters``; ``improved`` is told the held-out losses [D] after every epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + layer)
        steps = self.epochs * math.ceil(len(train.hidden) / BATCH)
        optimizer = torch.optim.Adam(parameters, lr=rate, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        loss = LOSSES[self.loss]
        for _ in range(self.epochs):
            for index in torch.randperm(len(train.hidden), generator=generator).split(BATCH):
                part = train.rows(index)
                optimizer.zero_grad()
                loss(said(part), part).sum().backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                losses = [loss(said(part), part) * len(part.hidden) for part in held.blocks()]
                improved(torch.stack(losses).sum(0) / len(held.hidden))


Said = Callable[[Sample], torch.Tensor]


class Scales:
    """Root mean square of the inputs of every router, by layer: inputs divided by it are alike.

    Args:
        spreads: [H] each (`spread`).
    """

    def __init__(self, spreads: Sequence[torch.Tensor]) -> None:
        self.tensors = {f"spread.{layer}": one.half().float() for layer, one in enumerate(spreads)}

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self.tensors[f"spread.{layer}"]

    def saved(self, name: str, layer: int, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of a gates file, ``name`` without the layer, as it will be read again."""
        rung, _, part = name.partition(".")
        full = f"{rung}.{layer}.{part}"
        return gates.unpack(gates.pack({**self.tensors, full: tensor}))[full]


def align(
    train: Sample, held: Sample, starts: list[Heads], how: Fitting, layer: int, scales: Scales
) -> tuple[Heads, list[int]]:
    """Linear heads trained from ``starts[0]``; for each distance the trained one, or the start that recalls more of
    the held-out tokens. Returns them and, by distance, -1 for trained or the place of the start that was kept."""
    scale = scales[layer]
    weight = (starts[0].weight * scale).clone().requires_grad_()
    bias = torch.zeros(weight.shape[:2]) if starts[0].bias is None else starts[0].bias.clone()
    bias.requires_grad_()
    best = torch.full((weight.shape[0],), torch.inf)
    kept_weight, kept_bias = weight.detach().clone(), bias.detach().clone()

    def improved(losses: torch.Tensor) -> None:
        better = losses < best
        best[better] = losses[better]
        kept_weight[better], kept_bias[better] = weight.detach()[better], bias.detach()[better]

    def said(part: Sample) -> torch.Tensor:
        return Heads(weight, bias).logits(part.hidden / scale)

    how.descend([weight, bias], said, train, held, layer, how.rate, improved)
    choices = []
    for heads in (*starts, Heads(kept_weight / scale, kept_bias)):
        own = torch.zeros_like(kept_bias) if heads.bias is None else heads.bias
        weights, biases = (scales.saved(f"aligned.{n}", layer, t) for n, t in (("weight", heads.weight), ("bias", own)))
        choices.append(Heads(weights, biases))
    recalls = torch.stack([_recall(lambda part, heads=heads: heads.logits(part.hidden), held) for heads in choices])
    chosen = [int(column.argmax()) if column[-1] < column.max() else -1 for column in recalls.T]
    parts = [choices[c] for c in chosen]
    weights = torch.stack([heads.weight[d] for d, heads in enumerate(parts)])
    return Heads(
        weights, torch.stack([heads.bias[d] for d, heads in enumerate(parts) if heads.bias is not None])
    ), chosen


def add_trunk(train: Sample, held: Sample, heads: Heads, width: int, how: Fitting, layer: int, scales: Scales) -> Trunk:
    """A trunk trained on what ``heads``, which stay as they are, leave; nothing is added at a distance where that does
    not raise recall."""
    generator = torch.Generator().manual_seed(how.seed * 1000 + layer)
    scale = scales[layer]
    size, outputs = train.hidden.shape[1], heads.weight.shape[0] * heads.weight.shape[1]
    down = (torch.rand(width, size, generator=generator) * 2 - 1) * math.sqrt(3 / size)
    parts = [down.requires_grad_(), torch.zeros(width).requires_grad_(), torch.zeros(outputs, width).requires_grad_()]
    shape = heads.weight.shape[:2]
    best = Best(parts)

    def said(part: Sample) -> torch.Tensor:
        return heads.logits(part.hidden) + Trunk(*parts).logits(part.hidden / scale).view(-1, *shape)

    how.descend(parts, said, train, held, layer, how.rate / 2, best.improved)
    down, bias, up = best.kept
    kept = {"down": down / scale, "bias": bias, "up": up}
    trunk = Trunk(**{name: scales.saved(f"mlp.{name}", layer, part) for name, part in kept.items()})

    def after(part: Sample) -> torch.Tensor:
        return heads.logits(part.hidden) + trunk.logits(part.hidden).view(-1, *shape)

    worse = _recall(after, held) <= _recall(lambda part: heads.logits(part.hidden), held)
    trunk.up.view(*shape, width)[worse] = 0
    return trunk


def add_context(
    train: Sample, held: Sample, heads: Heads, trunk: Trunk, how: Fitting, layer: int, scales: Scales
) -> Context:
    """Heads on a trunk, which stays as it is, and on what routers were fed for the token before; at a distance where
    they recall less than ``heads`` on the trunk, these."""
    assert train.before is not None and heads.bias is not None
    scale = scales[layer]
    later = torch.stack([scales[layer + 1 + d] for d in range(heads.distances)])[:, None]
    shape = heads.weight.shape[:2]
    before = torch.zeros_like(heads.weight).requires_grad_()
    parts = [(heads.weight * scale).clone(), before, heads.bias.clone(), trunk.up.clone()]
    parts = [part.detach().requires_grad_() for part in parts]
    best = Best(parts)
    inside = Trunk(trunk.down * scale, trunk.bias, trunk.up)

    def said(part: Sample) -> torch.Tensor:
        assert part.before is not None
        return Context(*parts).logits(inside, part.hidden / scale, part.before / later)

    how.descend(parts, said, train, held, layer, how.rate, best.improved)
    weight, before, bias, up = best.kept
    kept = {"weight": weight / scale, "before": before / later, "bias": bias, "up": up}
    context = Context(**{name: scales.saved(f"context.{name}", layer, part) for name, part in kept.items()})

    def after(part: Sample) -> torch.Tensor:
        assert part.before is not None
        return context.logits(trunk, part.hidden, part.before)

    def without(part: Sample) -> torch.Tensor:
        return heads.logits(part.hidden) + trunk.logits(part.hidden).view(-1, *shape)

    worse = _recall(after, held) < _recall(without, held)
    context.weight[worse], context.before[worse], context.bias[worse] = heads.weight[worse], 0, heads.bias[worse]
    context.up.view(*shape, -1)[worse] = trunk.up.view(*shape, -1)[worse]
    return context


class Best:
    """Parameters as they were when the held-out loss over all distances was lowest."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self._parameters = parameters
        self._loss = math.inf
        self.kept = [p.detach().clone() for p in parameters]

    def improved(self, losses: torch.Tensor) -> None:
        if (total := float(losses.sum())) < self._loss:
            self._loss, self.kept = total, [p.detach().clone() for p in self._parameters]


def _recall(said: Said, held: Sample) -> torch.Tensor:
    """Share of the routed experts among as many guesses, [D]."""
    found = [recall(said(part), part.ids, part.ids.shape[-1]) * len(part.ids) for part in held.blocks()]
    return torch.stack(found).sum(0) / len(held.ids)


def spread(inputs: npt.NDArray[np.float16]) -> torch.Tensor:
    """Root mean square of every input [H] over rows [N, H], at least a hundredth of the largest."""
    squares = torch.zeros(inputs.shape[1])
    for start in range(0, len(inputs), BLOCK):
        squares += torch.from_numpy(np.array(inputs[start : start + BLOCK])).float().square().sum(0)
    size = (squares / len(inputs)).sqrt()
    return size.clamp_min(max(float(size.max()) / 100, 1e-6))
