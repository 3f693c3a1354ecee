"""Turn pictures into embeddings and write them to a safetensors file.

The file holds one tensor [tokens, hidden_size] per picture, named by its place on the command line (picture.0,
picture.1, ...); the file's metadata says, as JSON under the same names, which picture that was, its grid and its sizes.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tritontower.cli.options import (
    add_bounds,
    add_json,
    add_model,
    add_pictures,
    add_placement,
    bounds_of,
    load_tower,
    output_file,
)
from tritontower.drawing import text_table
from tritontower.errors import UsageError

if TYPE_CHECKING:
    from tritontower import ImageEmbedding

__all__ = ["EXAMPLE", "add_arguments", "run"]

EXAMPLE = "tritontower encode Qwen/Qwen2-VL-2B-Instruct cat.jpg chart.png -o embeddings.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, pictures, and where the embeddings go."""
    add_model(parser)
    add_pictures(parser, required=True)
    parser.add_argument(
        "-o", "--output", type=output_file, required=True, metavar="FILE", help="the safetensors file to write"
    )
    add_bounds(parser)
    add_placement(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Encodes all pictures in one packed pass."""
    tower = load_tower(arguments)
    embeddings = tower.encode(arguments.pictures, **bounds_of(arguments))
    facts = [_facts(path, embedding) for path, embedding in zip(arguments.pictures, embeddings, strict=True)]
    _write(arguments.output, embeddings, facts)
    if arguments.json:
        print(json.dumps({"output": str(arguments.output), "pictures": facts}, indent=2))
    else:
        rows = [
            (
                fact["picture"],
                "{} × {}".format(*fact["original_size"]),
                "{} × {}".format(*fact["processed_size"]),
                "{} × {} × {}".format(*fact["grid_thw"]),
                fact["num_tokens"],
            )
            for fact in facts
        ]
        print(text_table("", ("picture", "size", "resized to", "grid", "tokens"), rows))
        print(f"\nwritten: {arguments.output}")
    return 0


def _facts(path: Path, embedding: "ImageEmbedding") -> dict[str, Any]:
    return {
        "picture": str(path),
        "num_tokens": embedding.num_tokens,
        "grid_thw": list(embedding.grid_thw),
        "original_size": list(embedding.original_size),
        "processed_size": list(embedding.processed_size),
        "content_hash": embedding.content_hash,
    }


def _write(path: Path, embeddings: list["ImageEmbedding"], facts: list[dict[str, Any]]) -> None:
    """Writes the file whole or not at all: an interrupted run leaves what was there before."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    names = [f"picture.{index}" for index in range(len(embeddings))]
    tensors = {name: embedding.embeddings.cpu() for name, embedding in zip(names, embeddings, strict=True)}
    metadata = {name: json.dumps(fact) for name, fact in zip(names, facts, strict=True)}
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise UsageError(f"{path} cannot be written: it is not an ordinary file")
    try:
        with TemporaryDirectory(prefix=".tritontower-", dir=target.parent) as folder:
            finished = Path(folder, target.name)
            save_file(tensors, finished, metadata=metadata)
            finished.replace(target)
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{path} cannot be written: {reason}") from error
