"""Benchmarks: each is a module to run, `python -m bench.NAME --help`."""
