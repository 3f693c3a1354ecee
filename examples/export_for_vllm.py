"""Embeddings made in one process, for vLLM in another.

    python examples/export_for_vllm.py encode photo.jpg --file photo.safetensors
    python examples/export_for_vllm.py ask "<|vision_start|><|image_pad|><|vision_end|>Title:" --file photo.safetensors

The second needs vLLM, which then loads no encoder of its own; without vLLM it shows the request.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch

from tritontower import VisionTower
from tritontower.embedding import load_embeddings, save_embeddings
from tritontower.integrations.vllm import to_vllm


def main() -> None:
    """Writes the file, or reads it and asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("encode", "ask"))
    parser.add_argument("given", nargs="+", help="images to encode, or the prompt to ask with")
    parser.add_argument("--model", default="Qwen/Qwen2-VL-2B-Instruct", help="a local folder or a hub id")
    parser.add_argument("--file", type=Path, required=True, help="where the embeddings are kept")
    arguments = parser.parse_args()

    if arguments.what == "encode":
        tower = VisionTower.from_pretrained(arguments.model)
        embeddings = tower.encode([Path(name) for name in arguments.given], output_device="cpu")
        save_embeddings(arguments.file, embeddings)
        print(f"{len(embeddings)} embeddings, {sum(each.num_tokens for each in embeddings)} tokens: {arguments.file}")
        return

    # Only the configuration is read: it says which form vLLM takes, and what the embeddings are checked against.
    tower = VisionTower.from_pretrained(arguments.model, delay_load=True)
    data = to_vllm(tower, load_embeddings(arguments.file))
    request = {"prompt": arguments.given[0], "multi_modal_data": data}
    if find_spec("vllm"):
        from vllm import LLM

        engine = LLM(arguments.model, enable_mm_embeds=True, limit_mm_per_prompt={"image": 0})
        print(engine.generate(request)[0].outputs[0].text)
        return
    for name, value in data["image"].items() if isinstance(data["image"], dict) else enumerate(data["image"]):
        print(f"{name}: {list(value.shape)} {value.dtype}" if torch.is_tensor(value) else f"{name}: {value}")


if __name__ == "__main__":
    main()
