"""Decode steps as CUDA graphs, cut where experts are computed, so that a layer's dense part is launched at once.

What is captured is the model's own forward, whatever its family: where it calls experts, capturing pauses, the
captured part is replayed, the visit is made, and capturing goes on with its result. A step is then

    inputs to their static buffers
    of every MoE layer: replay what leads to it (attention, norms, router, lookahead gates), then `Executor.meet`: one
        wait, a plan, and the experts from their slots; its result to a static buffer
    replay the rest (head)

The first decode step of a kind (arguments, their shapes, and the KV cache) runs as ever, which warms up what allocates;
the second is captured while it runs, later ones are replayed. A step is captured only if it adds one token to each
sequence in a ``transformers.StaticCache`` without sliding windows; where it is not, or the device refuses, it runs as
ever. Hooks on modules inside the model do not run in a replay.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from transformers.cache_utils import StaticCache, StaticLayer

from runtime.executor import Executor, Looked
from runtime.skeleton import moe_blocks

MOST_STEPS = 8  # kinds of steps kept; a cache whose tensors move (beam search) makes a new kind every time


class Graph(Protocol):
    """A piece of work of the device, on memory that stays where it is."""

    def begin(self) -> None:
        """Note what the device is given from now on, in place of doing it."""

    def end(self) -> None:
        """No longer. Raises RuntimeError where something could not be noted."""

    def replay(self) -> None:
        """Do what was noted."""


class Maker(Protocol):
    """Makes graphs."""

    def graph(self) -> Graph:
        """A new one. Those made in one `around` share memory, so they are replayed in the order of making."""

    def around(self) -> AbstractContextManager[None]:
        """Where a step runs that is captured, or warms up for it; no graph may be open when it is left."""


class CudaGraph:
    """A CUDA graph whose memory comes from ``pool``; other threads, such as the copier's, may go on meanwhile."""

    def __init__(self, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def begin(self) -> None:
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        self._graph.capture_end()

    def replay(self) -> None:
        self._graph.replay()


class CudaGraphs:
    """The maker of a CUDA device; it captures on a stream of its own, as CUDA demands."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def graph(self) -> CudaGraph:
        return CudaGraph(self._pool)

    @contextmanager
    def around(self) -> Iterator[None]:
        self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self._device)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            torch.cuda.synchronize(self._device)


class Segment(NamedTuple):
    """What leads to a visit, the visit's beginning, and the buffer [T, H] its result goes to."""

    graph: Graph
    layer: int
    looked: Looked
    result: torch.Tensor


class Step(NamedTuple):
    """A captured decode step: static inputs by argument, segments in order, the rest, its output's type and logits."""

    inputs: dict[tuple[str, ...], torch.Tensor]
    segments: list[Segment]
    rest: Graph
    kind: type
    logits: torch.Tensor


class _Capture:
    """A step that is being captured: what is done of it, and the graph that is open."""

    def __init__(self, maker: Maker) -> None:
        self._maker = maker
        self.segments: list[Segment] = []
        self.open: Graph | None = None
        self.refused = False

    def begin(self) -> None:
        self.open = graph = self._maker.graph()
        graph.begin()

    def end(self) -> Graph:
        """Close the open graph and do what it noted."""
        graph = self.open
        assert graph is not None
        graph.end()
        self.open = None
        graph.replay()
        return graph

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Close a graph that is left open by an exception; it was refused if that is the device's."""
        try:
            yield
        except BaseException as error:
            if self.open is not None:
                self.refused = isinstance(error, RuntimeError)
                with contextlib.suppress(RuntimeError):  # it is broken already: that is why it is given up
                    self.open.end()
            raise


class Graphs:
    """Stands before an offloaded model's forward and captures and replays its decode steps.

    Attributes:
        captured, replayed: steps so far.
        refused: why a decode step was last not captured, one sentence; empty if none was.
    """

    def __init__(self, model: torch.nn.Module, executor: Executor, maker: Maker) -> None:
        self.captured = self.replayed = 0
        self.refused = ""
        self._executor = executor
        self._maker = maker
        self._capturing: _Capture | None = None
        self._steps: dict[Any, Step | None] = {}  # None: seen, not captured yet
        self._hopeless: set[Any] = set()
        self._cache: weakref.ref[StaticCache] | None = None  # that the steps are of
        self._forward = model.forward

        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._pass(*args, **kwargs)

        model.forward = forward
        for found in moe_blocks(model):
            found.block.experts.visit = self._visit

    def counts(self) -> dict[str, Any]:
        """The attributes."""
        return {"captured": self.captured, "replayed": self.replayed, "refused": self.refused}

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        key = None if args else self._key(kwargs)
        if key is None or key in self._hopeless:
            return self._forward(*args, **kwargs)
        if key not in self._steps:
            if len(self._steps) == MOST_STEPS:
                del self._steps[next(iter(self._steps))]
            self._steps[key] = None
            with self._maker.around():
                return self._forward(**kwargs)
        step = self._steps[key]
        return self._capture(key, kwargs) if step is None else self._replay(step, kwargs)

    def _key(self, kwargs: dict[str, Any]) -> Any:
        """What a captured step is good for; None: these arguments are of no step that can be captured."""
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if ids is None or ids.shape[1] != 1 or not kwargs.get("return_dict", True):
            return None
        if not isinstance(cache, StaticCache) or getattr(cache, "offloading", False):
            self.refused = f"graphs need a StaticCache on the device, not {type(cache).__name__}"
            return None
        for layer in cache.layers:
            if type(layer) is not StaticLayer:
                self.refused = f"a cache layer of type {type(layer).__name__} keeps count outside the device"
                return None
            if not layer.is_initialized:
                return None
        if self._cache is None or self._cache() is not cache:
            self._forget()
            self._cache = weakref.ref(cache, self._forget)
        held = [t for layer in cache.layers for t in (layer.keys, layer.values, layer.cumulative_length)]
        parts: list[Any] = [tuple(t.data_ptr() for t in held)]
        for name, value in _flat(kwargs).items():
            if isinstance(value, torch.Tensor):
                parts.append((name, value.shape, value.dtype))
            elif value is None or isinstance(value, bool | int | float | str):
                parts.append((name, value))
            elif value is not cache:
                self.refused = f"argument {name[0]} holds a {type(value).__name__}"
                return None
        return tuple(parts)

    def _forget(self, cache: object = None) -> None:
        """Steps are of one cache's memory; without it, theirs is let go."""
        self._steps.clear()
        self._hopeless.clear()

    def _visit(self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """In place of `Executor.visit`."""
        capture = self._capturing
        if capture is None:
            return self._executor.visit(layer, hidden, ids, weights)
        looked = self._executor.look(layer, hidden, ids, weights, guessing=True)
        graph = capture.end()
        result = _static(self._executor.meet(layer, looked))
        capture.segments.append(Segment(graph, layer, looked, result))
        capture.begin()
        return result

    def _capture(self, key: Any, kwargs: dict[str, Any]) -> Any:
        """Run a step and capture it; where that is refused, run it as ever."""
        layers = kwargs["past_key_values"].layers
        lengths = [layer.cumulative_length.clone() for layer in layers]
        inputs = {name: _static(value) for name, value in _flat(kwargs).items() if isinstance(value, torch.Tensor)}
        capture = self._capturing = _Capture(self._maker)
        try:
            with self._maker.around(), capture.closed():
                capture.begin()
                out = self._forward(**_with(kwargs, inputs))
                rest = capture.end()
        except RuntimeError as error:
            if not capture.refused:
                raise  # a visit's
            out, why = None, str(error)
        finally:
            self._capturing = None
        if out is None:
            for layer, length in zip(layers, lengths, strict=True):
                layer.cumulative_length.copy_(length)  # what was written behind it is written again
            return self._given_up(key, why, bool(capture.segments), kwargs)
        if set(out) <= {"logits", "past_key_values"}:
            self._steps[key] = Step(inputs, capture.segments, rest, type(out), out.logits)
            self.captured += 1
        else:
            self._hopeless.add(key)
            self.refused = f"the model returns {', '.join(out)}"
        return type(out)(**{**out, "logits": out.logits.clone()})  # a replay overwrites its own

    def _given_up(self, key: Any, why: str, visited: bool, kwargs: dict[str, Any]) -> Any:
        """Run a step as ever whose capture broke off."""
        self._hopeless.add(key)
        self.refused = (why.strip() or "unknown error").splitlines()[0]
        warnings.warn(f"a decode step cannot be captured ({self.refused}); it runs without graphs", stacklevel=4)
        if visited:
            self._executor.restart_pass()
        return self._forward(**kwargs)

    def _replay(self, step: Step, kwargs: dict[str, Any]) -> Any:
        given = _flat(kwargs)
        for name, buffer in step.inputs.items():
            buffer.copy_(given[name])
        for segment in step.segments:
            segment.graph.replay()
            segment.result.copy_(self._executor.meet(segment.layer, segment.looked))
        step.rest.replay()
        self.replayed += 1
        return step.kind(logits=step.logits.clone(), past_key_values=kwargs["past_key_values"])


def _flat(kwargs: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    """Arguments by name; those in a dictionary (masks by type of layer) by its name and theirs."""
    found: dict[tuple[str, ...], Any] = {}
    for name, value in sorted(kwargs.items()):
        found |= {(name, key): part for key, part in value.items()} if isinstance(value, dict) else {(name,): value}
    return found


def _with(kwargs: dict[str, Any], inputs: dict[tuple[str, ...], torch.Tensor]) -> dict[str, Any]:
    """``kwargs`` with ``inputs`` in their places."""
    made = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
    for (name, *key), tensor in inputs.items():
        if key:
            made[name][key[0]] = tensor
        else:
            made[name] = tensor
    return made


def _static(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that may be written in any mode."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)
