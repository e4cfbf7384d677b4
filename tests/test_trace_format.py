"""The trace format: literal bytes, round trips, every refusal, and damage of any kind."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from traces import DECODE, PREFILL, GuessTable, ModelSpec, Pass, Trace, TraceError, load, save
from traces.trace import check, rank

HEADER = (
    rb"{\"domains\":[\"prose\"],\"model\":{\"attention_bytes\":0,\"dense_bytes\":0,\"expert_bias\":0,"
    rb"\"expert_size\":64,\"full_layers\":0,\"head_bytes\":0,\"hidden_size\":64,\"kv_bytes\":0,\"name\":\"tiny\","
    rb"\"num_experts\":3,\"num_layers\":2,\"shared_bytes\":0,\"top_k\":2},"
    rb"\"predictors\":{\"router\":{\"wrap\":false}},\"provenance\":{\"command\":\"by hand\"},"
    rb"\"routing\":\"SYNTHETIC\"}"
)
LITERAL = (
    bytes.fromhex("b803000000000000")
    + b'{"__metadata__":{"format":"moe-routing-trace","header":"'
    + HEADER
    + b'","sha256":"aad0777d89005a0e6fd7fa9a2392ef8d51df50935ce48487da7d71d2bd78a3e2","version":"1"},'
    b'"sequence_lengths":{"dtype":"I32","shape":[1],"data_offsets":[0,4]},'
    b'"guesses.router.scores":{"dtype":"F16","shape":[2,2,1,2],"data_offsets":[4,20]},'
    b'"routed_weights":{"dtype":"F16","shape":[2,2,2],"data_offsets":[20,36]},'
    b'"guesses.router.ids":{"dtype":"U8","shape":[2,2,1,2],"data_offsets":[36,44]},'
    b'"phase":{"dtype":"U8","shape":[2],"data_offsets":[44,46]},'
    b'"routed_ids":{"dtype":"U8","shape":[2,2,2],"data_offsets":[46,54]}}  '
    + bytes.fromhex("02000000")  # sequence_lengths: 2
    + bytes.fromhex("003c0038 00000000 003a003a 00000000")  # scores: 1 .5, padding, .75 .75, padding
    + bytes.fromhex("003a0034 00380038 003c0000 00390036")  # weights: .75 .25, .5 .5, 1 0, .625 .375
    + bytes.fromhex("0201 ffff 0001 ffff")  # guessed ids: 2 1, padding, 0 1, padding
    + bytes.fromhex("0001")  # phase: prefill, decode
    + bytes.fromhex("0001 0200 0102 0100")  # routed ids
)


def tiny(**changes: Any) -> Trace:
    """The trace of ``LITERAL``."""
    guesses = GuessTable(
        np.array([[[[2, 1]], [[255, 255]]], [[[0, 1]], [[255, 255]]]], np.uint8),
        np.array([[[[1, 0.5]], [[0, 0]]], [[[0.75, 0.75]], [[0, 0]]]], np.float16),
    )
    trace = Trace(
        model=ModelSpec("tiny", num_layers=2, num_experts=3, top_k=2, hidden_size=64, expert_size=64),
        ids=np.array([[[0, 1], [2, 0]], [[1, 2], [1, 0]]], np.uint8),
        weights=np.array([[[0.75, 0.25], [0.5, 0.5]], [[1, 0], [0.625, 0.375]]], np.float16),
        sequence_lengths=np.array([2], np.int32),
        phase=np.array([PREFILL, DECODE], np.uint8),
        guesses={"router": guesses},
        provenance={"command": "by hand"},
        domains=("prose",),
        routing="SYNTHETIC",
    )
    return replace(trace, **changes)


def random_trace(seed: int = 0, experts: int = 8, wrap: bool = False) -> Trace:
    """Three sequences (5 prefill and 3 decode, 2 decode, 4 prefill) of 3 layers, top-2, with logits and guesses."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(14, 3, experts)).astype(np.float16)
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :2]
    return Trace(
        model=ModelSpec("random", 3, experts, 2, 128, 64),
        ids=ids.astype(np.uint8 if experts <= 255 else np.uint16),
        weights=rng.random((14, 3, 2)).astype(np.float16),
        sequence_lengths=np.array([8, 2, 4], np.int32),
        phase=np.array([0] * 5 + [1] * 3 + [1] * 2 + [0] * 4, np.uint8),
        logits=logits,
        guesses={"router": rank(rng.random((14, 3, 2, experts)), 4, wrap)},
        provenance={"seed": seed, "nested": {"list": [1, 2.5, None, "é"]}},
        domains=("code", "prose", "code"),
        routing="RECORDED",
    )


def same(a: Trace, b: Trace) -> bool:
    arrays = [(a.ids, b.ids), (a.weights, b.weights), (a.sequence_lengths, b.sequence_lengths), (a.phase, b.phase)]
    if a.logits is not None and b.logits is not None:
        arrays.append((a.logits, b.logits))
    if list(a.guesses) != list(b.guesses):
        return False
    for name, table in a.guesses.items():
        other = b.guesses[name]
        arrays += [(table.ids, other.ids), (table.scores, other.scores)]
        if table.wrap != other.wrap:
            return False
    plain = [(t.model, t.provenance, t.domains, t.routing, t.logits is None) for t in (a, b)]
    return plain[0] == plain[1] and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in arrays)


def pack(table: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


def unpack(content: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def refusal(tmp_path: Path, content: bytes) -> str:
    """The one sentence, less the path, with which ``load`` refuses these bytes."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(TraceError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_save_writes_the_literal_bytes(tmp_path: Path) -> None:
    save(tiny(), tmp_path / "tiny.safetensors")
    assert (tmp_path / "tiny.safetensors").read_bytes() == LITERAL
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.safetensors"]


def test_load_reads_the_literal_bytes(tmp_path: Path) -> None:
    (tmp_path / "tiny.safetensors").write_bytes(LITERAL)
    trace = load(tmp_path / "tiny.safetensors")
    assert same(trace, tiny())
    assert not trace.ids.flags.writeable


def test_the_digest_is_the_one_specified() -> None:
    table, data = unpack(LITERAL)
    metadata = table.pop("__metadata__")
    sha = hashlib.sha256(metadata["header"].encode())
    for name in sorted(table):
        entry = table[name]
        sha.update(f"\n{name} {entry['dtype']} {','.join(map(str, entry['shape']))}\n".encode())
        sha.update(data[slice(*entry["data_offsets"])])
    assert sha.hexdigest() == metadata["sha256"]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "trace", [random_trace(), random_trace(1, experts=300), random_trace(2, wrap=True)], ids=["u8", "u16", "wrap"]
)
def test_round_trip_is_exact_and_byte_identical(tmp_path: Path, trace: Trace, verify: bool) -> None:
    save(trace, tmp_path / "a.safetensors")
    read = load(tmp_path / "a.safetensors", verify=verify)
    assert same(read, trace)
    save(read, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_safetensors_package_reads_our_files(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors", reason="the safetensors package is not installed")
    trace = random_trace()
    save(trace, tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert file.metadata()["format"] == "moe-routing-trace"
        assert np.array_equal(file.get_tensor("routed_ids"), trace.ids)
        assert np.array_equal(file.get_tensor("guesses.router.scores"), trace.guesses["router"].scores)


def test_we_read_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    """Another writer may order the tensors and the JSON keys as it likes."""
    numpy_writer = pytest.importorskip("safetensors.numpy", reason="the safetensors package is not installed")
    table, data = unpack(LITERAL)
    metadata = table.pop("__metadata__")
    dtypes = {"U8": np.uint8, "I32": np.int32, "F16": np.float16}
    tensors = {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], dtypes[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in table.items()
    }
    numpy_writer.save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    assert same(load(tmp_path / "a.safetensors"), tiny())


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(tiny(), path)
    with pytest.raises(TraceError, match="provenance does not survive JSON"):
        save(tiny(provenance={"shape": (1, 2)}), path)
    assert path.read_bytes() == LITERAL
    assert list(tmp_path.iterdir()) == [path]


Change = Callable[[dict[str, Any]], Any]


def in_metadata(**values: Any) -> Change:
    return lambda table: table["__metadata__"].update(values)


def in_header(**values: Any) -> Change:
    def change(table: dict[str, Any]) -> None:
        header = json.loads(table["__metadata__"]["header"]) | values
        table["__metadata__"]["header"] = json.dumps({k: v for k, v in header.items() if v is not ...})

    return change


def in_model(**values: Any) -> Change:
    def change(table: dict[str, Any]) -> None:
        model = json.loads(table["__metadata__"]["header"])["model"] | values
        in_header(model={k: v for k, v in model.items() if v is not ...})(table)

    return change


def in_tensor(name: str, **values: Any) -> Change:
    return lambda table: table[name].update(values)


def renamed(name: str, new: str) -> Change:
    return lambda table: table.update({new: table.pop(name)})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("__metadata__"), "metadata 'format' is None"),
        (in_metadata(format="pt"), "metadata 'format' is 'pt'; it must be 'moe-routing-trace'"),
        (in_metadata(version="2"), "metadata 'version' is '2'; this program reads version 1: update this program"),
        (in_metadata(version="one"), "metadata 'version' is 'one'; this program reads version 1: record"),
        (in_metadata(version=1), "metadata 'version' is 1; it must be a string"),
        (in_metadata(header="{"), "metadata 'header' is not valid JSON"),
        (in_metadata(header="[]"), "metadata 'header' is a JSON list; it must be an object"),
        (in_metadata(header='{"model": NaN}'), "metadata 'header' holds NaN"),
        (in_metadata(header='{"model": 1e999}'), "metadata 'header' holds 1e999"),
        (in_metadata(header='{"a": 1, "a": 2}'), "metadata 'header' has the key 'a' twice"),
        (in_metadata(header="[" * 100_000), "metadata 'header' is not valid JSON"),
        (in_metadata(sha256="0" * 64), "metadata 'sha256' is '000000"),
        (in_header(model=...), "header field 'model' is None; it must be of JSON type object"),
        (in_header(domains="prose"), "header field 'domains' is 'prose'; it must be of JSON type list"),
        (in_header(batch=4), "header field 'batch' is unknown"),
        (in_header(routing="MEASURED"), "routing is 'MEASURED'; it must be one of RECORDED, FORCED, SYNTHETIC"),
        (in_header(domains=["a", "b"]), "domains names 2 sequences; give one for each of 1, or none"),
        (in_header(domains=[1]), "domains holds 1; it must be a string of printable characters"),
        (in_header(domains=["\ud800"]), r"domains holds '\ud800'; it must be a string of printable characters"),
        (in_header(predictors={}), "tensor 'guesses.router.scores' is unknown"),
        (in_header(predictors={"router": {}}), "header field 'predictors' says {} of 'router'"),
        (in_header(predictors={"other": {"wrap": False}}), "tensor 'guesses.other.ids' is missing"),
        (in_model(top_k=...), "model field 'top_k' is missing"),
        (in_model(width=1), "model field 'width' is unknown"),
        (in_model(num_experts=70_000), "model field 'num_experts' is 70000; a trace holds at most 65535"),
        (in_model(num_experts=300), "routed_ids is uint8; it must be uint16"),
        (in_model(num_layers=3), "routed_ids has shape [2, 2, 2]; it must be [2, 3, 2] (tokens, layers, top_k)"),
        (renamed("phase", "phases"), "tensor 'phase' is missing"),
        (renamed("guesses.router.ids", "ids"), "tensor 'guesses.router.ids' is missing"),
        (renamed("guesses.router.ids", "pass_lengths"), "tensor 'guesses.router.ids' is missing"),
        (renamed("phase", "x" * 80), "tensor 'xxxxxxxx"),
        (lambda t: t.update(phase=[]), "tensor 'phase' is described by []"),
        (in_tensor("phase", dtype="BF16"), "tensor 'phase' has dtype 'BF16'; allowed are U8, U16, I32, F16"),
        (in_tensor("phase", dtype=["U8"]), "tensor 'phase' has dtype ['U8']"),
        (in_tensor("phase", shape=[-2]), "tensor 'phase' has shape [-2]"),
        (in_tensor("phase", shape=[True]), "tensor 'phase' has shape [True]"),
        (in_tensor("phase", shape=[2, 1]), "phase has shape [2, 1]; it must be [any] (tokens)"),
        (in_tensor("phase", data_offsets=[44]), "tensor 'phase' has data_offsets [44]"),
        (in_tensor("phase", data_offsets=[46, 44]), "tensor 'phase' has data_offsets [46, 44]"),
        (in_tensor("phase", data_offsets=[60, 62]), "tensor 'phase' ends at data byte 62, but the file at 54"),
        (in_tensor("phase", data_offsets=[43, 45]), "tensor 'phase' begins at data byte 43; it must begin at 44"),
        (in_tensor("phase", dtype="F16", data_offsets=[44, 48]), "tensor 'routed_ids' begins at data byte 46"),
    ],
)
def test_refuses_headers(tmp_path: Path, change: Change, sentence: str) -> None:
    table, data = unpack(LITERAL)
    change(table)
    assert refusal(tmp_path, pack(table, data)).startswith(sentence)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the file is shorter than 8 bytes"),
        (b"PK\x03\x04 a zip archive", "the header length is"),
        (LITERAL[:500], "the header ends at byte 960, but the file at 500: it is truncated"),
        (LITERAL[:-1], "tensor 'routed_ids' ends at data byte 54, but the file at 53: it is truncated"),
        (LITERAL + b"\0", "the file has 1 bytes after its last tensor"),
        (LITERAL[:-1] + b"\1", "metadata 'sha256' is"),
        (pack({}, b"").replace(b"{}", b"{a"), "header is not valid JSON"),
        (pack({}, b"").replace(b"{}", b"11"), "header is a JSON int; it must be an object"),
        (LITERAL.replace(b'"phase":', b'"\xff\xff\xff\xff\xff":'), "header is not valid JSON"),
        (
            LITERAL.replace(b'"guesses.router.ids":', b'"sequence_lengths"  :'),
            "header has the key 'sequence_lengths' tw",
        ),
    ],
)
def test_refuses_files(tmp_path: Path, content: bytes, sentence: str) -> None:
    assert refusal(tmp_path, content).startswith(sentence)


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(TraceError, match=r"the file cannot be read"):
            load(path)


def test_unverified_loading_still_checks_the_structure(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(LITERAL[:-1] + b"\1")
    assert load(path, verify=False).ids[1, 1].tolist() == [1, 1]
    path.write_bytes(LITERAL[:-1])
    with pytest.raises(TraceError, match="truncated"):
        load(path, verify=False)


def edited(array: np.ndarray, where: tuple[int, ...], value: Any) -> np.ndarray:
    copy = array.copy()
    copy[where] = value
    return copy


def guessed(where: tuple[int, ...], expert: int | None = None, score: float | None = None) -> dict[str, GuessTable]:
    table = tiny().guesses["router"]
    ids = table.ids if expert is None else edited(table.ids, where, expert)
    scores = table.scores if score is None else edited(table.scores, where, score)
    return {"router": GuessTable(ids, scores)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ids": tiny().ids.astype(np.int64)}, "routed_ids is int64; it must be uint8"),
        ({"ids": tiny().ids[:1]}, "routed_ids has shape [1, 2, 2]; it must be [2, 2, 2]"),
        ({"ids": edited(tiny().ids, (1, 0, 1), 3)}, "routed_ids[1, 0, 1] is 3; the model's experts are 0 to 2"),
        ({"ids": edited(tiny().ids, (1, 0, 1), 1)}, "routed_ids[1, 0] names an expert twice, [1, 1]"),
        ({"weights": tiny().weights.astype(np.float32)}, "routed_weights is float32; it must be float16"),
        ({"weights": edited(tiny().weights, (0, 1, 0), np.nan)}, "routed_weights[0, 1, 0] is nan; it must be finite"),
        ({"weights": edited(tiny().weights, (0, 1, 0), np.inf)}, "routed_weights[0, 1, 0] is inf; it must be finite"),
        ({"weights": edited(tiny().weights, (0, 1, 0), -0.5)}, "routed_weights[0, 1, 0] is -0.5; it must be finite"),
        ({"sequence_lengths": np.array([1], np.int32)}, "sequence_lengths sum to 1; they must sum to the 2 tokens"),
        ({"sequence_lengths": np.array([], np.int32)}, "sequence_lengths is empty"),
        ({"sequence_lengths": np.array([2, 0], np.int32)}, "sequence_lengths[1] is 0; a sequence has at least 1 token"),
        ({"sequence_lengths": np.array([3, -1], np.int32)}, "sequence_lengths[1] is -1; a sequence has at least 1"),
        ({"sequence_lengths": np.array([[2]], np.int32)}, "sequence_lengths has shape [1, 1]; it must be [any]"),
        ({"phase": np.array([0, 2], np.uint8)}, "phase[1] is 2; allowed are 0 (prefill) and 1 (decode)"),
        ({"phase": np.array([1, 0], np.uint8)}, "phase[1] is prefill after decode"),
        ({"logits": np.zeros((2, 2, 2), np.float16)}, "router_logits has shape [2, 2, 2]; it must be [2, 2, 3]"),
        ({"logits": np.full((2, 2, 3), np.nan, np.float16)}, "router_logits[0, 0, 0] is nan; record"),
        ({"routing": "recorded"}, "routing is 'recorded'"),
        ({"domains": ("a\nb",)}, r"domains holds 'a\nb'; it must be a string of printable characters"),
        ({"guesses": {"a b": tiny().guesses["router"]}}, "predictor name 'a b' is not allowed"),
        ({"guesses": guessed((0, 1, 0, 0), expert=1)}, "guesses.router at distance 1: a guess from layer 1 or later"),
        ({"guesses": guessed((0, 1, 0, 0), score=0.5)}, "guesses.router at distance 1: a guess from layer 1 or later"),
        ({"guesses": guessed((0, 0, 0, 0), expert=255)}, "guesses.router at distance 1: ids[0, 0, 0] is 255"),
        ({"guesses": guessed((0, 0, 0, 0), expert=1)}, "guesses.router at distance 1: ids[0, 0] names an expert twice"),
        ({"guesses": guessed((0, 0, 0, 0), score=1.5)}, "guesses.router at distance 1: scores[0, 0, 0] is 1.5"),
        ({"guesses": guessed((0, 0, 0, 1), score=-0.0)}, "guesses.router at distance 1: scores[0, 0, 1] is -0.0"),
        ({"guesses": guessed((0, 0, 0, 0), score=0.25)}, "guesses.router at distance 1: scores[0, 0] [0.25, 0.5]"),
        ({"guesses": guessed((0, 0, 0, 0), score=0.5)}, "guesses.router at distance 1: scores[0, 0] [0.5, 0.5] of ids"),
        (
            {"guesses": {"router": GuessTable(np.zeros((2, 2, 3, 1), np.uint8), np.zeros((2, 2, 3, 1), np.float16))}},
            "guesses.router.ids has 3 distances; allowed are 1 to 2",
        ),
        (
            {"guesses": {"router": GuessTable(np.zeros((2, 2, 1, 4), np.uint8), np.zeros((2, 2, 1, 4), np.float16))}},
            "guesses.router.ids has 4 guesses of a distance; allowed are 1 to 3",
        ),
        (
            {"guesses": {"router": GuessTable(np.zeros((2, 2, 1, 2), np.uint8), np.zeros((2, 2, 1, 1), np.float16))}},
            "guesses.router.scores has shape [2, 2, 1, 1]; it must be [2, 2, 1, 2]",
        ),
    ],
)
def test_refuses_values(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TraceError) as caught:
        save(tiny(**changes), tmp_path / "a.safetensors")
    assert str(caught.value).startswith(sentence)
    assert not list(tmp_path.iterdir())


def test_repeats_far_into_a_large_trace_are_found() -> None:
    """The check goes block by block."""
    ids = np.tile(np.array([0, 1], np.uint8), (40_000, 2, 1))
    trace = Trace(
        tiny().model, ids, np.ones(ids.shape, np.float16), np.array([40_000], np.int32), np.ones(40_000, np.uint8),
        routing="SYNTHETIC",
    )  # fmt: skip
    check(trace)
    ids[39_999, 1] = 1
    with pytest.raises(TraceError, match=r"routed_ids\[39999, 1\] names an expert twice"):
        check(trace)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_is_refused_or_read_as_it_was(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes are changed, removed or put in anywhere; nothing but TraceError comes out, and nothing wrong is read."""
    content = bytearray(LITERAL)
    for _ in range(data.draw(st.integers(1, 3))):
        if not content:
            break
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["set", "digit", "flip", "cut", "insert", "swap", "end"]))
        if kind == "set":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "digit":
            content[at] = data.draw(st.sampled_from(b'0123456789[]{}",:- '))
        elif kind == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        elif kind == "swap":
            other = data.draw(st.integers(0, len(content) - 1))
            content[at], content[other] = content[other], content[at]
        else:
            del content[max(1, at) :]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    try:
        read = load(path)
    except TraceError as error:
        assert "\n" not in str(error)
    else:
        assert same(read, tiny())
    with contextlib.suppress(TraceError):
        load(path, verify=False)


def test_passes_and_visits() -> None:
    trace = random_trace()
    assert trace.passes() == [
        Pass(0, 5, PREFILL, 0, 0, 0, True),
        Pass(5, 1, DECODE, 0, 5, 1, False),
        Pass(6, 1, DECODE, 0, 6, 1, False),
        Pass(7, 1, DECODE, 0, 7, 1, False),
        Pass(8, 1, DECODE, 1, 0, 0, True),
        Pass(9, 1, DECODE, 1, 1, 1, False),
        Pass(10, 4, PREFILL, 2, 0, 0, True),
    ]
    visits = list(trace.visits())
    assert [v.index for v in visits] == list(range(7 * 3))
    assert [v.layer for v in visits] == [0, 1, 2] * 7
    assert [v.index for v in visits if v.starts_sequence] == [0, 12, 18]
    prefill, decode = visits[1], visits[3 * 3 + 2]
    assert (prefill.tokens, prefill.phase, prefill.context, sum(prefill.counts)) == (5, PREFILL, 0, 10)
    assert prefill.experts == list(dict.fromkeys(trace.ids[:5, 1].ravel().tolist()))
    assert (decode.tokens, decode.phase, decode.context, decode.counts) == (1, DECODE, 7, [1, 1])
    assert decode.experts == trace.ids[7, 2].tolist()
    assert decode.guesses == []


def test_the_head_keeps_whole_sequences_and_cuts_the_last(tmp_path: Path) -> None:
    trace = random_trace()
    assert trace.num_decode_tokens == 5
    head = trace.head(4)
    assert (head.num_tokens, head.num_decode_tokens) == (9, 4)
    assert head.sequence_lengths.tolist() == [8, 1] and head.domains == ("code", "prose")
    assert trace.head(3).sequence_lengths.tolist() == [8]
    assert trace.head(1).sequence_lengths.tolist() == [6]
    assert trace.head(5) is trace and trace.head(6) is trace
    save(head, tmp_path / "head.safetensors")
    assert same(load(tmp_path / "head.safetensors"), head)
    with pytest.raises(TraceError, match="decode tokens are 0; keep at least 1"):
        trace.head(0)


def test_ranking_rounds_first_and_breaks_ties_by_id() -> None:
    scores = np.array([[[[0.1, 0.5, 0.50001, 0.9]], [[0.4, 0.3, 0.2, 0.1]]]])
    table = rank(scores, 3)
    assert table.ids.tolist() == [[[[3, 1, 2]], [[255, 255, 255]]]]
    assert table.scores[0, 0, 0].tolist() == [float(np.float16(0.9)), 0.5, 0.5]
    assert rank(scores, 3, wrap=True).ids[0, 1, 0].tolist() == [0, 1, 2]
