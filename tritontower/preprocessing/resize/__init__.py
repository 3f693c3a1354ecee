"""The resizing rules, one file per rule."""
