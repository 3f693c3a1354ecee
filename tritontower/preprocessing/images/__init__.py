"""Decodes any accepted image into canonical RGB within limits."""
