"""The supported models, one file per family; shared code is in :mod:`tritontower.models.common`."""
