"""Collects what the engine routes and guesses, visit by visit, into a trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from runtime.lookahead import NUM_GUESSES
from traces import ModelSpec, Trace
from traces.trace import id_dtype, rank


class Recorder:
    """Rows of all visits in pass order.

    Args:
        model: shape of the model that routes.
        lookahead: distances of the guesses; 0 records none.
        with_logits: keep router logits.
    """

    def __init__(self, model: ModelSpec, lookahead: int, with_logits: bool = True) -> None:
        self._model = model
        self._lookahead = lookahead
        self._with_logits = with_logits
        self._new: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, npt.NDArray[np.float16] | None]] = []
        self._visits: list[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any] | None]] = []
        self._scores: list[npt.NDArray[np.float16] | None] = []
        self._beside: dict[str, list[npt.NDArray[np.float16]]] = {}
        self._passes: list[tuple[int, int]] = []  # tokens, phase
        self._rows: list[npt.NDArray[np.int32]] = []  # of each pass: the sequence of every token
        self._batch: list[int] = []
        self._domains: list[str] = []

    def start_sequences(self, count: int = 1, domain: str = "") -> None:
        """All following passes belong to ``count`` new sequences that run together."""
        self._batch = list(range(len(self._domains), len(self._domains) + count))
        self._domains += [domain] * count

    def start_pass(self, tokens: int, phase: int) -> None:
        """The next ``num_layers`` visits belong to a pass of ``tokens``, equally many of each sequence."""
        self._take_in()
        self._passes.append((tokens, phase))
        self._rows.append(np.repeat(np.array(self._batch, np.int32), tokens // len(self._batch)))

    def drop_pass(self) -> None:
        """Forget a pass that did not end."""
        self._take_in()
        self._passes.pop()
        self._rows.pop()
        for visits in (self._visits, self._scores, *self._beside.values()):
            del visits[len(self._passes) * self._model.num_layers :]

    def guess(self, predictor: str, scores: npt.NDArray[np.float16]) -> None:
        """What another predictor than the run's own says at the visit that comes next, scores [T, D, E]."""
        self._beside.setdefault(predictor, []).append(self._padded(scores))

    def _padded(self, scores: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
        table = np.zeros((scores.shape[0], self._lookahead, self._model.num_experts), np.float16)
        table[:, : scores.shape[1]] = scores[:, : self._lookahead]
        return table

    def visit(
        self,
        ids: torch.Tensor,
        weights: torch.Tensor,
        logits: torch.Tensor | None,
        scores: npt.NDArray[np.float16] | None,
    ) -> None:
        """One visit: ids and weights [T, K], logits [T, E], guess scores [T, D, E], which are not written to again.

        Tensors are copied; all else is left until the pass has ended, since a pass is timed.
        """
        kept = logits.clone() if self._with_logits and logits is not None else None
        self._new.append((ids.clone(), weights.clone(), kept, scores))

    def _take_in(self) -> None:
        for ids, weights, logits, scores in self._new:
            kept = None if logits is None else logits.float().cpu().numpy().astype(np.float16)
            self._visits.append((ids.cpu().numpy(), weights.float().cpu().numpy().astype(np.float16), kept))
            self._scores.append(None if scores is None or not self._lookahead else self._padded(scores))
        self._new.clear()

    def trace(self, provenance: dict[str, Any], predictor: str, routing: str = "RECORDED") -> Trace:
        """All whole passes so far, the run's own guesses under the name ``predictor``; "" leaves guesses out."""
        self._take_in()
        layers = self._model.num_layers
        whole = len(self._visits) // layers  # passes; the last may have broken off
        made = self._passes[:whole]

        def by_token(visits: list[Any]) -> npt.NDArray[Any]:
            passes = [np.stack(visits[i * layers : (i + 1) * layers], axis=1) for i in range(whole)]
            return np.concatenate(passes)

        def rows(part: int) -> npt.NDArray[Any]:
            return by_token([v[part] for v in self._visits])

        phases = [np.full(tokens, phase, np.uint8) for tokens, phase in made]
        begun, sequence = np.unique(
            np.concatenate(self._rows[:whole]), return_inverse=True
        )  # without those that never ran
        together = any(rows[0] != rows[-1] for rows in self._rows[:whole])
        domains = tuple(self._domains[i] for i in begun)
        nothing = (self._lookahead, self._model.num_experts)
        own = [
            np.zeros((len(visit[0]), *nothing), np.float16) if scores is None else scores
            for visit, scores in zip(self._visits, self._scores, strict=True)
        ]
        said = {predictor: own, **self._beside} if self._lookahead and predictor else {}
        most = min(NUM_GUESSES, self._model.num_experts)
        guesses = {name: rank(by_token(scores), most) for name, scores in said.items()}
        return Trace(
            model=self._model,
            ids=rows(0).astype(id_dtype(self._model.num_experts)),
            weights=rows(1),
            sequence_lengths=np.bincount(sequence).astype(np.int32),
            phase=np.concatenate(phases),
            logits=rows(2) if self._visits[0][2] is not None else None,
            guesses=guesses,
            provenance=provenance,
            domains=domains if all(domains) else (),
            pass_lengths=np.array([tokens for tokens, _ in made], np.int32) if together else None,
            token_sequence=sequence.astype(np.int32) if together else None,
            routing=routing,
        )
