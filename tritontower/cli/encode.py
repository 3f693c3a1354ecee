"""Turn images into embeddings and write them to a safetensors file.

Tensors are named by the image's position on the command line: 0.embeddings [tokens, hidden_size], 0.deepstack.0 ...,
0.pooled, 1.embeddings ...; the metadata has grids and sizes.  In Python, tritontower.load_embeddings reads the file.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritontower.text_table import text_table

from .options import (
    add_bounds,
    add_device_and_dtype,
    add_images,
    add_json,
    add_model,
    load_tower,
    output_file,
    read_bounds,
)

if TYPE_CHECKING:
    from tritontower import ImageEmbedding


EXAMPLE = "tritontower encode Qwen/Qwen2-VL-2B-Instruct cat.jpg chart.png -o embeddings.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL, images and output."""
    add_model(parser)
    add_images(parser, required=True)
    parser.add_argument(
        "-o", "--output", type=output_file, required=True, metavar="FILE", help="the safetensors file to write"
    )
    add_bounds(parser)
    add_device_and_dtype(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Encodes all images in one call."""
    from tritontower.embedding import save_embeddings

    tower = load_tower(arguments)
    embeddings = tower.encode(arguments.images, **read_bounds(arguments))
    metadata = [_describe(path, embedding) for path, embedding in zip(arguments.images, embeddings, strict=True)]
    save_embeddings(arguments.output, embeddings)
    if arguments.json:
        print(json.dumps({"output": str(arguments.output), "images": metadata}, indent=2))
    else:
        rows = [
            (
                image["image"],
                "{} × {}".format(*image["original_size"]),
                "{} × {}".format(*image["processed_size"]),
                "{} × {} × {}".format(*image["grid_thw"]),
                image["num_tokens"],
            )
            for image in metadata
        ]
        print(text_table("", ("image", "size", "resized to", "grid", "tokens"), rows))
        print(f"\nwritten: {arguments.output}")
    return 0


def _describe(path: Path, embedding: "ImageEmbedding") -> dict[str, Any]:
    return {
        "image": str(path),
        "num_tokens": embedding.num_tokens,
        "grid_thw": list(embedding.grid_thw),
        "original_size": list(embedding.original_size),
        "processed_size": list(embedding.processed_size),
        "content_hash": embedding.content_hash,
    }
