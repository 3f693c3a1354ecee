"""Benchmarks that run from a checkout: single commands, and the campaign that runs them all (:mod:`bench.campaign`)."""
