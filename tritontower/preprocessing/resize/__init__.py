"""Resizing rules, one per file: the layout of an image of a given size."""
