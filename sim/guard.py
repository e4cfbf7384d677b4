"""Never worse: the planner replays on_demand in its head, and prefetches while that is not ahead by more than a budget.

Beside the run's own state a shadow is kept: the same visits, the same total slots, no prefetching. While the run rests,
it is on_demand: landing slots are lent to the caches, and guesses are looked at in one pass of ``probe`` only. A trial
begins when guesses have proved worth issuing, and when what it may cost fits the budget: two tokens and 0.4 per cent
of the time so far. What it costs to begin and to end is known: the lent slots' experts must be loaded again. A trial
ends when it has lost that and a share of one token's time (the credit) against the shadow, or once it has paid back,
the credit alone. Each failure makes the next rest four times as long, each gain shorter again. Looking at guesses
while resting is paid from the same budget. The shadow's times are the run's own: what the policy plans longer than
on_demand on every visit, resting or not, is left out of the comparison.
"""

from __future__ import annotations

from sim.state import (
    ACCOUNT,
    ACTIVE,
    APPETITE,
    BALANCE,
    ENTRY,
    LENT,
    LOOKING,
    NOW,
    PASS_START,
    PASSES,
    REST,
    REST_LENGTH,
    SHADOW_START,
    SHADOW_TIME,
    Config,
    State,
)

LEARN = 6  # decode passes looked at before the first trial
LONGEST_REST = 4096
PAYBACK = 32  # passes in which the guesses' worth must exceed what a trial may cost
BUDGET_TOKENS = 2
BUDGET_SHARE = 250  # of the time so far: one part in this many


def begin_run(s: State, c: Config) -> None:
    """Before the first visit: zero trust with a guard, else prefetching from the start."""
    n = s.n
    n[LOOKING] = 1 if c.lookahead else 0
    n[ACTIVE] = 0 if c.guard else n[LOOKING]
    n[REST] = n[REST_LENGTH] = LEARN


def end_pass(s: State, c: Config, decode: bool, shadow_now: int, load_ns: int) -> None:
    """After the last layer of a pass: whether the next one looks at guesses, and whether it prefetches.

    ``load_ns``: one load.
    """
    n = s.n
    own_ns = n[NOW] - n[PASS_START]
    shadow_ns = shadow_now - n[SHADOW_START]
    n[PASS_START] = n[NOW]
    n[SHADOW_START] = shadow_now
    if not decode:
        return
    n[PASSES] += 1
    n[SHADOW_TIME] += shadow_ns
    n[ACCOUNT] += shadow_ns - own_ns
    token_ns = n[SHADOW_TIME] // n[PASSES]
    credit = token_ns * c.credit_percent // 100
    budget = BUDGET_TOKENS * token_ns + n[SHADOW_TIME] // BUDGET_SHARE
    appetite = n[APPETITE]
    n[APPETITE] = 0
    if n[ACTIVE]:
        watch_trial(s, shadow_ns - own_ns, credit, budget)
        return
    n[REST] -= 1
    if n[REST] <= 0 and n[LOOKING]:
        entry = n[LENT] * load_ns
        cost = 2 * entry + credit
        if appetite * PAYBACK > cost and cost - n[ACCOUNT] <= budget:
            n[ACTIVE] = 1
            n[BALANCE] = 0
            n[ENTRY] = entry
            return
    probes = n[ACCOUNT] > -budget and (n[REST] == 0 or n[PASSES] % c.probe == 0)
    n[LOOKING] = 1 if n[PASSES] < LEARN or probes else 0


def watch_trial(s: State, gain_ns: int, credit: int, budget: int) -> None:
    """Go on prefetching, or rest."""
    n = s.n
    n[BALANCE] += gain_ns
    if n[BALANCE] >= credit:
        n[BALANCE] = credit
        n[REST_LENGTH] = max(LEARN, n[REST_LENGTH] // 4)
        n[ENTRY] = 0
    if n[BALANCE] < -credit - n[ENTRY] or (n[BALANCE] < 0 and n[ACCOUNT] < -budget):
        n[ACTIVE] = n[LOOKING] = 0
        n[REST_LENGTH] = min(LONGEST_REST, n[REST_LENGTH] * 4)
        n[REST] = n[REST_LENGTH]
