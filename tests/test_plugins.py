"""What every plug-in promises, and what each one does: who leaves, what is guessed, what is issued."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from conftest import random_trace, round_machine, trace_of

from sim import registry
from sim.caches import predicted_next_use, protected_lru, sized_lru
from sim.experiment import Experiment, Setting, fitted, guess_table, predictor
from sim.planner import Fitted, Plan, Planner
from sim.plugin import Experts, Guess, LinkView, Misses, Now, hashed, power
from sim.policies import deadline, expected_saving, idle_only
from sim.presets import PRESETS
from sim.spec import bind, options, parse
from sim.timing import Timing
from traces import DECODE, Trace
from traces.stats import lru_hits
from traces.values import check_guesses

EVERYTHING = [(kind, name) for kind in registry.PACKAGES for name in registry.plugins(kind)]
COUNTED = ("demand_loads", "prefetch_loads", "prefetch_used", "retracted", "h2d_bytes")
HOST = {"host_memory_gb_s": 6.0}


def together(seed: int, sequences: int = 3, length: int = 10, **shape: int) -> Trace:
    """Sequences that decode together, one row each in every pass, with guesses."""
    trace = random_trace(seed, sequences, length, **shape)
    turn = np.arange(sequences * length)
    return replace(
        trace,
        token_sequence=(turn % sequences).astype(np.int32),
        pass_lengths=np.full(length, sequences, np.int32),
    )


def setting(text: str, trace: Trace, slots: int = 3, **changes: Any) -> Setting:
    return Setting(trace, round_machine(**(HOST | changes)), trace.model, 4, slots, options(text))


def plans(text: str, trace: Trace, slots: int, learned: Fitted | None = None, **changes: Any) -> list[Plan]:
    """Every plan of a run, without a driver."""
    run = setting(text, trace, slots, **changes)
    timing = Timing(run.machine, run.model, run.bits, run.options)
    decide = Planner(run.model, run.options, slots, timing, learned or fitted(run))
    predict = predictor(run)
    made = []
    visits = trace.visits()
    for forward in trace.passes():
        for _ in range(run.model.num_layers):
            visit = next(visits)
            visit.guesses = predict(visit, forward.first) if predict else []
            made.append(decide.plan(visit))
    return made


# --- contracts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), EVERYTHING)
def test_every_plugin_says_what_it_is_and_what_its_parameters_mean(kind: str, name: str) -> None:
    module = registry.plugins(kind)[name]
    assert module.SOURCE.strip()
    assert module.__doc__.splitlines()[0].endswith((".", ":", ","))
    for key, value in module.Params._field_defaults.items():
        assert f"``{key}``" in module.Params.__doc__, f"{name}: {key} is not explained"
        assert isinstance(value, bool | int | float | str)
    assert bind(kind, parse(name)).text() == name


def specs() -> list[str]:
    """Every policy and preset, every cache and every predictor with a policy that uses it, every rule for misses."""
    texts = [*registry.plugins("policy"), *PRESETS]
    users = ("on_demand", "next_layer", "all_positive:landing_slots=0")
    for cache, policy in product(registry.plugins("cache"), users):
        texts.append(f"{policy}{',' if ':' in policy else ':'}cache={cache}")
    texts += [f"all_positive:predictor={name}" for name in registry.plugins("predictor")]
    texts += [f"{policy}:miss={name}" for name in registry.plugins("miss") for policy in ("on_demand", "two_class")]
    return texts


@pytest.mark.parametrize("text", specs())
def test_every_plugin_and_preset_runs_above_the_joint_floor_and_conserves_counts(text: str) -> None:
    experiment = Experiment()
    for trace in (random_trace(3, sequences=2, length=9, prefill=3), together(4, length=6)):
        slots = min(trace.model.num_experts, 4)
        result = experiment.run(setting(text, trace, slots))
        for counts in (result, result["prefill"]):
            assert counts["hits"] + counts["late"] + counts["misses"] == counts["accesses"]
        both = {key: result[key] + result["prefill"][key] for key in COUNTED}
        assert both["prefetch_used"] + both["retracted"] <= both["prefetch_loads"]
        least, most = both["demand_loads"], both["demand_loads"] + both["prefetch_loads"]
        assert least * result["expert_bytes"] <= both["h2d_bytes"] <= most * result["expert_bytes"]
        assert result["tpot_s"] >= result["bounds"]["joint_floor_s"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_their_source_and_no_plugin(name: str) -> None:
    preset = PRESETS[name]
    assert preset.source
    assert name not in registry.plugins("policy")
    assert parse(preset.spec).name in registry.plugins("policy")
    options(name)


@pytest.mark.parametrize("name", registry.plugins("predictor"))
@pytest.mark.parametrize("batch", [False, True])
def test_guesses_are_ranked_and_their_scores_are_probabilities(name: str, batch: bool) -> None:
    trace = together(7, layers=4, experts=8) if batch else random_trace(7, 3, 10, prefill=4, layers=4, experts=8)
    table = guess_table(trace, name)
    check_guesses(name, table.ids, table.scores, table.wrap, trace.model.num_experts)
    assert ((table.scores >= 0) & (table.scores <= 1)).all()
    assert table.scores[..., :1, :].any()


CAUSAL = [
    *(name for name, module in registry.plugins("predictor").items() if not getattr(module, "NEEDS_FUTURE", False)),
    "previous_token:wrap=1",
    "popularity:wrap=1",
    "popularity:per_sequence=1",
]


@pytest.mark.parametrize("text", CAUSAL)
@pytest.mark.parametrize("batch", [False, True])
def test_changing_the_future_changes_no_earlier_guess(text: str, batch: bool) -> None:
    trace = together(8, length=12, layers=4) if batch else random_trace(8, 3, 12, layers=4)
    rng = np.random.default_rng(0)
    before = guess_table(trace, text)
    for number in (2, 7, 10):
        forward = trace.passes()[number]
        end = forward.first + forward.tokens
        for layer in range(4):
            other = trace.ids.copy()
            strange = np.argsort(rng.random((trace.num_tokens, 4, trace.model.num_experts)), axis=-1)[..., :2]
            other[end:] = strange[end:]
            other[forward.first : end, layer + 1 :] = strange[forward.first : end, layer + 1 :]
            after = guess_table(replace(trace, ids=other), text)
            for one, two in ((before.ids, after.ids), (before.scores, after.scores)):
                assert np.array_equal(one[: forward.first], two[: forward.first])
                assert np.array_equal(one[forward.first : end, : layer + 1], two[forward.first : end, : layer + 1])


def compiled(module: Any, name: str) -> Any:
    """A plug-in's function through numba."""
    numba = pytest.importorskip("numba")
    function = getattr(module, name)
    helpers = {helper.__name__: numba.njit(helper) for helper in (power, hashed)}
    return numba.njit(FunctionType(function.__code__, function.__globals__ | helpers))


def arguments(kind: str, rng: np.random.Generator) -> dict[str, tuple[Any, ...]]:
    """Arguments for every function a plug-in of a kind may define, after its parameters."""
    if kind == "cache":
        kinds = Experts.__annotations__.values()
        known = Experts(*(rng.random(4) if "float" in str(kind) else rng.integers(0, 9, 4) for kind in kinds))
        now = Now(5, 9, 40)
        return {"score": (known, 1, now), "touch": (known, 1, 2, now), "admit": (known, 1, 3, now)}
    if kind == "policy":
        values = [rng.random() if k == "float" else int(rng.integers(0, 3)) for k in Guess.__annotations__.values()]
        return {"worth": (Guess(*values)._replace(distance=1, top_k=2), LinkView(*rng.integers(1, 99, 6).tolist()))}
    return {"loads": (Misses(*rng.integers(1, 9, 7).tolist()),)}


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, n in EVERYTHING if k != "predictor"])
def test_plugins_compile_and_give_the_same_bits(kind: str, name: str) -> None:
    module, rng = registry.plugins(kind)[name], np.random.default_rng(0)
    functions = {f: compiled(module, f) for f in arguments(kind, rng) if hasattr(module, f)}
    for _ in range(50):
        drawn = arguments(kind, rng)
        for function, fast in functions.items():
            assert fast(module.Params(), *drawn[function]) == getattr(module, function)(
                module.Params(), *drawn[function]
            )


# --- caches: who leaves -----------------------------------------------------------------------------------------------


def one_layer(experts: list[int], lengths: list[int] | None = None) -> Trace:
    """A layer of 8 experts, one of them for each token."""
    return trace_of([[[e]] for e in experts], lengths, experts=8)


def victims(cache: str, experts: list[int], slots: int, lengths: list[int] | None = None) -> list[int | None]:
    """Who left for each load."""
    made = plans(f"on_demand:cache=({cache})", one_layer(experts, lengths), slots)
    return [load.evicted for plan in made for load in plan.demand]


@pytest.mark.parametrize(
    ("cache", "experts", "slots", "gone"),
    [
        ("lru", [0, 1, 1, 1, 2, 0, 3], 3, [1]),
        ("fifo", [0, 1, 1, 1, 2, 0, 3], 3, [0]),
        ("lfu", [0, 1, 1, 1, 2, 0, 3], 3, [2]),
        ("global_lru", [0, 1, 1, 1, 2, 0, 3], 3, [1]),
        ("sized_lru", [0, 1, 1, 1, 2, 0, 3], 3, [1]),
        ("protected_lru", [0, 1, 1, 1, 2, 0, 3], 3, [1]),
        ("belady", [0, 1, 2, 0, 1], 2, [1, 0]),
        ("lfu", [0, 0, 0, 1, 1, 1, 1, 2, 0, 3], 2, [0, 2, 1]),
        ("lfu:resident=1", [0, 0, 0, 1, 1, 1, 1, 2, 0, 3], 2, [0, 2, 0]),
        ("lfru", [0, 0, 0, 0, 1, 1, 1, 2], 2, [0]),
        ("lfu", [0, 0, 0, 0, 1, 1, 1, 2], 2, [1]),
        ("heat:decay=0.5", [0, 0, 0, 0, 1, 1, 1, 2], 2, [0]),
        ("heat:decay=0.99", [0, 0, 0, 0, 1, 1, 1, 2], 2, [1]),
        ("sequence_heat:weight=9,decay=0.5,newcomer=99", [0, 0, 0, 0, 1, 1, 1, 2], 2, [0]),
        ("sequence_heat:weight=1,decay=0.99,newcomer=99", [0, 0, 0, 0, 1, 1, 1, 2], 2, [1]),
        ("predicted_next_use:decay=0.5", [0, 0, 0, 0, 1, 1, 1, 2], 2, [0]),
        ("predicted_next_use:decay=0.99", [0, 0, 0, 0, 1, 1, 1, 2], 2, [1]),
    ],
)
def test_who_leaves(cache: str, experts: list[int], slots: int, gone: list[int]) -> None:
    assert victims(cache, experts, slots)[slots:] == gone


def test_lfu_and_lfru_forget_at_a_new_sequence_if_told_to() -> None:
    experts, lengths = [0, 0, 0, 1, 1, 1, 1, 2, 0, 3], [5, 5]
    assert victims("lfu", experts, 2, lengths)[2:] == [0, 2, 1]
    assert victims("lfu:per_sequence=1", experts, 2, lengths)[2:] == [0, 2, 0]
    old_love = [0] * 9 + [1, 2]
    assert victims("lfru", old_love, 2, [9, 2])[2:] == [1]
    assert victims("lfru:per_sequence=1", old_love, 2, [9, 2])[2:] == [0]


def test_random_evicts_by_a_hash_of_seed_moment_and_expert() -> None:
    experts = [0, 1, 2, 3, 4, 5]
    resident, expected = [0, 1], []
    for moment, expert in enumerate(experts[2:], 2):
        gone = min(resident, key=lambda x: hashed(5, moment, x))
        resident[resident.index(gone)] = expert
        expected.append(gone)
    assert victims("random:seed=5", experts, 2)[2:] == expected


def test_static_hot_lets_cold_experts_pass_through() -> None:
    made = plans("on_demand:cache=(static_hot:share=1)", one_layer([2, 0, 0, 0, 1, 1, 2, 0, 1]), 2)
    assert [(load.expert, load.evicted) for plan in made for load in plan.demand] == [(2, None), (0, None), (1, 2)]
    assert [(load.visit, load.expert) for plan in made for load in plan.stream] == [(6, 2)]


def test_sequence_heat_lets_a_newcomer_pass_until_it_is_warmer_than_the_victim() -> None:
    made = plans("on_demand:cache=(sequence_heat:weight=0,newcomer=1.5)", one_layer([0, 0, 0, 1, 1, 1, 2, 2, 2, 2]), 2)
    assert [(load.visit, load.expert) for plan in made for load in plan.stream] == [(6, 2), (7, 2)]
    assert [(load.visit, load.evicted) for plan in made for load in plan.demand] == [(0, None), (3, None), (8, 0)]


def test_static_hot_counts_the_first_share_of_decode_tokens_alone() -> None:
    module = registry.plugins("cache")["static_hot"]
    trace = one_layer([1, 1, 2, 3, 3, 3, 3, 3])
    assert module.fit(module.Params(share=0.25), trace) == [0, 2, 0, 0, 0, 0, 0, 0]
    assert module.fit(module.Params(share=1.0), trace) == [0, 2, 1, 5, 0, 0, 0, 0]


def test_belady_with_bypass_lets_pass_what_is_used_again_later() -> None:
    made = plans("on_demand:cache=belady_bypass", one_layer([0, 1, 2, 0, 1, 2, 0]), 2)
    assert [(load.visit, load.expert) for plan in made for load in plan.stream] == [(2, 2), (5, 2)]
    assert [load.evicted for plan in made for load in plan.demand] == [None, None]


def test_global_lru_never_hits_up_to_all_other_layers_experts_and_hits_with_one_slot_more() -> None:
    layers, top_k = 4, 2
    trace = trace_of([[[0, 1]] * layers] * 6)
    run = setting("on_demand:cache=global_lru", trace, top_k)
    assert run.options.pooled
    for pool in range(top_k, layers * top_k + 1):
        made = plans("on_demand:cache=global_lru", trace, top_k, Fitted(sizes=[pool, 0, 0, 0]))
        hits = sum(len(plan.resident) for plan in made)
        assert (hits == 0) == (pool <= (layers - 1) * top_k), pool


def knowledge(**columns: list[Any]) -> Experts:
    zeros = {name: [0, 0] for name in Experts._fields}
    return Experts(**(zeros | columns))


def test_protected_lru_keeps_what_a_coming_visit_is_likely_to_route() -> None:
    now = Now(10, 3, 50)
    for visit, score, stays in ((11, 0.5, True), (10, 0.5, False), (11, 0.1, False)):
        known = knowledge(last_use=[1, 2], guess_visit=[visit, -1], guess_score=[score, 0.0])
        older, newer = (protected_lru.score(protected_lru.Params(min_score=0.3), known, x, now) for x in (0, 1))
        assert (older > newer) == stays


def test_predicted_next_use_shortens_the_wait_by_the_guess() -> None:
    now, params = Now(10, 3, 50), predicted_next_use.Params(decay=0.5)
    known = knowledge(memory=[1.0, 2.0], visits=[3, 3], guess_visit=[11, -1], guess_score=[0.75, 0.0])
    cold, hot = (predicted_next_use.score(params, known, x, now) for x in (0, 1))
    assert cold == pytest.approx(-0.25 / 0.5, rel=1e-4)
    assert hot == pytest.approx(-1 / 1.0, rel=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_sized_lru_gives_slots_where_they_hit_most(seed: int) -> None:
    trace = random_trace(seed, 2, 12, layers=3, experts=5)
    curves = lru_hits(trace.head(12))
    for slots in (2, 3, 4, 5):
        sizes = sized_lru.sizes(sized_lru.Params(share=0.5), trace, slots)
        assert sum(sizes) == 3 * slots
        assert all(2 <= size <= 5 for size in sizes)
        found = sum(int(curves[layer, size - 2]) for layer, size in enumerate(sizes))
        allowed = (c for c in product(range(2, 6), repeat=3) if sum(c) == 3 * slots)
        assert found == max(sum(int(curves[i, size - 2]) for i, size in enumerate(c)) for c in allowed)


# --- predictors: what is guessed --------------------------------------------------------------------------------------


def guesses(text: str, trace: Trace, row: int, layer: int, distance: int = 1) -> list[tuple[int, float]]:
    table = guess_table(trace, text)
    ids, scores = table.ids[row, layer, distance - 1].tolist(), table.scores[row, layer, distance - 1].tolist()
    return [(e, round(s, 3)) for e, s in zip(ids, scores, strict=True) if s > 0]


CHAIN = trace_of([[[0], [3]], [[0], [3]], [[1], [2]], [[0], [3]], [[0], [3]]], [3, 2])


def test_oracle_and_recorded_say_what_was_routed_and_what_was_recorded() -> None:
    trace = random_trace(5, layers=3)
    for row, layer in product(range(trace.num_tokens), range(2)):
        assert [e for e, _ in guesses("oracle", trace, row, layer)] == sorted(trace.ids[row, layer + 1].tolist())
    assert guess_table(trace, "recorded") is trace.guesses["router"]


def test_noisy_oracle_is_right_as_often_as_it_says() -> None:
    trace = random_trace(1, 20, 50, layers=4, experts=8)
    for text, recalls in (
        ("noisy_oracle:recall=1,step=0", (1, 1, 1)),
        ("noisy_oracle:recall=0", (0, 0, 0)),
        ("noisy_oracle:recall=0.9,step=0.2", (0.9, 0.7, 0.5)),
    ):
        table = guess_table(trace, text)
        for distance, recall in enumerate(recalls, 1):
            named, routed = table.ids[:, :-distance, distance - 1], trace.ids[:, distance:]
            found = (named[..., :, None] == routed[..., None, :]).any(-1).mean()
            assert found == pytest.approx(recall, abs=0.02 if 0 < recall < 1 else 0)
            assert (table.scores[:, :-distance, distance - 1] == np.float16(recall)).all()


def test_noisy_oracle_with_more_recall_knows_what_it_knew_with_less() -> None:
    trace = random_trace(2, 5, 50, layers=3, experts=8)
    routed = trace.ids[:, 1:, None, :]
    less, more = (guess_table(trace, f"noisy_oracle:recall={r}").ids[:, :-1, 0, :, None] for r in (0.5, 0.8))
    right = [(ids == routed).any(-2) for ids in (less, more)]
    assert (right[0] <= right[1]).all()
    assert not np.array_equal(less, guess_table(trace, "noisy_oracle:recall=0.5,seed=1").ids[:, :-1, 0, :, None])


def test_previous_token_names_its_experts_with_the_rate_at_which_they_repeated() -> None:
    assert guesses("previous_token:prior=1", CHAIN, 0, 0) == []
    assert guesses("previous_token:prior=1", CHAIN, 1, 0) == [(3, 0.25)]
    assert guesses("previous_token:prior=1", CHAIN, 2, 0) == [(3, 0.625)]  # 1 of 1, and 1 in 4 believed at first
    assert guesses("previous_token:prior=1", CHAIN, 3, 0) == []
    assert guesses("previous_token:prior=1", CHAIN, 4, 0) == [(3, 0.417)]  # 1 of 2
    assert guesses("previous_token:prior=1,wrap=1", CHAIN, 2, 1) == [(1, 0.625)]  # layer 0 of the next token


def test_previous_token_follows_the_sequence_where_sequences_decode_together() -> None:
    trace = together(9, sequences=3, length=5)
    table = guess_table(trace, "previous_token")
    for row in range(3, 15):
        assert set(table.ids[row, 0, 0].tolist()) == set(trace.ids[row - 3, 1].tolist())


def test_popularity_names_shares_of_use_so_far() -> None:
    assert guesses("popularity:prior=1,guesses=2", CHAIN, 0, 0) == [(0, 0.25), (1, 0.25)]
    assert guesses("popularity:prior=1,guesses=2", CHAIN, 4, 0) == [(3, 0.65), (2, 0.25)]  # 3.25 and 1.25 of 5
    assert guesses("popularity:prior=1,guesses=2,per_sequence=1", CHAIN, 4, 0) == [(3, 0.625), (0, 0.125)]


def test_transition_names_what_followed_the_expert_of_this_layer() -> None:
    assert guesses("transition:prior=1,guesses=1", CHAIN, 1, 0) == [(3, 0.812)]  # (1 + 1.25 / 2) / 2
    assert guesses("transition:prior=1,guesses=1", CHAIN, 4, 0) == [(3, 0.913)]  # (3 + 3.25 / 5) / 4
    first = [e for e, _ in guesses("transition:prior=1,guesses=1", replace(CHAIN, ids=CHAIN.ids[::-1].copy()), 4, 0)]
    assert first == [3]


# --- policies: what is issued -----------------------------------------------------------------------------------------

SCORES = [
    [0.9, 0.7, 0.3, 0.1, 0, 0, 0, 0],
    [0, 0, 0, 0, 0.8, 0.5, 0.4, 0.2],
    [0.66, 0.55, 0.5, 0.2, 0, 0, 0, 0],
]


def first_prefetches(text: str, tokens: int = 1, **changes: Any) -> list[list[tuple[int, int]]]:
    """(layer, expert) of the prefetches of every visit; layers of 8 experts, all guesses as in SCORES."""
    ids = [[[0, 1]] * 4] * tokens
    scores = [[[SCORES[d] for d in range(3)] for _ in range(4)] for _ in range(tokens)]
    spec = f"{text}{',' if ':' in text else ':'}landing_slots=16"
    made = plans(spec, trace_of(ids, experts=8, scores=scores), 2, **changes)
    return [[(load.layer, load.expert) for load in plan.prefetch] for plan in made]


@pytest.mark.parametrize(
    ("text", "issued"),
    [
        ("next_layer", [(1, 0), (1, 1)]),
        ("next_layer:count=1", [(1, 0)]),
        ("next_missing", [(1, 0)]),
        ("next_missing:count=2,lookahead=2", [(1, 0), (1, 1), (2, 4), (2, 5)]),
        ("walk_forward", [(1, 0), (1, 1)]),
        (
            "all_positive",
            [(1, 0), (1, 1), (2, 4), (2, 5), (1, 2), (2, 6), (3, 0), (3, 1), (3, 2), (2, 7), (1, 3), (3, 3)],
        ),
        ("cumulative", [(1, 0), (1, 1), (2, 4), (2, 5), (3, 0), (2, 6), (3, 1), (3, 2)]),
        ("cumulative:mass=0.3,lookahead=1", [(1, 0)]),
        ("confidence", [(1, 0), (1, 1)]),
        ("confidence:least=0.75,lookahead=3", [(1, 0), (2, 4)]),
        ("agreement", []),
        ("agreement:layers=1,lookahead=1", [(1, 0), (1, 1)]),
        ("deadline", [(2, 4), (3, 0)]),
        ("two_class", [(1, 0), (1, 1), (2, 4), (2, 5), (3, 0), (3, 1)]),
        ("idle_only", []),
    ],
)
def test_what_is_issued_at_the_first_visit(text: str, issued: list[tuple[int, int]]) -> None:
    assert first_prefetches(text)[0] == issued


def test_next_missing_passes_over_residents_and_next_layer_does_not() -> None:
    later = {text: first_prefetches(f"{text}:count=1", tokens=2)[4] for text in ("next_layer", "next_missing")}
    assert later == {"next_layer": [], "next_missing": []}  # both first guesses are resident, none of top_k is missing
    assert first_prefetches("next_missing:count=1", tokens=1)[1] == [(2, 0)]


def test_walk_forward_goes_on_to_the_first_layer_that_misses_something() -> None:
    assert first_prefetches("walk_forward", tokens=2)[4] == [(2, 4), (2, 5)]


def test_agreement_waits_for_a_second_layer() -> None:
    ids = [[[0, 1]] * 4]
    sure = [[0.9, 0.8, 0, 0, 0, 0, 0, 0]] * 3
    made = plans("agreement:landing_slots=8", trace_of(ids, experts=8, scores=[[sure] * 4]), 2)
    assert [[(load.layer, load.expert) for load in plan.prefetch] for plan in made] == [
        [],
        [(2, 0), (3, 0), (2, 1), (3, 1)],
        [],
        [],
    ]


def test_idle_only_issues_one_at_a_time_on_an_idle_link() -> None:
    trace = random_trace(6, 1, 40, layers=4, experts=8)
    made = plans("idle_only:landing_slots=8", trace, 4)
    assert max(len(plan.prefetch) for plan in made) == 1
    assert not any(plan.prefetch for plan in made if plan.demand)


def test_two_class_purges_what_is_queued_for_a_layer_when_it_is_routed() -> None:
    run = options("two_class")
    assert (run.chunk_bytes, run.stale) == (-3, "retract")
    ids = [[[0, 1], [2, 3], [2, 3], [2, 3]]]
    scores = [[[SCORES[d] for d in range(3)] for _ in range(4)]]
    made = plans("two_class:landing_slots=16", trace_of(ids, experts=8, scores=scores), 2)
    assert {(load.layer, load.expert) for load in made[1].retract} == {(1, 0), (1, 1)}


def guess(score: float, **more: Any) -> Guess:
    values = dict.fromkeys(Guess._fields, 0) | {"score": score, "distance": 1, "agreed": 1, "top_k": 2}
    return Guess(**(values | more))


def test_expected_saving_weighs_the_hidden_copy_against_what_a_wrong_one_blocks() -> None:
    link = LinkView(backlog_ns=10, queued_ns=10, load_ns=100, chunk_ns=5, max_submitted=2, window_ns=60)
    params = expected_saving.Params()
    assert expected_saving.worth(params, guess(0.5), link) == 0.5 * 50 - 0.5 * 10
    assert expected_saving.worth(params._replace(reuse=0.5), guess(0.5), link) == 0.5 * 50 - 0.5 * 60
    assert expected_saving.worth(params, guess(0.5), link._replace(window_ns=10)) == 0


def test_deadline_and_idle_only_read_the_virtual_link() -> None:
    link = LinkView(backlog_ns=10, queued_ns=40, load_ns=50, chunk_ns=5, max_submitted=2, window_ns=60)
    assert deadline.worth(deadline.Params(), guess(0.4), link) == 0.4
    assert deadline.worth(deadline.Params(), guess(0.4), link._replace(window_ns=59)) == 0
    assert idle_only.worth(idle_only.Params(), guess(0.4), link) == 0
    assert idle_only.worth(idle_only.Params(), guess(0.4), link._replace(queued_ns=0)) == 0.4


def test_naive_loads_every_expert_at_every_visit() -> None:
    trace = random_trace(2, 1, 5, layers=3, experts=6)
    result = Experiment(references=False).run(setting("naive", trace))
    assert (result["hits"], result["misses"]) == (0, result["accesses"])
    assert result["h2d_bytes"] == 5 * 3 * 6 * result["expert_bytes"]


def test_rules_for_misses_say_how_many_are_loaded() -> None:
    misses = Misses(number=3, loads=1, backlog_ns=20, load_ns=100, compute_ns=5, host_ns=150, host_shared_ns=150)
    found = {name: m.loads(m.Params(), misses) for name, m in registry.plugins("miss").items() if hasattr(m, "loads")}
    assert found == {"cpu": 0, "split": 1}  # two on the host take 300 ns, two copies and one expert 225


def test_layers_that_route_every_expert_are_no_special_case() -> None:
    trace = random_trace(4, layers=2, experts=2, top_k=2)
    for name in registry.plugins("predictor"):
        table = guess_table(trace, name)
        check_guesses(name, table.ids, table.scores, table.wrap, 2)
    for name in registry.plugins("cache"):
        Experiment(references=False).run(setting(f"on_demand:cache={name}", trace, 2))


def test_a_trace_of_prefill_alone_fits_every_cache() -> None:
    trace = replace(random_trace(4, prefill=8), guesses={})
    assert not (trace.phase == DECODE).any()
    for name in registry.plugins("cache"):
        Experiment(references=False).run(setting(f"on_demand:cache={name}", trace))
