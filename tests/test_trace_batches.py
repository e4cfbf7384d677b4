"""Sequences that decode together: literal bytes, what follows from the tensors, refusals, a naive second opinion."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from traces import DECODE, PREFILL, ModelSpec, Pass, Trace, TraceError, load, save
from traces.trace import merged

LITERAL = (
    bytes.fromhex("6803000000000000") + rb'{"__metadata__":{"format":"moe-routing-trace","header":"'
    rb"{\"domains\":[],\"model\":{\"attention_bytes\":0,\"dense_bytes\":0,\"expert_bias\":0,"
    rb"\"expert_size\":64,\"full_layers\":0,\"head_bytes\":0,\"hidden_size\":64,\"kv_bytes\":0,\"name\":\"pair\","
    rb"\"num_experts\":4,\"num_layers\":1,\"shared_bytes\":0,\"top_k\":1},"
    rb"\"predictors\":{},\"provenance\":{},\"routing\":\"SYNTHETIC\"}"
    b'","sha256":"5ceae12c671842cbbeae24c116f099cf5b5d1f09bde0e14dd09fe1b7affd34c4","version":"1"},'
    b'"pass_lengths":{"dtype":"I32","shape":[4],"data_offsets":[0,16]},'
    b'"sequence_lengths":{"dtype":"I32","shape":[2],"data_offsets":[16,24]},'
    b'"token_sequence":{"dtype":"I32","shape":[7],"data_offsets":[24,52]},'
    b'"routed_weights":{"dtype":"F16","shape":[7,1,1],"data_offsets":[52,66]},'
    b'"phase":{"dtype":"U8","shape":[7],"data_offsets":[66,73]},'
    b'"routed_ids":{"dtype":"U8","shape":[7,1,1],"data_offsets":[73,80]}}   '
    + bytes.fromhex("03000000 02000000 01000000 01000000")  # pass_lengths: 3 2 1 1
    + bytes.fromhex("04000000 03000000")  # sequence_lengths: 4 3
    + bytes.fromhex("00000000 00000000 01000000 01000000 00000000 00000000 01000000")  # token_sequence: 0 0 1 1 0 0 1
    + bytes.fromhex("003c 0038 003c 003c 003c 0034 003c")  # weights: 1 .5 1 1 1 .25 1
    + bytes.fromhex("00 00 00 01 01 01 01")  # phase: three of prefill, four of decode
    + bytes.fromhex("03 02 03 02 02 00 01")  # routed ids
)


def pair(**changes: Any) -> Trace:
    """The trace of ``LITERAL``: two sequences, prefilled together, then one visit of both, then one of each."""
    trace = Trace(
        model=ModelSpec("pair", num_layers=1, num_experts=4, top_k=1, hidden_size=64, expert_size=64),
        ids=np.array([3, 2, 3, 2, 2, 0, 1], np.uint8).reshape(7, 1, 1),
        weights=np.array([1, 0.5, 1, 1, 1, 0.25, 1], np.float16).reshape(7, 1, 1),
        sequence_lengths=np.array([4, 3], np.int32),
        phase=np.array([0, 0, 0, 1, 1, 1, 1], np.uint8),
        pass_lengths=np.array([3, 2, 1, 1], np.int32),
        token_sequence=np.array([0, 0, 1, 1, 0, 0, 1], np.int32),
        routing="SYNTHETIC",
    )
    return replace(trace, **changes)


def random_batches(seed: int) -> Trace:
    """Sequences that start, pause and end at random, some without prefill, some with theirs in several passes."""
    rng = np.random.default_rng(seed)
    sequences = int(rng.integers(1, 6))
    prefill = rng.integers(0, 5, sequences)
    decode = rng.integers(0, 6, sequences) + (prefill == 0)
    token_sequence: list[int] = []
    pass_lengths: list[int] = []
    phase: list[int] = []
    while prefill.any() or decode.any():
        kind = PREFILL if prefill.any() and (rng.random() < 0.4 or not decode[prefill == 0].any()) else DECODE
        able = np.flatnonzero(prefill if kind == PREFILL else (prefill == 0) & (decode > 0))
        members = rng.permutation(able)[: rng.integers(1, len(able) + 1)].tolist()
        rows = 0
        for sequence in members:
            left = prefill if kind == PREFILL else decode
            tokens = int(rng.integers(1, left[sequence] + 1)) if kind == PREFILL else 1
            left[sequence] -= tokens
            token_sequence += [sequence] * tokens
            rows += tokens
        pass_lengths.append(rows)
        phase += [kind] * rows
    tokens = len(phase)
    ids = np.argsort(rng.random((tokens, 2, 5)), axis=-1)[..., :2].astype(np.uint8)
    return Trace(
        ModelSpec("batches", 2, 5, 2, 64, 64),
        ids,
        rng.random(ids.shape).astype(np.float16),
        np.bincount(token_sequence, minlength=sequences).astype(np.int32),
        np.array(phase, np.uint8),
        domains=tuple(f"text {i}" for i in range(sequences)),
        pass_lengths=np.array(pass_lengths, np.int32),
        token_sequence=np.array(token_sequence, np.int32),
        routing="SYNTHETIC",
    )


def naive_passes(trace: Trace) -> list[Pass]:
    """The definitions of ``Pass``, word by word."""
    assert trace.pass_lengths is not None and trace.token_sequence is not None
    cached = [0] * len(trace.sequence_lengths)
    passes = []
    row = 0
    for tokens in trace.pass_lengths.tolist():
        inside = trace.token_sequence[row : row + tokens].tolist()
        phase = int(trace.phase[row])
        passes.append(
            Pass(
                first=row,
                tokens=tokens,
                phase=phase,
                sequence=inside[0],
                context=sum(cached[s] for s in set(inside)),
                following=sum(phase == DECODE and cached[s] > 0 for s in inside),
                opens=any(cached[s] == 0 for s in inside),
            )
        )
        for sequence in inside:
            cached[sequence] += 1
        row += tokens
    return passes


def same_arrays(a: Trace, b: Trace) -> bool:
    names = ("ids", "weights", "sequence_lengths", "phase", "pass_lengths", "token_sequence")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names) and a.domains == b.domains


def test_the_literal_bytes_are_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "pair.safetensors"
    save(pair(), path)
    assert path.read_bytes() == LITERAL
    assert same_arrays(load(path), pair())


def test_passes_and_visits_of_a_batch() -> None:
    trace = pair()
    assert trace.passes() == [
        Pass(first=0, tokens=3, phase=PREFILL, sequence=0, context=0, following=0, opens=True),
        Pass(first=3, tokens=2, phase=DECODE, sequence=1, context=3, following=2, opens=False),
        Pass(first=5, tokens=1, phase=DECODE, sequence=0, context=3, following=1, opens=False),
        Pass(first=6, tokens=1, phase=DECODE, sequence=1, context=2, following=1, opens=False),
    ]
    visits = list(trace.visits())
    assert [(v.index, v.layer, v.phase, v.tokens, v.context) for v in visits] == [
        (0, 0, PREFILL, 3, 0),
        (1, 0, DECODE, 2, 3),
        (2, 0, DECODE, 1, 3),
        (3, 0, DECODE, 1, 2),
    ]
    assert [(v.experts, v.counts) for v in visits] == [([3, 2], [2, 1]), ([2], [2]), ([0], [1]), ([1], [1])]
    assert [v.starts_sequence for v in visits] == [True, False, False, False]


def test_rows_of_a_sequence() -> None:
    trace = pair()
    assert [trace.rows_of(s).tolist() for s in (0, 1)] == [[0, 1, 4, 5], [2, 3, 6]]
    assert trace.next_rows().tolist() == [1, 4, 3, 6, 5, -1, -1]
    with pytest.raises(TraceError, match="decode together, so their rows alternate; ask rows_of"):
        trace.sequence_starts()
    with pytest.raises(IndexError, match="sequence is 2; the trace has 2"):
        trace.rows_of(2)
    alone = replace(trace, pass_lengths=None, token_sequence=None, phase=np.array([0, 1, 1, 1, 0, 1, 1], np.uint8))
    assert [alone.rows_of(s).tolist() for s in (0, 1)] == [[0, 1, 2, 3], [4, 5, 6]]
    assert alone.next_rows().tolist() == [1, 2, 3, -1, 5, 6, -1]
    assert alone.sequence_starts().tolist() == [0, 4, 7]


@pytest.mark.parametrize("seed", range(60))
def test_random_batches_agree_with_the_definitions(tmp_path: Path, seed: int) -> None:
    trace = random_batches(seed)
    assert trace.token_sequence is not None
    passes = naive_passes(trace)
    assert trace.passes() == passes
    visits = trace.visits()
    for forward in passes:
        for layer in range(2):
            visit = next(visits)
            routed = trace.ids[forward.first : forward.first + forward.tokens, layer].ravel().tolist()
            assert visit.experts == list(dict.fromkeys(routed))
            assert visit.counts == [routed.count(e) for e in visit.experts]
            assert (visit.layer, visit.tokens, visit.context) == (layer, forward.tokens, forward.context)
            assert visit.starts_sequence == (forward.opens and layer == 0)
    assert next(visits, None) is None
    following = np.full(trace.num_tokens, -1)
    for sequence, length in enumerate(trace.sequence_lengths):
        rows = np.flatnonzero(trace.token_sequence == sequence)
        assert trace.rows_of(sequence).tolist() == rows.tolist() and len(rows) == length
        following[rows[:-1]] = rows[1:]
    assert trace.next_rows().tolist() == following.tolist()
    save(trace, tmp_path / "a.safetensors")
    assert same_arrays(load(tmp_path / "a.safetensors"), trace)


@pytest.mark.parametrize("seed", range(30))
def test_the_head_ends_with_the_pass_that_holds_the_last_token(seed: int) -> None:
    trace = random_batches(seed)
    assert trace.token_sequence is not None
    everything = list(trace.visits())
    for decode_tokens in range(1, trace.num_decode_tokens + 2):
        head = trace.head(decode_tokens)
        if decode_tokens >= trace.num_decode_tokens:
            assert head is trace
            continue
        assert head.pass_lengths is not None and head.token_sequence is not None
        last = int(head.pass_lengths[-1])
        assert head.num_decode_tokens - last < decode_tokens <= head.num_decode_tokens
        assert list(head.visits()) == everything[: 2 * len(head.pass_lengths)]
        kept = sorted(set(trace.token_sequence[: head.num_tokens].tolist()))
        assert head.domains == tuple(f"text {s}" for s in kept)
        assert [kept[s] for s in head.token_sequence] == trace.token_sequence[: head.num_tokens].tolist()


def test_a_batch_of_one_is_no_batch() -> None:
    """Saying by the two tensors what their absence says changes nothing that is read from a trace."""
    alone = replace(
        pair(), pass_lengths=None, token_sequence=None, phase=np.array([0, 0, 1, 1, 1, 1, 1], np.uint8)
    )  # fmt: skip
    said = replace(
        alone,
        pass_lengths=np.array([2, 1, 1, 1, 1, 1], np.int32),
        token_sequence=np.array([0, 0, 0, 0, 1, 1, 1], np.int32),
    )
    assert said.passes() == alone.passes() and list(said.visits()) == list(alone.visits())
    assert said.next_rows().tolist() == alone.next_rows().tolist()
    assert [p.following for p in alone.passes()] == [0, 1, 1, 0, 1, 1]
    for decode_tokens in range(1, 5):
        assert list(said.head(decode_tokens).visits()) == list(alone.head(decode_tokens).visits())


def test_a_large_pass_is_one_visit_between_small_ones() -> None:
    """Rows become lists block by block; a pass may be larger than a block."""
    lengths = np.array([700, 3000, 1, 1, 1], np.int32)
    token_sequence = np.concatenate([np.full(700, 0), np.full(3000, 1), [0, 1, 0]]).astype(np.int32)
    ids = np.arange(3703).astype(np.uint8)[:, None, None] % 4
    trace = Trace(
        pair().model, ids, np.ones(ids.shape, np.float16), np.array([702, 3001], np.int32),
        (np.arange(3703) >= 3700).astype(np.uint8), pass_lengths=lengths, token_sequence=token_sequence,
        routing="SYNTHETIC",
    )  # fmt: skip
    visits = list(trace.visits())
    assert [v.tokens for v in visits] == lengths.tolist()
    assert [sum(v.counts) for v in visits] == lengths.tolist()
    assert [v.experts for v in visits[2:]] == [[3700 % 256 % 4], [3701 % 256 % 4], [3702 % 256 % 4]]
    assert [v.context for v in visits] == [0, 0, 700, 3000, 701]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pass_lengths": None}, "pass_lengths is missing; give both pass_lengths and token_sequence, or neither"),
        ({"token_sequence": None}, "token_sequence is missing; give both pass_lengths and token_sequence, or neither"),
        ({"pass_lengths": np.array([7])}, "pass_lengths is int64; it must be int32"),
        ({"pass_lengths": np.ones((7, 1), np.int32)}, "pass_lengths has shape [7, 1]; it must be [any] (passes)"),
        ({"pass_lengths": np.array([], np.int32)}, "pass_lengths is empty; a trace holds at least one pass"),
        ({"pass_lengths": np.array([3, 2, 1], np.int32)}, "pass_lengths sum to 6; they must sum to the 7 tokens"),
        ({"pass_lengths": np.array([3, 5, -1], np.int32)}, "pass_lengths[2] is -1; a pass has at least 1 token"),
        ({"pass_lengths": np.array([4, 1, 1, 1], np.int32)}, "phase[3] is 1 and the row before is not, both in pass 0"),
        ({"token_sequence": np.zeros(7, np.int64)}, "token_sequence is int64; it must be int32"),
        ({"token_sequence": np.zeros(6, np.int32)}, "token_sequence has shape [6]; it must be [7] (tokens)"),
        (
            {"token_sequence": np.array([0, 0, 1, 1, 0, 0, 2], np.int32)},
            "token_sequence[6] is 2; the sequences are 0 to 1",
        ),
        (
            {"token_sequence": np.array([0, 0, 1, 1, 0, 0, -1], np.int32)},
            "token_sequence[6] is -1; the sequences are 0 to 1",
        ),
        (
            {"token_sequence": np.array([0, 0, 1, 1, 0, 0, 0], np.int32)},
            "sequence_lengths[0] is 4, but 5 entries of token_sequence are 0; make them agree",
        ),
        (
            {"token_sequence": np.array([0, 0, 1, 0, 0, 1, 1], np.int32)},
            "token_sequence[4] is 0 for the second time in pass 1; in a decode pass a sequence has at most one row",
        ),
        (
            {"token_sequence": np.array([0, 1, 0, 1, 0, 0, 1], np.int32)},
            "token_sequence[2] is 0 again in pass 0, after another sequence; in a prefill pass the rows of a sequence",
        ),
        (
            {"phase": np.array([0, 0, 0, 1, 1, 0, 1], np.uint8)},
            "phase[5] is prefill after decode; within a sequence prefill comes first",
        ),
        ({"sequence_lengths": np.array([7, 0], np.int32)}, "sequence_lengths[1] is 0; a sequence has at least 1 token"),
        ({"domains": ("a",)}, "domains names 1 sequences; give one for each of 2, or none"),
    ],
)
def test_refuses_batches(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TraceError) as caught:
        pair(**changes)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("kept", ["pass_lengths", "token_sequence"])
def test_a_file_with_one_of_the_two_tensors_is_refused(tmp_path: Path, kept: str) -> None:
    """The other one is there under a wrong name, or left out with its bytes."""
    path = tmp_path / "half.safetensors"
    gone = {"pass_lengths": "token_sequence", "token_sequence": "pass_lengths"}[kept]
    path.write_bytes(LITERAL.replace(gone.encode(), gone[::-1].encode()))
    with pytest.raises(TraceError, match=f"tensor '{gone[::-1]}' is unknown"):
        load(path)
    end = 8 + int.from_bytes(LITERAL[:8], "little")
    table, data = json.loads(LITERAL[8:end]), LITERAL[end:]
    begin, after = table.pop(gone)["data_offsets"]
    for name, entry in table.items():
        if name != "__metadata__" and entry["data_offsets"][0] >= after:
            entry["data_offsets"] = [offset - (after - begin) for offset in entry["data_offsets"]]
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[:begin] + data[after:])
    with pytest.raises(TraceError, match=f"{gone} is missing; give both"):
        load(path)


def test_merged_guesses_are_the_chance_that_any_token_is_routed_there() -> None:
    guesses = merged([[1, 2, 0], [2, 3, 1]], [[0.5, 0.25, 0.0], [0.75, 0.5, 0.5]])
    assert guesses.experts == [2, 1, 3]  # 1 - 3/4 * 1/4, 1 - 1/2 * 1/2, 1/2; 0 is left out
    assert guesses.scores == [0.8125, 0.75, 0.5]


def test_merged_guesses_round_to_float16_and_break_ties_by_id() -> None:
    guesses = merged([[7, 3], [5, 255]], [[0.1, 0.1], [np.nextafter(0.1, 1), 0.0]])
    tenth = float(np.float16(0.1))
    assert guesses == ([3, 5, 7], [tenth] * 3)
    assert merged([[1]], [[1e-9]]) == ([], []) and merged([], []) == ([], [])
    tiny = float(np.float16(6e-8))
    assert merged([[1], [1]], [[tiny], [1.0]]) == ([1], [1.0])


def test_merged_guesses_of_one_token_are_its_own() -> None:
    """Every float16 survives 1 - (1 - p) in float64."""
    scores = np.arange(1, 0x3C01, dtype=np.uint16).view(np.float16)[::-1]
    ids = np.arange(len(scores))
    guesses = merged(ids[None], scores[None])
    assert guesses.experts == ids.tolist() and guesses.scores == scores.tolist()
    assert all(type(e) is int for e in guesses.experts) and all(type(s) is float for s in guesses.scores)


@pytest.mark.parametrize("seed", range(20))
def test_merged_guesses_agree_with_the_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens, most = int(rng.integers(1, 6)), int(rng.integers(1, 8))
    ids = np.argsort(rng.random((tokens, 8)), axis=1)[:, :most].astype(np.uint8)
    scores = -np.sort(-rng.random((tokens, most)).astype(np.float16), axis=1)
    guesses = merged(ids, scores)
    assert guesses == merged(ids.tolist(), scores.tolist())
    for expert, score in zip(guesses.experts, guesses.scores, strict=True):
        exact = 1 - math.prod(1 - p for p in scores[ids == expert].astype(float).tolist())
        assert score == float(np.float16(exact))
    assert guesses.experts == sorted(set(ids.ravel().tolist()), key=lambda e: (-score_of(guesses, e), e))


def score_of(guesses: Any, expert: int) -> float:
    return float(guesses.scores[guesses.experts.index(expert)])
