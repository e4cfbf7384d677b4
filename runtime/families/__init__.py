"""One file per model family that differs; each holds ``FAMILY``, an instance of `runtime.family.Family`."""
