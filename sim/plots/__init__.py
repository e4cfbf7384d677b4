"""Pictures: every module here whose name does not start with an underscore is one, found by existing.

A picture has a docstring whose first line is its help, ``READS`` (``runs``, ``cells``, ``traces`` or ``recalls``),
``NEEDS`` (keys every result must have), ``VARIES`` (fields in which results may differ), ``SIZE`` (inches, headline and
caption aside) and ``draw(figure, results) -> Drawn``, where ``figure`` is the part between them. It is called
twice: once for its words. ``height(results)``, where there is one, gives the height.
"""
