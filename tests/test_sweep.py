"""Sweeps: what is tried, what is kept when something dies, and that a record says what a run says."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import random_trace, round_machine

from sim import results, settings, sweep, trial
from sim.axes import axis
from sim.experiment import Experiment, at_full_depth, memory
from sim.machine import load_machine, load_model
from sim.settings import Space
from sim.spec import SpecError
from traces import load as load_trace
from traces.format import save

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A trace of 96 tokens and the round machine, as files."""
    folder = tmp_path_factory.mktemp("sweep")
    save(random_trace(1, sequences=4, length=24, prefill=2), folder / "tiny.safetensors")
    (folder / "round.json").write_text(json.dumps(round_machine().to_json()))
    return {"trace": str(folder / "tiny.safetensors"), "machine": str(folder / "round.json")}


def arguments(files: dict[str, str], *flags: str) -> argparse.Namespace:
    return sweep.parser().parse_args(["--trace", files["trace"], "--machine", files["machine"], *flags])


def simpy(files: dict[str, str], *flags: str) -> dict[str, Any]:
    return sweep.run(arguments(files, "--driver", "simpy", "--jobs", "2", *flags))


def command(files: dict[str, str], *flags: str) -> list[str]:
    return [
        sys.executable, "-m", "sim.sweep", "--trace", files["trace"], "--machine", files["machine"],
        "--driver", "simpy", *flags,
    ]  # fmt: skip


def env(root: Path = ROOT) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def keys_in(path: Path) -> list[str]:
    content = path.read_bytes() if path.exists() else b""
    return [json.loads(line)["key"] for line in content[: content.rfind(b"\n") + 1].splitlines()]


MANY = ("--grid", "slots=2..6", "--grid", "machine.link.h2d_gb_s=1..40")


def wait_for(path: Path, records: int, process: subprocess.Popen[str], limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while len(keys_in(path)) < records:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_axes_are_read() -> None:
    """Lists, semicolons, nested specs and ranges."""
    assert axis("bits=4,3").listed() == ("4", "3")
    assert axis("policy=a:x=1,y=2;b").listed() == ("a:x=1,y=2", "b")
    assert axis("cache=lfu:(x=1,y=2),lru").listed() == ("lfu:(x=1,y=2)", "lru")
    assert axis("slots=2..5").listed() == ("2", "3", "4", "5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slots", "write KEY=VALUE"),
        ("slots=", "write KEY=VALUE"),
        ("slot=3", "unknown"),
        ("policy.nothing=1", "policy.PARAMETER"),
        ("slots=4..2", "LOW..HIGH"),
        ("slots=2,,3", "empty value"),
    ],
)
def test_bad_axes_are_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        axis(text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grid", "slots=9"], "no setting could be simulated: slots is 9"),
        (["--grid", "policy=nonsense"], "policy 'nonsense' is unknown"),
        (["--policy", "on_demand", "--grid", "policy.lookahead=1,2"], "none of the policies has it"),
        (["--slots", "3", "--grid", "slots=2,3"], "both set it"),
        (["--grid", "slots=2", "--grid", "slots=3"], "varies 'slots' twice"),
        (["--grid", "machine.link.h2d_gb_s=0.5..2.5"], "no grid exhausts"),
        (["--grid", "machine.nothing=1"], "no field 'nothing'"),
        (["--vram", "many"], "write a size"),
        (["--vram", "1kB"], "write a size"),
        (["--vram", "0.00001MB"], "not even 2 slots"),
        (["--best", "fun"], "must be tpot"),
        (["--random", "0"], "at least 1"),
        (["--search", "5"], "nothing to vary"),
        (["--grid", "machine.link.h2d_gb_s=1,2", "--choice-out", "x.json"], "one trace, machine, model and use"),
        (["--out", "/nowhere/x.jsonl"], "folder does not exist"),
    ],
)
def test_bad_input_is_one_sentence(files: dict[str, str], flags: list[str], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        simpy(files, *flags)
    assert "\n" not in str(caught.value)


def test_exit_codes_and_the_last_line(files: dict[str, str]) -> None:
    """2 and a sentence on bad input; one JSON document as the last line otherwise."""
    bad = subprocess.run(command(files, "--grid", "slot=3"), cwd=ROOT, env=env(), capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and bad.stderr.startswith("sim.sweep: ")
    good = subprocess.run(command(files, "--grid", "slots=2,3"), cwd=ROOT, env=env(), capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout.splitlines()[-1])["settings"] == 2
    assert "settings/s" in good.stderr and "best so far" in good.stderr


def test_at_most_25_flags() -> None:
    assert len(sweep.parser()._actions) <= 25


def test_a_parameter_varies_only_the_policies_that_have_it(files: dict[str, str]) -> None:
    """3 lookaheads of one policy and one of the other; equal settings are one."""
    flags = ("--policy", "on_demand", "--policy", "speculative", "--grid", "policy.lookahead=1,2,3", "--slots", "3")
    found = simpy(files, *flags)
    assert found["settings"] == found["simulated"] == 4


def test_a_record_says_what_a_run_says(files: dict[str, str], tmp_path: Path) -> None:
    """Every figure, bound and reference of `Experiment`, by the SimPy driver."""
    out = tmp_path / "r.jsonl"
    simpy(files, "--policy", "speculative:lookahead=2,miss=load", "--slots", "3", "--references", "--out", str(out))
    (record,) = results.records(out)
    space = Space({"trace": files["trace"], "machine": files["machine"], "policy": "speculative:lookahead=2,miss=load",
                   "slots": "3"}, ())  # fmt: skip
    expected = Experiment().run(space.case({}).setting)
    expected.pop("load_log_sha256")
    for key, value in expected.items():
        if key not in ("bounds", "driver"):
            assert record[key] == json.loads(json.dumps(value)), key
    assert record["bounds"] == pytest.approx(expected["bounds"], rel=1e-12)
    assert sum(record["blocks"]["ns"]) / sum(record["blocks"]["tokens"]) / 1e9 == pytest.approx(record["tpot_s"])


def test_the_compiled_driver_gives_the_same_records(files: dict[str, str], tmp_path: Path) -> None:
    """Two threads, one compiled driver, against SimPy."""
    pytest.importorskip("numba", reason="needs the fast extra")
    flags = ("--policy", "on_demand", "--grid", "slots=2..6", "--grid", "cold_sequences=0,1")
    sweep.run(arguments(files, *flags, "--jobs", "2", "--out", str(tmp_path / "c.jsonl")))
    simpy(files, *flags, "--out", str(tmp_path / "s.jsonl"))
    one, other = ({r["key"]: r for r in results.records(tmp_path / name)} for name in ("c.jsonl", "s.jsonl"))
    assert one.keys() == other.keys() and len(one) == 10
    for key, record in one.items():
        assert record["driver"] == "compiled"
        assert record | {"driver": "simpy"} == other[key]


def test_records_append_and_are_not_simulated_again(files: dict[str, str], tmp_path: Path) -> None:
    """A finished sweep again simulates nothing; a larger one only what is new; a torn last line is dropped."""
    out = tmp_path / "r.jsonl"
    assert simpy(files, "--grid", "slots=2,3", "--out", str(out))["simulated"] == 2
    before = out.read_bytes()
    assert simpy(files, "--grid", "slots=2,3", "--out", str(out))["simulated"] == 0
    assert out.read_bytes() == before
    with out.open("ab") as file:
        file.write(b'{"key": "torn')
    assert len(list(results.records(out))) == 2
    assert simpy(files, "--grid", "slots=2,3,4", "--out", str(out))["simulated"] == 1
    assert out.read_bytes().startswith(before) and len(keys_in(out)) == 3


def test_foreign_and_busy_files_are_refused(files: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    out.write_text("not json\n")
    with pytest.raises(SpecError, match="line 1 is no record"):
        simpy(files, "--slots", "2", "--out", str(out))
    assert out.read_text() == "not json\n"
    other = tmp_path / "busy.jsonl"
    with results.Store(str(other)), pytest.raises(SpecError, match="another sweep"):
        simpy(files, "--slots", "2", "--out", str(other))


def test_results_load_as_a_data_frame(files: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="needs the plots extra")
    simpy(files, "--grid", "slots=2,3", "--out", str(tmp_path / "r.jsonl"))
    frame = results.load(tmp_path / "r.jsonl")
    assert sorted(frame["slots"]) == [2, 3] and (frame["bounds.joint_floor_s"] <= frame["tpot_s"]).all()


def test_killed_sweeps_lose_next_to_nothing(files: dict[str, str], tmp_path: Path) -> None:
    """kill -9: the last record is less than 2 s old, and the next run does the rest, the one after nothing."""
    out = tmp_path / "r.jsonl"
    flags = (*MANY, "--jobs", "2", "--out", str(out))
    first = subprocess.Popen(command(files, *flags), cwd=ROOT, env=env(), stdout=-1, stderr=-1, text=True)
    wait_for(out, 40, first)
    first.send_signal(signal.SIGKILL)
    age_s = time.time() - out.stat().st_mtime
    first.communicate()
    kept = keys_in(out)
    assert age_s < 2 and 40 <= len(kept) < 200
    again = subprocess.run(command(files, *flags), cwd=ROOT, env=env(), capture_output=True, text=True, check=True)
    assert json.loads(again.stdout.splitlines()[-1])["simulated"] == 200 - len(kept)
    assert sorted(keys_in(out)) == sorted(set(keys_in(out))) and len(keys_in(out)) == 200
    begin = time.monotonic()
    third = subprocess.run(command(files, *flags), cwd=ROOT, env=env(), capture_output=True, text=True, check=True)
    assert json.loads(third.stdout.splitlines()[-1])["simulated"] == 0
    assert time.monotonic() - begin < 5  # 2 s on a machine with nothing else to do


def test_a_changed_policy_invalidates_its_own_records_only(files: dict[str, str], tmp_path: Path) -> None:
    """An edit of next_layer.py: its records are made again, on_demand's are not."""
    for package in ("sim", "traces"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "shipped"))
    (tmp_path / "traces" / "shipped").symlink_to(ROOT / "traces" / "shipped")
    flags = (
        "--policy",
        "on_demand",
        "--policy",
        "next_layer",
        "--grid",
        "slots=2,3",
        "--out",
        str(tmp_path / "r.jsonl"),
    )

    def simulated() -> int:
        line = command(files, *flags)
        run = subprocess.run(line, cwd=tmp_path, env=env(tmp_path), capture_output=True, text=True, check=True)
        return int(json.loads(run.stdout.splitlines()[-1])["simulated"])

    assert simulated() == 4
    policy = tmp_path / "sim" / "policies" / "next_layer.py"
    policy.write_text(policy.read_text().replace("else 0.0", "else 0.0 * 1.0") + "\n# a note\n")
    assert simulated() == 2
    policy.write_text(policy.read_text() + "\n# another note changes nothing\n")
    assert simulated() == 0


def test_what_fits_decides_bits_and_slots() -> None:
    """24 GB with 4,096 tokens of context: the most slots at each width; one more does not fit."""
    base = {"machine": "rtx3090", "model": "mixtral-8x7b", "policy": "on_demand", "context": "4096"}
    space = Space(base, (), vram_bytes=settings.size_bytes("24GB"))
    machine = load_machine("rtx3090")
    chosen = {}
    for one in space.grid():
        try:
            case = space.case(one)
        except settings.FitError:
            continue
        chosen[case.bits] = case.slots
        device, host = memory(at_full_depth(case.setting))
        assert load_model("mixtral-8x7b").dense_bytes < device <= 24e9 and host <= machine.host_gb * 1e9
        if case.slots < 8:
            bigger = Space({**base, "slots": str(case.slots + 1), "bits": str(case.bits)}, (), vram_bytes=24 * 10**9)
            with pytest.raises(settings.FitError, match="need more than 24 GB"):
                bigger.case({})
    assert chosen[2] == 8 and chosen[2] >= chosen[3] >= chosen[4] >= chosen.get(8, 2)
    assert 16 not in chosen  # 90 GB of experts exceed the host's 64


def test_random_settings_are_distinct_and_repeatable(files: dict[str, str]) -> None:
    space = Space({"trace": files["trace"], "machine": files["machine"], "policy": "on_demand"},
                  (axis("slots=2..6"), axis("machine.link.h2d_gb_s=0.5..50.0")))  # fmt: skip

    def some(seed: int) -> list[str]:
        found = simpy_cases(space, seed)
        assert len(found) == 20
        return list(found)

    assert some(1) == some(1) != some(2)


def simpy_cases(space: Space, seed: int) -> dict[str, Any]:
    one = sweep.Sweep(space, results.Store(None), None, 1, sweep.Progress(0))  # type: ignore[arg-type]
    return one.cases(space.drawn(seed), 20)


def test_search_finds_the_best_and_starts_from_the_grid(files: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="needs the search extra")
    out = tmp_path / "r.jsonl"
    axes = ("--grid", "slots=2..6", "--grid", "policy.lookahead=1..3")
    simpy(files, *axes, "--random", "3", "--out", str(out))
    found = simpy(files, *axes, "--search", "12", "--out", str(out))
    assert found["found_before"] == 3 and 3 <= found["settings"] <= 12
    assert found["simulated"] == len(keys_in(out)) - 3
    assert found["best"][0]["slots"] == 6


def test_a_cluster_that_loses_a_worker_loses_nothing(files: dict[str, str], tmp_path: Path) -> None:
    """A real scheduler and two worker processes, one killed while it works."""
    distributed = pytest.importorskip("distributed", reason="needs the cluster extra")
    os.environ["PYTHONPATH"] = str(ROOT)
    out = tmp_path / "r.jsonl"
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster:
        flags = (*MANY, "--scheduler", cluster.scheduler_address, "--out", str(out))
        process = subprocess.Popen(command(files, *flags), cwd=ROOT, env=env(), stdout=-1, stderr=-1, text=True)
        wait_for(out, 30, process)
        os.kill(cluster.workers[0].process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    found = json.loads(stdout.splitlines()[-1])
    keys = keys_in(out)
    assert found["settings"] == found["simulated"] == len(keys) == len(set(keys)) == 200
    assert found["workers"] == 2


def test_a_worker_with_another_trace_says_so(files: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    shutil.copy(files["trace"], path)
    case = Space({"trace": str(path), "machine": files["machine"], "policy": "on_demand"}, ()).case({})
    save(load_trace(files["trace"]).head(10), path)
    results.trace_sha256.cache_clear()
    settings.trace_of.cache_clear()
    found, failed, _ = trial.records([case])
    assert not found and "not the one the sweep began with" in failed[0].reason
