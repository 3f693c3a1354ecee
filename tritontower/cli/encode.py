"""Turn images into embeddings and write them to a safetensors file.

The file holds all that the tower makes of an image, under its place on the command line: 0.embeddings [tokens,
hidden_size], 0.deepstack.0 ..., 0.pooled, 1.embeddings ...; the file's metadata says each one's grid and sizes.  In Python,
tritontower.embedding.load_embeddings reads it.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritontower.text_table import text_table

from .options import add_bounds, add_images, add_json, add_model, add_placement, bounds_of, load_tower, output_file

if TYPE_CHECKING:
    from tritontower import ImageEmbedding

__all__ = ["EXAMPLE", "add_arguments", "run"]

EXAMPLE = "tritontower encode Qwen/Qwen2-VL-2B-Instruct cat.jpg chart.png -o embeddings.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, images, and where the embeddings go."""
    add_model(parser)
    add_images(parser, required=True)
    parser.add_argument(
        "-o", "--output", type=output_file, required=True, metavar="FILE", help="the safetensors file to write"
    )
    add_bounds(parser)
    add_placement(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Encodes all images in one call."""
    from tritontower.embedding import save_embeddings

    tower = load_tower(arguments)
    embeddings = tower.encode(arguments.images, **bounds_of(arguments))
    facts = [_facts(path, embedding) for path, embedding in zip(arguments.images, embeddings, strict=True)]
    save_embeddings(arguments.output, embeddings)
    if arguments.json:
        print(json.dumps({"output": str(arguments.output), "images": facts}, indent=2))
    else:
        rows = [
            (
                fact["image"],
                "{} × {}".format(*fact["original_size"]),
                "{} × {}".format(*fact["processed_size"]),
                "{} × {} × {}".format(*fact["grid_thw"]),
                fact["num_tokens"],
            )
            for fact in facts
        ]
        print(text_table("", ("image", "size", "resized to", "grid", "tokens"), rows))
        print(f"\nwritten: {arguments.output}")
    return 0


def _facts(path: Path, embedding: "ImageEmbedding") -> dict[str, Any]:
    return {
        "image": str(path),
        "num_tokens": embedding.num_tokens,
        "grid_thw": list(embedding.grid_thw),
        "original_size": list(embedding.original_size),
        "processed_size": list(embedding.processed_size),
        "content_hash": embedding.content_hash,
    }
