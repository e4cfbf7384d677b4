"""Decides which experts to load, evict and prefetch, and predicts how long it takes. Needs no torch."""
