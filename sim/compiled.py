"""The compiled driver: the planner's own functions and the plug-ins', put into one file and compiled by numba.

`source` writes that file: every function of `sim.plugin`, `wire`, `decide`, `clock`, `guard` and `loop` and of the
plug-ins in use, renamed so that none collide. All tables of a state lie in two arrays there (one of integers, one of
floats), handed on as bare pointers, so that a function has few arguments and nothing is counted or checked:
``s.size[g]`` becomes ``s[0][s[0][PLACE] + g]``. The file is stored under the sha256 of its
text, so a changed rule is a new driver, and numba finds the machine code of an old one again.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sim import guard
from sim.ledger import Counts, Ledger, LoadLog
from sim.planner import DEMAND, PREFETCH, RETRACT, STREAM, Fitted, config_of, group_sizes, spread
from sim.plugin import Experts
from sim.spec import Options, SpecError
from sim.state import TOTAL_SCALARS, WIRE_SCALARS, Config, State, Times, Wire, new_state, new_wire
from sim.timing import Timing
from traces import DECODE, GuessTable, ModelSpec, Trace
from traces.trace import merged, padding

CORE = ("plugin", "wire", "decide", "clock", "guard", "loop")
SHARED = ("sim.plugin", "sim.state")  # their classes and constants are imported, so that all drivers use the same
KINDS = (DEMAND, PREFETCH, RETRACT, STREAM)
LOG_ROWS = 1 << 20
_loading = threading.Lock()
JIT_CACHE = "EXPERT_LOOKAHEAD_JIT_CACHE"


class CompileError(SpecError):
    """A plug-in that numba cannot compile; it still runs in the SimPy driver."""


def folder() -> Path:
    """Where compiled drivers are kept: the environment's `JIT_CACHE`, or a folder of the user's cache."""
    named = os.environ.get(JIT_CACHE)
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(named) if named else (Path(base) if base else Path.home() / ".cache") / "expert-lookahead"


class Layout(NamedTuple):
    """Where the tables of a structure lie when they are packed into arrays.

    The first ``scalars`` integers are its table of scalars (`State.n`, `Wire.i`), then come a place and a length for
    every table, then their contents.
    """

    scalars: int
    places: dict[str, int]
    floats: frozenset[str]

    def place(self, name: str) -> int:
        """Where the place of a table stands."""
        return self.scalars + 2 * self.places[name]


def _layout(structure: type, scalars: int, first: str) -> Layout:
    names: list[str] = []
    floats: set[str] = set()
    for name, kind in structure.__annotations__.items():
        inner = Experts.__annotations__ if name == "e" else {name: kind}
        names += [field for field in inner if field != first]
        floats |= {field for field, of in inner.items() if "float" in str(of)}
    return Layout(scalars, {name: k for k, name in enumerate(names)}, frozenset(floats))


STATE = _layout(State, TOTAL_SCALARS, "n")
WIRE = _layout(Wire, WIRE_SCALARS, "i")
LAYOUTS = dict.fromkeys(("s", "o", "e", "experts"), STATE) | dict.fromkeys(("w", "ow"), WIRE)
CONSTANTS = dict.fromkeys(("c", "oc"), Config._fields) | dict.fromkeys(("t", "ot"), Times._fields)
BY_SLOTS = frozenset(
    {"members", "free", "landing", "released", "pending", "kept", "displaced", "prefetch_x", "prefetch_evicted"}
    | {f"retract_{name}" for name in ("x", "number", "slot", "copy")}
    | (set(WIRE.places) - {"fifo", "host"})
)
CALLED = ("clock_visit", "loop_unused_bytes")  # in a specialised driver; all else is put where it is called from
TABLES_OF_TIMES = ("expert_ns", "host_expert_ns", "host_shared_ns")


Places = dict[str, int]


class Fixed(NamedTuple):
    """What a specialised driver has as literals in its text.

    Attributes:
        constants: values of `Config` and `Times`.
        state, wire: places of the tables.
    """

    constants: dict[str, int]
    state: Places
    wire: Places


def _tables(structure: State | Wire) -> tuple[Any, dict[str, Any]]:
    """The scalars of a structure, and its tables."""
    tables = structure._asdict()
    if "e" in tables:
        tables |= tables.pop("e")._asdict()
    return tables.pop("n" if "n" in tables else "i"), tables


def places(structures: Sequence[State | Wire], layout: Layout, experts: int) -> Places:
    """Places with room to spare, so that runs of like shape share them; ``experts``: of all layers.

    Tables whose length depends on slots have room for a slot to every expert.
    """
    found: Places = {}
    ends = [layout.scalars + 2 * len(layout.places), 0]
    tables = [_tables(structure)[1] for structure in structures]
    for name in layout.places:
        length = max(len(one[name]) for one in tables)
        if name in BY_SLOTS:
            length = max(length, 4 * experts)
        of = int(name in layout.floats)
        found[name] = ends[of]
        room = 8
        while room < length:
            room *= 4
        ends[of] += room + 8  # a line more: equal places of two tables do not share a set of the processor's cache
    return found


def pack(
    structure: State | Wire, layout: Layout, at: Places | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """All tables of a structure in two arrays, one behind the other or ``at`` places."""
    scalars, tables = _tables(structure)
    if at is not None:
        return _pack_at(scalars, tables, layout, at)
    header = np.zeros(2 * len(tables), np.int64)
    ends = [len(scalars) + len(header), 0]
    for name, values in tables.items():
        of = int(name in layout.floats)
        header[2 * layout.places[name] : 2 * layout.places[name] + 2] = ends[of], len(values)
        ends[of] += len(values)
    whole = [values for name, values in tables.items() if name not in layout.floats]
    parts = [values for name, values in tables.items() if name in layout.floats]
    return np.concatenate([scalars, header, *whole]), np.concatenate([*parts, np.zeros(1)])


def _pack_at(
    scalars: Any, tables: dict[str, Any], layout: Layout, at: Places
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    ends = [max((at[n] + len(v) for n, v in tables.items() if (n in layout.floats) == of), default=0) for of in (0, 1)]
    whole, parts = np.zeros(ends[0], np.int64), np.zeros(ends[1] + 1)
    whole[: len(scalars)] = scalars
    for name, values in tables.items():
        place = layout.place(name)
        whole[place : place + 2] = at[name], len(values)
        (parts if name in layout.floats else whole)[at[name] : at[name] + len(values)] = values
    return whole, parts


def pack_times(times: Times) -> npt.NDArray[np.int64]:
    """Times in one array; the tables behind the scalars."""
    values: list[int] = []
    behind: list[int] = []
    for name, value in times._asdict().items():
        values.append(len(Times._fields) + len(behind) if name in TABLES_OF_TIMES else value)
        behind += value if name in TABLES_OF_TIMES else []
    return np.array(values + behind, np.int64)


class _Renamer(ast.NodeTransformer):
    """Gives a module's functions a prefix, packs tables, and drops annotations and docstrings.

    ``names``: what is renamed; ``modules``: ``module.function`` becomes ``module_function``; ``rules.function``
    becomes the plug-in's.
    """

    def __init__(
        self, names: dict[str, str], modules: set[str], rules: dict[str, str], fixed: Fixed | None = None
    ) -> None:
        self.names, self.modules, self.rules, self.fixed = names, modules, rules, fixed

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        if not isinstance(node.test, ast.Constant):
            return node
        return (node.body if node.test.value else node.orelse) or ast.Pass()

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.test, ast.Constant):
            return node
        return node.body if node.test.value else node.orelse

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        ends = isinstance(node.op, ast.Or)  # the constant that decides
        kept = []
        for value in node.values:
            if isinstance(value, ast.Constant) and bool(value.value) != ends:
                continue
            kept.append(value)
            if isinstance(value, ast.Constant):
                break
        if not kept:
            return ast.Constant(not ends)
        return kept[0] if len(kept) == 1 else ast.BoolOp(node.op, kept)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        known = isinstance(node.op, ast.Not) and isinstance(node.operand, ast.Constant)
        return ast.Constant(not node.operand.value) if known else node  # type: ignore[attr-defined]

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.arg = self.names.get(node.arg, node.arg)
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        if node.value is None:
            return ast.Pass()
        return ast.Assign([node.target], node.value, lineno=node.lineno)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "len" and isinstance(node.args[0], ast.Attribute):
            owner, name = _owner(node.args[0])
            if owner in LAYOUTS:
                return _read(f"{owner}[0][{LAYOUTS[owner].place(name) + 1}]")
        self.generic_visit(node)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        index = self.visit(node.slice)
        if isinstance(node.value, ast.Attribute):
            owner, name = _owner(node.value)
            if owner in LAYOUTS and name not in ("n", "i"):
                layout = LAYOUTS[owner]
                place = self._place(owner, name)
                array = _read(f"{owner}[{int(name in layout.floats)}]")
                return ast.Subscript(array, ast.BinOp(place, ast.Add(), index), node.ctx)
            if owner in CONSTANTS:
                place = _read(f"{owner}[{CONSTANTS[owner].index(name)}]")
                return ast.Subscript(_read(owner), ast.BinOp(place, ast.Add(), index), node.ctx)
        return ast.Subscript(self.visit(node.value), index, node.ctx)

    def _place(self, owner: str, name: str) -> ast.expr:
        layout = LAYOUTS[owner]
        if self.fixed is None:
            return _read(f"{owner}[0][{layout.place(name)}]")
        return ast.Constant((self.fixed.state if layout is STATE else self.fixed.wire)[name])

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        owner, name = _owner(node)
        if owner in LAYOUTS:
            return _read(owner if name == "e" else f"{owner}[0]")
        if owner in CONSTANTS:
            if self.fixed is not None and name in self.fixed.constants:
                return ast.Constant(self.fixed.constants[name])
            return _read(f"{owner}[{CONSTANTS[owner].index(name)}]")
        if owner in self.modules:
            return ast.Name(f"{owner}_{name}", node.ctx)
        if owner == "rules" and name in self.rules:
            return ast.Name(self.rules[name], node.ctx)
        self.generic_visit(node)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        node.name = self.names.get(node.name, node.name)
        node.returns = None
        self.generic_visit(node)
        inlined = self.fixed is not None and node.name not in CALLED
        node.decorator_list = [_read("inlined" if inlined else "njit(cache=True, nogil=True)")]
        return node


def _owner(node: ast.Attribute) -> tuple[str, str]:
    """(variable, attribute) of ``variable.attribute`` and of ``s.e.attribute``; ("", "") for anything else."""
    if isinstance(node.value, ast.Name):
        return node.value.id, node.attr
    if isinstance(node.value, ast.Attribute) and node.value.attr == "e" and isinstance(node.value.value, ast.Name):
        return node.value.value.id, node.attr
    return "", ""


def _read(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _text(module: ModuleType, prefix: str, rules: dict[str, str], fixed: Fixed | None = None) -> str:
    """A module's functions and constants, renamed."""
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    constants = [node for node in tree.body if isinstance(node, ast.Assign) and not _is_type(node)]
    local = module.__name__ not in SHARED
    names = {node.name: f"{prefix}{node.name}" for node in functions}
    if local:
        names |= {name.id: f"{prefix}{name.id}" for node in constants for name in _targets(node)}
    renamer = _Renamer(names, {name for name in CORE if name != "plugin"}, rules, fixed)
    kept: list[ast.AST] = [*(constants if local else []), *functions]
    return "\n\n".join(ast.unparse(ast.fix_missing_locations(renamer.visit(node))) for node in kept)


def _targets(node: ast.Assign) -> list[ast.Name]:
    return [name for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _is_type(node: ast.Assign) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "Any"


def _plugin_text(module: ModuleType, kind: str, fixed: Fixed | None) -> str:
    """A plug-in's functions and constants that functions can use, renamed."""
    text = _text(module, f"{kind}_", {}, fixed)
    unused = (
        "SOURCE",
        "OPTIONS",
        "NEEDS_FUTURE",
        "POOLED",
        "WHOLE_LAYER",
        "WANTS_GUESSES",
        "WANTS_TRUST",
        "fit",
        "sizes",
    )
    tree = ast.parse(text)
    drop = {f"{kind}_{name}" for name in (*unused, "WANTS_AGREEMENT")}
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.FunctionDef) and node.name in drop)
        and not (isinstance(node, ast.Assign) and any(name.id in drop for name in _targets(node)))
    ]
    return ast.unparse(tree)


INLINED = "inlined = njit(nogil=True, error_model='numpy', forceinline=True)"

DEFAULTS = """
@njit(cache=True, nogil=True)
def no_touch(params, experts, x, tokens, now):
    return 0.0

@njit(cache=True, nogil=True)
def no_admit(params, experts, x, victim, now):
    return True

@njit(cache=True, nogil=True)
def no_worth(params, guess, link):
    return 0.0

@njit(cache=True, nogil=True)
def no_loads(params, misses):
    return misses.number
"""


ENTRY = """
@njit(cache=True, nogil=True)
def entry(s, w, c, t, o, ow, oc, ot, rules, ids, rows, tokens, decode, opens, guess_rows, guess_ids, guess_scores,
          distances, guesses, no_guess, wraps, dense_ns, head_ns, following, knows_future, whole_layer, cold, first,
          last, access, counts, lengths, log, logs, seen):
    return loop_run(
        (pointer(s[0]), pointer(s[1])), (pointer(w[0]), pointer(w[1])), pointer(c), pointer(t),
        (pointer(o[0]), pointer(o[1])), (pointer(ow[0]), pointer(ow[1])), pointer(oc), pointer(ot),
        rules, pointer(ids), pointer(rows), pointer(tokens), pointer(decode), pointer(opens), pointer(guess_rows),
        pointer(guess_ids), pointer(guess_scores), distances, guesses, no_guess, wraps, pointer(dense_ns),
        pointer(head_ns), pointer(following), knows_future, whole_layer, cold, first, last, access, pointer(counts),
        pointer(lengths), pointer(log), logs, pointer(seen))

@njit(cache=True, nogil=True)
def left_over(s, w, c, t):
    return loop_unused_bytes((pointer(s[0]), pointer(s[1])), (pointer(w[0]), pointer(w[1])), pointer(c), pointer(t))
"""


STEP = """
@njit(cache=True, nogil=True)
def step(s, w, c, t, o, ow, oc, ot, rules, index, layer, decode, opens, cold, routed, used, dense_ns, head_ns):
    loop_step(
        (pointer(s[0]), pointer(s[1])), (pointer(w[0]), pointer(w[1])), pointer(c), pointer(t),
        (pointer(o[0]), pointer(o[1])), (pointer(ow[0]), pointer(ow[1])), pointer(oc), pointer(ot),
        rules, index, layer, decode, opens, cold, routed, used, dense_ns, head_ns)
"""


def source(options: Options, fixed: Fixed | None = None) -> str:
    """The text of the driver for the plug-ins of ``options``; with ``fixed``, for runs of that shape only."""
    modules = (options.cache.module, options.policy.module, options.miss_rule.module)
    found = map(os.stat, _files(modules))
    stamps = tuple((file.st_mtime_ns, file.st_size) for file in found)
    return _source(modules, stamps, None if fixed is None else json.dumps(fixed))


@cache
def _files(modules: tuple[ModuleType, ModuleType, ModuleType]) -> tuple[str, ...]:
    here = Path(__file__).parent
    return (*(str(module.__file__) for module in modules), *(str(here / f"{name}.py") for name in (*CORE, "state")))


@cache
def _source(
    modules: tuple[ModuleType, ModuleType, ModuleType], stamps: tuple[tuple[int, int], ...], shape: str | None
) -> str:
    fixed = None if shape is None else Fixed(*json.loads(shape))
    plugins = dict(zip(("cache", "policy", "miss"), modules, strict=True))
    wanted = {"score": "cache", "touch": "cache", "admit": "cache", "worth": "policy", "loads": "miss"}
    rules = {name: f"{kind}_{name}" if hasattr(plugins[kind], name) else f"no_{name}" for name, kind in wanted.items()}
    parts = [
        "from numba import njit",
        "from sim.plugin import Experts, Guess, LinkView, Misses, Now",
        "from sim.pointers import pointer",
        "from sim.state import *",
        INLINED,
        DEFAULTS,
        *(_plugin_text(module, kind, fixed) for kind, module in plugins.items()),
    ]
    for name in CORE:
        module = importlib.import_module(f"sim.{name}")
        parts.append(_text(module, "" if name == "plugin" else f"{name}_", rules, fixed))
    state = hashlib.sha256((Path(__file__).parent / "state.py").read_bytes()).hexdigest()
    return "\n\n".join([*parts, ENTRY, *([STEP] if fixed is None else []), f"STATE_SHA256 = {state!r}", ""])


def driver(text: str) -> ModuleType:
    """The compiled functions of one source text; all threads get the same ones, so that they compile once.

    Raises:
        SpecError: numba is not installed.
    """
    with _loading:
        return _load(text)


@cache
def _load(text: str) -> ModuleType:
    if importlib.util.find_spec("numba") is None:
        raise SpecError(
            "the compiled driver needs numba, which is not installed; install the extra 'fast', or use --driver simpy"
        )
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    name = f"expert_lookahead_driver_{key}"
    path = folder() / f"{name}.py"
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def table(length: int, fill: float = 0) -> npt.NDArray[Any]:
    """A table as a numpy array."""
    return np.full(length, fill, np.float64 if isinstance(fill, float) else np.int64)


class Rules(NamedTuple):
    """Parameters of the plug-ins in use."""

    cache: Any
    policy: Any
    miss: Any


class Arrays(NamedTuple):
    """A trace as the compiled loop reads it (see `sim.loop.run`); made once, used by every setting of the trace."""

    ids: npt.NDArray[Any]
    rows: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    decode: npt.NDArray[np.int64]
    opens: npt.NDArray[np.int64]
    context: npt.NDArray[np.int64]
    weights: npt.NDArray[np.int64]
    most_tokens: int
    no_expert: int


class GuessArrays(NamedTuple):
    """Guesses as the compiled loop reads them: [rows, L, D, M], and the row of every pass."""

    ids: npt.NDArray[Any]
    scores: npt.NDArray[np.float32]
    rows: npt.NDArray[np.int64]
    wraps: bool


def arrays_of(trace: Trace) -> Arrays:
    """The arrays of a trace."""
    columns = np.array(
        [[p.first, p.tokens, p.phase == DECODE, p.opens, p.context, p.following] for p in trace.passes()]
    )
    first, tokens, decode, opens, context, following = np.ascontiguousarray(columns.T, np.int64)
    ids = np.ascontiguousarray(trace.ids)
    return Arrays(
        ids, first, tokens, decode, opens, context, following, int(tokens.max()), padding(trace.model.num_experts)
    )


def guess_arrays(guesses: GuessTable | None, arrays: Arrays) -> GuessArrays:
    """The arrays of a predictor; visits of several tokens get rows of their own, merged."""
    if guesses is None:
        none = np.zeros((1, 1, 1, 1), np.uint8)
        return GuessArrays(none, none.astype(np.float32), np.zeros(len(arrays.rows), np.int64), False)
    ids, scores = np.ascontiguousarray(guesses.ids), guesses.scores.astype(np.float32)
    several = np.flatnonzero((arrays.tokens > 1) & (arrays.decode > 0))
    rows = arrays.rows.copy()
    if len(several):
        ids, scores, rows = _merge(ids, scores, arrays, several, rows)
    return GuessArrays(ids, scores, rows, guesses.wrap)


def _merge(
    ids: npt.NDArray[Any],
    scores: npt.NDArray[np.float32],
    arrays: Arrays,
    several: npt.NDArray[Any],
    rows: npt.NDArray[Any],
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    _, layers, distances, most = ids.shape
    width = most * int(arrays.tokens[several].max())
    shape = (len(ids) + len(several), layers, distances, width)
    wide_ids = np.full(shape, arrays.no_expert, ids.dtype)
    wide_scores = np.zeros(shape, np.float32)
    wide_ids[: len(ids), ..., :most], wide_scores[: len(ids), ..., :most] = ids, scores
    for k, p in enumerate(several.tolist()):
        row = rows[p] = len(ids) + k
        span = slice(int(arrays.rows[p]), int(arrays.rows[p] + arrays.tokens[p]))
        for layer in range(layers):
            for d in range(distances):
                found = merged(ids[span, layer, d].tolist(), scores[span, layer, d].tolist())
                wide_ids[row, layer, d, : len(found.experts)] = found.experts
                wide_scores[row, layer, d, : len(found.scores)] = found.scores
    return wide_ids, wide_scores, rows


PassTimes = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


def pass_times(arrays: Arrays, timing: Timing) -> PassTimes:
    """Nanoseconds of a layer's dense part and of the head, for every pass."""
    dense, head = np.empty(len(arrays.tokens), np.int64), np.empty(len(arrays.tokens), np.int64)
    for n in np.unique(arrays.tokens).tolist():
        of = arrays.tokens == n
        dense[of] = timing.all_dense_ns(n, arrays.context[of])
        head[of] = timing.head_ns(n)
    return dense, head


class Run(NamedTuple):
    """What one compiled run leaves: counts [2, TOTAL_COUNTS], and the length of every pass in ns."""

    counts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


class Parts(NamedTuple):
    """One planner's tables: state, link, constants, times."""

    s: State
    w: Wire
    c: Config
    t: Times

    def packed(self, fixed: Fixed | None) -> tuple[Any, ...]:
        """As the compiled functions take them."""
        state, wire = (None, None) if fixed is None else (fixed.state, fixed.wire)
        tables = (pack(self.s, STATE, state), pack(self.w, WIRE, wire))
        return (*tables, np.array(self.c, np.int64), pack_times(self.t))


def parts_of(
    model: ModelSpec, options: Options, slots: int, timing: Timing, fitted: Fitted, most_tokens: int, max_guesses: int
) -> Parts:
    """Tables of a fresh planner."""
    sizes = group_sizes(model, options, slots, fitted.sizes)
    c = config_of(model, options, sizes, max_guesses, True)
    most = model.num_experts * (model.num_layers if options.pooled else 1)
    limits = spread(c.landing_slots if c.lends else 0, [0] * len(sizes), [most] * len(sizes), sizes)
    s = new_state(c, sizes, limits, fitted.table, fitted.first_use, table)
    w = new_wire(c.first_stream + c.stream_slots, model.num_experts, options.max_submitted, table)
    tables = timing.tables()
    tables.make_room(most_tokens)
    guard.begin_run(s, c)
    return Parts(s, w, c, tables.times)


USUAL = {"copy_stream": 1, "write_back": 0, "keep_stale": 0, "max_submitted": 2}
BY_RULES = ("hints", "trust", "guard", "lends", "bypass", "touches", "has_rule", "clock", "layers", "experts", "top_k")
SPECIALISED_FROM = 20_000  # visits of a run: shorter ones are not worth a driver of their own


def fixed_of(own: Parts, shadow: Parts, visits: int) -> Fixed | None:
    """What a driver for runs like this one has as literals; None where the general driver will do."""
    known = own.c._asdict() | own.t._asdict()
    if visits < SPECIALISED_FROM or any(known[name] != value for name, value in USUAL.items()):
        return None
    same = {name: getattr(own.c, name) for name in BY_RULES if getattr(own.c, name) == getattr(shadow.c, name)}
    both = (own, shadow)
    experts = own.c.layers * own.c.experts
    return Fixed(USUAL | same, places([p.s for p in both], STATE, experts), places([p.w for p in both], WIRE, experts))


def guarded(function: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """The compiled function; numba's complaints about a plug-in become a `CompileError`."""

    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            if not type(error).__module__.startswith("numba"):
                raise
            names = f"{options.policy.name}, {options.cache.name}, {options.miss}"
            said = [line.strip() for line in str(error).splitlines() if line.strip() and "Failed in" not in line]
            reason = said[0] if said else type(error).__name__
            raise CompileError(f"numba cannot compile {names} ({reason}); the SimPy driver runs them") from None

    return call


def run(
    arrays: Arrays,
    guesses: GuessArrays,
    model: ModelSpec,
    options: Options,
    slots: int,
    timing: Timing,
    fitted: Fitted,
    cold: bool = False,
    log: LoadLog | None = None,
    times: PassTimes | None = None,
) -> Run:
    """Simulate one setting; ``log`` gets its loads; ``times`` if they are known already.

    Raises:
        CompileError: a plug-in numba cannot compile.
        SpecError: numba is not installed.
    """
    a, g = arrays, guesses
    planner = parts_of(model, options, slots, timing, fitted, a.most_tokens, g.ids.shape[3])
    other, c, most = planner, planner.c, len(planner.s.prefetch_x)
    if c.guard:
        plain = options.without_prefetching()
        other = parts_of(model, plain, slots, timing, fitted, a.most_tokens, 1)
    fixed = fixed_of(planner, other, len(a.rows) * model.num_layers)
    module = driver(source(options, fixed))
    entry = guarded(module.entry, options)
    own = shadow = planner.packed(fixed)
    if c.guard:
        shadow = other.packed(fixed)
    layers = model.num_layers
    passes = len(a.rows)
    counts = np.zeros((2, module.loop_TOTAL_COUNTS), np.int64)
    lengths = np.zeros(passes, np.int64)
    dense, head = pass_times(a, timing) if times is None else times
    following = np.array(fitted.following, np.int64)
    most_lines = layers * (3 * model.num_experts + 2 * c.places + most + 4)
    rows = np.zeros((max(LOG_ROWS, most_lines) if log is not None else 0, 5), np.int64)
    block = max(1, len(rows) // most_lines) if log is not None else passes
    seen = np.zeros(model.num_experts, np.int64)
    rules = Rules(options.cache.params, options.policy.params, options.miss_rule.params)
    access = 0
    for first in range(0, passes, block):
        last = min(passes, first + block)
        access, lines = entry(
            *own, *shadow, rules, a.ids, a.rows, a.tokens, a.decode, a.opens, g.rows, g.ids, g.scores, g.ids.shape[2],
            g.ids.shape[3], a.no_expert, g.wraps, dense, head, following,
            bool(len(following)), options.whole_layer, cold, first, last, access, counts, lengths, rows,
            log is not None, seen,
        )  # fmt: skip
        if log is not None:
            _write(log, rows[:lines], model.num_experts)
    unused = int(module.left_over(*own))
    counts[1, module.loop_H2D_BYTES] += unused
    counts[1, module.loop_WASTED_BYTES] += unused
    return Run(counts, lengths)


def _write(log: LoadLog, rows: npt.NDArray[np.int64], experts: int) -> None:
    for kind, visit, x, slot, evicted in rows.tolist():
        gone = None if evicted < 0 else (evicted // experts, evicted % experts)
        log.line(visit, x // experts, x % experts, KINDS[kind], slot, gone)


def ledger(found: Run, arrays: Arrays, log: LoadLog | None = None) -> Ledger:
    """A compiled run as the SimPy driver would leave it."""
    prefill, decode = (
        Counts(**dict(zip((f.name for f in fields(Counts)), row, strict=True))) for row in found.counts.tolist()
    )
    is_decode = arrays.decode > 0
    return Ledger(
        phases=(prefill, decode),
        decode_ns=found.lengths[is_decode].tolist(),
        timed=arrays.weights[is_decode].tolist(),
        ttft_ns=found.lengths[~is_decode].tolist(),
        log=log or LoadLog(),
    )
