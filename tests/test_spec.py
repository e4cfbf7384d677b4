"""SPEC strings: how they are read, what presets stand for, and one sentence for everything that is wrong."""

from __future__ import annotations

import pytest

from sim import registry
from sim.presets import PRESETS
from sim.spec import RUN_KEYS, Options, Spec, SpecError, options, parse


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("lru", Spec("lru", {})),
        (" lru ", Spec("lru", {})),
        ("speculative:lookahead=3", Spec("speculative", {"lookahead": "3"})),
        ("a:b=1,c=x", Spec("a", {"b": "1", "c": "x"})),
        ("a:cache=(lfu:decay=0.9,age=2),b=1", Spec("a", {"cache": "lfu:decay=0.9,age=2", "b": "1"})),
        ("a:p=(b:c=(d:e=1,f=2),g=3)", Spec("a", {"p": "b:c=(d:e=1,f=2),g=3"})),
        ("a: b = 1 , c = 2", Spec("a", {"b": "1", "c": "2"})),
    ],
)
def test_parse(text: str, spec: Spec) -> None:
    assert parse(text) == spec


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no proper name"),
        (":a=1", "no proper name"),
        ("a b:c=1", "no proper name"),
        ("a:b", "'b' is not key=value"),
        ("a:b=", "is not key=value"),
        ("a:=1", "is not key=value"),
        ("a:b=1,", "is not key=value"),
        ("a:b=1,b=2", "gives 'b' twice"),
        ("a:b=(c", "parentheses do not match"),
        ("a:b=c)", "parentheses do not match"),
        ("nonsense", "policy 'nonsense' is unknown; known are"),
        ("speculative:depth=3", "no parameter 'depth'; its parameters: lookahead, min_score"),
        ("on_demand:lookahead=3", "no parameter 'lookahead'; its parameters: none"),
        ("speculative:lookahead=three", "lookahead is 'three'; it must be an integer"),
        ("speculative:min_score=high", "it must be a finite number"),
        ("speculative:lookahead=0", "must be at least 1"),
        ("on_demand:cache=clairvoyant", "cache 'clairvoyant' is unknown; known are"),
        ("on_demand:cache=(lru:age=2)", "cache 'lru' has no parameter 'age'"),
        ("on_demand:stale=forget", "it must be retract or keep"),
        ("on_demand:miss=pray", "miss 'pray' is unknown; known are cpu, load, split"),
        ("on_demand:landing_slots=-1", "must be at least 0"),
        ("on_demand:stream_slots=0", "must be at least 1"),
        ("on_demand:chunk_bytes=-5000", "must be at least -4096"),
        ("naive:copy_stream=1", "copies whole layers"),
        ("naive:miss=cpu", "leave it out"),
        ("on_demand:max_submitted=0", "must be at least 1"),
        ("on_demand:write_back=maybe", "must be 0 or 1"),
    ],
)
def test_every_mistake_is_one_sentence(text: str, says: str) -> None:
    with pytest.raises(SpecError) as error:
        options(text)
    message = str(error.value)
    assert says in message
    assert "\n" not in message


def test_every_key_of_the_contract_is_accepted_by_every_policy() -> None:
    values = {
        "cache": "lru",
        "predictor": "oracle",
        "miss": "load",
        "stale": "keep",
        "landing_slots": 3,
        "stream_slots": 5,
        "write_back": True,
        "copy_stream": False,
        "chunk_bytes": 4096,
        "max_submitted": 3,
        "guard": True,
    }
    assert sorted(values) == sorted(RUN_KEYS)
    for policy in registry.plugins("policy"):
        run = options(f"{policy}:" + ",".join(f"{k}={int(v) if v is True else v}" for k, v in values.items()))
        for key, value in values.items():
            found = getattr(run, key)
            assert (found.name if key == "cache" else found) == value


def test_a_key_wins_over_the_commands_default_and_that_over_the_policys() -> None:
    own = registry.plugins("policy")["speculative"].OPTIONS["landing_slots"]
    assert options("speculative").landing_slots == own
    assert options("speculative", landing_slots=own + 1).landing_slots == own + 1
    assert options("speculative:landing_slots=1", landing_slots=own + 1).landing_slots == 1
    assert options("on_demand", cache="belady").cache.name == "belady"
    assert options("on_demand:cache=lru", cache="belady").cache.name == "lru"
    assert options("speculative:predictor=(oracle:reach=2)").predictor == "oracle:reach=2"


def test_a_preset_is_a_string_and_a_key_after_it_overrides() -> None:
    released = options("mixtral_offloading")
    assert (released.write_back, released.copy_stream, released.chunk_bytes) == (True, False, 0)
    repaired = options("mixtral_offloading:write_back=0,copy_stream=1")
    assert (repaired.write_back, repaired.copy_stream, repaired.chunk_bytes) == (False, True, 0)
    assert repaired.text == "mixtral_offloading:write_back=0,copy_stream=1"
    for name, preset in PRESETS.items():
        assert options(name).replace(text="") == options(preset.spec).replace(text="")
        assert name not in registry.plugins("policy")


def test_a_chunk_is_a_sixteenth_of_an_expert_unless_said() -> None:
    assert options("on_demand").chunk_size(16 * 4096 * 10) == 4096 * 10
    assert options("on_demand").chunk_size(16 * 4096 * 10 + 1) == 4096 * 11
    assert options("on_demand").chunk_size(100) == 64  # small experts: multiples of 64
    assert options("on_demand:chunk_bytes=-3").chunk_size(3 * 4096 * 10) == 4096 * 10
    assert options("on_demand:chunk_bytes=0").chunk_size(1000) == 1000
    assert options("on_demand:chunk_bytes=300").chunk_size(1000) == 300
    assert options("on_demand:chunk_bytes=3000").chunk_size(1000) == 1000


def test_plugins_that_know_the_future_are_named() -> None:
    assert options("on_demand").needs_future() == []
    assert options("speculative:cache=belady,predictor=oracle").needs_future() == ["belady", "oracle"]
    assert options("on_demand:predictor=oracle").needs_future() == []


@pytest.mark.parametrize("kind", ["cache", "predictor", "policy", "miss"])
def test_every_plugin_binds_with_its_defaults_and_is_described(kind: str) -> None:
    lines = registry.describe(kind).splitlines()
    assert len(lines) == len(registry.plugins(kind))
    for name, module in registry.plugins(kind).items():
        assert module.Params() is not None, "every parameter needs a default"
        assert any(line.strip().startswith(f"{name}:") for line in lines)


def test_options_cannot_be_changed() -> None:
    run = options("on_demand")
    with pytest.raises(AttributeError):
        run.landing_slots = 3  # type: ignore[misc]
    assert isinstance(run.replace(landing_slots=3), Options)
