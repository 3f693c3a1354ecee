"""Encodes images, loading only the vision tower of a checkpoint.

    python examples/minimal_encode.py photo.jpg page.png --output embeddings.safetensors

The output is a safetensors file, which ``load_embeddings`` reads.
"""

import argparse
from pathlib import Path

from tritontower import VisionTower
from tritontower.embedding import load_embeddings, save_embeddings


def main() -> None:
    """Encodes the images, saves the embeddings, and reads them back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, help="image files of any sizes")
    parser.add_argument("--model", default="Qwen/Qwen2-VL-2B-Instruct", help="a local folder or a hub id")
    parser.add_argument("--output", type=Path, help="a safetensors file to write")
    arguments = parser.parse_args()

    tower = VisionTower.from_pretrained(arguments.model)
    embeddings = tower.encode(arguments.images)
    for path, embedding in zip(arguments.images, embeddings, strict=True):
        width, height = embedding.original_size
        rows = embedding.embeddings
        print(f"{path.name}: {width} × {height} pixels, {embedding.num_tokens} tokens, {list(rows.shape)} {rows.dtype}")

    if arguments.output:
        save_embeddings(arguments.output, embeddings)
        print(f"{arguments.output} holds {len(load_embeddings(arguments.output))} embeddings")


if __name__ == "__main__":
    main()
