"""Swaps a tower into a loaded model of transformers, and restores the model.

    python examples/swap_into_transformers.py photo.jpg "USER: <image> What is this? ASSISTANT:"

Both answers are the same; the tower is made from the model's own weights.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tritontower.integrations.transformers import accelerate_vision, restore


def main() -> None:
    """Generates an answer with and without the tower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("prompt", help="prompt with the model's image marker")
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="a local folder or a hub id")
    parser.add_argument("--tokens", type=int, default=32, help="maximum number of generated tokens")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype="auto").to(device)
    processor = AutoProcessor.from_pretrained(arguments.model)
    inputs = processor(images=Image.open(arguments.image), text=arguments.prompt, return_tensors="pt").to(device)

    def answer() -> str:
        tokens = model.generate(**inputs, max_new_tokens=arguments.tokens, do_sample=False)
        return str(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])

    swapped = accelerate_vision(model)
    print(f"tower in place; {swapped.shared_bytes / 2**20:.1f} MiB of vision weights shared with the model")
    print(f"with the tower: {answer()}")
    restore(model)
    print(f"without it:     {answer()}")


if __name__ == "__main__":
    main()
