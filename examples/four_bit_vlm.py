"""Loads a model with its language model in 4 bits and a tower in full precision as its vision encoder.

    python examples/four_bit_vlm.py photo.jpg "What is in the image?" --model Qwen/Qwen2.5-VL-7B-Instruct

Needs bitsandbytes.
"""

import argparse
from pathlib import Path

from PIL import Image

from tritontower.integrations.transformers import accelerated, load_vlm


def main() -> None:
    """Answers one question about one image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-7B-Instruct", help="a local folder or a hub id")
    parser.add_argument("--tokens", type=int, default=32, help="maximum number of generated tokens")
    arguments = parser.parse_args()

    model, processor = load_vlm(arguments.model, load_in_4bit=True)
    swapped = accelerated(model)
    assert swapped is not None  # every model of load_vlm has a tower
    quantized = sum(type(module).__name__ == "Linear4bit" for module in model.modules())
    print(f"{quantized} linears of the language model in 4 bits, the tower in {swapped.tower.dtype}")

    content = [{"type": "image"}, {"type": "text", "text": arguments.question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[Image.open(arguments.image)], text=[text], return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=arguments.tokens, do_sample=False)
    print(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])


if __name__ == "__main__":
    main()
