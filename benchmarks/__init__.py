"""Benchmarks: `pytest benchmarks --benchmark-only` for all, `python -m benchmarks.compare` for pairs of a few cases."""
