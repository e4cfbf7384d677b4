"""Eviction rules, one file each: ``score(params, resident)``, the lowest leaves (ties: the lower expert id)."""
