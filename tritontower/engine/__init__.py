"""Runs a layer graph over packed batches: weights, operators, planned buffers and CUDA graphs."""
