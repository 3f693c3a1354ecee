"""Independence of torch's default dtype and device.

Engines load language models under ``torch.set_default_dtype(torch.bfloat16)`` and ``torch.device("meta")``.
"""

from contextlib import contextmanager

import pytest
import torch
from support.checkpoints import noise
from support.towers import all_cases

from tritontower import TokenSpace, VisionTower, encode_prompt, merge_embeddings
from tritontower.engine import weight_loader
from tritontower.kernels.gemm import cpu
from tritontower.prompt import prompt_positions

CASES = all_cases()
PROBES = (cpu.has_onednn_matmul, cpu.can_prepack)
"""Probes that run once per process."""


@contextmanager
def defaults(dtype, device):
    """Sets other defaults than torch's own, with empty probe caches."""
    before = torch.get_default_dtype()
    for probe in PROBES:
        probe.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)
        for probe in PROBES:
            probe.cache_clear()


def compute_tensors(folder, case):
    """Computes the embeddings of images and of a video, and a prompt with them, by a new tower."""
    tower = VisionTower.from_pretrained(folder, device="cpu")
    embeddings = tower.encode([noise(width, height, seed) for seed, (width, height) in enumerate(case.sizes[:3])])
    if case.video:
        embeddings.append(tower.encode_video([noise(60, 60, seed) for seed in range(7)], fps=0.9))
    tensors = [tensor for embedding in embeddings for tensor in embedding.tensors.values()]
    # A layout with tokens after rows looks them up in a vocabulary, which a function does not have.
    if tower.prompt_layout is None or tower.prompt_layout.row_break is not None:
        return tensors
    aliased = [embedding.with_alias(f"<{index}>") for index, embedding in enumerate(embeddings)]
    text = "And ".join(f"<{index}>" for index in range(len(aliased)))
    prompt = encode_prompt(lambda text: [*map(ord, text)], text, aliased, tower=tower, space=TokenSpace())
    rows = torch.zeros(len(prompt.input_ids), tower.hidden_size, dtype=torch.float32, device="cpu")
    tensors += [prompt.input_ids, prompt.placeholder_ids, prompt.token_types]
    tensors += [merge_embeddings(rows, ids, prompt.embeddings) for ids in (prompt.input_ids, prompt.input_ids.tolist())]
    return tensors if tower.mrope is None else [*tensors, prompt_positions(tower.mrope, prompt).positions]


# Engines set both at once; float64 would reveal a computation that follows the default upward.
@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.bfloat16, "meta"), (torch.float64, "cpu")], ids=["bfloat16 on meta", "float64"]
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_number_depends_on_torch_defaults(case, dtype, device, saved, monkeypatch):
    monkeypatch.setattr(weight_loader, "_SEPARATE_BYTES", 2**12)  # small towers have no weight that is large enough
    expected = compute_tensors(saved(case), case)
    with defaults(dtype, device):
        found = compute_tensors(saved(case), case)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
