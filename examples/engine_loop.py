"""Generates text in a loop as an engine does: prompt ids, image rows, positions, chunked prefill and greedy decoding.

    python examples/engine_loop.py photo.jpg "What is in the image?"

The language model is that of transformers, called with embeddings and positions only.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, DynamicCache

from tritontower import VisionTower
from tritontower.prompt import TokenSpace, encode_prompt, merge_embeddings, prompt_positions, sanitize_ids


@torch.inference_mode()
def main() -> None:
    """Answers one question about one image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    parser.add_argument("--model", default="Qwen/Qwen2-VL-2B-Instruct", help="Qwen2-VL or Qwen2.5-VL")
    parser.add_argument("--chunk", type=int, default=256, help="tokens per prefill step")
    arguments = parser.parse_args()
    tower = VisionTower.from_pretrained(arguments.model)
    rule = tower.mrope
    if rule is None or tower.config.deepstack:
        parser.error("--model must be a Qwen2-VL or Qwen2.5-VL (M-RoPE, no deepstack)")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=tower.dtype).to(tower.device)
    language, table = model.model.language_model, model.get_input_embeddings()
    images = tower.encode(arguments.image, text_alias="<image>")
    question = [{"role": "user", "content": f"<image>{arguments.question}"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    prompt = encode_prompt(tokenizer, text, images, tower=tower, space=TokenSpace())

    cache, state = DynamicCache(), None
    for ids in prompt.input_ids.split(arguments.chunk):
        rows = table(sanitize_ids(ids, table.num_embeddings, 0).to(tower.device))
        rows = merge_embeddings(rows, ids, prompt.embeddings)[None]
        positions, delta, (state,) = prompt_positions(rule, prompt, tokens=len(ids), state=state)
        hidden = language(inputs_embeds=rows, position_ids=positions.to(rows.device), past_key_values=cache)[0]

    answer: list[int] = []
    for place in range(len(prompt), len(prompt) + 32):
        answer += model.lm_head(hidden[:, -1]).argmax(-1).tolist()
        if answer[-1] == tokenizer.eos_token_id:
            break
        rows = table(torch.tensor([answer[-1:]], device=tower.device))
        positions = (place + delta).expand(3, 1, 1).to(tower.device)
        hidden = language(inputs_embeds=rows, position_ids=positions, past_key_values=cache)[0]
    print(tokenizer.decode(answer, skip_special_tokens=True))


if __name__ == "__main__":
    main()
