"""Routing traces: which experts every token of a model was sent to, in order, and what was guessed beforehand."""

from traces.format import load, save
from traces.trace import GuessTable, Pass, Trace, TraceError
from traces.vocabulary import DECODE, PREFILL, ExpertId, Guesses, ModelSpec, Visit

__all__ = [
    "DECODE",
    "PREFILL",
    "ExpertId",
    "GuessTable",
    "Guesses",
    "ModelSpec",
    "Pass",
    "Trace",
    "TraceError",
    "Visit",
    "load",
    "save",
]
