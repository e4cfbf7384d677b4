"""Predictors, one file each: ``table(params, trace)`` returns a `traces.GuessTable`, for every row of the trace.

Entry [t, l, d - 1] names experts of layer l + d and may use nothing that came after layer l of row t was routed, unless
the plug-in declares ``NEEDS_FUTURE``. All rows of a pass reach a layer at once, so what is learned on the way counts
from the next pass on. `sim.predicting` has what several of them need.
"""
