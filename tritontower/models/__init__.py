"""The supported models, one file per family; what families share is in :mod:`tritontower.models.common`."""
