"""Benchmarks of the four scripts: `python -m benchmarks --help`."""
