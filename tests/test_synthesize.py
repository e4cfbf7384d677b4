"""Synthetic traces have the statistics they were asked for, and say that they are synthetic."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from traces import ModelSpec, Trace, load, save, stats
from traces.guessing import _recall_of, membership
from traces.presets import PRESETS, Statistics, StatisticsError, repeating
from traces.synthesize import fit_table, main, measure, score_error, synthesize
from traces.trace import check

SMALL = ModelSpec("small", 6, 16, 3, 64, 64)
MIXTRAL = PRESETS["mixtral-8x7b"]


@pytest.fixture(scope="module")
def mixtral() -> Trace:
    return synthesize(MIXTRAL.model, MIXTRAL.statistics, 2000)


def small(**changes: object) -> Trace:
    statistics = replace(Statistics(recent=repeating(0.4, 3), distances=3), **changes)
    return synthesize(SMALL, statistics, 600, seed=1)


def test_mixtral_meets_its_published_figures(mixtral: Trace) -> None:
    rows = fit_table(MIXTRAL, measure(mixtral))
    by_figure = {row["figure"]: row for row in rows}
    assert all(row["within"] in (True, None) for row in rows), rows
    for slots, share in ((2, 0.317), (3, 0.457), (4, 0.588), (5, 0.696), (6, 0.798)):
        row = by_figure[f"lru_access_{slots}"]
        assert (row["value"], row["tolerance"]) == (share, 0.01)
        hits = stats.lru_hits(mixtral, replay="access").sum(axis=0)[slots - 2]
        assert abs(hits / mixtral.ids.size - share) <= 0.01
    assert abs(stats.lru_hits(mixtral).sum(axis=0)[2] / mixtral.ids.size - 0.61) <= 0.01
    assert abs(stats.repeat(mixtral).in_order.mean() - 0.375) <= 0.01
    assert by_figure["belady_4"]["within"] is None and abs(by_figure["belady_4"]["got"] - 0.74) < 0.02


def test_mixtral_is_predicted_layer_by_layer_as_published(mixtral: Trace) -> None:
    recall = stats.recall(mixtral, "synthetic")[:, :, 1]
    assert np.allclose(recall[0, :31], MIXTRAL.statistics.recall, atol=0.025)
    assert np.allclose(MIXTRAL.statistics.recall[:3], (0.566, 0.721, 0.789))
    assert np.mean(MIXTRAL.statistics.recall) == pytest.approx(0.866, abs=5e-4)
    assert max(MIXTRAL.statistics.recall) == 0.939
    for distance in (2, 3, 4):
        wanted = [MIXTRAL.statistics.recall_at(distance, target) for target in range(distance, 32)]
        assert np.allclose(recall[distance - 1, : 32 - distance], wanted, atol=0.03)


def test_scores_are_probabilities_of_being_routed(mixtral: Trace) -> None:
    """Over bins of score, the share of such guesses that were routed is the score."""
    assert score_error(mixtral, "synthetic") < 0.003
    assert score_error(small(), "synthetic") < 0.012


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_a_trace_that_keeps_the_rules(name: str, tmp_path: Path) -> None:
    preset = PRESETS[name]
    assert all(text.startswith(("PUBLISHED", "ASSUMED")) for text in preset.sources.values())
    trace = synthesize(preset.model, preset.statistics, 24)
    check(trace)
    save(trace, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors")
    assert again.routing == "SYNTHETIC" and again.model == preset.model
    assert again.provenance["statistics"]["skew"] == preset.statistics.skew
    assert again.guesses["synthetic"].ids.shape[2:] == (4, 2 * preset.model.top_k)


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        save(synthesize(SMALL, Statistics(), 50, seed), tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("repeat", [0.2, 0.45, 0.8])
@pytest.mark.parametrize(("skew", "drift"), [(0.0, 0.0), (1.0, 0.7)])
def test_the_repeat_probability_is_had_whatever_the_popularity(repeat: float, skew: float, drift: float) -> None:
    trace = small(recent=repeating(repeat, 3), skew=skew, drift=drift, distances=0)
    assert abs(stats.repeat(trace).in_order.mean() - repeat) < 0.02
    assert not trace.guesses


def test_a_hit_curve_is_had_as_stated() -> None:
    recent = (0.1, 0.25, 0.4, 0.48, 0.55, 0.7)
    hits = stats.hits_by_slots(stats.depths(small(recent=recent, skew=0.8)), 16).sum(axis=0) / (600 * 6 * 3)
    assert np.allclose(hits[:6], recent, atol=0.02)


def test_skew_and_drift_do_what_they_say() -> None:
    even, skewed = (stats.balance(small(skew=skew, drift=0.0)) for skew in (0.0, 1.0))
    assert skewed.busiest_share.mean() > 1.3 * even.busiest_share.mean()
    alike, apart = (stats.domain_divergence(small(skew=1.0, drift=drift, sequence_length=50)) for drift in (0.0, 1.0))
    assert alike is not None and apart is not None and apart.mean() > 2 * alike.mean()


def test_membership_is_the_sum_over_all_sets() -> None:
    log_odds = np.random.default_rng(0).normal(size=(5, 6)) * 3
    slow = np.zeros((5, 6))
    total = np.zeros(5)
    for chosen in combinations(range(6), 3):
        weight = np.exp(log_odds[:, chosen].sum(axis=1))
        total += weight
        slow[:, chosen] += weight[:, None]
    fast = membership(log_odds, 3)
    assert np.allclose(fast, slow / total[:, None]) and np.allclose(fast.sum(axis=1), 3)


def test_the_computed_recall_is_that_of_a_simulation() -> None:
    rng = np.random.default_rng(0)
    for amount in (0.0, 1.0, 2.5):
        seen = rng.normal(size=(40_000, 12))
        seen[:, :3] += amount
        top = np.argsort(-seen, axis=1)[:, :3]
        assert _recall_of(np.array([amount]), 12, 3)[0] == pytest.approx((top < 3).mean(), abs=0.006)


def test_nearer_guesses_know_more() -> None:
    recall = stats.recall(small(recall=(0.8,), recall_step=0.1), "synthetic")[:, :, 2]
    assert np.allclose(np.nanmean(recall, axis=1), [0.8, 0.7, 0.6], atol=0.03)


def test_the_command_prints_the_fit_beside_its_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.safetensors"
    assert main(["--preset", "mixtral-8x7b", "--tokens", "400", "--out", str(out), "--skew", "0.5"]) == 0
    printed = capsys.readouterr()
    *human, last = printed.out.splitlines()
    result = json.loads(last)
    assert human[0].startswith("SYNTHETIC") and result["routing"] == load(out).routing == "SYNTHETIC"
    row = next(row for row in result["fit"] if row["figure"] == "lru_access_4")
    assert any(line.split()[:3] == ["lru_access_4", "0.588", f"{row['got']:.3f}"] for line in human)
    assert result["provenance"]["statistics"]["skew"] == 0.5 and "skew" in result["provenance"]["sources"]["flags"]


def test_the_shape_may_come_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.json").write_text(json.dumps({"model": SMALL.to_json()}))
    command = ["--model", str(tmp_path / "model.json"), "--tokens", "30", "--repeat", "0.3", "--recall", "0.7"]
    assert main([*command, "--distances", "2", "--out", str(tmp_path / "a")]) == 0
    trace = load(tmp_path / "a")
    assert trace.model == SMALL and trace.guesses["synthetic"].ids.shape == (30, 6, 2, 6)
    assert main([*command, "--preset", "mixtral-8x7b", "--out", str(tmp_path / "b")]) == 2
    assert "leave one of them out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "neither --preset nor --model"),
        (["--preset", "mixtral-8x7b", "--tokens", "0"], "tokens is 0"),
        (["--preset", "mixtral-8x7b", "--skew", "nan"], "skew is nan"),
        (["--preset", "mixtral-8x7b", "--drift", "2"], "drift is 2.0; for this model it must be 0 to 1"),
        (["--preset", "mixtral-8x7b", "--distances", "32"], "distances is 32"),
        (["--preset", "mixtral-8x7b", "--repeat", "1.5"], "each higher than the one before"),
        (["--preset", "mixtral-8x7b", "--recall", "1"], "between 0 and 1"),
        (["--model", "nowhere.json"], "cannot be read"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    assert main([*flags, "--out", str(tmp_path / "a")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.splitlines()[-1].startswith("traces.synthesize: ")
    assert sentence in printed.err.splitlines()[-1]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("content", ["[1]", "{", '{"model": 3}', '{"model": {"name": "x"}}'])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (tmp_path / "model.json").write_text(content)
    assert main(["--model", str(tmp_path / "model.json"), "--out", str(tmp_path / "a")]) == 2
    assert "is not a model's JSON" in capsys.readouterr().err


def test_a_model_of_any_size_is_not_begun() -> None:
    with pytest.raises(StatisticsError, match="at most 262144 in all"):
        synthesize(ModelSpec("huge", 1 << 40, 64, 2, 64, 64), Statistics(), 10)


def test_a_model_that_routes_all_its_experts_is_refused() -> None:
    with pytest.raises(StatisticsError, match="an expert that is not routed"):
        synthesize(ModelSpec("all", 4, 2, 2, 64, 64), Statistics(distances=1), 10)
