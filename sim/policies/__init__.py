"""Scheduling policies, one file each.

A policy that prefetches defines ``worth(params, guess, link)`` (highest first, nothing at or below zero) and a
parameter ``lookahead``; one without ``worth`` never prefetches and uses its landing slots as cache slots.
``OPTIONS`` holds its own defaults for run options.
"""
