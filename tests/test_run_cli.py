"""``python -m sim.run`` as a user meets it: exit codes, the JSON line, the files it writes, and its mistakes."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import random_trace, round_machine

import traces
from traces.format import shipped

ROOT = Path(__file__).parent.parent
KEYS = [
    "policy",
    "cache",
    "predictor",
    "model",
    "machine",
    "bits",
    "slots",
    "tokens",
    "decode_tokens",
    "accesses",
    "token_accesses",
    "hits",
    "late",
    "misses",
    "demand_loads",
    "prefetch_loads",
    "prefetch_used",
    "retracted",
    "h2d_bytes",
    "wasted_bytes",
    "prefetch_precision",
    "prefetch_coverage",
    "overlap",
    "ttft_s",
    "tpot_s",
    "itl_p50_s",
    "itl_p99_s",
    "tokens_per_s",
    "stall_s",
    "stall_miss_s",
    "stall_late_s",
    "link_busy",
    "link_useful",
    "compute_busy",
    "vram_bytes",
    "host_bytes",
    "regime",
    "evidence",
    "routing",
    "load_log_sha256",
    "bounds",
]
PHASE_KEYS = KEYS[KEYS.index("accesses") : KEYS.index("overlap") + 1] + ["stall_s", "link_busy", "compute_busy"]
BOUND_KEYS = {
    "all_resident_s",
    "link_floor_s",
    "joint_floor_s",
    "demand_only_s",
    "perfect_lookahead_s",
    "perfect_lookahead_belady_s",
    "zero_overhead_s",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    traces.save(random_trace(1, sequences=3, length=12, prefill=4), folder / "trace.safetensors")
    (folder / "round.json").write_text(json.dumps(round_machine().to_json()))
    return folder


def run(folder: Path, *flags: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sim.run", *flags]
    if "--trace" not in flags:
        command += ["--trace", str(folder / "trace.safetensors")]
    if "--machine" not in flags:
        command += ["--machine", str(folder / "round.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def complete(found: dict[str, Any]) -> None:
    assert set(KEYS) <= set(found)
    assert set(PHASE_KEYS) <= set(found["prefill"])
    assert set(found["bounds"]) == BOUND_KEYS
    assert found["bounds"]["joint_floor_s"] <= found["tpot_s"]
    assert found["hits"] + found["late"] + found["misses"] == found["accesses"]
    assert found["routing"] == "SYNTHETIC"


def test_one_policy_with_its_baselines(files: Path) -> None:
    done = run(files)
    found = document(done)
    complete(found)
    assert found["policy"] == "speculative"
    assert [b["policy"] for b in found["baselines"]] == ["on_demand", "mixtral_offloading"]
    for baseline in found["baselines"]:
        complete(baseline)
        assert (baseline["predictor"], baseline["vram_bytes"]) == (None, found["vram_bytes"])
    assert (found["tokens"], found["decode_tokens"], found["prefill"]["token_accesses"]) == (36, 24, 12 * 3 * 2)
    assert found["model"] == "tiny"
    assert "regime" in done.stdout
    assert "joint floor" in done.stdout
    assert all(line.startswith("simulating ") for line in done.stderr.splitlines())


def test_without_baselines_and_several_policies(files: Path) -> None:
    alone = document(run(files, "--policy", "on_demand", "--no-baselines"))
    complete(alone)
    assert "baselines" not in alone
    several = document(
        run(files, "--policy", "on_demand", "--policy", "speculative:lookahead=1,cache=belady,landing_slots=0")
    )
    assert list(several) == ["runs"]
    assert [r["policy"] for r in several["runs"]] == [
        "on_demand",
        "speculative:lookahead=1,cache=belady,landing_slots=0",
    ]
    for found in several["runs"]:
        complete(found)
    assert several["runs"][0] == alone


def test_timeline_and_load_log(files: Path, tmp_path: Path) -> None:
    log, timeline = tmp_path / "loads.jsonl", tmp_path / "timeline.json.gz"
    found = document(run(files, "--load-log", str(log), "--timeline", str(timeline), "--slots", "3"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loads.jsonl", "timeline.json.gz"]
    assert hashlib.sha256(log.read_bytes()).hexdigest() == found["load_log_sha256"]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(list(line) == ["visit", "layer", "expert", "kind", "slot", "evicted"] for line in lines)
    kinds = [line["kind"] for line in lines]
    phases = [found, found["prefill"]]
    assert kinds.count("demand") + kinds.count("stream") == sum(p["demand_loads"] for p in phases)
    assert kinds.count("prefetch") == sum(p["prefetch_loads"] for p in phases)
    assert kinds.count("retract") == sum(p["retracted"] for p in phases)
    assert [line["visit"] for line in lines] == sorted(line["visit"] for line in lines)
    events = json.loads(gzip.decompress(timeline.read_bytes()))["traceEvents"]
    names = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert {"compute", "link H2D"} <= names
    assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")


def test_set_changes_the_machine_and_is_recorded(files: Path) -> None:
    flags = ("--policy", "on_demand", "--no-baselines")
    slow = document(run(files, *flags, "--set", "machine.link.h2d_gb_s=0.1"))
    fast = document(run(files, *flags, "--set", "machine.link.h2d_gb_s=10", "--set", "machine.link.h2d_fixed_s=0"))
    plain = document(run(files, *flags))
    assert slow["tpot_s"] > plain["tpot_s"] > fast["tpot_s"]
    assert slow["load_log_sha256"] == plain["load_log_sha256"] == fast["load_log_sha256"]
    assert fast["set"] == ["machine.link.h2d_gb_s=10", "machine.link.h2d_fixed_s=0"]


def test_choice_sets_what_no_flag_sets(files: Path, tmp_path: Path) -> None:
    choice = tmp_path / "choice.json"
    choice.write_text(json.dumps({"policy": "on_demand", "bits": 4, "slots": 5, "chunk_bytes": 2000, "by": "sweep"}))
    found = document(run(files, "--choice", str(choice), "--no-baselines"))
    assert (found["policy"], found["slots"], found["bits"]) == ("on_demand", 5, 4)
    done = run(files, "--choice", str(choice), "--slots", "3", "--no-baselines")
    assert document(done)["slots"] == 3
    assert "--slots on the command line wins" in done.stderr


def test_tokens_and_cold_sequences(files: Path) -> None:
    flags = ("--policy", "on_demand", "--no-baselines", "--slots", "6")
    assert document(run(files, *flags, "--tokens", "10"))["decode_tokens"] == 10
    warm, cold = (document(run(files, *flags, *more)) for more in ((), ("--cold-sequences",)))
    assert warm["prefill"]["misses"] < cold["prefill"]["misses"]


@pytest.mark.parametrize("machine", ["rtx3090", "t4"])
def test_a_named_machine_estimates_a_model_nobody_measured(files: Path, machine: str) -> None:
    found = document(run(files, "--machine", machine, "--bits", "3", "--no-baselines"))
    complete(found)
    assert (found["machine"], found["bits"], found["evidence"]) == (machine, 3, "ESTIMATED")


def test_memory_is_that_of_the_whole_model() -> None:
    """Mixtral at 4 bits with 4 slots does not fit 12 GB, although 12 of its layers do; the slots that fit are named."""
    flags = ("--trace", str(shipped()), "--model", "mixtral-8x7b", "--tokens", "5", "--no-baselines")
    done = run(ROOT, *flags, "--machine", "rtx3060-12gb")
    found = document(done)
    assert found["vram_bytes"] < 12e9 < found["scaled"]["vram_bytes"]
    assert found["scaled"]["host_bytes"] == 32 * 8 * found["expert_bytes"]
    assert "does not fit the device: --slots 2 does" in done.stdout
    fits = run(ROOT, *flags, "--machine", "rtx3060-12gb", "--slots", "2")
    assert document(fits)["scaled"]["vram_bytes"] < 12e9
    assert "does not fit" not in fits.stdout


def test_vram_decides_the_slots() -> None:
    """The most that fit, the same for every policy however many landing slots it has; --slots is checked."""
    flags = ("--trace", str(shipped()), "--model", "mixtral-8x7b", "--tokens", "5", "--machine", "rtx3060-12gb")
    policies = ("--policy", "on_demand", "--policy", "speculative:landing_slots=9")
    done = run(ROOT, *flags, *policies, "--vram", "12.6GB", "--context", "4096")
    assert "slots    2 of 8 a layer: the most that fit 12.6 GB with 4,096 tokens of context" in done.stdout
    assert "of 12.6 GB (--vram; rtx3060-12gb has 12)" in done.stdout
    for found in document(done)["runs"]:
        assert (found["slots"], found["context"]) == (2, 4096)
        assert found["scaled"]["vram_bytes"] <= 12.6e9
        more = 32 * found["expert_bytes"]  # a slot in every layer
        assert found["scaled"]["vram_bytes"] + more > 12.6e9
    few = run(ROOT, *flags, "--vram", "12GB", "--slots", "3", code=2)
    assert few.stderr == "sim.run: --slots 3 do not fit --vram 12GB with that context; 2 do\n"
    everything = run(ROOT, *flags, "--vram", "80GB", "--no-baselines")
    assert "slots    8 of 8 a layer: all fit 80 GB" in everything.stdout


def test_where_nothing_fits_what_would_is_said_and_true() -> None:
    from sim.run import parser, prepare

    def slots(*flags: str) -> int:
        return prepare(parser().parse_args(["--tokens", "3", "--vram", "10GB", *flags]))[0].slots

    wide = ("--context", "8192")
    with pytest.raises(ValueError, match="not even 2 slots") as error:
        slots(*wide)
    found = re.search(r"8,192 tokens of context: --bits (\d+) or --context (\d+) does$", str(error.value))
    assert found is not None
    assert slots(*wide, "--bits", found[1]) >= 2
    assert slots("--context", found[2]) == 2
    with pytest.raises(ValueError, match="not even 2 slots"):
        slots("--context", str(int(found[2]) + 1))
    with pytest.raises(ValueError, match=r"no other width or context does: 2 bits without any context take \S+ GB$"):
        slots("--vram", "3GB")


def test_a_made_up_trace_has_the_memory_of_the_shipped_shape() -> None:
    """Presets of traces.synthesize state no dense part; without it too many slots would seem to fit."""
    from sim.machine import load_model
    from sim.settings import with_dense_part
    from traces.presets import PRESETS

    for name, preset in PRESETS.items():
        assert with_dense_part(preset.model) == load_model(name)
    deeper = replace(PRESETS["qwen3-30b-a3b"].model, num_layers=50)
    for other in (random_trace(1).model, deeper, load_model("mixtral-8x7b").at_depth(12)):
        assert with_dense_part(other) is other


def test_what_was_set_and_what_no_guess_covers_is_said(files: Path) -> None:
    assert "set      machine.link.h2d_gb_s=10" in run(files, "--set", "machine.link.h2d_gb_s=10").stdout
    trace = random_trace(2, sequences=2, length=8, prefill=2)
    reach = max(table.ids.shape[2] for table in trace.guesses.values())
    done = run(files, "--policy", f"speculative:lookahead={reach + 1}", "--no-baselines")
    assert f"records guesses for {reach} layers ahead" in done.stderr


MISTAKES = {
    "policy": (("--policy", "nonsense"), "policy 'nonsense' is unknown"),
    "policy key": (("--policy", "speculative:depth=2"), "no parameter 'depth'"),
    "machine": (("--machine", "abacus"), "machine 'abacus' not found"),
    "another shape": (("--model", "qwen3-30b-a3b"), "top-8 of 128"),
    "too few slots": (("--slots", "1"), "slots is 1"),
    "too many slots": (("--slots", "7"), "slots is 7"),
    "no trace": (("--trace", "nowhere.safetensors"), "nowhere.safetensors"),
    "tokens": (("--tokens", "0"), "--tokens is 0"),
    "cache": (("--cache", "nonsense"), "cache 'nonsense' is unknown"),
    "predictor": (("--predictor", "nonsense"), "predictor 'nonsense' is neither"),
    "bits nobody measured": (("--bits", "3"), "not at 3"),
    "set without value": (("--set", "machine.vram_gb"), "write machine.FIELD=VALUE"),
    "set of nothing": (("--set", "vram_gb=3"), "write machine.FIELD=VALUE"),
    "set of an unknown field": (("--set", "machine.link.colour=3"), "no field 'colour'"),
    "set to a word": (("--set", "machine.link.h2d_gb_s=fast"), "'fast'"),
    "set to zero": (("--set", "machine.link.h2d_gb_s=0"), "above 0"),
    "set of a law": (("--set", "machine.operators.tiny.head=[1]"), "list of 2 seconds"),
    "set of the shape": (("--set", "model.num_experts=4"), "name a model of the trace's shape"),
    "set of a width": (("--set", "model.hidden_size=100"), "group size 64 does not divide"),
    "no bandwidth": (("--machine", "rtx3090", "--set", "machine.memory_efficiency=0"), "above 0"),
    "choice": (("--choice", "nowhere.json"), "nowhere.json"),
    "no size": (("--vram", "12 apples"), "write a size such as 24GB"),
    "no context": (("--context", "-1"), "--context is -1"),
    "too little memory": (("--vram", "0.0001MB"), "not even 2 slots"),
    "a number that is none": (("--policy", "speculative:min_score=nan"), "a finite number"),
    "set of the name": (("--set", "machine.name=3"), "must be a string"),
    "file is a folder": (("--timeline", "tests"), "is a folder"),
    "folder": (("--timeline", "no/such/folder/t.json.gz"), "no/such/folder"),
    "two policies": (("--policy", "on_demand", "--policy", "speculative", "--timeline", "t.gz"), "exactly one"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_file(files: Path, tmp_path: Path, mistake: str) -> None:
    flags, says = MISTAKES[mistake]
    done = run(files, *flags, "--load-log", str(tmp_path / "log"), code=2)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("simulating ")]
    assert len(lines) == 1
    assert lines[0].startswith("sim.run: ")
    assert says in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{", "{}", '{"policy": 7}', '{"slots": "many"}', '{"chunk_bytes": "big"}', '{"bits": 5}'),
        *('{"machine": "rtx3090"}', '{"slots": 3, "machine": 7}', '{"slots": 3, "set": "machine.vram_gb=1"}'),
        '{"slots": 3, "set": ["machine.colour=1"]}',
    ],
)
def test_a_bad_choice_file_is_one_line(files: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "choice.json").write_text(content)
    done = run(files, "--choice", str(tmp_path / "choice.json"), code=2)
    assert len(done.stderr.splitlines()) == 1


def test_importing_the_command_needs_nothing_heavy() -> None:
    """No optional package is imported; simpy and numpy are."""
    heavy = ["torch", "transformers", "hqq", "matplotlib", "pandas", "numba", "dask", "tokenizers"]
    code = f"import sys, sim.run; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_wrong_flag_values_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """A value argparse itself refuses gives one line and exit code 2."""
    from sim.run import parser

    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["--slots", "abc"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "python -m sim.run: argument --slots: invalid int value: 'abc'; see --help\n"


@pytest.mark.parametrize("name", ["tiny", "a.b-c"])
def test_a_profile_is_not_believed_far_beyond_what_it_measured(files: Path, name: str) -> None:
    """The fixture's sequences have 12 tokens of context, more than 1.5 times 7; told so, the command goes on."""
    machine = json.loads((files / "round.json").read_text())
    laws = machine["machine"]["operators"].pop("tiny")
    machine["machine"]["operators"][name] = laws | {"reach": {"tokens": 1000, "context": 7}}
    near = files / f"{name}.near.json"
    near.write_text(json.dumps(machine))
    flags = ("--machine", str(near), "--no-baselines", "--set", f"model.name={name}")
    done = run(files, *flags, code=2)
    assert "up to 7 tokens of context" in done.stderr
    remedy = shlex.split(done.stderr.partition("or extrapolate with ")[2])
    assert remedy == ["--set", f"machine.operators.{name}.reach.context=12"]
    assert document(run(files, *flags, *remedy))["tpot_s"] > 0
