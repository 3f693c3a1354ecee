"""Benchmarks of kernels, towers, preprocessing, loading, launches and memory: ``tritontower bench``."""
