"""Encodes images in one process and passes the embeddings to vLLM in another.

    python examples/export_for_vllm.py encode photo.jpg --file photo.safetensors
    python examples/export_for_vllm.py ask "<|vision_start|><|image_pad|><|vision_end|>Title:" --file photo.safetensors

The second command needs vLLM, which then loads no encoder; without vLLM it prints the request.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch

from tritontower import VisionTower
from tritontower.embedding import load_embeddings, save_embeddings
from tritontower.integrations.vllm import to_vllm


def main() -> None:
    """Writes the embeddings, or reads them and asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("encode", "ask"))
    parser.add_argument("inputs", nargs="+", help="images to encode, or the prompt to ask")
    parser.add_argument("--model", default="Qwen/Qwen2-VL-2B-Instruct", help="a local folder or a hub id")
    parser.add_argument("--file", type=Path, required=True, help="safetensors file of the embeddings")
    arguments = parser.parse_args()

    if arguments.command == "encode":
        tower = VisionTower.from_pretrained(arguments.model)
        embeddings = tower.encode([Path(name) for name in arguments.inputs], output_device="cpu")
        save_embeddings(arguments.file, embeddings)
        print(f"{len(embeddings)} embeddings, {sum(each.num_tokens for each in embeddings)} tokens: {arguments.file}")
        return

    # Only the configuration is read, to choose vLLM's form and to check the embeddings.
    tower = VisionTower.from_pretrained(arguments.model, delay_load=True)
    data = to_vllm(tower, load_embeddings(arguments.file))
    request = {"prompt": arguments.inputs[0], "multi_modal_data": data}
    if find_spec("vllm"):
        from vllm import LLM

        engine = LLM(arguments.model, enable_mm_embeds=True, limit_mm_per_prompt={"image": 0})
        print(engine.generate(request)[0].outputs[0].text)
        return
    for name, value in data["image"].items() if isinstance(data["image"], dict) else enumerate(data["image"]):
        print(f"{name}: {list(value.shape)} {value.dtype}" if torch.is_tensor(value) else f"{name}: {value}")


if __name__ == "__main__":
    main()
