"""Benchmarks: each module is a command (``python -m bench.towers --help``) whose last line of output is JSON."""
