"""A plug-in that is half written: who names it is told in one sentence, and nobody else is stopped by it."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import random_trace, round_machine

from sim import registry, run, sweep
from sim.experiment import Experiment, Setting, guess_table
from sim.settings import Space
from sim.spec import SpecError, options
from traces import save

HEAD = '"""A test."""\nfrom typing import NamedTuple\nSOURCE = "a test"\n'
PARAMS = 'class Params(NamedTuple):\n    """``lookahead``: layers."""\n    lookahead: int = 1\n'
NOTHING = 'class Params(NamedTuple):\n    """None."""\n'
WORTH = "def worth(params, guess, link):\n    return guess.score\n"
BROKEN = {
    "syntax": ("policy", HEAD + PARAMS + "def worth(params, guess link):\n", ", line 7: SyntaxError"),
    "encoding": ("policy", "x = 'ab\n", ", line 1: SyntaxError: unterminated string"),
    "import": ("cache", '"""A test."""\nimport not_there_at_all\n', ", line 2: ModuleNotFoundError: No module named"),
    "raises": ("miss", HEAD + "\n\nx = 1 / 0\n", ", line 6: ZeroDivisionError: division by zero"),
    "docstring": ("policy", 'SOURCE = "a test"\n' + WORTH, "it has no docstring"),
    "source": ("policy", '"""A test."""\n' + WORTH, "it has no text SOURCE"),
    "no source": ("policy", HEAD + "SOURCE = None\n", "it has no text SOURCE"),
    "params": ("policy", HEAD + WORTH, "it has no class Params(NamedTuple)"),
    "plain params": (
        "policy",
        HEAD + "class Params:\n    lookahead = 1\n" + WORTH,
        "it has no class Params(NamedTuple)",
    ),
    "default": (
        "policy",
        HEAD + "class Params(NamedTuple):\n    lookahead: int\n" + WORTH,
        "Params.lookahead has no def",
    ),
    "list": ("cache", HEAD + "class Params(NamedTuple):\n    a: list = []\n", "Params.a has no default that is an int"),
    "score": ("cache", HEAD + NOTHING, "it has no function score(params, experts, x, now)"),
    "score is none": ("cache", HEAD + NOTHING + "score = 3\n", "it has no function score(params, experts, x, now)"),
    "table": ("predictor", HEAD + NOTHING, "it has no function table(params, trace)"),
    "arguments": (
        "policy",
        HEAD + PARAMS + "def worth(params, guess):\n    return 1.0\n",
        "worth must take (params, guess,",
    ),
    "touch": (
        "cache",
        HEAD + NOTHING + "def score(p, e, x, now):\n    return 0.0\ndef touch(p, e, x):\n    return 0.0\n",
        "its function touch must take (params, experts, x, tokens, now)",
    ),
    "no lookahead": ("policy", HEAD + NOTHING + WORTH, "so its Params must have an int lookahead"),
    "misspelt": (
        "policy",
        HEAD + PARAMS + WORTH.replace("worth", "wort"),
        "it must have a function worth(params, guess",
    ),
}
Put = Callable[..., Path]


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Put]:
    """Puts a file beside the plug-ins of a kind."""

    def beside(kind: str, text: str, name: str = "zz_mine") -> Path:
        package = importlib.import_module(registry.PACKAGES[kind])
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        importlib.invalidate_caches()
        registry.plugins.cache_clear()
        made.add(f"{package.__name__}.{name}")
        return path

    made: set[str] = set()
    yield beside
    registry.plugins.cache_clear()
    for module in made:
        sys.modules.pop(module, None)


def naming(kind: str) -> str:
    """A SPEC that uses the plug-in."""
    return {"policy": "zz_mine", "predictor": "all_positive:predictor=zz_mine"}.get(kind, f"on_demand:{kind}=zz_mine")


@pytest.mark.parametrize("case", BROKEN)
def test_who_names_it_is_told_which_file_and_why_and_others_go_on(
    case: str, put: Put, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, text, says = BROKEN[case]
    before = list(registry.plugins(kind))
    path = put(kind, text)
    with pytest.raises(SpecError) as told:
        options(naming(kind))
    sentence = str(told.value)
    assert sentence.startswith(f"{kind} 'zz_mine' cannot be used: {path}") and says in sentence
    assert sentence.endswith("mend the file, or move it elsewhere") and "\n" not in sentence
    assert list(registry.plugins(kind)) == before
    assert capsys.readouterr().err == ""
    for _ in range(2):
        options("all_positive")  # one plug-in of every kind, and none of them the broken one
        guess_table(random_trace(1), "oracle")
    assert capsys.readouterr().err == f"left out: {sentence}\n"
    assert registry.describe(kind).splitlines()[-1] == f"  left out: {sentence}"


def test_no_file_that_is_shipped_is_left_out() -> None:
    assert {name: why for kind in registry.PACKAGES for name, why in registry.plugins(kind).left_out.items()} == {}


def test_a_policy_with_the_name_of_a_preset_would_never_be_reached(put: Put) -> None:
    put("policy", HEAD + PARAMS + WORTH, "mixtral_offloading")
    assert "a preset has the same name" in registry.plugins("policy").left_out["mixtral_offloading"]


@pytest.mark.parametrize("value", ["['guard']", "{'landing_slot': 2}", "{'cache': 'lru'}", "{'landing_slots': 'two'}"])
def test_options_that_a_policy_cannot_set_are_named(value: str, put: Put) -> None:
    path = put("policy", HEAD + PARAMS + WORTH + f"OPTIONS = {value}\n")
    with pytest.raises(SpecError) as told:
        options("zz_mine")
    assert str(told.value).startswith(f"policy 'zz_mine' has OPTIONS = {value}; in {path}, make it a dict of ")


def said(command: Any, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Exit code of a command, and what it said."""
    monkeypatch.setattr(sys, "argv", ["command", *words])
    return command.main(), capsys.readouterr()


COMMANDS = [
    (run, ["--policy", "zz_mine"]),
    (run, ["--policy", "all"]),
    (run, ["--policy", "on_demand", "--policy", "zz_mine"]),
    (sweep, ["--driver", "simpy", "--policy", "zz_mine"]),
    (sweep, ["--driver", "simpy", "--policy", "zz_mine", "--grid", "policy.lookahead=1,2"]),
    (sweep, ["--driver", "simpy", "--grid", "policy=zz_mine;on_demand"]),
]


@pytest.mark.parametrize(("command", "words"), COMMANDS)
def test_commands_that_name_it_end_with_2_and_print_nothing_else(
    command: Any, words: list[str], put: Put, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put("policy", HEAD + PARAMS + "def worth(params, guess link):\n")
    code, streams = said(command, [*words, "--tokens", "5"], monkeypatch, capsys)
    sentence = registry.plugins("policy").left_out["zz_mine"]
    own = [line for line in streams.err.splitlines() if not line.startswith("left out: ")]
    assert (code, streams.out, own) == (2, "", [f"{command.__name__}: {sentence}"])


@pytest.mark.parametrize("kind", ["predictor", "cache"])
def test_a_sweep_ends_with_2_too_where_another_kind_is_broken(
    kind: str, put: Put, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(kind, HEAD)
    words = ["--driver", "simpy", "--tokens", "5", "--policy", "on_demand", "--policy", naming(kind)]
    code, streams = said(sweep, words, monkeypatch, capsys)
    assert code == 2 and streams.err.splitlines()[-1] == f"sim.sweep: {registry.plugins(kind).left_out['zz_mine']}"


def test_commands_that_do_not_name_it_say_in_one_line_what_is_left_out(
    put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put("policy", "def worth(params, guess link):\n")
    save(random_trace(1), tmp_path / "t.safetensors")
    (tmp_path / "m.json").write_text(json.dumps(round_machine().to_json()))
    words = ["--trace", str(tmp_path / "t.safetensors"), "--machine", str(tmp_path / "m.json"), "--policy", "on_demand"]
    code, streams = said(run, words, monkeypatch, capsys)
    assert code == 0 and streams.out
    lines = [line for line in streams.err.splitlines() if not line.startswith("simulating ")]
    assert lines == [f"left out: {registry.plugins('policy').left_out['zz_mine']}"]
    with pytest.raises(SystemExit) as stop:
        said(run, ["--help"], monkeypatch, capsys)
    assert stop.value.code == 0 and "left out: policy 'zz_mine' cannot be used" in " ".join(
        capsys.readouterr().out.split()
    )


def test_engine_commands_refuse_it_too(
    put: Put, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    from runtime import validate

    put("policy", HEAD)
    code, streams = said(validate, ["--policy", "zz_mine"], monkeypatch, capsys)
    assert (code, streams.out) == (2, "")
    assert streams.err == f"runtime.validate: {registry.plugins('policy').left_out['zz_mine']}\n"


def test_a_parameter_of_a_file_that_is_left_out_is_no_riddle(put: Put) -> None:
    from sim.axes import axis

    put("cache", HEAD)
    with pytest.raises(SpecError, match=r"'cache\.mine' is unknown.*cache 'zz_mine' cannot be used"):
        axis("cache.mine=1,2")
    with pytest.raises(SpecError, match="policy 'nothing' is unknown"):
        Space({"policy": "nothing"}, (axis("policy.lookahead=1,2"),))


# --- errors of a plug-in's own functions ------------------------------------------------------------------------------


def printed(text: str, kind: str, put: Put) -> str:
    """The traceback of a run with the plug-in, as Python prints it."""
    put(kind, text)
    trace = random_trace(3)
    setting = Setting(trace, round_machine(), trace.model, 4, 3, options(naming(kind)))
    with pytest.raises((ZeroDivisionError, TypeError)) as raised:
        Experiment(references=False).run(setting)
    return "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize(
    ("kind", "text", "line"),
    [
        ("policy", HEAD + PARAMS + WORTH.replace("guess.score", "guess.score / (guess.rank - guess.rank)"), 8),
        ("cache", HEAD + NOTHING + "def score(params, experts, x, now):\n    return experts.last_use[x] / 0\n", 7),
        (
            "cache",
            HEAD + NOTHING + "def score(p, e, x, now):\n    return 0.0\ndef fit(params, trace):\n    return [1 / 0]\n",
            9,
        ),
        ("predictor", HEAD + NOTHING + "def table(params, trace):\n    return 1 // 0\n", 7),
    ],
)
def test_an_error_in_a_rule_keeps_its_traceback_and_says_whose_it_is(
    kind: str, text: str, line: int, put: Put, tmp_path: Path
) -> None:
    found = printed(text, kind, put)
    place = f"{tmp_path / 'zz_mine.py'}"
    assert f'File "{place}", line {line}' in found and text.splitlines()[line - 1].strip() in found
    assert f"raised in {kind} 'zz_mine', {place}, line {line}; what plug-ins are given" in found


def test_an_error_over_what_a_rule_returned_names_the_rules_in_use(put: Put) -> None:
    found = printed(HEAD + PARAMS + WORTH.replace("guess.score", "None"), "policy", put)
    assert "TypeError" in found and "while policy 'zz_mine', cache 'lru' and miss 'load' decided visit 0; what" in found
