"""Compares a tower with the implementation of transformers on the same checkpoint."""
