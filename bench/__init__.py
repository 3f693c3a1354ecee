"""Measuring from a checkout: commands (``python -m bench.towers --help``) and the campaigns (:mod:`bench.campaign`)."""
