"""Measuring: ``python -m runtime.bench``; one file a part."""
