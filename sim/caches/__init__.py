"""Eviction rules, one file each: ``score(params, experts, x, now)``, the lowest leaves (ties: the lower expert id).

A rule may also define, or declare:

- ``touch(params, experts, x, tokens, now)``, called at each routed access before the tables change; what it returns is
  kept in ``experts.memory[x]``.
- ``admit(params, experts, x, victim, now)``: whether a missing expert takes the victim's slot, or passes through.
- ``fit(params, trace)``: numbers by x learned from a trace beforehand, in ``experts.table``.
- ``sizes(params, trace, slots)``: cache slots of every layer, slots * layers in all.
- ``POOLED = True``: all layers share one pool.
- ``WANTS_GUESSES = True``: ``experts.guess_score`` and ``guess_visit`` are kept.
- ``NEEDS_FUTURE = True``: ``experts.next_use`` is kept, and the engine refuses the rule.
"""
