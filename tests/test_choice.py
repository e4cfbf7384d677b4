"""Choices: the front, what the noise cannot tell apart, and a file that the commands accept."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_trace

from sim import choice, noise
from sim.choice import made_for_another, read_choice
from sim.experiment import Setting
from sim.machine import HardwareProfile, load_machine, load_model, machine_from, override
from sim.run import parser, prepare
from sim.settings import machine_text
from sim.spec import SpecError


def record(number: int, vram: int, ns: list[int]) -> dict[str, Any]:
    """A setting with 10 tokens a block."""
    tpot_s = sum(ns) / (10 * len(ns)) / 1e9
    same = {"trace_sha256": "t", "machine_sha256": "a", "model_sha256": "b", "tokens": 40, "cold_sequences": False}
    figures = {
        "tokens_per_s": 1 / tpot_s,
        "tpot_s": tpot_s,
        "vram_bytes": vram,
        "scaled": None,
        "regime": "link",
        "driver": "compiled",
    }
    chosen = {"policy": f"p{number}", "bits": 4, "slots": 3, "chunk_bytes": -16, "context": 4096, "axes": {}, "set": []}
    labels = {"key": f"{number:02}", "machine": "m", "model": "x", "evidence": "ESTIMATED", "routing": "SYNTHETIC"}
    return same | figures | chosen | labels | {"blocks": {"ns": ns, "tokens": [10] * len(ns)}}


def noisy(seed: int, mean: float, blocks: int = 32) -> list[int]:
    return (np.random.default_rng(seed).normal(mean, mean / 20, blocks)).astype(int).tolist()


def test_wishes() -> None:
    assert choice.wish("tpot").metric == "tpot" and choice.wish("vram:5%").within == pytest.approx(0.05)
    assert choice.wish("vram:5").within == pytest.approx(0.05)
    for text in ("", "tpot:3", "vram", "vram:x%", "vram:100%", "vram:-1%"):
        with pytest.raises(SpecError, match="--best"):
            choice.wish(text)


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    records = [
        record(0, 10, [400]),
        record(1, 20, [200]),
        record(2, 20, [300]),
        record(3, 30, [250]),
        record(4, 40, [100]),
    ]
    assert choice.front(records) == [0, 1, 4]


def test_differences_inside_the_noise_are_none() -> None:
    """Independent blocks of one mean: none; 20 % apart: a difference; the same blocks 1 % slower: one too."""
    base = noisy(1, 1e6)
    shifted = [int(ns * 1.01) for ns in base]
    others = [record(0, 1, base), record(1, 1, noisy(2, 1e6)), record(2, 1, noisy(3, 1.2e6)), record(3, 1, shifted)]
    found = noise.differences(others, 0)
    assert [d.real for d in found] == [False, False, True, True]
    assert found[2].low is not None and found[2].high is not None and found[2].low < 0.2 < found[2].high + 0.05
    assert choice.interval_text(found[1]) == "no difference" and "%" in choice.interval_text(found[2])
    assert noise.SEEDS >= 20
    assert found == noise.differences(others, 0)


def test_too_few_tokens_tell_nothing() -> None:
    found = noise.differences([record(0, 1, [100]), record(1, 1, [200])], 0)
    assert not found[1].real and choice.interval_text(found[1]) == "too few tokens to tell"


def test_among_equals_the_smallest_is_chosen() -> None:
    records = [record(0, 30, noisy(1, 1e6)), record(1, 20, noisy(2, 1.001e6)), record(2, 10, noisy(3, 2e6))]
    found = choice.choose(records, choice.wish("tpot"))
    assert found.chosen == 1 and found.fastest in (0, 1)
    assert choice.choose(records, choice.wish("vram:60%")).chosen == 2
    lines = "\n".join(choice.report(found, choice.wish("tpot")))
    assert "no difference from the fastest" in lines and "sequence resampling only" in lines and "ESTIMATED" in lines


def test_every_width_has_a_line_of_its_own() -> None:
    """A width that loses on the front is still shown; one width alone is not."""
    records = [record(0, 30, noisy(1, 2e6)), record(1, 20, noisy(2, 1e6)) | {"bits": 2}]
    assert [line.split()[0] for line in choice.widths(records)[1:]] == ["4", "2"]
    assert choice.widths(records[:1]) == []


def test_the_choice_is_accepted_by_the_commands(tmp_path: Path) -> None:
    records = [record(0, 30, noisy(1, 1e6)), record(1, 20, noisy(3, 2e6))]
    wanted = choice.wish("tokens_per_s")
    choice.write(str(tmp_path / "c.json"), choice.document(choice.choose(records, wanted), wanted))
    assert read_choice(str(tmp_path / "c.json")) == {
        "policy": "p0", "bits": 4, "slots": 3, "chunk_bytes": -16, "context": 4096,
        "machine": "m", "machine_sha256": "a", "model": "x", "set": [],
    }  # fmt: skip


SET = "machine.link.h2d_gb_s=12.4"


@pytest.fixture
def chosen(tmp_path: Path) -> Path:
    """A choice for Mixtral on a 4090 with a slower link."""
    machine, _ = override(load_machine("rtx4090"), load_model("mixtral-8x7b"), [SET])
    content = {"policy": "on_demand", "slots": 3, "machine": "rtx4090", "model": "mixtral-8x7b", "set": [SET]}
    path = tmp_path / "choice.json"
    path.write_text(json.dumps(content | {"machine_sha256": sha256(machine_text(machine).encode()).hexdigest()}))
    return path


def prepared(path: Path, *flags: str) -> Setting:
    """The setting of ``sim.run --choice``."""
    return prepare(parser().parse_args(["--choice", str(path), "--tokens", "3", *flags]))[0]


def test_a_choice_brings_its_machine_and_model(chosen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setting = prepared(chosen)
    assert (setting.machine.name, setting.machine.link.h2d_gb_s) == ("rtx4090", 12.4)
    assert (setting.model.name, setting.slots) == ("mixtral-8x7b", 3)
    assert capsys.readouterr().err == ""


def test_a_flag_wins_over_the_machine_of_a_choice(chosen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another machine does not get the changes made to the choice's; a change of the same field replaces that one."""
    assert prepared(chosen, "--machine", "rtx3090").machine.link.h2d_gb_s == load_machine("rtx3090").link.h2d_gb_s
    assert f"--machine on the command line wins over the choice file's rtx4090, {SET}" in capsys.readouterr().err
    assert prepared(chosen, "--set", "machine.link.h2d_gb_s=52").machine.link.h2d_gb_s == 52
    assert f"--set on the command line wins over the choice file's {SET}" in capsys.readouterr().err
    assert prepared(chosen, "--vram", "80GB").slots == 8
    assert "--vram on the command line wins over the choice file's 3 slots" in capsys.readouterr().err


def test_a_machine_that_changed_since_is_told(chosen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(chosen.read_text())
    chosen.write_text(json.dumps(content | {"machine_sha256": "0"}))
    assert prepared(chosen).machine.name == "rtx4090"
    assert "rtx4090 has changed since" in capsys.readouterr().err
    del content["machine_sha256"]
    chosen.write_text(json.dumps(content))  # of an earlier version
    assert prepared(chosen).machine.name == "rtx4090" and capsys.readouterr().err == ""
    chosen.write_text(json.dumps({"slots": 3}))
    assert prepared(chosen).machine.name == "rtx3090"


def test_a_machine_from_a_file_is_found_again(chosen: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps(load_machine("t4").to_json()))
    content = json.loads(chosen.read_text()) | choice.files({"machine": str(own), "model": None})
    chosen.write_text(json.dumps(content))
    assert prepared(chosen).machine.name == "t4"
    own.unlink()
    with pytest.raises(SpecError, match=r"^--choice .*own\.json' not found"):
        prepared(chosen)


def test_a_choice_for_another_model_is_told() -> None:
    """Shapes are compared: a checkpoint is named after its folder."""
    mixtral = load_model("mixtral-8x7b")
    folder = load_model("mixtral-8x7b").at_depth(12)
    assert made_for_another({"model": "mixtral-8x7b"}, mixtral) is None
    assert made_for_another({}, mixtral) is None
    values = folder.to_json() | {"name": "Mixtral-8x7B-Instruct-v0.1"}
    assert made_for_another({"model": "mixtral-8x7b"}, type(mixtral).from_json(values)) is None
    assert "made for mixtral-8x7b" in str(made_for_another({"model": "mixtral-8x7b"}, load_model("demo")))
    assert "made for my-own" in str(made_for_another({"model": "my-own"}, mixtral))


def test_blocks_cover_every_decode_pass_once() -> None:
    """A block a sequence from 20 sequences on, 32 blocks below; sums are kept."""
    for sequences, length, blocks in ((24, 5, 24), (2, 50, 32), (1, 6, 3), (200, 3, 50)):
        trace = random_trace(0, sequences=sequences, length=length)
        starts = noise.block_starts(trace)
        assert len(starts) == blocks and starts[0] == 0 and (np.diff(starts) > 0).all()
        values = np.arange(sequences * length)
        assert noise.block_sums(starts, values).sum() == values.sum()


def test_timing_jitter_blurs_what_differs_in_kind_alone() -> None:
    """1 % apart on the same blocks: a difference if both spend alike, none where one waits and the other computes."""
    base = noisy(1, 1e6)
    slower = record(1, 1, [int(ns * 1.01) for ns in base])
    waits = {"dense": 0.2, "expert": 0.2, "host": 0.1, "link": 0.5}
    plans = {"dense": 0.2, "expert": 0.2, "host": 0.5, "link": 0.1}
    first = record(0, 1, base) | {"shares": waits}
    assert noise.differences([first, slower | {"shares": waits}], 0)[1].real
    assert not noise.differences([first, slower | {"shares": plans}], 0)[1].real
    exact = {"residuals": {name: [1.0, 1.0] for name in noise.OPERATORS}}
    assert noise.differences([first | exact, slower | {"shares": plans} | exact], 0)[1].real
    assert "3% assumed" in noise.source(first) and "from the profile" in noise.source(first | exact)


def test_residuals_of_a_profile_are_read_and_checked() -> None:
    law = {"dense": [1e-3, 0, 0], "expert": {"4": [1e-3, 0]}, "head": [1e-3, 0]}
    link = dict.fromkeys(("h2d_gb_s", "d2h_gb_s", "h2d_duplex_gb_s"), 1.0) | {"h2d_fixed_s": 0.0, "d2h_fixed_s": 0.0}
    values = {"name": "m", "vram_gb": 1, "host_gb": 1, "link": link}

    def load(residuals: dict[str, Any]) -> HardwareProfile:
        return machine_from(values | {"operators": {"x": law | {"residuals": residuals}}}, "MEASURED", {})

    machine = load({"dense": [0.9, 1.0, 1.2]})
    assert machine.operators["x"].residuals == {"dense": (0.9, 1.0, 1.2)}
    assert machine_from(machine.to_json()["machine"], "MEASURED", {}) == machine
    essence = machine.essence()
    assert machine_from(essence["machine"], essence["evidence"], {}) == machine
    assert set(essence["machine"]) == {*values, "operators"}  # what results are known by: no field at its default
    for wrong in ({"dense": [1.2, 0.9]}, {"dense": [1.0]}, {"gpu": [1.0, 1.0]}, {"dense": [0.0, 1.0]}):
        with pytest.raises(SpecError, match="residuals"):
            load(wrong)
