"""What becomes of misses that would need a victim, one file each: ``loads(params, misses)`` says how many are loaded.

The first ones in router order are loaded, the host computes the others. A rule without ``loads`` loads all.
"""
