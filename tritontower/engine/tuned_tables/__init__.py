"""Tables of tuned launch configurations: where they lie, how they are checked, and how they reach the kernels.

A table is a JSON file that ``tritontower tune`` measured on one GPU, such as ``NVIDIA_H200.json``.  It is looked for in
``$TRITONTOWER_TUNED_CONFIG_FOLDER``, then in the user's cache folder, then among the tables that come with the package.
:func:`fill_registry` reads the tables of a device once per process and hands their entries to the kernels' registry.
"""

from .folders import (
    FOLDER_VARIABLE,
    Identity,
    cache_folder,
    identify,
    packaged_folder,
    table_name,
    table_paths,
    user_folder,
)
from .loading import LoadedTable, fill_registry, is_current, load_tables, reload_tables
from .schema import SCHEMA, Table, check_table, read_table, triton_minor
from .source_digest import source_digest

__all__ = [
    "FOLDER_VARIABLE",
    "SCHEMA",
    "Identity",
    "LoadedTable",
    "Table",
    "cache_folder",
    "check_table",
    "fill_registry",
    "identify",
    "is_current",
    "load_tables",
    "packaged_folder",
    "read_table",
    "reload_tables",
    "source_digest",
    "table_name",
    "table_paths",
    "triton_minor",
    "user_folder",
]
