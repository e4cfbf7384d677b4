"""Pictures: every module here whose name does not start with an underscore is one, found by existing.

A picture has a docstring whose first line is its help, ``READS`` (``runs`` or ``cells``), ``NEEDS`` (keys every result
must have), ``VARIES`` (fields in which results may differ), ``SIZE`` (inches) and ``draw(figure, results) -> Drawn``.
"""
