"""Thousands of damaged trace files: each is refused in one sentence or read exactly, in bounded memory.

Damage is done to the bytes, which the digest catches, and to what the bytes say, with the digest made right again, so
that every later check is reached. All of it follows from a seed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from traces import GuessTable, ModelSpec, Trace, TraceError, load, save
from traces.format import MAX_HEADER_BYTES
from traces.trace import rank

CHUNKS, FILES = 12, 500
DTYPES = {"U8": "u1", "U16": "<u2", "I32": "<i4", "F16": "<f2"}
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 255, 300, 2**31, 2**48, 2**63, 10**300, 1.5, -0.0, "", "x", "0", "SYNTHETIC",
    "../../../etc/passwd", "/dev/zero", "a\nb", "\x00", "\ud800", "x" * 5000, [], {}, [[]], ["prose"], [1, 2],
    {"wrap": True}, {"wrap": 1}, {"x": {"wrap": False}},
)  # fmt: skip


class Tensor(NamedTuple):
    name: str
    dtype: str
    shape: list[Any]
    data: bytes


class Content(NamedTuple):
    """What a file says: its ``header`` and tensors, in the order of their bytes."""

    header: dict[str, Any]
    tensors: list[Tensor]


def trace(experts: int, wrap: bool, batches: bool) -> Trace:
    """Nine tokens of three sequences, 3 layers, top-2, with logits and guesses at two distances."""
    rng = np.random.default_rng(experts)
    logits = rng.normal(size=(9, 3, experts)).astype(np.float16)
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :2].astype(np.uint8 if experts <= 255 else np.uint16)
    return Trace(
        ModelSpec("tiny", 3, experts, 2, 64, 64),
        ids,
        rng.random(ids.shape).astype(np.float16),
        np.array([4, 3, 2], np.int32),
        np.array([0] * 5 + [1] * 4 if batches else [0, 0, 1, 1, 0, 1, 1, 1, 1], np.uint8),
        logits=logits if batches else None,
        guesses={"router": rank(rng.random((9, 3, 2, experts)), 3, wrap)},
        provenance={"command": "by hand", "list": [1, {"a": None}]},
        domains=("code", "prose", "code"),
        pass_lengths=np.array([3, 2, 3, 1], np.int32) if batches else None,
        token_sequence=np.array([0, 0, 1, 2, 0, 1, 0, 2, 1], np.int32) if batches else None,
        routing="SYNTHETIC",
    )


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("originals")
    contents = []
    for number, (experts, wrap, batches) in enumerate([(4, False, False), (300, True, False), (5, False, True)]):
        save(trace(experts, wrap, batches), folder / f"{number}")
        contents.append((folder / f"{number}").read_bytes())
    return contents


def read(content: bytes) -> Content:
    """A second reader, after the format's page, that trusts the file."""
    start = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:start])
    header = json.loads(table.pop("__metadata__")["header"])
    entries = sorted(table.items(), key=lambda item: item[1]["data_offsets"])
    return Content(
        header,
        [
            Tensor(name, e["dtype"], e["shape"], content[start + e["data_offsets"][0] : start + e["data_offsets"][1]])
            for name, e in entries
        ],
    )


def sealed(content: Content) -> bytes:
    """A second writer: offsets and digest are right, whatever the header and tensors are."""
    header = json.dumps(content.header)
    sha = hashlib.sha256(header.encode())
    for name, dtype, shape, data in sorted(content.tensors, key=lambda tensor: tensor.name):
        sha.update(f"\n{name} {dtype} {','.join(map(str, shape))}\n".encode(errors="replace"))
        sha.update(data)
    metadata = {"format": "moe-routing-trace", "header": header, "sha256": sha.hexdigest(), "version": "1"}
    table: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, dtype, shape, data in content.tensors:
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(t.data for t in content.tensors)


# Damage to the bytes


def flip(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 3)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def splice(content: bytearray, rng: random.Random) -> None:
    """Some bytes are copied over, put in, or removed elsewhere."""
    size = rng.randint(1, 64)
    source, target = rng.randrange(len(content)), rng.randrange(len(content))
    some = content[source : source + size]
    content[target : target + rng.choice((0, size, len(some)))] = some if rng.random() < 0.7 else b""


def truncate(content: bytearray, rng: random.Random) -> None:
    del content[rng.choice((rng.randrange(16), rng.randrange(len(content)), len(content) - 1)) :]


def lengthen(content: bytearray, rng: random.Random) -> None:
    """The header's length is another."""
    length = rng.choice((0, 1, len(content) - 8, len(content), 2**24 + 1, 2**30, 2**63, rng.randrange(len(content))))
    content[:8] = length.to_bytes(8, "little")


def digit(content: bytearray, rng: random.Random) -> None:
    """A digit or sign of the JSON is another."""
    end = min(8 + int.from_bytes(content[:8], "little"), len(content))
    places = [i for i in range(8, end) if content[i] in b'0123456789[]{}",:-']
    content[rng.choice(places)] = rng.choice(b'0123456789[]{}",:- eE.')


# Damage to what the bytes say


def header_field(content: Content, rng: random.Random) -> None:
    place: Any = content.header
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys or rng.random() < 0.05:
            break
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        if rng.random() < 0.15:
            del place[key]
        else:
            place[key] = copy.deepcopy(rng.choice(VALUES))
        return
    if isinstance(place, dict):
        place[rng.choice(("batch", "", "../x", "wrap", "name", "x" * 300))] = rng.choice(VALUES)
    else:
        place.append(rng.choice(VALUES))


def value(content: Content, rng: random.Random) -> None:
    """Some values of a tensor are others: edges, neighbours, a value of elsewhere."""
    at = rng.randrange(len(content.tensors))
    tensor = content.tensors[at]
    array = np.frombuffer(tensor.data, DTYPES[tensor.dtype]).copy()
    for _ in range(rng.choice((1, 1, 1, 3))):
        bits = array.view(f"u{array.itemsize}")
        edges = (0, 1, 2, 3, 4, 2**15, 0x3C00, 0x7C00, 0x7E00, 2**31, 2**32 - 1)
        place = rng.randrange(len(bits))
        other = int(bits[rng.randrange(len(bits))])
        bits[place] = rng.choice((*edges, other, other, other, int(bits[place]) + 1)) % 2 ** (8 * array.itemsize)
    content.tensors[at] = tensor._replace(data=array.tobytes())


def swap(content: Content, rng: random.Random) -> None:
    """Two tensors exchange their names, bytes, shapes or dtypes; or two rows of one are exchanged."""
    a, b = rng.sample(range(len(content.tensors)), 2)
    one, other = content.tensors[a], content.tensors[b]
    what = rng.choice((("name",), ("data",), ("shape",), ("dtype",), ("data", "shape", "dtype"), ()))
    for field in what:
        content.tensors[a] = content.tensors[a]._replace(**{field: getattr(other, field)})
        content.tensors[b] = content.tensors[b]._replace(**{field: getattr(one, field)})
    if not what:
        rows = np.frombuffer(one.data, DTYPES[one.dtype]).reshape(one.shape).copy()
        first, second = rng.randrange(len(rows)), rng.randrange(len(rows))
        rows[[first, second]] = rows[[second, first]]
        content.tensors[a] = one._replace(data=rows.tobytes())


def shape(content: Content, rng: random.Random) -> None:
    """A tensor has another shape, its bytes cut or repeated to fit where that is possible."""
    at = rng.randrange(len(content.tensors))
    tensor = content.tensors[at]
    sizes = list(tensor.shape)
    kind = rng.randrange(4)
    if kind == 0:
        sizes[rng.randrange(len(sizes))] = rng.choice((0, 1, 2, 3, 8, 10, 2**47, 2**48, -1, 1.0, True, None, "9"))
    elif kind == 1:
        sizes.insert(rng.randrange(len(sizes) + 1), rng.choice((0, 1, 2)))
    elif kind == 2:
        rng.shuffle(sizes)
    else:
        sizes.pop()
    data = tensor.data
    if rng.random() < 0.7 and all(type(s) is int and 0 <= s < 100 for s in sizes):
        size = int(np.prod(sizes, dtype=np.int64)) * np.dtype(DTYPES[tensor.dtype]).itemsize
        data = (data * (size // len(data) + 1))[:size]
    content.tensors[at] = tensor._replace(shape=sizes, data=data)


def ragged(content: Content, rng: random.Random) -> None:
    """One tensor, or all that have it, loses the last token or layer."""
    axis, only = rng.choice(((0, True), (0, False), (1, True), (1, False))), rng.randrange(len(content.tensors))
    for at, tensor in enumerate(content.tensors):
        if (axis[1] and at != only) or len(tensor.shape) <= axis[0]:
            continue
        rows = np.frombuffer(tensor.data, DTYPES[tensor.dtype]).reshape(tensor.shape)
        rows = rows[:-1] if axis[0] == 0 else rows[:, :-1]
        content.tensors[at] = tensor._replace(shape=list(rows.shape), data=rows.tobytes())


def tensors(content: Content, rng: random.Random) -> None:
    """A tensor is left out, comes with another name, or comes twice; or all stand in another order."""
    at = rng.randrange(len(content.tensors))
    names = (
        "phases",
        "../phase",
        "/etc/passwd",
        "guesses..ids",
        "x" * 400,
        "\ud800",
        "",
        "router_logits",
        "pass_lengths",
    )
    kind = rng.randrange(4)
    if kind == 0:
        content.tensors.pop(at)
    elif kind == 1:
        content.tensors[at] = content.tensors[at]._replace(name=rng.choice(names))
    elif kind == 2:
        content.tensors.append(content.tensors[at]._replace(name=rng.choice(names)))
    else:
        rng.shuffle(content.tensors)


BYTES: tuple[Callable[[bytearray, random.Random], None], ...] = (flip, splice, truncate, lengthen, digit)
SAYS: tuple[Callable[[Content, random.Random], None], ...] = (header_field, value, swap, shape, ragged, tensors)


def damaged(originals: list[bytes], rng: random.Random) -> tuple[bytes, bool]:
    """A damaged file, and whether its digest was made right again."""
    original = rng.choice(originals)
    if rng.random() < 0.35:
        content = bytearray(original)
        rng.choice(BYTES)(content, rng)
        return bytes(content), False
    said = read(original)
    for _ in range(rng.choice((1, 1, 2))):
        try:
            rng.choice(SAYS)(said, rng)
        except (ValueError, KeyError, IndexError, TypeError, ZeroDivisionError, AttributeError):
            break  # the second change does not apply to what the first one left
    return sealed(said), True


def same(content: Content, other: Content) -> bool:
    model = content.header["model"]
    return (
        {k: other.header["model"][k] for k in model} == model
        and {**content.header, "model": 0} == {**other.header, "model": 0}
        and sorted(content.tensors) == sorted(other.tensors)
    )


@pytest.mark.parametrize("seed", range(CHUNKS))
def test_damaged_files_are_refused_or_read_exactly(
    tmp_path: Path, originals: list[bytes], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    rng = random.Random(seed)
    path, copied = tmp_path / "damaged", tmp_path / "copied"
    sentences: set[str] = set()
    reads = 0
    for number in range(FILES):
        content, resealed = damaged(originals, rng)
        path.write_bytes(content)
        for verify in (True, False):
            try:
                found = load(path, verify=verify)
            except TraceError as error:
                message = str(error).removeprefix(f"{path}: ")
                assert "\n" not in message and len(message) < 600, number
                sentences.add(re.sub(r"\d+|\[.*?\]|'.*?'", "", message)[:60])
                continue
            assert sum(p.tokens for p in found.passes()) == found.num_tokens
            assert sum(p.opens for p in found.passes()) >= 1
            if not verify:
                continue
            reads += 1
            visits = list(found.visits())
            assert sum(sum(v.counts) for v in visits) == found.ids.size
            save(found, copied)
            assert same(read(content), read(copied.read_bytes())), number
            assert list(load(copied).visits()) == visits
            if not resealed:
                assert any(same(read(content), read(original)) for original in originals), number
    assert reads >= FILES // 20
    assert len(sentences) >= 30


# What the sizes in a file cost


def peak_bytes(path: Path) -> tuple[int, str]:
    """The most memory that loading takes, and how the file is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(TraceError) as caught:
            load(path)
        return tracemalloc.get_traced_memory()[1], str(caught.value).removeprefix(f"{path}: ")
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 1 << 30, (1 << 64) - 1])
def test_a_header_of_a_gigabyte_is_not_read(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(length.to_bytes(8, "little") + b"{")
    os.truncate(path, (1 << 30) + 8)
    peak, message = peak_bytes(path)
    assert message.startswith(f"the header length is {length} bytes; allowed are {MAX_HEADER_BYTES}: the file is dam")
    assert peak < 1 << 20


@pytest.mark.parametrize("item", [b"[],", b'{"a":0},', b'"",', b"0,", b"[["])
def test_the_largest_header_takes_bounded_memory(tmp_path: Path, item: bytes) -> None:
    """Python objects are larger than their JSON, but by a constant factor."""
    size = 1 << 20
    text = b'{"a":[' + item * ((size - 16) // len(item)) + b"0]}"
    path = tmp_path / "a"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    peak, message = peak_bytes(path)
    assert message.startswith(("metadata 'format' is None", "header is not valid JSON"))
    assert peak < 100 * size


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ([2**47], "tensor 'phase' has data_offsets"),
        ([0, 2**47, 2**47], "tensor 'phase' has shape [0, 140737488355328, 140737488355328]; it must be at most 4"),
        ([-9], "tensor 'phase' has shape [-9]; it must be at most 4 integers, 1 to"),
        ([2**64], "tensor 'phase' has shape [18446744073709551616]; it must be"),
        ([1] * 1000, "tensor 'phase' has shape [1, 1, 1"),
    ],
)
def test_claimed_sizes_are_not_believed(
    tmp_path: Path, originals: list[bytes], sizes: list[int], sentence: str
) -> None:
    said = read(originals[0])
    changed = [t._replace(shape=sizes) if t.name == "phase" else t for t in said.tensors]
    path = tmp_path / "a"
    path.write_bytes(sealed(Content(said.header, changed)))
    peak, message = peak_bytes(path)
    assert message.startswith(sentence) and peak < 1 << 20


def test_claimed_offsets_are_not_believed(tmp_path: Path, originals: list[bytes]) -> None:
    path = tmp_path / "a"
    path.write_bytes(originals[0].replace(b'"data_offsets":[0,12]', b'"data_offsets":[0,99]'))
    assert peak_bytes(path)[1].startswith("tensor 'sequence_lengths' has data_offsets [0, 99]; they must span the 12")


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "..", "a/b", "a\\b", "", "a.b", "x" * 65, "é"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, originals: list[bytes], name: str) -> None:
    """A predictor's name is part of a tensor's name, and of nothing on the disk; even so."""
    said = read(originals[0])
    said.header["predictors"] = {name: said.header["predictors"]["router"]}
    renamed = [t._replace(name=t.name.replace("router", name)) for t in said.tensors]
    path = tmp_path / "a"
    path.write_bytes(sealed(Content(said.header, renamed)))
    assert re.match(r"predictor name .* is not allowed|tensor .* is unknown: its name has", peak_bytes(path)[1])
    whole = trace(4, False, False)
    with pytest.raises(TraceError, match=r"predictor name .* is not allowed"):
        replace(whole, guesses={name: whole.guesses["router"]})


def test_long_names_and_numbers_are_quoted_in_part(tmp_path: Path, originals: list[bytes]) -> None:
    said = read(originals[0])
    path = tmp_path / "a"
    for field, content in (("name", "x" * 10**6), ("x" * 10**6, 1), ("hidden_size", 10**4000), ("top_k", "1" * 10**6)):
        model = {**said.header["model"], field: content}
        path.write_bytes(sealed(Content({**said.header, "model": model}, said.tensors)))
        if field == "name":
            assert load(path).model.name == content
        else:
            assert len(peak_bytes(path)[1]) < 600
    for change in ({"x" * 10**6: 1}, {"predictors": {"y" * 10**6: {"wrap": True}}}, {"routing": "z" * 10**6}):
        path.write_bytes(sealed(Content({**said.header, **change}, said.tensors)))
        assert len(peak_bytes(path)[1]) < 600


def test_provenance_is_not_nested_without_end(tmp_path: Path, originals: list[bytes]) -> None:
    said = read(originals[0])
    path = tmp_path / "a"
    for depth in (31, 32, 500):
        nested: Any = 0
        for _ in range(depth):
            nested = [nested]
        path.write_bytes(sealed(Content({**said.header, "provenance": {"a": nested}}, said.tensors)))
        if depth < 32:
            save(load(path), tmp_path / "b")
            assert load(tmp_path / "b").provenance == {"a": nested}
            continue
        assert peak_bytes(path)[1] == "provenance holds lists or objects more than 32 deep; flatten it"
        with pytest.raises(TraceError, match="more than 32 deep"):
            save(replace(trace(4, False, False), provenance={"a": nested}), tmp_path / "b")


def test_a_large_file_is_examined_in_little_memory(tmp_path: Path) -> None:
    """20,000 tokens x 48 layers x top-8, with guesses: mapping takes next to nothing, examining less than the file."""
    ids = np.broadcast_to(np.arange(8, dtype=np.uint8), (20_000, 48, 8))
    guesses = np.broadcast_to(np.arange(2, dtype=np.uint8), (20_000, 48, 1, 2)).copy()
    guesses[:, 47:] = 255
    scores = np.full(guesses.shape, 0.5, np.float16)
    scores[:, 47:] = 0
    whole = Trace(
        ModelSpec("large", 48, 128, 8, 64, 64), ids, np.full(ids.shape, 0.125, np.float16),
        np.array([20_000], np.int32), np.ones(20_000, np.uint8), guesses={"g": GuessTable(guesses, scores)},
        routing="SYNTHETIC",
    )  # fmt: skip
    save(whole, tmp_path / "a")
    for verify, most in ((False, 1 << 20), (True, 4 << 20)):
        tracemalloc.start()
        load(tmp_path / "a", verify=verify)
        assert tracemalloc.get_traced_memory()[1] < most
        tracemalloc.stop()
