"""The figures of a trace, against hand-worked examples, a slow LRU and public reference counts."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from traces import GuessTable, ModelSpec, Trace, inspect, picture, save, stats

ROOT = Path(__file__).parent.parent
GPT_OSS = ROOT.parent / "shared/data/traces/gpt-oss-20b/gptoss20b_decode_sample64.npz"


def decoded(ids: list, lengths: list[int], experts: int, domains: tuple[str, ...] = (), **guesses: GuessTable) -> Trace:
    """A trace of decode tokens only, from ids [T][L][K]."""
    array = np.array(ids, np.uint8)
    tokens, layers, top_k = array.shape
    return Trace(
        ModelSpec("made-up", layers, experts, top_k, 64, 64),
        array,
        np.ones(array.shape, np.float16),
        np.array(lengths, np.int32),
        np.ones(tokens, np.uint8),
        guesses=guesses,
        domains=domains,
        routing="SYNTHETIC",
    )


def random_decoded(seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    return decoded(np.argsort(rng.random((60, 2, 6)), axis=-1)[..., :2].tolist(), [25, 1, 34], 6)


@pytest.fixture(scope="module")
def gpt_oss() -> Trace:
    if not GPT_OSS.exists():
        pytest.skip("../shared/data, with the public gpt-oss-20b trace, is not next to the project")
    with np.load(GPT_OSS) as arrays:
        ids, weights, lengths = arrays["experts"], arrays["probs"], arrays["lens"]
    return Trace(
        ModelSpec("gpt-oss-20b", 24, 32, 4, 2880, 2880),
        ids,
        weights,
        lengths.astype(np.int32),
        np.ones(len(ids), np.uint8),
        routing="RECORDED",
    )


@pytest.mark.parametrize(
    ("replay", "cold", "hits"),
    [
        ("visit", True, (1_921_810, 2_651_137)),
        ("visit", False, (1_925_105, 2_662_873)),
        ("access", True, (1_838_874, 2_637_346)),
    ],
)
def test_lru_gives_the_reference_counts(gpt_oss: Trace, replay: str, cold: bool, hits: tuple[int, int]) -> None:
    assert gpt_oss.ids.size == 2_968_320
    by_slots = stats.lru_hits(gpt_oss, cold_sequences=cold, replay=replay).sum(axis=0)
    assert (by_slots[8 - 4], by_slots[16 - 4]) == hits


def test_repeat_gives_the_reference_probability(gpt_oss: Trace) -> None:
    repeat = stats.repeat(gpt_oss)
    assert round(float(repeat.in_order.mean()), 4) == 0.4378
    assert repeat.shuffled.mean() < repeat.shuffled_within.mean() < repeat.in_order.mean()


def slow_lru(trace: Trace, layer: int, slots: int, cold: bool) -> int:
    """One cache, by the rules: hits are counted before loading, no expert of the visit is a victim, router order."""
    recent: list[int] = []
    hits = 0
    for visit in trace.visits():
        if visit.starts_sequence and cold:
            recent.clear()
        if visit.layer != layer:
            continue
        hits += sum(expert in recent for expert in visit.experts)
        for expert in visit.experts:
            if expert not in recent:
                if len(recent) == slots:
                    recent.remove(next(e for e in recent if e not in visit.experts))
                recent.append(expert)
        recent = [e for e in recent if e not in visit.experts] + visit.experts
    return hits


@pytest.mark.parametrize("cold", [False, True])
def test_lru_at_every_slot_count_equals_a_slow_cache(cold: bool) -> None:
    trace = random_decoded()
    hits = stats.lru_hits(trace, cold)
    assert hits.shape == (2, 5)
    for layer in range(2):
        assert hits[layer].tolist() == [slow_lru(trace, layer, slots, cold) for slots in range(2, 7)]


def test_lru_with_top_k_slots_hits_what_repeats() -> None:
    trace = random_decoded()
    pairs = trace.num_tokens - len(trace.sequence_lengths)
    hits = stats.lru_hits(trace, cold_sequences=True)[:, 0]
    assert np.allclose(hits / (2 * pairs), stats.repeat(trace).in_order)


def test_repeat_by_hand() -> None:
    """0 1 | 1 2 | 1 2 repeats 1 and 2 of 2; the second sequence has no pair."""
    trace = decoded([[[0, 1]], [[1, 2]], [[1, 2]], [[0, 3]]], [3, 1], 4)
    repeat = stats.repeat(trace)
    assert repeat.in_order.tolist() == [0.75]
    assert np.allclose(repeat.shuffled_within, (1 + 1 + 2) / 3 / 2)
    assert np.allclose(repeat.shuffled, (1 + 1 + 1 + 2) / 6 / 2)


def test_shuffled_repeat_is_the_mean_over_random_orders() -> None:
    trace = random_decoded()
    rng = np.random.default_rng(1)
    everywhere, within = [], []
    for _ in range(400):
        order = rng.permutation(60)
        everywhere.append(stats.repeat(decoded(trace.ids[order].tolist(), [25, 1, 34], 6)).in_order)
        order = np.concatenate([rng.permutation(25), [25], 26 + rng.permutation(34)])
        within.append(stats.repeat(decoded(trace.ids[order].tolist(), [25, 1, 34], 6)).in_order)
    repeat = stats.repeat(trace)
    assert np.allclose(np.mean(everywhere, axis=0), repeat.shuffled, atol=0.01)
    assert np.allclose(np.mean(within, axis=0), repeat.shuffled_within, atol=0.01)


def test_balance_by_hand() -> None:
    balance = stats.balance(decoded([[[0, 1]], [[0, 1]], [[0, 2]], [[0, 1]]], [4], 4))
    assert balance.busiest_share.tolist() == [0.5]
    assert np.allclose(balance.entropy, (0.5 * 1 + 0.375 * np.log2(8 / 3) + 0.125 * 3) / 2)
    assert balance.unused.tolist() == [1]


def test_domain_divergence_is_one_bit_when_two_domains_share_no_expert() -> None:
    apart = decoded([[[0, 1]], [[1, 0]], [[2, 3]]], [2, 1], 4, ("code", "prose"))
    assert stats.domain_divergence(apart) == pytest.approx([1])
    alike = decoded([[[0, 1]], [[1, 0]], [[0, 1]]], [2, 1], 4, ("code", "prose"))
    assert stats.domain_divergence(alike) == pytest.approx([0])
    assert stats.domain_divergence(decoded([[[0, 1]]], [1], 4, ("code",))) is None


def test_recall_by_hand() -> None:
    """Two layers, top-2; guesses for the next layer, in the second table wrapping to the next token's first layer."""
    routed = [[[0, 1], [2, 3]], [[0, 2], [1, 0]]]
    ids = np.array([[[[3, 0, 2]], [[0, 3, 1]]], [[[2, 3, 0]], [[0, 1, 2]]]], np.uint8)
    scores = np.zeros(ids.shape, np.float16)
    padded = ids.copy()
    padded[:, 1] = 255
    trace = decoded(routed, [2], 4, plain=GuessTable(padded, scores), wraps=GuessTable(ids, scores, wrap=True))
    plain, wraps = stats.recall(trace, "plain"), stats.recall(trace, "wraps")
    assert np.allclose(plain[0, 0], [(1 / 2 + 0) / 2, (1 / 2 + 0) / 2, (1 + 1 / 2) / 2])
    assert np.isnan(plain[0, 1]).all()
    assert np.array_equal(wraps[0, 0], plain[0, 0])
    assert np.allclose(wraps[0, 1], [1 / 2, 1 / 2, 1 / 2])


def test_inspect_ends_with_one_json_line_of_the_same_figures(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(random_decoded(), path)
    command = [sys.executable, "-m", "traces.inspect", str(path), "--cold-sequences"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    *human, last = done.stdout.splitlines()
    figures = json.loads(last)
    assert figures["tokens"] == {"prefill": 0, "decode": 60} and figures["lru"]["slots"] == [2, 3, 4, 5, 6]
    assert figures["lru"]["hits"] == stats.lru_hits(random_decoded(), True).sum(axis=0).tolist()
    mean = next(line for line in human if line.strip().startswith("mean"))
    assert mean.split()[-1] == f"{figures['lru']['hit_share'][-1]:.3f}"
    assert (
        figures["belady"]["forced"]["hits"] == stats.belady_hits(random_decoded(), False, True)[:, 1:].sum(0).tolist()
    )
    assert figures["belady"]["bypass"]["slots"] == [1, 2, 3, 4, 5, 6]
    assert figures["layers"]["reuse_visits_median"] == [2, 2]


def test_replay_is_chosen_and_named_and_a_difference_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = random_decoded()
    save(trace, tmp_path / "a.safetensors")
    printed = {}
    for replay in stats.REPLAYS:
        assert inspect.main([str(tmp_path / "a.safetensors"), "--replay", replay]) == 0
        printed[replay] = capsys.readouterr().out.splitlines()
    figures = {replay: json.loads(lines[-1])["lru"] for replay, lines in printed.items()}
    for replay, lru in figures.items():
        assert lru["replay"] == replay
        assert lru["hits"] == stats.lru_hits(trace, replay=replay).sum(axis=0).tolist()
        assert lru["by_replay"] == figures["visit"]["by_replay"]
        assert any(f"{inspect._REPLAYS[replay]}, carried over" in line for line in printed[replay])
    moved = figures["visit"]["replay_moves_misses"]
    visit, access = (240 - stats.lru_hits(trace, replay=r).sum(axis=0) for r in stats.REPLAYS)
    share = (access - visit) / visit
    assert moved["slots"] == 2 + np.argmax(np.abs(share)) and moved["share"] == pytest.approx(share.max(), abs=1e-6)
    [warning] = [line for line in printed["visit"] if line.startswith("warning")]
    assert f"{share.max():.1%} more misses than visit-atomic replay with {moved['slots']} slots" in warning
    save(decoded([[[0]], [[1]], [[0]]], [3], 4), tmp_path / "b.safetensors")
    assert inspect.main([str(tmp_path / "b.safetensors")]) == 0
    assert "warning" not in capsys.readouterr().out


def test_inspect_describes_sequences_that_decode_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A visit is a set of tokens: its distinct experts are its accesses, and slots start where every visit fits."""
    made = random_decoded()
    batched = dataclasses.replace(
        made,
        sequence_lengths=np.array([30, 30], np.int32),
        pass_lengths=np.full(30, 2, np.int32),
        token_sequence=np.tile(np.arange(2, dtype=np.int32), 30),
        domains=("code", "prose"),
    )
    save(batched, tmp_path / "a.safetensors")
    assert inspect.main([str(tmp_path / "a.safetensors")]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["lru"]["slots"] == [4, 5, 6] and figures["belady"]["bypass"]["slots"] == [1, 2, 3, 4, 5, 6]
    assert figures["lru"]["decode_accesses"] == sum(len(visit.experts) for visit in batched.visits())
    assert figures["domains"]["prose"] == {"sequences": 1, "prefill": 0, "decode": 30}


@pytest.mark.parametrize("ending", picture.FORMATS)
def test_the_picture_is_written_the_same_each_time(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib", reason="needs the plots extra")
    trace = random_decoded()
    ids = np.tile(np.array([1, 3], np.uint8), (60, 2, 1, 1))
    ids[:, 1] = 255
    trace.guesses["made-up"] = GuessTable(ids, np.zeros(ids.shape, np.float16))
    save(trace, tmp_path / "a.safetensors")
    for name in ("one", "two"):
        assert inspect.main([str(tmp_path / "a.safetensors"), "--plot", str(tmp_path / (name + ending))]) == 0
    one, two = ((tmp_path / (name + ending)).read_bytes() for name in ("one", "two"))
    assert one == two and len(one) > 5000
    if ending == ".svg":
        assert b"SYNTHETIC" in one or b"<use" in one


def test_the_caption_of_the_picture_carries_the_evidence_label() -> None:
    caption = picture._caption(inspect.describe(random_decoded(), cold_sequences=True))
    assert caption.startswith("SYNTHETIC routing: made-up, 2 MoE layers x 6 experts, top-2; 0 prefill and 60 decode")
    assert "emptied where a sequence starts" in caption


def test_a_picture_that_cannot_be_drawn_is_refused_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(random_decoded(), tmp_path / "a.safetensors")
    names = [("a.gif", "use one of .png, .svg, .pdf"), ("a.png", "install the 'plots' extra")]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name, sentence in names:
        assert inspect.main([str(tmp_path / "a.safetensors"), "--plot", str(tmp_path / name)]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1 and sentence in printed.err


def test_a_picture_in_a_folder_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs the plots extra")
    save(random_decoded(), tmp_path / "a.safetensors")
    assert inspect.main([str(tmp_path / "a.safetensors"), "--plot", str(tmp_path / "none/a.png")]) == 2
    assert "name a file in a folder that exists" in capsys.readouterr().err


def test_inspect_describes_prefill_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No decode token: what needs one is null, and nothing fails."""
    made = random_decoded()
    trace = Trace(
        made.model, made.ids, made.weights, made.sequence_lengths, np.zeros(60, np.uint8),
        guesses={"none": GuessTable(np.full((60, 2, 1, 1), 255, np.uint8), np.zeros((60, 2, 1, 1), np.float16))},
        domains=("code", "code", "prose"), routing="SYNTHETIC",
    )  # fmt: skip
    trace.guesses["none"].ids[:, 0] = 0
    save(trace, tmp_path / "a.safetensors")
    assert inspect.main([str(tmp_path / "a.safetensors")]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["layers"]["repeat_in_order"] == [None, None]
    assert figures["lru"]["hit_share"] == [None] * 5
    assert figures["predictors"]["none"]["recall"] == [[[None], [None]]]
    assert figures["domains"]["code"] == {"sequences": 2, "prefill": 26, "decode": 0}


def test_inspect_refuses_bad_input_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").write_bytes(b"not a trace, only text")
    assert inspect.main([str(tmp_path / "bad")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert "damaged, or not a trace" in printed.err


def test_the_numpy_example_of_the_readme_reads_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "traces/README.md").read_text()
    code = text.split("## Reading with numpy alone")[1].split("```python\n")[1].split("```")[0]
    trace = random_decoded()
    save(trace, tmp_path / "FILE.safetensors")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert np.array_equal(names["tensors"]["routed_ids"], trace.ids)
    assert names["header"]["routing"] == "SYNTHETIC"
