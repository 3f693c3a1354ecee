"""Generates the pages that follow from the code: supported models, and the API reference."""

import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tritontower.models.common.catalog import families_table

API = {
    "Tower": ("tritontower.tower.VisionTower", "tritontower.models.common.registry.has_vision"),
    "Results": (
        "tritontower.embedding.ImageEmbedding",
        "tritontower.embedding.save_embeddings",
        "tritontower.embedding.load_embeddings",
        "tritontower.scheduler.outputs.ItemError",
    ),
    "Batches": ("tritontower.batch.packed_batch.PackedBatch",),
    "Cache": ("tritontower.cache.EmbeddingCache",),
    "Configuration": ("tritontower.config.TowerConfig", "tritontower.engine.graph_cache.CaptureLimits"),
    "Prompts": ("tritontower.prompt",),
    "Integrations": (
        "tritontower.integrations.transformers",
        "tritontower.integrations.vllm",
        "tritontower.integrations.sglang",
        "tritontower.integrations.exllama",
    ),
    "Errors and limits": ("tritontower.errors",),
}
"""Section of the API page → documented objects."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    models = (
        "# Supported models\n\nToken counts are those of one published checkpoint per row.  "
        "`tritontower families` prints this table; [Adding a model](adding-a-model.md) extends it.\n\n"
        + families_table()
    )
    sections = "\n\n".join(
        f"## {title}\n\n" + "\n\n".join(f"::: {name}" for name in names) for title, names in API.items()
    )
    files.append(File.generated(config, "models.md", content=models))
    files.append(File.generated(config, "api.md", content=f"# API\n\n{sections}\n"))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Hides the markers of generated tables."""
    return re.sub(r"<!-- /?[\w:]+ -->\n", "", markdown)
