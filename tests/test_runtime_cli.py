"""Commands of the runtime on a small random model: calibrate, record, validate, train, and their refusals."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the runtime extra")
transformers = pytest.importorskip("transformers", reason="needs the runtime extra")

import traces  # noqa: E402 (after the check above)
from runtime import calibrate, record, train, validate, verdict  # noqa: E402
from runtime.prompts import BUILT_IN, read  # noqa: E402
from sim.machine import load_machine  # noqa: E402

CELL = {
    "policy",
    "bits",
    "slots",
    "link_gb_s",
    "prompts",
    "regime",
    "measured",
    "simulated",
    "tpot_error",
    "repeat_spread",
    "load_log_equal",
    "first_divergence",
}


def call(monkeypatch: pytest.MonkeyPatch, module, *argv: object) -> int:
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, argv)])
    return module.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained for three steps on a text made here, interrupted after the second and resumed."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n\nIt was a fine day, and the old man went out to sea.\n" * 2000)
    shape = ["--layers", "4", "--hidden", "64", "--ffn", "64", "--experts", "4", "--vocab", "300"]
    shape += ["--batch", "2", "--length", "32", "--evaluate-every", "2"]
    for tokens in (128, 192):
        with pytest.MonkeyPatch.context() as patch:
            out = folder / "tiny"
            assert call(patch, train, "--corpus", text, "--out", out, "--tokens", tokens, "--threads", 1, *shape) == 0
    return out


def test_training_resumes(trained: Path) -> None:
    log = [json.loads(line) for line in (trained / "training" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [2, 3]
    assert transformers.AutoModelForCausalLM.from_pretrained(trained).config.num_hidden_layers == 4


def test_record_writes_a_trace(trained: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "t.safetensors"
    assert call(monkeypatch, record, "--model", trained, "--tokens", 5, "--out", out) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    trace = traces.load(out)
    assert last["decode_tokens"] == trace.num_decode_tokens == 5 * len(BUILT_IN)
    assert trace.routing == "RECORDED" and trace.logits is not None and "router" in trace.guesses
    assert str(tmp_path) not in json.dumps(trace.provenance)


def test_calibrate_then_validate(trained: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """The profile is usable as it is, the table has every cell, and all load logs are equal."""
    profile, result = tmp_path / "here.json", tmp_path / "validation.json"
    short = ("--tokens", 8, "--rounds", 1, "--context", 64, "--allow-busy")
    assert call(monkeypatch, calibrate, "--model", trained, *short, "--out", profile) == 0
    assert load_machine(str(profile)).operators["tiny"].gates
    capsys.readouterr()
    drawn = tmp_path / "drawn.json.gz"
    flags = ["--tokens", "6", "--repeats", "2", "--slots", "2", "--slots", "3", "--link-gb-s", "0.2"]
    flags += ["--timeline", str(drawn)]
    policies = ["--policy", "on_demand", "--policy", "speculative", "--policy", "mixtral_offloading"]
    code = call(monkeypatch, validate, "--model", trained, "--profile", profile, *flags, *policies, "--out", result)
    lines = capsys.readouterr().out.splitlines()
    document = json.loads(lines[-1])
    assert code == (1 if False in document["gates"].values() else 0)
    assert document["gates"]["load_logs"]
    assert document == json.loads(result.read_text())
    assert len(document["cells"]) == 6
    for cell in document["cells"]:
        assert set(cell) >= CELL
        assert cell["load_log_equal"] and cell["first_divergence"] is None
        assert cell["measured"]["evidence"] == "MEASURED"
        assert cell["measured"]["misses"] == cell["simulated"]["misses"]
        assert set(cell["simulated"]) == set(cell["measured"])
    assert {"median_abs_tpot_error", "max_abs_tpot_error", "kendall_tau", "regret", "device"} <= set(document)
    check_timelines(json.loads(gzip.decompress(drawn.read_bytes()))["traceEvents"])
    check_recheck(result, tmp_path / "copy", monkeypatch, capsys)


def check_timelines(events: list[dict]) -> None:
    """Measured and simulated in turn, six cells; slices of the computing thread never overlap."""
    names = [e["args"]["name"].partition(":")[0] for e in events if e["name"] == "process_name"]
    assert names == ["measured", "simulated"] * 6
    for pid in range(1, 13):
        mine = [e for e in events if e["pid"] == pid]
        tracks = {e["args"]["name"]: e["tid"] for e in mine if e["name"] == "thread_name"}
        assert {"compute", "link H2D"} <= set(tracks)
        slices = sorted((e["ts"], e["dur"]) for e in mine if e["ph"] == "X" and e["tid"] == tracks["compute"])
        assert all(a + length <= b + 0.002 for (a, length), (b, _) in itertools.pairwise(slices))


def check_recheck(result: Path, folder: Path, monkeypatch, capsys) -> None:
    """The stored figures come again exactly; a changed one, or a missing trace, is found."""
    assert call(monkeypatch, validate, "--recheck", result) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["differences"] == []
    folder.mkdir()
    for file in result.parent.glob("validation*"):
        shutil.copy(file, folder)
    document = json.loads(result.read_text())
    document["cells"][1]["simulated"]["stall_s"] += 1e-9
    (folder / result.name).write_text(json.dumps(document))
    assert call(monkeypatch, validate, "--recheck", folder / result.name) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["differences"]
    assert [(d["cell"], d["key"]) for d in found] == [(1, "simulated.stall_s")]
    (folder / "validation.cell0.safetensors").unlink()
    assert call(monkeypatch, validate, "--recheck", folder / result.name) == 2


@pytest.mark.parametrize(
    ("module", "argv", "says"),
    [
        (record, ["--model", "nowhere", "--out", "x"], "config.json"),
        (record, ["--tokens", "0", "--out", "x"], "at least 1"),
        (record, ["--temperature", "-1", "--out", "x"], "0 or larger"),
        (validate, ["--policy", "nonsense"], "unknown"),
        (validate, ["--profile", "rtx3090"], "no measurements of demo"),
        (validate, ["--link-gb-s", "0"], "link-gb-s"),
        (validate, ["--slots", "9"], "must be 2 to 8"),
        (validate, ["--policy", "on_demand:cache=belady"], "needs the future"),
        (calibrate, ["--model", "nowhere", "--out", "x", "--allow-busy"], "config.json"),
        (calibrate, ["--tokens", "1", "--out", "x"], "at least 8"),
        (calibrate, ["--out", "missing/x.json"], "does not exist"),
        (record, ["--out", "missing/x"], "does not exist"),
        (validate, ["--out", "missing/x.json"], "does not exist"),
        (validate, ["--recheck", "missing.json"], "written by --out"),
        (train, ["--corpus", "missing.txt", "--out", "x"], "not found"),
    ],
)
def test_bad_input_is_one_sentence(module, argv, says, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, module, *argv) == 2
    shown = capsys.readouterr()
    assert says in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert not list(tmp_path.iterdir())


def test_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "domain": "x"}\n{"question": "b"}\n')
    assert [tuple(p) for p in read(file)] == [("a", "x"), ("b", "p")]
    file.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1"):
        read(file)


def test_rank_agreement() -> None:
    """tau-b by hand: order kept, reversed, and with a tie inside the spread."""
    assert verdict.kendall_tau_b([1, 2, 3], [2, 4, 9], [0, 0, 0]) == pytest.approx(1)
    assert verdict.kendall_tau_b([1, 2, 3], [9, 4, 2], [0, 0, 0]) == pytest.approx(-1)
    assert verdict.kendall_tau_b([1, 1.01, 3], [2, 1, 9], [0.05, 0.05, 0.05]) == pytest.approx(2 / (2 * 3) ** 0.5)
    assert verdict.kendall_tau_b([1, 1], [1, 2], [0, 0]) is None
