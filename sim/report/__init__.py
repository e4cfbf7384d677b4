"""``python -m sim.report RESULTS --out report.html``: the results of a sweep or a validation as one page to read.

The page needs no network and no server. Every text passes through `markup`, which escapes it; the one script on it is
named by its digest in the page's content security policy, so nothing else can run.
"""
