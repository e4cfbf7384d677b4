"""The report page: what it holds, that nothing in a result can break out of it, and how it behaves in a browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import random_setting

from sim import choice as choices
from sim.experiment import Experiment
from sim.report import __main__ as command
from sim.report import events, page
from sim.report.charts import ticks
from sim.report.markup import VOID, badge, tag
from sim.spec import SpecError
from sim.timeline import Timeline

ROOT = Path(__file__).parent.parent
SWEEP = ROOT / "notebooks/sweeps/equal_vram.jsonl"
SLOTS = ROOT / "notebooks/sweeps/equal_slots.jsonl"
VALIDATION = ROOT / "notebooks/validation/cpu-2core.json"
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'\"&lt;</title>"
)


class Reader(HTMLParser):
    """Elements of a page, checked to be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert tag not in ("meta", "input", "br")
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        (self.scripts if inside == "script" else self.text).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def made(folder: Path, results: Path, *flags: str) -> str:
    """The page of a result file."""
    out = folder / "report.html"
    command.run(command.parser().parse_args([str(results), "--out", str(out), *flags]))
    return out.read_text()


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in SWEEP.read_text().splitlines()]


def lines(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in found))
    return path


def hostile_sweep(path: Path) -> Path:
    """Records in which every text that a person or another program chose tries to break out."""
    found = records()
    for record in found:
        for key in (
            "model",
            "machine",
            "trace",
            "policy",
            "cache",
            "version",
            "regime",
            "evidence",
            "routing",
            "driver",
        ):
            record[key] = f"{record[key]}{HOSTILE}"
        record["set"] = [f"machine.x={HOSTILE}"]
        record["axes"] = record["axes"] | {HOSTILE: HOSTILE}
    return lines(path, found)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One page of every kind."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "hostile.json").write_text(
        VALIDATION.read_text().replace('"policy": "speculative"', f'"policy": {json.dumps("speculative" + HOSTILE)}')
    )
    sources = {
        "sweep": SWEEP,
        "slots": SLOTS,
        "validation": VALIDATION,
        "hostile_sweep": hostile_sweep(folder / "hostile.jsonl"),
        "hostile_validation": folder / "hostile.json",
    }
    found = {}
    for name, source in sources.items():
        found[name] = folder / f"{name}.html"
        command.run(command.parser().parse_args([str(source), "--out", str(found[name])]))
    return found


KINDS = ("sweep", "slots", "validation", "hostile_sweep", "hostile_validation")


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_that_needs_nothing_else(kind: str, pages: dict[str, Path]) -> None:
    text = pages[kind].read_text()
    reader = Reader(text.removeprefix("<!DOCTYPE html>"))
    assert len(text.encode()) < page.MOST_BYTES
    assert not reader.all("img") and not reader.all("link") and not reader.all("iframe")
    assert not any(set(a) & {"src", "onclick", "onerror", "onload"} for _, a in reader.elements)
    script = "".join(reader.scripts)
    assert len(reader.all("script")) == 1 and script == (ROOT / "sim/report/page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(m["content"] for m in reader.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/2000/svg"}  # a namespace, not loaded
    ids = [a["id"] for _, a in reader.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {a["href"] for a in reader.all("a")}
    assert targets and targets <= {f"#{one}" for one in ids}
    named = {a[k] for _, a in reader.elements for k in ("aria-labelledby", "aria-describedby", "for") if k in a}
    assert named <= set(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_says_what_it_rests_on(kind: str, pages: dict[str, Path]) -> None:
    text = pages[kind].read_text()
    for found in re.findall(r"<figure.*?</figure>", text, re.DOTALL):
        label = re.search(r'<h3[^>]*>[^<]+<span class="badge \w+">(\w+)', found)
        assert label is not None and label[1] in ("MEASURED", "SIMULATED", "ESTIMATED")
        assert "<figcaption>" in found
    for heading in re.findall(r"<h3[^>]*>(.*?)</h3>", text):
        assert "badge" in heading or heading == "Provenance"


def test_a_sweep_begins_with_the_recommendation_in_words(pages: dict[str, Path]) -> None:
    text = pages["slots"].read_text()
    body = re.sub(r"<[^>]+>", "", text[text.index("<main>") :])
    found = [json.loads(line) for line in SLOTS.read_text().splitlines()]
    chosen = choices.choose(found, choices.wish("tpot"))
    best = chosen.records[chosen.chosen]
    assert body.index(f"Run {best['policy']} with experts of {best['bits']} bits") < body.index("Pareto front")
    speed, size = choices.speed(best), choices.vram(best) / 1e9
    assert f"{speed:.2f} tokens/s in {size:.2f} GB of VRAM (all {best['scaled']['layers']} layers)" in body
    for part in (
        "joint floor",
        "Where the time of a token goes",
        "All settings",
        "Provenance",
        "A few tokens, in time",
    ):
        assert part in body
    for record in found:
        assert f"{record['scaled']['tokens_per_s']:.2f}" in body and record["trace_sha256"] in body


def test_where_every_expert_has_a_slot_the_page_says_so_and_shows_tokens_that_load(pages: dict[str, Path]) -> None:
    text = pages["sweep"].read_text()
    assert "Every expert has a slot there" in text
    assert 'class="a"' in text and "so the fastest setting that does is shown" in text


def test_a_validation_begins_with_what_ran_fastest_and_how_far_predictions_are_off(pages: dict[str, Path]) -> None:
    body = re.sub(r"<[^>]+>", "", pages["validation"].read_text())
    document = json.loads(VALIDATION.read_text())
    cells = document["cells"]
    for pace in {c["link_gb_s"] for c in cells}:
        best = max((c for c in cells if c["link_gb_s"] == pace), key=lambda c: c["measured"]["tokens_per_s"])
        setting = f"{best['policy']}, {best['bits']} bits, {best['slots']} slots a layer"
        assert f"over a link of {pace:g} GB/s: {setting}: {best['measured']['tokens_per_s']:.2f} tokens/s" in body
    median, most = document["median_abs_tpot_error"] * 100, document["max_abs_tpot_error"] * 100
    assert f"off by {median:.1f} % in the median and {most:.1f} % at most over {len(cells)} cells" in body
    assert f"exactly the loads it foretold in {sum(c['load_log_equal'] for c in cells)} of them" in body


def test_the_same_results_give_the_same_bytes(tmp_path: Path, pages: dict[str, Path]) -> None:
    out = tmp_path / "again.html"
    words = [sys.executable, "-m", "sim.report", str(SLOTS), "--out", str(out)]
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert out.read_bytes() == pages["slots"].read_bytes()
    document = json.loads(done.stdout.splitlines()[-1])
    assert (
        document["kind"] == "sweep"
        and document["bytes"] == out.stat().st_size
        and document["results"] == len(SLOTS.read_text().splitlines())
    )


def test_a_large_sweep_stays_under_the_limit_and_says_what_is_left_out(tmp_path: Path) -> None:
    found, some = [], records()
    for number in range(2000):
        record = some[number % len(some)]
        slower = record["scaled"] | {"tokens_per_s": record["scaled"]["tokens_per_s"] * (1 - number / 1e5)}
        blocks = {name: values[:8] for name, values in record["blocks"].items()}
        found.append(record | {"key": f"{number:064x}", "scaled": slower, "blocks": blocks})
    text = made(tmp_path, lines(tmp_path / "many.jsonl", found))
    assert len(text.encode()) < page.MOST_BYTES and "500 slower settings are left out" in text
    assert text.count("<tr ") >= page.MOST_ROWS


def test_settings_of_two_machines_are_not_compared(tmp_path: Path) -> None:
    other = [r | {"machine": "another", "machine_sha256": "0", "key": f"x{r['key']}"} for r in records()]
    reader = Reader(made(tmp_path, lines(tmp_path / "two.jsonl", records() + other)).removeprefix("<!DOCTYPE html>"))
    headings = [t for t in reader.text if t.startswith("mixtral-8x7b on ")]
    assert {"mixtral-8x7b on rtx3090", "mixtral-8x7b on another"} <= set(headings)


def test_a_setting_on_another_trace_has_no_timeline_and_the_page_says_why(tmp_path: Path) -> None:
    foreign = [r | {"trace_sha256": "1" * 64} for r in records()]
    text = made(tmp_path, lines(tmp_path / "foreign.jsonl", foreign))
    assert "No timeline: " in text and "sim.run --timeline writes it" in text and 'class="tokens"' not in text


def test_a_timeline_file_is_shown_for_the_tokens_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with path.open("w") as file:
        timeline = Timeline(file, "simulated" + HOSTILE)
        Experiment(references=False).run(random_setting(3), None, timeline)
        timeline.close()
    text = made(tmp_path, SLOTS, "--timeline", str(path), "--tokens", "2")
    Reader(text.removeprefix("<!DOCTYPE html>"))
    assert text.count('data-do="token') == 2 and "The last tokens of t.json" in text


def test_outcomes_are_those_the_drivers_count() -> None:
    """Hits, late loads and misses read off a timeline are the run's own counts."""
    seen: Counter[str] = Counter()
    for seed in range(80):
        setting = random_setting(seed)
        stream = io.StringIO()
        timeline = Timeline(stream, "run")
        result = Experiment(references=False).run(setting, None, timeline)
        timeline.close()
        if not setting.options.copy_stream and result["host_computed"] + result["prefill"]["host_computed"]:
            continue  # then the timeline has no slices of what the host computes
        (process,) = events.processes(json.loads(stream.getvalue())["traceEvents"])
        kinds = Counter(one.kind for one in process.slices)
        for kind, key in ((events.HIT, "hits"), (events.LATE, "late"), (events.MISS, "misses")):
            assert kinds[kind] == result[key] + result["prefill"][key], (seed, kind)
            seen[kind] += kinds[kind]
        shown = process.last(2)
        assert len(shown.ends_ns) == 2 and all(s.end_ns > 0 and s.start_ns < shown.ends_ns[-1] for s in shown.slices)
        lanes: dict[str, int] = {}
        for one in shown.slices:
            assert one.start_ns >= lanes.get(one.track, one.start_ns), "slices of a lane overlap"
            lanes[one.track] = one.end_ns
    assert min(seen[kind] for kind in (events.HIT, events.LATE, events.MISS)) > 20


def test_every_part_of_a_prefetch_that_was_used_is_drawn_as_such() -> None:
    """A prefetch that a demand load interrupts goes on later; what is retracted is drawn apart."""
    link, compute = {"pid": 1, "tid": 2, "ph": "X"}, {"pid": 1, "tid": 1, "ph": "X"}
    made_of: list[dict[str, Any]] = [
        {"pid": 1, "tid": 1, "ph": "M", "name": "thread_name", "args": {"name": "compute"}},
        {"pid": 1, "tid": 2, "ph": "M", "name": "thread_name", "args": {"name": "link H2D"}},
        compute | {"name": "attention 0", "ts": 0, "dur": 1},
        link | {"name": "1.3", "cat": "prefetch", "ts": 1, "dur": 2},
        link | {"name": "0.2", "cat": "demand", "ts": 3, "dur": 4},
        link | {"name": "1.3", "cat": "prefetch", "ts": 7, "dur": 2},
        link | {"name": "1.1", "cat": "prefetch", "ts": 9, "dur": 1.5},
        compute | {"name": "expert 0.2", "ts": 7, "dur": 1},
        compute | {"name": "attention 1", "ts": 8, "dur": 2},
        compute | {"name": "expert 1.3", "ts": 10, "dur": 1},
        compute | {"name": "head", "ts": 11, "dur": 1},
        {"pid": 1, "tid": 2, "ph": "s", "cat": "prefetch", "name": "use", "id": 4, "ts": 1},
        {"pid": 1, "tid": 1, "ph": "f", "cat": "prefetch", "name": "use", "id": 4, "ts": 10},
    ]
    (process,) = events.processes(made_of)
    assert [(s.name, s.kind) for s in process.slices if s.track == "link H2D"] == [
        ("1.3", "prefetch"), ("0.2", "demand"), ("1.3", "prefetch"), ("1.1", "unclaimed"),
    ]  # fmt: skip
    assert process.arrows == [events.Arrow(1000, 10000)] and process.ends_ns == [12000]
    assert [s.kind for s in process.slices if s.name.startswith("expert")] == ["miss", "hit"]


REFUSED = [
    ("nothing", None, "name a file of sim.sweep --out or runtime.validate --out"),
    ("empty", "", "hold no record"),
    ("text", "no results\n", "line 1 is no record of a sweep"),
    ("other", '{"a": 1}', "hold neither"),
    ("cells", '{"cells": []}', "no cells"),
    ("half", '{"cells": [{"measured": {"tpot_s": 1}}]}', "without both times"),
    ("poor", '{"key": "k"}\n', "a result has no 'tokens_per_s'"),
    ("untimed", '{"key": "k", "tokens_per_s": null}\n', "a result has no 'evidence'"),
    ("still", '{"key": "k", "tokens_per_s": 0}\n', "a result has tokens_per_s 0; it must be a number above 0"),
    ("sides", '{"cells": [{"measured": {"tpot_s": 1}, "simulated": {"tpot_s": 1}}]}', "a cell has no 'policy'"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED, ids=[r[0] for r in REFUSED])
def test_other_files_are_refused_in_one_sentence(
    name: str, content: str | None, message: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    source, out = tmp_path / name, tmp_path / "r.html"
    if content is not None:
        source.write_text(content)
    monkeypatch.setattr(sys, "argv", ["sim.report", str(source), "--out", str(out)])
    assert command.main() == 2
    said = capsys.readouterr()
    assert said.err.startswith("sim.report: ") and message in said.err and said.err.count("\n") == 1
    assert said.out == "" and not list(tmp_path.glob("r.html*"))


@pytest.mark.parametrize("key", ["tokens_per_s", "bits", "bounds", "stall_s", "blocks", "evidence", "vram_bytes"])
@pytest.mark.parametrize("value", [None, "x", [], float("nan")])
def test_a_value_of_the_wrong_kind_is_refused_or_shown_but_never_a_traceback(
    key: str, value: Any, tmp_path: Path
) -> None:
    found = [r | {key: value, "scaled": None} for r in records()[:3]]
    source = lines(tmp_path / "odd.jsonl", found)
    try:
        Reader(made(tmp_path, source).removeprefix("<!DOCTYPE html>"))
    except SpecError as error:
        assert str(source) in str(error) or "no setting has a time" in str(error)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where everything in a result stands."""
    for key in value if isinstance(value, dict) and path[-1:] != ("prefill",) else ():
        yield (*path, key)
        yield from leaves(value[key], (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with something else there; without it for Ellipsis."""
    key, *rest = path
    if rest:
        return {**value, key: changed(value[key], tuple(rest), new)}
    return {k: v for k, v in value.items() if k != key} | ({} if new is ... else {key: new})


@pytest.mark.parametrize("kind", ["sweep", "validation"])
def test_whatever_a_field_holds_there_is_a_page_or_one_sentence(kind: str, tmp_path: Path) -> None:
    """Every field of a result in turn, missing and with values of every kind."""
    source = tmp_path / "odd"
    noisy = {"shares": {"dense": 0.5}, "residuals": {"dense": [0.9, 1.0, 1.1]}, "trace_sha256": "1" * 64}
    runs, document = [r | noisy for r in records()[:3]], json.loads(VALIDATION.read_text())
    cells = [{k: v for k, v in cell.items() if k != "trace"} for cell in document["cells"][:2]]
    first = runs[0] if kind == "sweep" else cells[0]
    odd: list[Any] = [..., None, "x", [], {}, True, -1, 0, float("nan"), 10**400]
    shown: Counter[bool] = Counter()
    for number, path in enumerate(leaves(first)):
        for value in odd[number % 3 :: 3]:
            one = changed(first, path, value)
            if kind == "sweep":
                lines(source, [one, *runs[1:]])
            else:
                source.write_text(json.dumps(document | {"cells": [one, cells[1]], "profile": {}}))
            try:
                made(tmp_path, source)
                shown[True] += 1
            except SpecError as error:
                assert str(source) in str(error) and "\n" not in str(error), path
                shown[False] += 1
    assert min(shown.values()) > 50


def test_a_mistake_of_the_programs_own_is_not_called_a_damaged_file(tmp_path: Path, monkeypatch: Any) -> None:
    def mistaken(*_: Any) -> None:
        raise KeyError("of our own")

    monkeypatch.setattr(page, "sweep_sections", mistaken)
    with pytest.raises(KeyError, match="of our own"):
        made(tmp_path, SLOTS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "missing/r.html"], "folder does not exist"),
        (["--out", "r.html", "--tokens", "0"], "it must be 1 to 12"),
        (["--out", "r.html", "--best", "luck"], "--best"),
        (["--out", "r.html", "--timeline", str(SWEEP)], "is no timeline"),
        (["--out", "r.html", "--timeline", "none.gz"], "No such file"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags: list[str], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=message):
        command.run(command.parser().parse_args([str(SWEEP), *flags]))
    assert not list(tmp_path.iterdir())


def test_markup_escapes_everything_that_is_not_markup() -> None:
    built = tag("p", HOSTILE, tag("b", "<"), title=HOSTILE, data_v=0.1, hidden=False)
    reader = Reader(built)
    assert reader.elements == [("p", {"title": HOSTILE, "data-v": "0.1"}), ("b", {})]
    assert "".join(reader.text) == HOSTILE + "<"
    assert badge("ESTIMATED, SIMULATED").startswith('<span class="badge ')


def test_ticks_are_round_and_inside() -> None:
    for low, high in ((0.0, 1.0), (10.2, 22.9), (0.0, 48.2), (3.0, 3.0 + 1e-6), (0.0, 4e5)):
        found = ticks(low, high, 6)
        assert 2 <= len(found) <= 14 and all(low - 1e-9 <= t <= high + 1e-9 for t in found)


# --- in a browser -------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium")
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium (apt-get install chromium)")
FRAME = """<!DOCTYPE html><title>waiting</title><body style="margin:0"><iframe id="f" src="PAGE"
style="width:WIDTHpx;height:HEIGHTpx;border:0"></iframe><script>
document.getElementById("f").addEventListener("load", (event) => {
  const w = event.target.contentWindow, d = w.document, found = {};
  try { CHECKS } catch (error) { found.error = String(error); }
  document.body.replaceChildren(JSON.stringify(found));
  document.title = "done";
});
</script></body>"""
CHECKS = """
  found.title = d.title;
  found.overflow = d.documentElement.scrollWidth - d.documentElement.clientWidth;
  const press = (key) => svg.dispatchEvent(new w.KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
  const grid = d.querySelector(".grid"), rows = () => [...grid.querySelectorAll("tbody tr")];
  const column = (n) => rows().map((r) => Number(r.cells[n].dataset.v));
  const heads = [...grid.querySelectorAll("th[data-key]")], n = heads.findIndex((h) => h.dataset.key === "tokens");
  heads[n].querySelector("button").click();
  found.sort1 = heads[n].getAttribute("aria-sort"); found.down = column(n);
  heads[n].querySelector("button").click();
  found.sort2 = heads[n].getAttribute("aria-sort"); found.up = column(n);
  const box = grid.querySelector(".filter");
  const type = (text) => { box.value = text; box.dispatchEvent(new w.Event("input"));
    return [rows().filter((r) => !r.hidden).length, grid.querySelector(".count").textContent]; };
  found.words = type("speculative bits=4"); found.less = type("tokens<10"); found.none = type("zzz");
  found.all = type("");
  const svg = d.querySelector(".tokens"), s = svg.querySelectorAll(".s")[4];
  const wide = () => Number(s.getAttribute("width"));
  found.focusable = svg.tabIndex; found.before = wide(); press("0"); found.whole = wide(); press("+"); press("+");
  press("0"); found.again = wide(); press("n"); found.said = d.querySelector(".said").textContent;
  d.querySelector('[data-do="token1"]').click(); found.token = s.style.display;
  found.ground = w.getComputedStyle(d.body).backgroundColor;
"""


def chromium(folder: Path, *flags: str) -> str:
    """What headless chromium prints."""
    words = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}", "--allow-file-access-from-files", *flags,
    ]  # fmt: skip
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout


def looked_at(folder: Path, source: Path, width: int, *flags: str) -> dict[str, Any]:
    """What `CHECKS` find on a page in a window of this width."""
    frame = folder / "frame.html"
    text = FRAME.replace("PAGE", source.as_uri()).replace("WIDTH", str(width)).replace("HEIGHT", "3000")
    frame.write_text(text.replace("CHECKS", CHECKS))
    shown = chromium(folder, "--virtual-time-budget=8000", "--dump-dom", *flags, frame.as_uri())
    assert "<title>done</title>" in shown
    found = json.loads(
        "".join(Reader(re.sub(r"<!DOCTYPE html>|<meta[^>]*>", "", shown)).text).strip().removeprefix("done")
    )
    assert isinstance(found, dict) and "error" not in found, found
    return found


@browser
@pytest.mark.parametrize(("kind", "width"), [("slots", 390), ("validation", 1200), ("hostile_sweep", 390)])
def test_it_works_in_a_browser(kind: str, width: int, pages: dict[str, Path], tmp_path: Path) -> None:
    """Sorting, filtering and zooming, by keyboard too; nothing is wider than the window; no foreign code runs."""
    if kind == "hostile_sweep":
        source = tmp_path / "t.json"
        with source.open("w") as file:
            timeline = Timeline(file, "simulated")
            Experiment(references=False).run(random_setting(3), None, timeline)
            timeline.close()
        made(tmp_path, hostile_sweep(tmp_path / "h.jsonl"), "--timeline", str(source))
        found = looked_at(tmp_path, tmp_path / "report.html", width)
    else:
        found = looked_at(tmp_path, pages[kind], width)
    assert found["title"].startswith("Expert offloading: ") and found["overflow"] <= 0
    assert found["sort1"] == "descending" and found["down"] == sorted(found["down"], reverse=True)
    assert found["sort2"] == "ascending" and found["up"] == sorted(found["up"])
    total = len(found["up"])
    assert found["none"] == [0, f"0 of {total} shown"] and found["all"] == [total, f"{total} of {total} shown"]
    assert found["less"][0] == sum(v < 10 for v in found["up"])
    assert 0 < found["words"][0] < total
    assert found["focusable"] == 0 and 0 < found["whole"] <= found["before"] and found["again"] == found["whole"]
    assert re.search(r": .+; [\d.]+ (ms|µs) from ", found["said"])
    assert found["ground"] == "rgb(255, 255, 255)"


@browser
@pytest.mark.parametrize(
    ("name", "width", "dark"), [("desktop", 1200, False), ("phone", 500, False), ("dark", 1200, True)]
)
def test_screenshots(name: str, width: int, dark: bool, pages: dict[str, Path], tmp_path: Path) -> None:
    """There is something to see at every width, on light ground or dark as the reader's system asks."""
    image = pytest.importorskip("matplotlib.image", reason="reading a screenshot needs the plots extra")
    path = tmp_path / f"{name}.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    chromium(tmp_path, f"--window-size={width},1600", f"--screenshot={path}", *scheme, pages["slots"].as_uri())
    pixels = image.imread(path)[..., :3]
    assert pixels.shape == (1600, width, 3)
    grey = pixels.mean(axis=2)
    middle = float(grey[:, width // 2 :].reshape(-1).mean())
    assert middle < 0.35 if dark else middle > 0.8
    assert ((pixels.max(axis=2) - pixels.min(axis=2)) > 0.4).mean() > 0.0005  # marks in colour
