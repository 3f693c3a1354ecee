"""Turn images into embeddings and write them to a safetensors file.

Tensors are named by the image's position on the command line: 0.embeddings [tokens, hidden_size], 0.deepstack.0 ...,
0.pooled, 1.embeddings ...; the metadata has grids and sizes.  In Python, tritontower.load_embeddings reads the file.
"""

import argparse
import json
from typing import Any

from tritontower.text_table import text_table

from . import options

EXAMPLE = "tritontower encode Qwen/Qwen2-VL-2B-Instruct cat.jpg chart.png -o embeddings.safetensors"

METADATA = ("num_tokens", "grid_thw", "original_size", "processed_size", "content_hash")
"""Fields of an embedding in the report."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL, images and output."""
    options.add_model(parser)
    options.add_images(parser, required=True)
    parser.add_argument(
        "-o", "--output", type=options.output_file, required=True, metavar="FILE", help="the safetensors file to write"
    )
    options.add_bounds(parser)
    options.add_device_and_dtype(parser)
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Encodes all images in one call."""
    from tritontower.embedding import save_embeddings

    tower = options.load_tower(arguments)
    embeddings = tower.encode(arguments.images, **options.read_bounds(arguments))
    metadata: list[dict[str, Any]] = [
        {"image": str(path), **{name: getattr(embedding, name) for name in METADATA}}
        for path, embedding in zip(arguments.images, embeddings, strict=True)
    ]
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
