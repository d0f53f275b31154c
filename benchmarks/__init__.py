"""Benchmarks: `pytest benchmarks --benchmark-only`, and interleaved pairs with `python -m benchmarks.compare`."""
