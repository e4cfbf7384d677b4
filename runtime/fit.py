"""Lookahead gates of one layer, fitted to what the frozen routers of the next layers said: no back-propagation through
the model, every layer by itself.

Shape letters: N tokens, D distances, E experts, K routed experts, H hidden size, R width of the trunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from runtime.activations import Activations
from runtime.lookahead import Heads, Trunk, inclusion

BATCH = 512
PATIENCE = 3  # epochs without a better held-out loss
BINS = 15
TEMPERATURES = tuple(2 ** (i / 8) for i in range(-32, 17))  # 1/16 to 4


class Sample(NamedTuple):
    """One layer's inputs and what it should say: hidden [N, H], logits [N, D, E], ids [N, D, K]."""

    hidden: torch.Tensor
    logits: torch.Tensor
    ids: torch.Tensor

    def rows(self, index: torch.Tensor) -> Sample:
        return Sample(*(part[index] for part in self))


def sample(found: Activations, layer: int, distances: int, rows: slice | torch.Tensor = slice(None)) -> Sample:
    """What layer ``layer`` saw, and what its next ``distances`` layers' routers said, float32 and int64."""
    later = range(layer + 1, layer + 1 + distances)
    index = rows if isinstance(rows, slice) else rows.numpy()
    return Sample(
        torch.from_numpy(np.array(found.inputs[layer][index])).float(),
        torch.stack([torch.from_numpy(np.array(found.logits[i][index])) for i in later], 1).float(),
        torch.stack([torch.from_numpy(np.array(found.ids[i][index], np.int64)) for i in later], 1),
    )


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
        epochs: at most; fewer when held-out loss has not fallen for ``PATIENCE``.
        rate: peak learning rate (Adam), falling to zero as a cosine.
        seed: of batches and of the trunk's start.
    """

    loss: str = "kl"
    epochs: int = 12
    rate: float = 2e-3
    seed: int = 0

    def batches(self, count: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
        order = torch.randperm(count, generator=generator)
        yield from order.split(BATCH)

    def descend(
        self,
        parameters: list[torch.Tensor],
        said: Callable[[torch.Tensor], torch.Tensor],
        train: Sample,
        held: Sample,
        layer: int,
        improved: Callable[[torch.Tensor], bool],
    ) -> int:
        """Adam on ``parameters``; ``improved`` is told the held-out losses [D] after every epoch and says whether any
        is better; returns the epochs it took."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + layer)
        steps = self.epochs * math.ceil(len(train.hidden) / BATCH)
        optimizer = torch.optim.Adam(parameters, lr=self.rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        loss, idle = LOSSES[self.loss], 0
        for epoch in range(self.epochs):
            for index in self.batches(len(train.hidden), generator):
                part = train.rows(index)
                optimizer.zero_grad()
                loss(said(part.hidden), part).sum().backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                idle = 0 if improved(loss(said(held.hidden), held)) else idle + 1
            if idle == PATIENCE:
                return epoch + 1
        return self.epochs


def align(train: Sample, held: Sample, starts: list[Heads], how: Fitting, layer: int) -> tuple[Heads, list[int]]:
    """Linear heads trained from ``starts[0]``; for each distance the trained one, or the start that recalls more of
    the held-out tokens. Returns them and, by distance, -1 for trained or the place of the start that was kept."""
    scale = spread(train.hidden)
    weight = (starts[0].weight * scale).clone().requires_grad_()
    bias = torch.zeros(weight.shape[:2]) if starts[0].bias is None else starts[0].bias.clone()
    bias.requires_grad_()
    ours, others = train._replace(hidden=train.hidden / scale), held._replace(hidden=held.hidden / scale)
    best = torch.full((weight.shape[0],), torch.inf)
    kept = Heads(weight.detach().clone(), bias.detach().clone())

    def improved(losses: torch.Tensor) -> bool:
        better = losses < best - 1e-5
        best[better] = losses[better]
        assert kept.bias is not None
        kept.weight[better], kept.bias[better] = weight.detach()[better], bias.detach()[better]
        return bool(better.any())

    how.descend([weight, bias], lambda x: Heads(weight, bias).logits(x), ours, others, layer, improved)
    trained = half(Heads(kept.weight / scale, kept.bias))
    choices = [half(start) for start in starts] + [trained]
    routed = held.ids.shape[-1]
    recalls = torch.stack([recall(c.logits(held.hidden), held.ids, routed) for c in choices])
    chosen = [int(column.argmax()) if column[-1] < column.max() else -1 for column in recalls.T]
    weights = torch.stack([choices[c].weight[d] for d, c in enumerate(chosen)])
    biases = [choices[c].bias for c in chosen]
    stacked = torch.stack([torch.zeros(weights.shape[1]) if b is None else b[d] for d, b in enumerate(biases)])
    return Heads(weights, stacked), chosen


def add_trunk(train: Sample, held: Sample, heads: Heads, width: int, how: Fitting, layer: int) -> Trunk:
    """A trunk trained on what ``heads``, which stay as they are, leave; nothing is added at a distance where that does
    not raise recall."""
    generator = torch.Generator().manual_seed(how.seed * 1000 + layer)
    scale = spread(train.hidden)
    size, outputs = train.hidden.shape[1], heads.weight.shape[0] * heads.weight.shape[1]
    down = (torch.rand(width, size, generator=generator) * 2 - 1) * math.sqrt(3 / size)
    parts = [down.requires_grad_(), torch.zeros(width).requires_grad_(), torch.zeros(outputs, width).requires_grad_()]
    shape = heads.weight.shape[:2]
    kept, best = Trunk(*(p.detach().clone() for p in parts)), torch.inf

    def said(hidden: torch.Tensor) -> torch.Tensor:
        trunk = Trunk(*parts).logits(hidden / scale)
        return heads.logits(hidden) + trunk.view(-1, *shape)

    def improved(losses: torch.Tensor) -> bool:
        nonlocal best, kept
        total = float(losses.sum())
        if total >= best - 1e-5:
            return False
        best, kept = total, Trunk(*(p.detach().clone() for p in parts))
        return True

    how.descend(parts, said, train, held, layer, improved)
    trunk = Trunk((kept.down / scale).half().float(), kept.bias.half().float(), kept.up.half().float())
    routed = held.ids.shape[-1]
    before = heads.logits(held.hidden)
    after = before + trunk.logits(held.hidden).view_as(before)
    worse = recall(after, held.ids, routed) <= recall(before, held.ids, routed)
    trunk.up.view(*shape, width)[worse] = 0
    return trunk


def spread(hidden: torch.Tensor) -> torch.Tensor:
    """Root mean square of every input [H], at least a hundredth of the largest: inputs divided by it are alike."""
    size = hidden.square().mean(0).sqrt()
    return size.clamp_min(max(float(size.max()) / 100, 1e-6))


def half(heads: Heads) -> Heads:
    """Rounded to float16, as they are saved."""
    bias = None if heads.bias is None else heads.bias.half().float()
    return Heads(heads.weight.half().float(), bias)
