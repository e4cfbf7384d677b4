"""Pictures: what they read, what they refuse in one sentence, and that the same results give the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sim import plot
from sim.plots import _records as records
from sim.plots import crossing, ladder, order, validation
from sim.plots._style import looks
from sim.plots.front import pareto
from sim.plots.stalls import parts_ms

ROOT = Path(__file__).parent.parent
VALIDATION = ROOT / "notebooks" / "validation" / "cpu-2core.json"


def result(policy: str = "speculative", **changes: Any) -> dict[str, Any]:
    """The object of one run, as far as pictures read it."""
    slots, bits = changes.get("slots", 4), changes.get("bits", 4)
    lookahead = int(policy.partition("lookahead=")[2][:1] or 3)
    prefetches = not policy.startswith("on_demand")
    tpot_s = (10 - slots) * bits * 1e-3 + lookahead * 1e-5 - 1e-3 * prefetches
    floor_s = tpot_s / 3
    values = {
        "policy": policy, "cache": "lru", "predictor": "recorded" if prefetches else None, "model": "tiny",
        "machine": "round", "bits": bits, "slots": slots, "decode_tokens": 100, "tpot_s": tpot_s,
        "tokens_per_s": 1 / tpot_s, "compute_busy": 0.25, "stall_s": tpot_s / 2, "stall_miss_s": tpot_s * 0.3,
        "stall_late_s": tpot_s * 0.2, "h2d_bytes": 10**9, "vram_bytes": slots * bits * 10**8, "landing_slots": 2,
        "stream_slots": 2, "prefetch_precision": 0.7 if prefetches else None,
        "prefetch_coverage": 0.5 if prefetches else None, "evidence": "SIMULATED", "routing": "SYNTHETIC",
        "bounds": {"joint_floor_s": floor_s, "all_resident_s": 0.002, "demand_only_s": tpot_s * 1.2,
                   "perfect_lookahead_s": tpot_s * 0.8, "perfect_lookahead_belady_s": tpot_s * 0.6},
        "seed": 0, "set": [], "trace": "tiny.safetensors", "scaled": None, "load_log_sha256": policy,
    }  # fmt: skip
    return values | changes


def grid() -> list[dict[str, Any]]:
    return [result(f"speculative:lookahead={d}", slots=n) for d in (1, 2, 3) for n in (2, 4, 6)]


def lines(path: Path, found: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in found))
    return str(path)


def trace_figures() -> dict[str, Any]:
    """As ``traces.inspect`` prints them, of a trace of 2 layers with 4 experts."""
    curve = {"slots": [2, 3, 4], "hit_share": [0.4, 0.7, 1.0]}
    return {
        "model": {"name": "tiny", "num_layers": 2, "num_experts": 4, "top_k": 2}, "routing": "SYNTHETIC",
        "tokens": {"prefill": 5, "decode": 50}, "sequences": 1, "cold_sequences": False,
        "layers": {"use": [[10, 0, 20, 30], [15, 15, 15, 15]], "repeat_in_order": [0.5, 0.6],
                   "repeat_shuffled": [0.3, 0.3], "repeat_shuffled_within": [0.4, 0.4]},
        "lru": curve | {"decode_accesses": 100, "hit_share_by_layer": [[0.3, 0.6, 1.0], [0.5, 0.8, 1.0]]},
        "belady": {"forced": {"slots": [2, 3, 4], "hit_share": [0.5, 0.8, 1.0]},
                   "bypass": {"slots": [1, 2, 3, 4], "hit_share": [0.2, 0.6, 0.9, 1.0]}},
    }  # fmt: skip


def recall_report() -> dict[str, Any]:
    """As ``runtime.gates_report`` writes one width: [distance - 1][layer][guesses - 1]."""
    layers = [[[0.4, 0.7], [0.45, 0.8], [None, None]], [[0.3, 0.6], [None, None], [None, None]]]
    better = [[[v and v + 0.1 for v in row] for row in rows] for rows in layers]
    return {
        "evidence": "MEASURED on SYNTHETIC routing of tiny", "bits": 4, "tokens": 50, "top_k": 2,
        "recall": {"router": {"all": layers}, "aligned": {"all": better}},
    }  # fmt: skip


def by_link() -> list[dict[str, Any]]:
    """On a slow link one policy loses 10 %, on a fast one it wins 10 %; the other is always slower."""
    found = []
    for link, ratio in ((4, 1.1), (16, 0.9)):
        shared = {"axes": {"machine.link.h2d_gb_s": str(link)}, "set": [f"machine.link.h2d_gb_s={link}"]}
        for policy, times in (("on_demand", 1.0), ("speculative", ratio), ("next_layer", 1.2)):
            found.append(result(policy, tpot_s=0.01 * times, **shared))
    return found


RUNGS = ["mixtral_offloading", "mixtral_offloading_no_write_back", "speculative"]
SHOWN = {  # results that are enough for each picture, and the points it draws
    "stalls": ([result(), result("on_demand")], 2),
    "slots": ([result(p, slots=n) for p in ("speculative", "on_demand") for n in (2, 3, 4)], 6),
    "lookahead": (grid(), 9),
    "budget": ([result(f"speculative:landing_slots={n}", landing_slots=n, tpot_s=0.02 + n / 1e3) for n in (1, 2)], 2),
    "front": ([result(slots=n, bits=b) for n in (2, 4) for b in (2, 4)], 4),
    "sizes": ([result(p, slots=n) for p in ("speculative", "on_demand") for n in (2, 3, 4)], 6),
    "crossing": (by_link(), 4),
    "ladder": ([result(p, tpot_s=t) for p, t in zip(RUNGS, (0.04, 0.03, 0.02), strict=True)], 3),
    "worth": ([result("on_demand"), *(result(predictor=p, recall=r) for p, r in (("router", 0.8), ("mlp", 0.9)))], 2),
    "predictors": ([result(predictor=p, bits=b) for p in ("router", "mlp", "oracle") for b in (2, 4)], 6),
    "use": ([trace_figures()], 8),
    "repeats": ([trace_figures()], 6),
    "hits": ([trace_figures()], 9),
    "recall": ([recall_report()], 4),
    "alignment": ([recall_report()], 3),
}
COUNTED = ("use", "repeats", "recall", "alignment")
CELLS = {"validation": 1, "order": 1, "shares": 2}  # points for each cell of the committed validation


@pytest.mark.parametrize("kind", plot.pictures())
def test_every_picture_draws_both_formats_with_its_evidence(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the plots extra")
    if kind in CELLS:
        source, points = str(VALIDATION), CELLS[kind] * len(records.read([str(VALIDATION)]).cells)
    else:
        found, points = SHOWN[kind]
        source = lines(tmp_path / "results.jsonl", found)
        if plot.pictures()[kind].READS == "recalls":
            Path(source).write_text(json.dumps({"reports": found}))
    out = [str(tmp_path / "a.png"), str(tmp_path / "a.svg")]
    command = [sys.executable, "-m", "sim.plot", kind, source, "--out", out[0], "--out", out[1]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["files"] == out and document["points"] == points
    assert ("MEASURED" if kind in COUNTED else "SIMULATED") in document["caption"]
    assert document["caption"].count("routing") == 1
    assert Path(out[0]).read_bytes().startswith(b"\x89PNG") and b"<svg" in Path(out[1]).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("a")) == ["a.png", "a.svg"]


@pytest.mark.parametrize("kind", SHOWN)
def test_the_same_results_in_any_order_give_the_same_bytes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mpl = pytest.importorskip("matplotlib", reason="pictures need the plots extra")
    found = SHOWN[kind][0]
    first = plot.draw(kind, found)
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "red"}):  # a person's own settings
        again = plot.draw(kind, found[::-1])
    assert first == again
    assert b"<dc:date>" not in first[0][".svg"]


def test_every_module_of_the_folder_is_a_picture() -> None:
    for name, module in plot.pictures().items():
        assert module.READS in records.Results._fields, name
        assert (module.__doc__ or "").splitlines()[0].endswith((".", ":")), name
        assert set(module.VARIES) <= set(records.CONDITIONS + records.CHOICES), name
        assert name in plot.parser().format_help()


@pytest.mark.parametrize(
    ("kind", "found", "message"),
    [
        ("slots", [result(), result("on_demand")], "do not vary slots"),
        ("slots", [result(slots=2, bits=2), result(slots=3)], "mix 2 values of bits"),
        ("stalls", [result(), result("on_demand", machine="t4")], "mix 2 values of machine"),
        ("stalls", [result(), result("on_demand", set=["machine.link.h2d_gb_s=9"])], "mix 2 values of set"),
        ("lookahead", [result(slots=n) for n in (2, 3)], "do not vary lookahead"),
        ("lookahead", grid() + [result("two_class", slots=2)], "shows one policy"),
        ("budget", [result("on_demand")], "no result has prefetch_precision"),
        ("budget", [result(), result("confidence")], "neither landing_slots nor h2d_bytes"),
        ("stalls", [{"policy": "on_demand"}], "no result has tpot_s"),
        ("front", [result(bounds={}), result("on_demand", tpot_s=None)], "one VRAM and one speed"),
        ("validation", [result()], "no cells"),
        ("use", [result()], "no traces in there; this picture needs the output of traces.inspect"),
        ("hits", [trace_figures()] * 2, "shows one trace, the results hold 2"),
        ("crossing", by_link()[1:3] + by_link()[4:], "lack on_demand"),
        ("sizes", [result(p, slots=n) for p in "abcde" for n in (2, 3)], "at most 4"),
        ("ladder", [result()], "2 to 12 rungs"),
        ("worth", [result(), result("on_demand")], "no recall"),
        ("predictors", [result(predictor="mlp")], "has predictor router"),
    ],
)
def test_what_the_results_lack_is_one_sentence(
    kind: str, found: list[dict[str, Any]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("matplotlib", reason="pictures need the plots extra")
    source = lines(tmp_path / "results.jsonl", found)
    monkeypatch.setattr(sys, "argv", ["sim.plot", kind, source, "--out", str(tmp_path / "a.png")])
    assert plot.main() == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.strip().splitlines()[-1].startswith("sim.plot: ")
    assert said.out == "" and not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("out", ["a.gif", "missing/a.png", "."])
def test_a_target_that_cannot_be_written_is_refused_before_anything_is_read(out: str, tmp_path: Path) -> None:
    with pytest.raises(records.PictureError, match="--out"):
        plot.check_targets([str(tmp_path / out)])


def test_all_shapes_of_a_file_give_the_same_results(tmp_path: Path) -> None:
    one, two = result(), result("on_demand")
    lines(tmp_path / "lines", [one, two])
    (tmp_path / "runs").write_text(json.dumps({"runs": [one, two]}))
    (tmp_path / "alone").write_text(json.dumps(one | {"baselines": [two]}, indent=1))
    (tmp_path / "saved").write_text("policy   tokens/s\n\n" + json.dumps(one | {"baselines": [two]}) + "\n")
    for name in ("lines", "runs", "alone", "saved"):
        assert records.read([str(tmp_path / name)]).runs == [one, two]


def test_a_baseline_in_two_files_counts_once_and_of_two_records_the_later(tmp_path: Path) -> None:
    common = result("on_demand")
    first = lines(tmp_path / "a", [result() | {"baselines": [common]}])
    second = lines(tmp_path / "b", [result("two_class") | {"baselines": [common]}])
    assert [r["policy"] for r in records.read([first, second]).runs] == ["speculative", "on_demand", "two_class"]
    keyed = lines(tmp_path / "c", [result(key="k", tpot_s=1.0), result(key="k", tpot_s=2.0)])
    assert [r["tpot_s"] for r in records.read([keyed]).runs] == [2.0]


def test_a_torn_last_line_is_left_out_and_a_damaged_one_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = json.dumps(result())
    torn, damaged = tmp_path / "torn", tmp_path / "damaged"
    torn.write_text(whole + "\n" + whole[:50])
    damaged.write_text(whole[:50] + "\n" + whole + "\n")
    assert len(records.read([str(torn)]).runs) == 1
    assert "incomplete" in capsys.readouterr().err
    with pytest.raises(records.PictureError, match="line 1"):
        records.read([str(damaged)])
    with pytest.raises(records.PictureError, match="cannot be read"):
        records.read([str(tmp_path / "none")])
    (tmp_path / "text").write_text("no results\n")
    with pytest.raises(records.PictureError, match="no results"):
        records.read([str(tmp_path / "text")])


def test_choosing_by_value_by_name_and_by_alternatives() -> None:
    found = [*grid(), result("on_demand", bits=2)]
    assert len(records.choose(found, ["policy=speculative"])) == 9
    assert len(records.choose(found, ["policy=speculative:lookahead=2", "slots=4"])) == 1
    assert len(records.choose(found, ["slots=2", "slots=6"])) == 6
    for wrong, message in (("slots", "KEY=VALUE"), ("width=4", "no result has that key"), ("bits=5", "there are 2, 4")):
        with pytest.raises(records.PictureError, match=message):
            records.choose(found, [wrong])


def test_lookahead_comes_from_the_record_the_text_or_the_default() -> None:
    assert records.lookahead(result("speculative:lookahead=2")) == 2
    assert records.lookahead(result("speculative", lookahead=4)) == 4
    assert records.lookahead(result("speculative")) == 3
    assert records.lookahead(result("on_demand", lookahead=3)) is None
    assert records.lookahead(result("a_policy_of_yesterday:lookahead=5")) == 5


def test_what_a_sweep_varied_of_the_machine_is_a_condition(tmp_path: Path) -> None:
    swept = [result(axes={"machine.link.h2d_gb_s": v, "slots": 4}, key=str(v)) for v in (12, 25)]
    for record in swept:
        del record["set"]
    found = records.read([lines(tmp_path / "a", swept)]).runs
    with pytest.raises(records.PictureError, match="mix 2 values of set"):
        records.comparable(found, ("slots",))
    assert records.read([lines(tmp_path / "b", [result(trace="/some/where/t.safetensors")])]).runs[0]["trace"] == (
        "t.safetensors"
    )
    records.comparable(records.choose(found, ["set=machine.link.h2d_gb_s=25"]), ())


def test_policies_of_one_text_are_told_apart_and_too_many_are_folded() -> None:
    two = [result(cache="lru"), result(cache="heat")]
    assert list(records.by_label(two)) == ["speculative, cache lru", "speculative, cache heat"]
    groups, folded = records.series(grid(), 3)
    assert len(groups) == 3 and not folded
    groups, folded = records.series(grid(), 2)
    assert list(groups) == ["speculative"] and folded
    with pytest.raises(records.PictureError, match="3 policies"):
        records.series([result(name) for name in ("a", "b", "c")], 2)


def test_the_parts_of_a_bar_sum_to_tpot() -> None:
    parts = parts_ms(result())
    assert parts == pytest.approx([p * result()["tpot_s"] * 1e3 for p in (0.25, 0.25, 0.3, 0.2)])
    assert min(parts_ms(result(compute_busy=0.9))) == 0.0


def test_pareto_front_by_hand() -> None:
    assert pareto([(3.0, 5.0), (1.0, 2.0), (2.0, 2.0), (2.0, 4.0), (4.0, 4.5), (1.0, 1.0)]) == [1, 3, 0]


def test_runs_of_one_budget_need_one_reference(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the plots extra")
    found = [result(p, landing_slots=n, h2d_bytes=n) for p in ("speculative", "two_class") for n in (1, 2)]
    found[0]["bounds"] = {"demand_only_s": 1.0}
    with pytest.raises(records.PictureError, match="unequal VRAM"):
        plot.draw("budget", found)


def test_only_the_front_takes_marks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the plots extra")
    source = lines(tmp_path / "results.jsonl", SHOWN["front"][0])
    out = str(tmp_path / "a.svg")
    plot.run(plot.parser().parse_args(["front", source, "--mark", "1.2", "--out", out]))
    with pytest.raises(records.PictureError, match="it is for front"):
        plot.run(plot.parser().parse_args(["slots", source, "--mark", "1.2", "--out", out]))


def test_drawing_loads_no_pyplot_and_reading_no_matplotlib() -> None:
    code = (
        "import sys; from sim import plot; assert 'matplotlib' not in sys.modules; "
        f"plot.select(plot.pictures()['validation'], [{str(VALIDATION)!r}], []); assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_policy_looks_the_same_in_every_picture() -> None:
    one = looks(["speculative", "on_demand", "mine"])
    two = looks(["on_demand:landing_slots=2", "speculative:lookahead=1", "speculative:lookahead=2"])
    assert one["speculative"] == two["speculative:lookahead=1"] and one["on_demand"] == two["on_demand:landing_slots=2"]
    for found in (one, two):
        assert len({look["color"] for look in found.values()}) == len({look["marker"] for look in found.values()}) == 3


def test_crossings_by_hand() -> None:
    line = crossing.slower(by_link())["speculative"]
    assert [x for x, _ in line] == [4.0, 16.0] and [y for _, y in line] == pytest.approx([10.0, -10.0])
    assert crossing.crossings(line) == pytest.approx([8.0])  # half-way on a logarithmic scale
    assert crossing.verdict("it", line) == "it loses below 8 GB/s (up to 10 %)"
    assert crossing.verdict("it", [(4.0, 0.4), (16.0, -3.0)]) == "it never loses more than 0.5 %"
    assert crossing.verdict("it", [(4.0, 2.0), (16.0, 3.0)]) == "it always loses (up to 3 %)"
    assert crossing.verdict("it", [(4.0, -2.0), (16.0, 3.0)]).startswith("it loses above ")


def cell(policy: str, measured: float, simulated: float, link: float = 0.1) -> dict[str, Any]:
    return {"policy": policy, "bits": 4, "slots": 4, "link_gb_s": link, "repeat_spread": 0.02,
            "measured": {"tpot_s": measured}, "simulated": {"tpot_s": simulated}}  # fmt: skip


def test_order_and_the_worst_cell_by_hand() -> None:
    right = [cell("a", 1.0, 1.1), cell("b", 2.0, 1.9)]
    wrong = [cell("a", 1.0, 1.2, 0.2), cell("b", 1.05, 1.1, 0.2)]
    assert list(order.groups([*right, *wrong, cell("a", 1.0, 1.0, 0.3)]).values()) == [right, wrong]
    assert order.swapped(right) == [] and order.regret(right) == 0.0
    assert order.swapped(wrong) == [("a", "b", pytest.approx(0.05), 0.02)]
    assert order.regret(wrong) == pytest.approx(0.05)
    assert "20.0 % at most: a, 0.2 GB/s" in validation.finding([*right, *wrong])
    assert validation.height([cell("a", 1.0, 1.0)] * 40) > validation.height(right) == validation.SIZE[1]


def test_the_ladder_goes_from_the_released_rung_to_the_fastest() -> None:
    rungs = SHOWN["ladder"][0]
    assert [r["policy"] for r in sorted([rungs[2], *rungs[:2]], key=ladder.order)] == RUNGS
    text = ladder.finding(rungs, rungs[-1])
    assert text.startswith("speculative makes 100 % more tokens/s than as released; 50 % of the time")


def test_a_picture_in_memory_is_shown_by_a_notebook() -> None:
    pytest.importorskip("matplotlib", reason="pictures need the plots extra")
    found = plot.picture("stalls", [result(), result("on_demand"), result(bits=2)], ["bits=4"])
    assert found._repr_png_().startswith(b"\x89PNG") and repr(found).startswith("2 points. SIMULATED")
    assert found == plot.picture("stalls", SHOWN["stalls"][0])
    marked = plot.picture("front", SHOWN["front"][0], marks=[1.5])
    assert marked.images != plot.picture("front", SHOWN["front"][0]).images
    with pytest.raises(records.PictureError, match="no results to draw"):
        plot.picture("stalls", [])


def test_validations_are_found_among_other_files(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"runs": []}')
    with pytest.raises(records.PictureError, match="no validation in there"):
        plot.validations(tmp_path)
    (tmp_path / "b.json").write_text('{"cells": [1]}')
    assert plot.validations(tmp_path) == [tmp_path / "b.json"]
    assert VALIDATION in plot.validations(VALIDATION.parent)
