"""Merging: image rows replace the embeddings at their ids, deepstack rows are added, in any chunks and dtypes."""

from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.prompts import WIDTH, make_embedding

from tritontower.embedding import ImageEmbedding
from tritontower.errors import PromptError, UsageError
from tritontower.kernels.rowwise.splice import splice_rows
from tritontower.prompt import DEFAULT_BASE, TokenSpace, add_deepstack, merge, merge_embeddings

SPACE = TokenSpace()
IMAGES = [SPACE.assign(make_embedding(count, content=str(count), seed=count, levels=2)) for count in (3, 1, 12, 5)]
FIRST = IMAGES[0].token_ids[0]
PROMPT = [7, *IMAGES[2].token_ids, 8, 9, *IMAGES[0].token_ids, *IMAGES[1].token_ids, 3, 4, *IMAGES[0].token_ids]
# The images in the order of their rows in the prompt, and where they are.
PLACED = [IMAGES[number] for number in (2, 0, 1, 0)]
MASK = torch.tensor([token >= DEFAULT_BASE for token in PROMPT])[:, None]


def text_rows(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.randn(len(PROMPT), WIDTH, generator=torch.Generator().manual_seed(9)).to(device, dtype)


def expected_rows(text: torch.Tensor, placed: list[ImageEmbedding] = PLACED) -> torch.Tensor:
    rows = torch.cat([image.embeddings for image in placed]).to(text.dtype)
    return text.cpu().masked_scatter(MASK, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_merged(device: torch.device, dtype: torch.dtype) -> None:
    text = text_rows(dtype, device)
    before, want = text.clone(), expected_rows(text)
    assert torch.equal(merge_embeddings(text, PROMPT, IMAGES).cpu(), want)
    assert torch.equal(text, before)
    assert merge_embeddings(text, torch.tensor(PROMPT), IMAGES, out=text) is text
    assert torch.equal(text.cpu(), want)


def test_batches_are_merged_per_prompt(device: torch.device) -> None:
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    text = torch.stack([text_rows(device=device), text_rows(device=device) * 2])
    merged = merge_embeddings(text, ids, IMAGES)
    assert torch.equal(merged[0].cpu(), expected_rows(text[0]))
    assert torch.equal(merged[1].cpu(), expected_rows(text[1].flip(0)).flip(0))
    assert torch.equal(merge_embeddings(text[:, 5:9], ids[:, 5:9], IMAGES), merged[:, 5:9])


@settings(deadline=None, max_examples=100)
@given(cuts=st.lists(st.integers(0, len(PROMPT)), max_size=8), level=st.sampled_from([None, 0, 1]), used=st.booleans())
def test_chunks_equal_the_whole(cuts: list[int], level: int | None, used: bool) -> None:
    """Cuts may be within an image; a chunk gets its own embeddings or all of them."""

    def work(rows: torch.Tensor, ids: list[int], images: list[ImageEmbedding]) -> torch.Tensor:
        return merge_embeddings(rows, ids, images) if level is None else add_deepstack(rows, ids, images, level)

    text = text_rows()
    chunks = []
    for start, end in pairwise([0, *sorted(cuts), len(PROMPT)]):
        ids = PROMPT[start:end]
        chunks.append(
            work(text[start:end], ids, [each for each in IMAGES if not used or set(ids) & set(each.token_ids)])
        )
    assert torch.equal(torch.cat(chunks), work(text, PROMPT, IMAGES))


def test_text_without_images_is_returned_unchanged() -> None:
    text = text_rows()[:3]
    assert merge_embeddings(text, [1, 2, 3], IMAGES) is text
    assert torch.equal(merge_embeddings(text, [1, 2, 3], [], out=torch.empty_like(text)), text)
    assert merge_embeddings(text[:0], [], IMAGES).shape == (0, WIDTH)


def test_strided_tensors_of_other_dtypes_are_merged(device: torch.device) -> None:
    text = text_rows(torch.bfloat16, device)
    wide = torch.zeros(12, 3 * WIDTH, dtype=torch.float16)
    wide[:, WIDTH : 2 * WIDTH] = IMAGES[2].embeddings
    half = replace(IMAGES[2], embeddings=wide[:, WIDTH : 2 * WIDTH])
    merged = merge_embeddings(text, PROMPT, [half, *IMAGES[:2]])
    assert torch.equal(merged.cpu(), expected_rows(text, [half, *PLACED[1:]]))
    slanted = text_rows(device=device).t().contiguous().t()
    turned = [replace(each, embeddings=each.embeddings.t().contiguous().t()) for each in IMAGES]
    assert slanted.stride() == (1, len(PROMPT))
    assert torch.equal(merge_embeddings(slanted, PROMPT, turned).cpu(), expected_rows(slanted))
    only = merge_embeddings(slanted[13:18], PROMPT[13:18], turned[:1])
    assert torch.equal(only.cpu(), expected_rows(slanted)[13:18])


def test_only_needed_rows_are_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    splice = Mock(wraps=splice_rows)
    monkeypatch.setattr(merge, "splice_rows", splice)
    merge_embeddings(text_rows()[3:6], PROMPT[3:6], IMAGES)
    merge_embeddings(text_rows(), PROMPT, IMAGES)
    assert [len(call.args[1]) for call in splice.call_args_list] == [3, 16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deepstack_rows_are_added(device: torch.device, dtype: torch.dtype) -> None:
    """As ``Qwen3VLTextModel._deepstack_process``: rounded to the dtype, then added."""
    hidden = text_rows(dtype)
    images = [replace(each, deepstack=tuple(rows.to(dtype) for rows in each.deepstack)) for each in IMAGES]
    for level in range(2):
        want = hidden.clone()
        want[MASK[:, 0]] += torch.cat([image.deepstack[level] for image in PLACED]).to(dtype)
        assert torch.equal(add_deepstack(hidden.to(device), PROMPT, images, level).cpu(), want)
        inside = hidden.to(device, copy=True)
        assert add_deepstack(inside, PROMPT, images, level, out=inside) is inside
        assert torch.equal(inside.cpu(), want)


def with_ids(image: ImageEmbedding, *ids: int, content: str = "") -> list[ImageEmbedding]:
    """Adds an image with the given ids."""
    return [image, make_embedding(len(ids), content=content).with_token_ids(ids)]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_ids": [1, 10**9 + 500, 2]}, PromptError, "1 ids that no embedding has, such as 1000000500"),
        ({"input_ids": [1, -1, 2]}, PromptError, "such as -1"),
        ({"embeddings": []}, PromptError, f"such as {FIRST}"),
        ({"embeddings": IMAGES[1:]}, PromptError, f"such as {FIRST}"),
        ({"input_ids": [1, 200, 2], "base": 100}, PromptError, "such as 200"),
        ({"input_ids": [1.0, 2.0, 3.0]}, UsageError, "input_ids must be integers, got torch.float32"),
        ({"input_ids": [1, 2]}, UsageError, r"got \[3, 8\] and \[2\]"),
        ({"input_ids": 1, "text_embeddings": torch.zeros(WIDTH)}, UsageError, r"got \[8\] and \[\]"),
        ({"text_embeddings": torch.zeros(3, 9)}, UsageError, r"must be \[3, 9\], .* got \[3, 8\]"),
        ({"embeddings": [make_embedding(3)]}, UsageError, "must be 3 consecutive ids, .* got 0 ids"),
        ({"embeddings": [make_embedding(3).with_token_ids((FIRST, FIRST + 2, FIRST + 1))]}, UsageError, "consecutive"),
        ({"embeddings": with_ids(IMAGES[0], FIRST, FIRST + 1, FIRST + 2, content="x")}, UsageError, "ids of another"),
        ({"embeddings": with_ids(IMAGES[0], FIRST, FIRST + 1)}, UsageError, "embedding 1 has the token ids of another"),
        ({"embeddings": with_ids(IMAGES[0], FIRST + 2, FIRST + 3)}, UsageError, f"have token id {FIRST + 2}"),
        ({"out": torch.zeros(3, 9)}, UsageError, r"out must be .* got torch.float32 \[3, 9\]"),
        ({"out": torch.zeros(3, 8).half()}, UsageError, "got torch.float16"),
        ({"out": torch.zeros(8, 3).t()}, UsageError, "and contiguous"),
        ({"out": torch.zeros(3, 8, device="meta")}, UsageError, "on cpu, .* on meta"),
        ({"text_embeddings": torch.zeros(3, WIDTH).double()}, UsageError, "got torch.float64"),
    ],
)
def test_mismatched_arguments_are_rejected(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"text_embeddings": torch.zeros(3, WIDTH), "input_ids": [1, FIRST, 2], "embeddings": IMAGES}
    with pytest.raises(error, match=message):
        merge_embeddings(**(arguments | changes))


@pytest.mark.parametrize("level", [-1, 2])
def test_missing_deepstack_levels_are_rejected(level: int) -> None:
    with pytest.raises(UsageError, match=f"level must be below 2, .* of embedding 0, got {level}"):
        add_deepstack(text_rows(), PROMPT, IMAGES, level)
    short = replace(IMAGES[0], deepstack=(IMAGES[0].deepstack[0][1:],))
    with pytest.raises(UsageError, match=r"rows of embedding 0 must be \[3, 8\], .* got \[2, 8\]"):
        add_deepstack(text_rows(), PROMPT, [short], 0)


def test_repeated_and_empty_images_are_ignored() -> None:
    again = [*IMAGES, IMAGES[0].with_alias("again"), make_embedding(0)]
    merged = merge_embeddings(text_rows().requires_grad_(), PROMPT, again)
    assert torch.equal(merged, expected_rows(text_rows()))
    assert not merged.requires_grad


def test_last_ids_of_int64_are_valid() -> None:
    image = TokenSpace(2**63 - 3, int32=False).assign(make_embedding(3))
    listed = replace(image, token_ids=list(image.token_ids))  # type: ignore[arg-type]
    merged = merge_embeddings(torch.zeros(4, WIDTH), [1, *image.token_ids], [listed])
    assert torch.equal(merged[1:], image.embeddings)
    for unknown in (2**63 - 4, -(2**63)):
        with pytest.raises(PromptError, match=f"such as {unknown}"):
            merge_embeddings(torch.zeros(2, WIDTH), [1, unknown], [image], base=2**63 - 5)


def test_spaces_below_the_default_base_need_it_passed() -> None:
    image = TokenSpace(5000).assign(make_embedding(3, levels=1))
    ids, text = [1, *image.token_ids, 2], torch.zeros(5, WIDTH)
    for work in (merge_embeddings, lambda *arguments: add_deepstack(*arguments, 0)):
        with pytest.raises(UsageError, match="embedding 0 must be at least 1000000000, got 5000"):
            work(text, ids, [image])
    assert torch.equal(merge_embeddings(text, ids, [image], base=5000)[1:4], image.embeddings)
