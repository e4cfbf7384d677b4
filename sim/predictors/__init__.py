"""Predictors, one file each: ``make(params, trace)`` returns a function (visit, row) -> list of guesses by distance.

``row`` is the trace row of the visit's first token. Entry d - 1 of the list speaks of layer + d.
"""
