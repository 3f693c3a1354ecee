"""Token spaces: equal images share ids, ids in use never overlap, and released ids are reused last."""

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.prompts import make_embedding

from tritontower.embedding import ImageEmbedding
from tritontower.errors import TokenSpaceExhaustedError, UsageError
from tritontower.prompt import DEFAULT_BASE, TokenSpace, sanitize_ids, token_ids
from tritontower.prompt.token_ids import order_by_ids


def test_equal_images_share_ids() -> None:
    space = TokenSpace()
    first = space.assign(make_embedding(4, content="a", seed=1))
    assert first.token_ids == tuple(range(DEFAULT_BASE, DEFAULT_BASE + 4))
    assert space.assign(make_embedding(4, content="a", seed=2)).token_ids == first.token_ids
    others = [
        make_embedding(4, content="b"),
        make_embedding(4, content="a", grid=(1, 2, 2)),
        replace(make_embedding(4, content="a"), processed_size=(28, 14)),
        replace(make_embedding(4, content="a"), original_size=(28, 14)),
        make_embedding(5, content="a"),
        make_embedding(4, content="a", seconds_per_grid=0.5),
        make_embedding(4, content="a", timestamps=(0.5,)),
        make_embedding(4, content="a", is_video=True),
        # Without a content hash, images are never equal.
        make_embedding(4),
        make_embedding(4),
    ]
    ids = [space.assign(other).token_ids for other in others]
    assert len({token for each in [first.token_ids, *ids] for token in each}) == 4 * 10 + 5
    assert TokenSpace(7).assign(others[0]).token_ids == (7, 8, 9, 10)


def test_assigned_image_without_hash_keeps_its_identity(tmp_path: Path) -> None:
    space, plain = TokenSpace(), make_embedding(3)
    named = space.assign(plain)
    named.save(tmp_path / "image")
    for same in (named, named.with_alias("x"), ImageEmbedding.load(tmp_path / "image")):
        assert space.assign(same).token_ids == named.token_ids
    assert space.assign(plain).token_ids != named.token_ids
    assert plain.content_hash == ""


def test_images_with_the_ids_of_others_are_found_by_their_hashes() -> None:
    first, second, plain = (
        replace(make_embedding(3, content=content), token_ids=(7, 8, 9)) for content in ("a", "b", "")
    )
    assert order_by_ids([first, plain, first]) == [0]
    with pytest.raises(UsageError, match="embedding 1 has the token ids of another one"):
        order_by_ids([first, second])


@pytest.mark.parametrize("contents", ["abc", ["", "", ""]], ids=["with content hashes", "without content hashes"])
def test_second_release_frees_nothing(contents: Sequence[str]) -> None:
    space = TokenSpace(2**31 - 4)
    first, second, third = (make_embedding(4, content=content) for content in contents)
    first = space.assign(first)
    space.release(first)
    # The space is full: the second image gets the ids of the first one, which is forgotten.
    second = space.assign(second)
    assert second.token_ids == first.token_ids
    with pytest.raises(UsageError, match="not in use for this image"):
        space.release(first)
    assert space.ids_in_use == 4
    with pytest.raises(TokenSpaceExhaustedError):
        space.assign(third)
    space.release(second)


def test_released_ids_are_reused_last_and_oldest_first() -> None:
    space = TokenSpace(2**31 - 10)
    first, second = (space.assign(make_embedding(4, content=content)) for content in "ab")
    space.release(first)
    space.release(second)
    # Two unused ids go first; an image that returns in time gets its ids back.
    assert space.assign(make_embedding(2, content="c")).token_ids == (2**31 - 2, 2**31 - 1)
    assert space.assign(make_embedding(4, content="a")).token_ids == first.token_ids
    assert space.assign(make_embedding(3, content="d")).token_ids == second.token_ids[:3]
    with pytest.raises(TokenSpaceExhaustedError, match="no 2 consecutive token ids are free"):
        space.assign(make_embedding(2, content="e"))
    assert space.ids_in_use == 9


def test_oldest_released_images_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_ids, "REMEMBERED", 3)
    space = TokenSpace()
    assigned = []
    for number in range(50):
        assigned.append(space.assign(make_embedding(2, content=str(number))))
        space.release(assigned[-1])
    assert len({each.token_ids for each in assigned}) == 50, "ids are not reused while others are left"
    assert space.assign(make_embedding(2, content="47")).token_ids == assigned[47].token_ids
    assert space.assign(make_embedding(2, content="46")).token_ids[0] > assigned[49].token_ids[0]


@pytest.mark.parametrize(("int32", "limit"), [(True, 2**31), (False, 2**63)])
def test_ids_fit_the_integer_type(int32: bool, limit: int) -> None:
    space = TokenSpace(limit - 3, int32=int32)
    ids = space.assign(make_embedding(3, content="a")).token_ids
    assert torch.tensor(ids, dtype=torch.int32 if int32 else torch.int64).tolist() == [limit - 3, limit - 2, limit - 1]
    with pytest.raises(TokenSpaceExhaustedError):
        space.assign(make_embedding(1, content="b"))
    with pytest.raises(UsageError, match="embedding must have rows"):
        space.assign(make_embedding(0))


@pytest.mark.parametrize("base", [0, 2**31, True, 1.5])
def test_invalid_bases_are_rejected(base: object) -> None:
    with pytest.raises(UsageError, match="base must be 1 to 2147483647"):
        TokenSpace(base)  # type: ignore[arg-type]


def test_threads_share_a_space() -> None:
    space = TokenSpace()
    images = [make_embedding(1 + number % 7, content=str(number)) for number in range(60)]

    def assign_all(seed: int) -> list[tuple[str, tuple[int, ...]]]:
        order = random.Random(seed).sample(range(60), 60)
        return [(images[number].content_hash, space.assign(images[number]).token_ids) for number in order]

    with ThreadPoolExecutor(8) as pool:
        found = {each for part in pool.map(assign_all, range(16)) for each in part}
    assert len(found) == 60, "each image has the same ids in all threads"
    every = [token for _, ids in found for token in ids]
    assert len(every) == len(set(every)) == sum(image.num_tokens for image in images)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(1, 9)), max_size=60))
def test_ids_in_use_never_overlap(steps: list[tuple[bool, int, int]]) -> None:
    """In a space of 24 ids, assignments fail only if no gap is large enough."""
    space = TokenSpace(2**31 - 24)
    held: dict[tuple[int, int], list[ImageEmbedding]] = {}
    for assign, content, tokens in steps:
        key = (content, tokens)
        if assign:
            try:
                assigned = space.assign(make_embedding(tokens, content=str(content)))
            except TokenSpaceExhaustedError:
                taken = sorted(token for each in held.values() for token in each[0].token_ids)
                assert max(high - low - 1 for low, high in pairwise([2**31 - 25, *taken, 2**31])) < tokens
                continue
            held.setdefault(key, []).append(assigned)
        elif held.get(key):
            space.release(held[key].pop())
            if not held[key]:
                del held[key]
        in_use = [set(each[0].token_ids) for each in held.values()]
        assert all(len({one.token_ids for one in each}) == 1 for each in held.values())
        assert sum(map(len, in_use)) == len(set().union(*in_use)) == space.ids_in_use


def test_sanitized_ids_are_in_the_vocabulary() -> None:
    ids = [3, 10**9, 2**40, 0, -1, 99]
    assert sanitize_ids(ids, 99, 7) == [3, 7, 7, 0, 7, 7]
    tensor = torch.tensor([ids, ids])
    assert sanitize_ids(tensor, 99, 7).tolist() == [[3, 7, 7, 0, 7, 7]] * 2
    assert sanitize_ids(tensor[:, :1].int(), 99, 7).dtype == torch.int32
    for wrong in (-1, 99):
        with pytest.raises(UsageError, match=f"replacement must be .* 0 to 98, got {wrong}"):
            sanitize_ids(ids, 99, wrong)
