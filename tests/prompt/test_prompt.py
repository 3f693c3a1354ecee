"""Prompts with images: token for token what transformers' processors make, ids that are nobody else's, rows in place."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.checkpoints import noise
from support.prompts import KINDS, make_tokenizer, processor_of, video_facts, write_token_ids
from support.towers import all_cases

from tritontower import VisionTower
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.embedding import ImageEmbedding
from tritontower.errors import PromptError, TokenSpaceExhaustedError, UsageError
from tritontower.kernels.rowwise.splice import splice_rows
from tritontower.models.common.family import read_summary
from tritontower.models.common.registry import list_summaries, read_family
from tritontower.prompt import (
    EncodedPrompt,
    PromptLayout,
    TokenSpace,
    VideoLayout,
    add_deepstack,
    encode_prompt,
    merge,
    merge_embeddings,
    sanitize_ids,
    token_ids,
)

CASES = {case.name: case for case in all_cases() if case.name in KINDS}
STYLES = ["bytes", "metaspace", "runs"]
Opened = tuple[VisionTower, Any, Any]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Opened]:
    """A small tower, a tokenizer with its tokens, and transformers' processor."""
    made: dict[tuple[str, str], tuple[VisionTower, Any, Path]] = {}

    def open_case(name: str, style: str, videos: Any = ()) -> Opened:
        if (name, style) not in made:
            folder = CASES[name].save(tmp_path_factory.mktemp("prompts") / name)
            tokenizer = make_tokenizer(KINDS[name], style)
            write_token_ids(folder, tokenizer, KINDS[name])
            made[name, style] = VisionTower.from_pretrained(folder, device="cpu"), tokenizer, folder
        tower, tokenizer, folder = made[name, style]
        return tower, tokenizer, processor_of(name, folder, tokenizer, videos)

    return open_case


def by_transformers(processor: Any, text: str, images: list[np.ndarray], videos: int = 0) -> list[int]:
    listed_images = [Image.fromarray(image) for image in images]
    arguments: dict[str, Any] = {"images": listed_images} if listed_images else {}
    if videos:
        arguments["videos"] = [np.zeros((2, 8, 8, 3), np.uint8)] * videos
    ids = processor(text=text, **arguments)["input_ids"][0]
    return [int(token) for token in ids]


def shown(prompt: EncodedPrompt) -> list[int]:
    return prompt.placeholder_ids.tolist()


TEXTS = [
    "{}",
    "{} What is in the image?",
    "What is in the image? {}",
    "User: a cat\n{}\n\nand a dog",
    "{}{}",
    "compare {} and\n\n\n {}, twice\n",
    " a {} b {}\n{}c é 猫",
]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_transformers_processor(name, style, opened):
    tower, tokenizer, processor = opened(name, style)
    layout = tower.family.prompt
    marker = tokenizer.convert_ids_to_tokens(layout.placeholder if layout.marker is None else layout.marker)
    around = [[tokenizer.convert_ids_to_tokens(token) for token in side] for side in (layout.before, layout.after)]
    images = [noise(width, height, seed) for seed, (width, height) in enumerate(CASES[name].sizes[:3])]
    embeddings = tower.encode(images)
    space = TokenSpace()
    for text in TEXTS:
        count = text.count("{}")
        with_markers = text.format(*[marker] * count)
        prompt = encode_prompt(tokenizer, with_markers, embeddings[:count], tower=tower, space=space)
        assert shown(prompt) == by_transformers(processor, with_markers, images[:count]), text
        # An alias brings along what a chat template writes round an image.
        framed = text.format(*["".join([*around[0], marker, *around[1]])] * count)
        named = [embedding.with_alias(f"<pic{n}>") for n, embedding in enumerate(embeddings[:count])]
        prompt = encode_prompt(
            tokenizer, text.format(*(each.text_alias for each in named)), named, layout=layout, space=space
        )
        assert shown(prompt) == by_transformers(processor, framed, images[:count]), text


def video_of(tower: VisionTower, frames: int, size: tuple[int, int], fps: float, seed: int) -> Any:
    return tower.encode_video([noise(*size, seed + frame) for frame in range(frames)], fps=fps)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_videos_are_those_of_transformers_processor(name, opened):
    tower, tokenizer, _ = opened(name, "bytes")
    frames = (5, 2)
    videos = [video_of(tower, count, (64, 96), 1.7, count) for count in frames]
    facts = [video_facts(video.grid_thw, count, 1.7) for video, count in zip(videos, frames, strict=True)]
    tower, tokenizer, processor = opened(name, "bytes", facts)
    image = noise(90, 60, 3)
    (embedding,) = tower.encode([image])
    layout = tower.family.prompt
    text = "a <|video_pad|> b\n<|vision_start|><|image_pad|><|vision_end|>, <|video_pad|>"
    space = TokenSpace()
    prompt = encode_prompt(tokenizer, text, [embedding, *videos], layout=layout, space=space)
    assert shown(prompt) == by_transformers(processor, text, [image], videos=2)
    assert prompt.token_types.tolist() == processor.create_mm_token_type_ids([shown(prompt)])[0]
    spaced = not name.startswith("qwen3")
    framed = text.replace("<|video_pad|>", "<|vision_start|><|video_pad|><|vision_end|>") if spaced else text
    named = [video.with_alias(alias) for video, alias in zip(videos, ("{c}", "{cc}"), strict=True)]
    prompt = encode_prompt(
        tokenizer,
        "a {c} b\n{p}, {cc}",
        [embedding.with_alias("{p}"), *named],
        layout=layout,
        space=space,
    )
    assert shown(prompt) == by_transformers(processor, framed, [image], videos=2)


@pytest.mark.parametrize("name", CASES)
def test_ids_spans_and_types_say_where_an_image_is(name, opened):
    tower, tokenizer, processor = opened(name, "bytes")
    embeddings = tower.encode([noise(width, height, 7) for width, height in CASES[name].sizes[:3]])
    named = [embedding.with_alias(f"@{n}@") for n, embedding in enumerate(embeddings)]
    layout = tower.family.prompt
    prompt = encode_prompt(tokenizer, "a @2@ b @0@\n@1@", named, layout=layout, space=TokenSpace())
    for embedding, (start, end) in zip(prompt.embeddings, prompt.spans, strict=True):
        within = prompt.input_ids[start:end]
        assert within[within >= 10**9].tolist() == list(embedding.token_ids)
        assert {int(within[0]), int(within[-1])} == {embedding.token_ids[0], embedding.token_ids[-1]}
    assert prompt.spans[2] < prompt.spans[0] < prompt.spans[1]
    rows = prompt.input_ids >= 10**9
    assert int(rows.sum()) == sum(embedding.num_tokens for embedding in embeddings)
    assert bool((prompt.placeholder_ids[rows] == layout.placeholder).all())
    assert torch.equal(prompt.placeholder_ids[~rows], prompt.input_ids[~rows])
    types = getattr(processor, "func", processor).create_mm_token_type_ids([shown(prompt)])[0]
    assert prompt.token_types.tolist() == types
    assert len(prompt) == len(types)


def test_tiles_that_see_both_ways_are_found_in_the_prompt(opened):
    tower, tokenizer, _ = opened("gemma3-pan-and-scan", "runs")
    embeddings = tower.encode([noise(300, 64, 1), noise(90, 90, 2)])
    assert [len(embedding.bidirectional_spans) for embedding in embeddings] == [4, 1]
    text = "one <start_of_image> two <start_of_image>"
    prompt = encode_prompt(tokenizer, text, embeddings, layout=tower.family.prompt, space=TokenSpace())
    assert len(prompt.bidirectional_spans) == 5
    seen = torch.zeros(len(prompt), dtype=torch.bool)
    for start, end in prompt.bidirectional_spans:
        assert bool((prompt.token_types[start:end] == 1).all())
        assert prompt.token_types[start - 1] == prompt.token_types[end] == 0
        seen[start:end] = True
    assert torch.equal(seen, prompt.token_types == 1)


def test_mistrals_own_format_has_the_tokens_of_the_converted_one(opened):
    _, tokenizer, processor = opened("pixtral", "bytes")
    config = {**read_summary("pixtral_mistral_format").example}
    names = {"image_token_id": "[IMG]", "image_break_token_id": "[IMG_BREAK]", "image_end_token_id": "[IMG_END]"}
    vision = {key: tokenizer.convert_tokens_to_ids(name) for key, name in names.items()}
    config["vision_encoder"] = {**config["vision_encoder"], **vision}
    layout = read_family(ConfigReader(config, source="params.json")).prompt
    image = noise(48, 80, 0)
    height, width = processor(text="[IMG]", images=[Image.fromarray(image)])["image_sizes"][0].tolist()
    patch = processor.patch_size
    rows = embedding_of(width * height // patch**2, grid=(1, height // patch, width // patch), alias="{}")
    prompt = encode_prompt(tokenizer, "a {} b", [rows], layout=layout, space=TokenSpace())
    assert shown(prompt) == by_transformers(processor, "a [IMG] b", [image])
    # The same without names of tokens: text in pieces, by Mistral's own tokenizer for one.
    pieces = encode_prompt(
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        "a {} b",
        [rows],
        layout=layout,
        space=TokenSpace(),
    )
    assert shown(pieces) == shown(prompt)


def published_layouts() -> dict[str, PromptLayout | None]:
    families = {summary.title: read_family(summary.reader) for summary in list_summaries()}
    return {f"{family.config.family}: {title}": family.prompt for title, family in families.items()}


def test_layouts_of_published_checkpoints():
    """The tokens of the published tokenizers."""
    found = published_layouts()
    assert {name for name, layout in found.items() if layout is None} == {
        name for name in found if name.startswith(("clip:", "siglip:"))
    }
    tokens: dict[str, set[Any]] = {}
    for name, layout in found.items():
        if layout is not None:
            fact = (layout.placeholder, layout.before, layout.after, layout.video and layout.video.placeholder)
            tokens.setdefault(name.partition(":")[0], set()).add(fact)
    qwen2 = (151655, (151652,), (151653,), 151656)
    assert tokens["qwen2_vl"] == tokens["qwen2_5_vl"] == {qwen2}
    assert tokens["qwen3_vl"] == {qwen2, (248056, (248053,), (248054,), 248057)}
    assert tokens["gemma3"] == {(262144, (), (), None)}
    assert tokens["paligemma"] == {(257152, (), (), None)}
    assert tokens["pixtral"] == tokens["mistral3"] == tokens["mistral_format"] == {(10, (), (), None)}
    assert tokens["llava"] == {(32000, (), (), None)}
    gemma = next(layout for name, layout in found.items() if name.startswith("gemma3:"))
    assert gemma is not None
    assert (gemma.marker, gemma.tile_before, gemma.tile_after) == (255999, ("\n\n", 255999), (256000, "\n\n"))
    assert {(layout.row_break, layout.row_end) for layout in found.values() if layout and layout.row_break} == {
        ("[IMG_BREAK]", "[IMG_END]"),
        (12, 13),
    }


# -- made by hand -----------------------------------------------------------------------------------------------------

WIDTH = 8
LAYOUT = PromptLayout(placeholder=5, before=(6,), after=(7,))


def embedding_of(
    tokens: int,
    *,
    grid: tuple[int, int, int] | None = None,
    alias: str | None = None,
    content: str = "",
    seed: int = 0,
    levels: int = 0,
    **facts: Any,
) -> ImageEmbedding:
    """An embedding of random rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(tokens, WIDTH, generator=generator) for _ in range(levels + 1)]
    return ImageEmbedding(
        embeddings=rows[0],
        grid_thw=grid or (1, 1, tokens),
        original_size=(10, 10),
        processed_size=(14, 14),
        content_hash=content,
        deepstack=tuple(rows[1:]),
        text_alias=alias,
        **facts,
    )


def letters(text: str) -> list[int]:
    """A tokenizer: every character is a token, from 100 on."""
    return [100 + ord(character) for character in text]


def encode(text: str, embeddings: list[ImageEmbedding], **options: Any) -> EncodedPrompt:
    arguments: dict[str, Any] = {"layout": LAYOUT, "space": TokenSpace(), **options}
    return encode_prompt(arguments.pop("tokenizer", letters), text, embeddings, **arguments)


names_of_images = st.lists(st.text("ab<", min_size=1, max_size=5), min_size=1, max_size=6, unique=True)


@settings(deadline=None, max_examples=150)
@given(aliases=names_of_images, data=st.data())
def test_aliases_that_begin_like_others(aliases, data):
    order = data.draw(st.permutations(range(len(aliases))))
    between = data.draw(st.lists(st.text("xyz \n", min_size=1, max_size=4), min_size=len(aliases) + 1))
    counts = data.draw(st.lists(st.integers(1, 4), min_size=len(aliases), max_size=len(aliases)))
    embeddings = [embedding_of(count, alias=alias, content=alias) for alias, count in zip(aliases, counts, strict=True)]
    text = between[0] + "".join(aliases[number] + gap for number, gap in zip(order, between[1:], strict=False))
    prompt = encode(text, embeddings)
    want: list[int] = letters(between[0])
    for number, gap in zip(order, between[1:], strict=False):
        want += [6, *prompt.embeddings[number].token_ids, 7, *letters(gap)]
    assert prompt.input_ids.tolist() == want


def test_raw_tokenizers_do_as_well(opened):
    tower, tokenizer, _ = opened("gemma3", "runs")
    (embedding,) = tower.encode([noise(64, 64, 1)])
    layout = tower.family.prompt
    text = "a\n\n<start_of_image>\nb"
    ours = encode_prompt(tokenizer, text, [embedding], layout=layout, space=TokenSpace())
    raw = encode_prompt(tokenizer.backend_tokenizer, text, [embedding], layout=layout, space=TokenSpace())
    assert torch.equal(ours.input_ids, raw.input_ids)


def test_special_tokens_are_the_callers_if_they_say_so(opened):
    tower, tokenizer, _ = opened("llava", "metaspace")
    (embedding,) = tower.encode([noise(64, 64, 1)])
    texts = {
        special: shown(
            encode_prompt(
                tokenizer,
                "a <image>",
                [embedding],
                layout=tower.family.prompt,
                space=TokenSpace(),
                add_special_tokens=special,
            )
        )
        for special in (None, True, False)
    }
    assert texts[None] == texts[True] == [tokenizer.bos_token_id, *texts[False]]


def test_a_prompt_without_images_is_text():
    prompt = encode("abc", [])
    assert prompt.input_ids.tolist() == prompt.placeholder_ids.tolist() == letters("abc")
    assert (prompt.spans, prompt.embeddings, prompt.token_types.tolist()) == ((), (), [0, 0, 0])
    assert encode("", []).input_ids.tolist() == []


CLIP_LAYOUT = PromptLayout(placeholder=5, video=VideoLayout(placeholder=8, timestamp="<{:.1f} seconds>"))
LINES = PromptLayout(placeholder=5, row_break=3, row_end=4)


@pytest.mark.parametrize(
    ("text", "embeddings", "options", "error", "message"),
    [
        ("a <$EMB_7$> b", [], {}, PromptError, "EMB_7.* no embedding has it"),
        ("a x", [embedding_of(2, alias="x"), embedding_of(2, alias="yy")], {}, PromptError, "missing: yy"),
        ("a x x", [embedding_of(2, alias="x")], {}, PromptError, "stands in the text twice"),
        ("x", [embedding_of(2, alias="x"), embedding_of(3, alias="x")], {}, PromptError, "0 and 1 have one alias"),
        ("x", [embedding_of(2, alias="")], {}, PromptError, "embedding 0 has an empty alias"),
        ("x", [embedding_of(2)], {}, PromptError, "embedding 0 has no alias"),
        ("x", [embedding_of(0, alias="x")], {}, PromptError, "embedding 0 has no rows"),
        ("x", [embedding_of(3, alias="x", tile_tokens=(2,))], {}, PromptError, "has 3 rows, but its tiles have 2"),
        ("x", [embedding_of(3, alias="x", bidirectional_spans=((0, 4),))], {}, PromptError, "spans end at 4"),
        ("x", [embedding_of(2, alias="x")], {"space": None}, UsageError, r"pass space=TokenSpace\(\)"),
        ("x", [], {"layout": None}, UsageError, "either layout or tower"),
        ("x", [], {"tower": SimpleNamespace(prompt_layout=LAYOUT)}, UsageError, "either layout or tower"),
        ("x", [], {"layout": None, "tower": SimpleNamespace(prompt_layout=None)}, UsageError, "without a language"),
        ("xé", [embedding_of(2, alias="x")], {"space": TokenSpace(333)}, PromptError, "token 333, and .* begin at 333"),
        ("x", [], {"tokenizer": 3}, UsageError, "tokenizer is 3"),
        ("x", [embedding_of(4, grid=(2, 2, 4), alias="x", is_video=True)], {}, PromptError, "embedding 0 is of a clip"),
        ("x", [embedding_of(4, grid=(2, 2, 4), alias="x")], {}, PromptError, "2 temporal patches and does not say"),
        (
            "x",
            [embedding_of(4, grid=(2, 2, 4), alias="x", is_video=True)],
            {"layout": CLIP_LAYOUT},
            PromptError,
            "2 temporal patches and 4 rows with 0 time stamps",
        ),
        (
            "x",
            [embedding_of(5, grid=(1, 2, 2), alias="x")],
            {"layout": LINES},
            PromptError,
            r"5 rows, which are not the 2 × 2 tokens of its grid \(1, 2, 2\)",
        ),
        (
            "x",
            [embedding_of(4, grid=(1, 2, 2), alias="x")],
            {"layout": PromptLayout(5, row_break="[IMG_BREAK]", row_end=4)},
            PromptError,
            "BREAK.* is not one token",
        ),
        ("x", [embedding_of(2, alias="x")], {"space": TokenSpace(2**31 - 1)}, TokenSpaceExhaustedError, "no 2 token"),
    ],
)
def test_refusals(text, embeddings, options, error, message):
    with pytest.raises(error, match=message):
        encode(text, embeddings, **options)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("llava", "<image> and <image>", "'<image>' stands in the text once too often"),
        ("llava", "no image", "embedding 0 has no alias, and the text no '<image>' left"),
        ("gemma3", "<start_of_image> <image_soft_token>", "'<image_soft_token>' stands in the text: .* nobody else"),
        ("qwen2_vl", "<|image_pad|> <|video_pad|>", r"'<\|video_pad\|>' stands in the text once too often"),
    ],
)
def test_markers_and_embeddings_are_as_many(name, text, message, opened):
    tower, tokenizer, _ = opened(name, "bytes")
    embeddings = tower.encode([noise(64, 64, 1)])
    with pytest.raises(PromptError, match=message):
        encode_prompt(tokenizer, text, embeddings, layout=tower.family.prompt, space=TokenSpace())


def test_a_tokenizer_of_another_model_is_told_from_the_right_one(opened):
    tower, _, _ = opened("qwen2_vl", "bytes")
    embeddings = tower.encode([noise(64, 64, 1)])
    tokenizer, space = make_tokenizer("llava"), TokenSpace()
    with pytest.raises(PromptError, match="the tokenizer has no token 5000"):
        encode_prompt(tokenizer, "x", [], layout=PromptLayout(5000), space=space)
    layout = PromptLayout(5, row_break="[IMG_BREAK]", row_end="[IMG_END]")
    with pytest.raises(PromptError, match=r"'\[IMG_BREAK\]' is not one token"):
        encode_prompt(tokenizer, "x", embeddings, layout=layout, space=space)


@pytest.mark.parametrize(
    ("style", "token", "message"),
    [("bytes", "Ġimage", "found 0 of 1 places for images"), ("metaspace", "<s>", "stands for rows .* out of turn")],
)
def test_placeholders_that_are_no_special_tokens(style, token, message):
    """One that text does not spell, and one that the tokenizer puts before every text."""
    tokenizer = make_tokenizer("llava", style)
    layout = PromptLayout(tokenizer.get_vocab()[token])
    with pytest.raises(PromptError, match=message):
        encode_prompt(tokenizer, "a {}", [embedding_of(3, alias="{}")], layout=layout, space=TokenSpace())


def test_nothing_stays_assigned_when_a_prompt_fails():
    space = TokenSpace(2**31 - 5)
    images = [embedding_of(3, alias="x", content="a"), embedding_of(3, alias="y", content="b")]
    with pytest.raises(TokenSpaceExhaustedError):
        encode("x y", images, space=space)
    assert space.ids_in_use == 0
    with pytest.raises(PromptError):
        encode("x", images, space=space)
    assert space.ids_in_use == 0


def test_images_of_two_spaces_do_not_pass_for_each_other():
    """Towers whose images all have as many rows give the first image of every space the same ids."""
    space = TokenSpace()
    first = space.assign(embedding_of(3, alias="x", content="a"))
    second = TokenSpace().assign(embedding_of(3, alias="y", content="b"))
    assert first.token_ids == second.token_ids
    with pytest.raises(UsageError, match="embedding 1 has the token ids of another one"):
        encode("x y", [first, second], space=None)
    with pytest.raises(UsageError, match="two embeddings have token id"):
        encode("x y", [TokenSpace(10**9 - 1).assign(first), second], space=None)
    # Ids of another space are none in this one.
    prompt = encode("x y", [first, second], space=space)
    assert [each.token_ids[0] for each in prompt.embeddings] == [10**9, 10**9 + 3]
    prompt.release(space)
    assert space.ids_in_use == 3
    # One image under two aliases is no two images.
    prompt = encode("x y", [first, first.with_alias("y")], space=None)
    assert prompt.input_ids.tolist() == [6, *first.token_ids, 7, *letters(" "), 6, *first.token_ids, 7]


def test_one_frame_is_a_video_or_an_image_as_it_was_encoded():
    layout = replace(LAYOUT, video=VideoLayout(placeholder=8, before=(6,), after=(7,)))
    for is_video, placeholder, kind in ((False, 5, 1), (True, 8, 2)):
        prompt = encode("x", [embedding_of(2, alias="x", is_video=is_video)], layout=layout)
        assert shown(prompt) == [6, placeholder, placeholder, 7]
        assert prompt.token_types.tolist() == [0, kind, kind, 0]


# -- ids --------------------------------------------------------------------------------------------------------------


def test_the_same_image_has_the_same_ids():
    space = TokenSpace()
    first = space.assign(embedding_of(4, content="a", seed=1))
    assert first.token_ids == tuple(range(10**9, 10**9 + 4))
    assert space.assign(embedding_of(4, content="a", seed=2)).token_ids == first.token_ids
    others = [
        embedding_of(4, content="b"),
        embedding_of(4, content="a", grid=(1, 2, 2)),
        replace(embedding_of(4, content="a"), processed_size=(28, 14)),
        embedding_of(5, content="a"),
        embedding_of(4, content="a", seconds_per_grid=0.5),
        embedding_of(4, content="a", timestamps=(0.5,)),
        embedding_of(4, content="a", is_video=True),
        # Nothing says what is in these.
        embedding_of(4),
        embedding_of(4),
    ]
    ids = [space.assign(other).token_ids for other in others]
    assert len({token for each in [first.token_ids, *ids] for token in each}) == 4 * 9 + 5
    assert TokenSpace(7).assign(others[0]).token_ids == (7, 8, 9, 10)


@pytest.mark.parametrize("content", ["a", ""], ids=["known by its content", "known by nothing"])
def test_every_prompt_of_a_chat_holds_a_use_of_its_images(content):
    space = TokenSpace()
    first = encode("tell me x", [embedding_of(3, alias="x", content=content)], space=space)
    second = encode("tell me x and y", [*first.embeddings, embedding_of(2, alias="y", content="b")], space=space)
    assert second.embeddings[0].token_ids == first.embeddings[0].token_ids
    first.release(space)
    assert space.ids_in_use == 5
    with pytest.raises(UsageError, match="not in use for this image"):
        space.release(second.embeddings[1], first.embeddings[0].with_token_ids((7, 8, 9)))
    # All or none.
    assert space.ids_in_use == 5
    second.release(space)
    assert space.ids_in_use == 0
    for prompt in (first, second):
        with pytest.raises(UsageError, match="not in use for this image"):
            prompt.release(space)


def test_an_image_that_stands_in_a_prompt_twice_is_used_twice():
    space = TokenSpace()
    image = embedding_of(3, alias="x", content="a")
    prompt = encode("x y", [image, image.with_alias("y")], space=space)
    space.release(prompt.embeddings[0])
    with pytest.raises(UsageError, match="not in use for this image"):
        prompt.release(space)
    assert space.ids_in_use == 3
    space.release(prompt.embeddings[1])
    assert space.ids_in_use == 0


@pytest.mark.parametrize("contents", ["abc", ["", "", ""]], ids=["known by their content", "known by nothing"])
def test_a_second_release_frees_no_other_images_ids(contents):
    space = TokenSpace(2**31 - 4)
    first, second, third = (embedding_of(4, content=content) for content in contents)
    first = space.assign(first)
    space.release(first)
    # The space is full: the first image is forgotten, and its ids are the second's.
    second = space.assign(second)
    assert second.token_ids == first.token_ids
    with pytest.raises(UsageError, match="not in use for this image"):
        space.release(first)
    assert space.ids_in_use == 4
    with pytest.raises(TokenSpaceExhaustedError):
        space.assign(third)
    space.release(second)


def test_an_image_known_by_nothing_is_known_by_its_ids(tmp_path):
    """Through files and copies; what was given has still no name, and is another image the next time."""
    space, plain = TokenSpace(), embedding_of(3)
    named = space.assign(plain)
    named.save(tmp_path / "image")
    for same in (named, named.with_alias("x"), ImageEmbedding.load(tmp_path / "image")):
        assert space.assign(same).token_ids == named.token_ids
    assert space.assign(plain).token_ids != named.token_ids
    assert plain.content_hash == ""


def test_prompts_that_share_a_space_share_the_ids_of_an_image():
    space = TokenSpace()
    image = embedding_of(3, alias="x", content="a")
    first = encode("tell me x", [image], space=space)
    second = encode("tell me x and z", [embedding_of(2, alias="z", content="b"), image], space=space)
    assert torch.equal(first.input_ids, second.input_ids[: len(first)])
    assert len({token for token in second.input_ids.tolist() if token >= 10**9}) == 5


def test_released_ids_are_used_again_last_and_oldest_first():
    space = TokenSpace(2**31 - 10)
    first, second = (space.assign(embedding_of(4, content=content)) for content in "ab")
    space.release(first)
    space.release(second)
    # Two are left, and they go first; the image that comes back before its ids were needed gets them back.
    assert space.assign(embedding_of(2, content="c")).token_ids == (2**31 - 2, 2**31 - 1)
    assert space.assign(embedding_of(4, content="a")).token_ids == first.token_ids
    assert space.assign(embedding_of(3, content="d")).token_ids == second.token_ids[:3]
    with pytest.raises(TokenSpaceExhaustedError, match="no 2 token ids in a row are free"):
        space.assign(embedding_of(2, content="e"))
    assert space.ids_in_use == 9


def test_neighbors_that_were_released_make_one_range():
    space = TokenSpace(2**31 - 9)
    images = [space.assign(embedding_of(3, content=content)) for content in "abc"]
    for number in (0, 2, 1):
        space.release(images[number])
    assert len(space.assign(embedding_of(9, content="d")).token_ids) == 9


def test_a_space_does_not_grow_with_what_was_released(monkeypatch):
    monkeypatch.setattr(token_ids, "REMEMBERED", 3)
    space = TokenSpace()
    given_ids = []
    for number in range(50):
        given_ids.append(space.assign(embedding_of(2, content=str(number))))
        space.release(given_ids[-1])
    assert len(space._entries) == len(space._idle) == 3
    assert len(space._free) <= 2
    # Nobody's ids were handed out a second time as long as there were others.
    assert len({each.token_ids for each in given_ids}) == 50
    assert space.assign(embedding_of(2, content="47")).token_ids == given_ids[47].token_ids
    assert space.assign(embedding_of(2, content="46")).token_ids[0] > given_ids[49].token_ids[0]


def test_ids_are_released_as_often_as_they_were_assigned():
    space = TokenSpace()
    image = embedding_of(3, content="a")
    once, twice = space.assign(image), space.assign(image)
    space.release(once)
    assert space.ids_in_use == 3
    space.release(twice)
    assert space.ids_in_use == 0
    for wrong in (once, image, once.with_token_ids((5, 6, 7))):
        with pytest.raises(UsageError, match="are not in use for this image"):
            space.release(wrong)


@pytest.mark.parametrize(("int32", "limit"), [(True, 2**31), (False, 2**63)])
def test_ids_fit_into_the_integers_that_were_asked_for(int32, limit):
    space = TokenSpace(limit - 3, int32=int32)
    ids = space.assign(embedding_of(3, content="a")).token_ids
    assert ids[-1] == limit - 1
    dtype = torch.int32 if int32 else torch.int64
    assert torch.tensor(ids, dtype=dtype).tolist() == list(ids)
    with pytest.raises(TokenSpaceExhaustedError):
        space.assign(embedding_of(1, content="b"))


@pytest.mark.parametrize("base", [0, -5, 2**31, True, 1.5, "x"])
def test_bases_that_make_no_sense(base):
    with pytest.raises(UsageError, match=r"base is .*; allowed: 1 to 2147483647"):
        TokenSpace(base)


def test_an_embedding_without_rows_has_no_ids():
    with pytest.raises(UsageError, match="without rows"):
        TokenSpace().assign(embedding_of(0))


def test_threads_get_ids_that_nobody_else_has():
    space = TokenSpace()
    images = [embedding_of(1 + number % 7, content=str(number % 60)) for number in range(60)]

    def work(seed: int) -> list[tuple[str, tuple[int, ...]]]:
        order = random.Random(seed).sample(range(60), 60)
        return [(images[number].content_hash, space.assign(images[number]).token_ids) for number in order]

    with ThreadPoolExecutor(8) as pool:
        found = [each for part in pool.map(work, range(16)) for each in part]
    by_image: dict[str, set[tuple[int, ...]]] = {}
    for content, ids in found:
        by_image.setdefault(content, set()).add(ids)
    assert all(len(ids) == 1 for ids in by_image.values())
    every = [token for ids in by_image.values() for token in next(iter(ids))]
    assert len(every) == len(set(every)) == sum(image.num_tokens for image in images)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(1, 9)), max_size=60))
def test_ids_in_use_never_overlap(steps):
    """In a space of 24 ids: what is in use stays what it was, and nothing is given to two."""
    space = TokenSpace(2**31 - 24)
    held: dict[tuple[int, int], list[ImageEmbedding]] = {}
    for assign, content, tokens in steps:
        key = (content, tokens)
        if assign:
            try:
                given_ids = space.assign(embedding_of(tokens, content=str(content)))
            except TokenSpaceExhaustedError:
                taken = sorted(token for each in held.values() for token in each[0].token_ids)
                gaps = [high - low - 1 for low, high in pairwise([2**31 - 25, *taken, 2**31])]
                assert max(gaps) < tokens
                continue
            held.setdefault(key, []).append(given_ids)
        elif held.get(key):
            space.release(held[key].pop())
            if not held[key]:
                del held[key]
        in_use = [set(each[0].token_ids) for each in held.values()]
        assert all(len({one.token_ids for one in each}) == 1 for each in held.values())
        assert sum(map(len, in_use)) == len(set().union(*in_use)) == space.ids_in_use


# -- rows -------------------------------------------------------------------------------------------------------------


def spaced(*embeddings: ImageEmbedding) -> list[ImageEmbedding]:
    space = TokenSpace()
    return [space.assign(embedding) for embedding in embeddings]


def one_by_one(text: torch.Tensor, ids: list[int], embeddings: list[ImageEmbedding]) -> torch.Tensor:
    rows = {token: row for each in embeddings for token, row in zip(each.token_ids, each.embeddings, strict=True)}
    return torch.stack([rows.get(token, old).to(text.dtype) for token, old in zip(ids, text, strict=True)])


IMAGES = spaced(*(embedding_of(count, content=str(count), seed=count, levels=2) for count in (3, 1, 12, 5)))
PROMPT = [7, *IMAGES[2].token_ids, 8, 9, *IMAGES[0].token_ids, *IMAGES[1].token_ids, 3, 4, *IMAGES[0].token_ids]


def text_rows(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.randn(len(PROMPT), WIDTH, generator=torch.Generator().manual_seed(9)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_put_in_place(device, dtype):
    text = text_rows(dtype, device)
    before = text.clone()
    merged = merge_embeddings(text, PROMPT, IMAGES)
    want = one_by_one(before.cpu(), PROMPT, IMAGES)
    assert torch.equal(merged.cpu(), want)
    assert torch.equal(text, before)
    assert torch.equal(merge_embeddings(text, torch.tensor(PROMPT), IMAGES, out=text), want.to(device))
    assert torch.equal(text.cpu(), want)


def test_a_batch_is_merged_as_its_prompts_are(device):
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    text = torch.stack([text_rows(device=device), text_rows(device=device) * 2])
    merged = merge_embeddings(text, ids, IMAGES)
    assert merged.shape == text.shape
    for number in range(2):
        assert torch.equal(merged[number].cpu(), one_by_one(text[number].cpu(), ids[number].tolist(), IMAGES))


def test_a_piece_of_a_batch_is_a_piece_of_what_the_batch_becomes():
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    text = torch.stack([text_rows(), text_rows() * 2])
    whole = merge_embeddings(text, ids, IMAGES)
    assert torch.equal(merge_embeddings(text[:, 5:9], ids[:, 5:9], IMAGES), whole[:, 5:9])


def test_rows_are_what_masked_scatter_makes_of_them():
    text = text_rows()
    rows = torch.cat([IMAGES[number].embeddings for number in (2, 0, 1, 0)])
    mask = torch.tensor([token >= 10**9 for token in PROMPT])[:, None]
    assert torch.equal(merge_embeddings(text, PROMPT, IMAGES), text.masked_scatter(mask, rows))


@settings(deadline=None, max_examples=100)
@given(cuts=st.lists(st.integers(0, len(PROMPT)), max_size=8), level=st.sampled_from([None, 0, 1]), used=st.booleans())
def test_pieces_equal_the_whole(cuts, level, used):
    """Cut anywhere, also within an image, with the embeddings of a piece alone or all of them."""

    def work(rows: torch.Tensor, ids: list[int], images: list[ImageEmbedding]) -> torch.Tensor:
        if level is None:
            return merge_embeddings(rows, ids, images)
        return add_deepstack(rows, ids, images, level)

    text = text_rows()
    ends = [0, *sorted(cuts), len(PROMPT)]
    pieces = []
    for start, end in pairwise(ends):
        ids = PROMPT[start:end]
        here = [image for image in IMAGES if not used or set(ids) & set(image.token_ids)]
        pieces.append(work(text[start:end], ids, here))
    assert torch.equal(torch.cat(pieces), work(text, PROMPT, IMAGES))


def test_text_alone_is_left_as_it_is():
    text = text_rows()[:3]
    assert merge_embeddings(text, [1, 2, 3], IMAGES) is text
    out = torch.empty_like(text)
    assert torch.equal(merge_embeddings(text, [1, 2, 3], [], out=out), text)
    assert merge_embeddings(text[:0], [], IMAGES).shape == (0, WIDTH)


def test_rows_come_from_anywhere_in_any_dtype(device):
    text = text_rows(torch.bfloat16, device)
    wide = torch.zeros(12, 3 * WIDTH, dtype=torch.float16)
    wide[:, WIDTH : 2 * WIDTH] = IMAGES[2].embeddings
    halves = [replace(IMAGES[2], embeddings=wide[:, WIDTH : 2 * WIDTH]), *IMAGES[:2]]
    merged = merge_embeddings(text, PROMPT, halves)
    assert torch.equal(merged.cpu(), one_by_one(text.cpu(), PROMPT, halves))


def test_only_the_rows_of_a_piece_are_moved(monkeypatch):
    taken = []

    def splice(text: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, **options: Any) -> torch.Tensor:
        taken.append(len(rows))
        return splice_rows(text, rows, index, **options)

    monkeypatch.setattr(merge, "splice_rows", splice)
    merge_embeddings(text_rows()[3:6], PROMPT[3:6], IMAGES)
    merge_embeddings(text_rows(), PROMPT, IMAGES)
    assert taken == [3, 16]


def test_deepstack_rows_are_added_as_in_transformers(device):
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

    mask = torch.tensor([token >= 10**9 for token in PROMPT])
    for dtype in (torch.float32, torch.bfloat16):
        hidden = text_rows(dtype)
        for level in range(2):
            rows = torch.cat([IMAGES[number].deepstack[level] for number in (2, 0, 1, 0)]).to(dtype)
            want = Qwen3VLTextModel._deepstack_process(None, hidden[None], mask[None], rows)[0]
            images = [replace(each, deepstack=tuple(level.to(dtype) for level in each.deepstack)) for each in IMAGES]
            assert torch.equal(add_deepstack(hidden.to(device), PROMPT, images, level).cpu(), want)
        inside = hidden.to(device, copy=True)
        assert add_deepstack(inside, PROMPT, images, 1, out=inside) is inside
        assert torch.equal(inside.cpu(), want)


FIRST = IMAGES[0].token_ids[0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_ids": [1, 10**9 + 500, 2]}, PromptError, "1 ids that no embedding has, such as 1000000500"),
        ({"input_ids": [1, -1, 2]}, PromptError, "such as -1"),
        ({"input_ids": [1, FIRST, 2], "embeddings": []}, PromptError, f"such as {FIRST}"),
        ({"input_ids": [1, FIRST, 2], "embeddings": IMAGES[1:]}, PromptError, f"such as {FIRST}"),
        ({"input_ids": [1, 200, 2], "base": 100}, PromptError, "such as 200"),
        ({"input_ids": [1.0, 2.0, 3.0]}, UsageError, "input_ids are torch.float32"),
        ({"input_ids": [1, 2]}, UsageError, r"\[3, 8\] and input_ids \[2\]"),
        ({"input_ids": 1, "text_embeddings": torch.zeros(WIDTH)}, UsageError, r"\[8\] and input_ids \[\]"),
        ({"text_embeddings": torch.zeros(3, 9)}, UsageError, "rows of 8 numbers, and the text rows of 9"),
        ({"embeddings": [embedding_of(3)]}, UsageError, "0 token ids for 3 rows"),
        ({"embeddings": [embedding_of(2).with_token_ids((10**9, 10**9 + 2))]}, UsageError, "in a row"),
        (
            {"embeddings": [embedding_of(4).with_token_ids((FIRST, FIRST + 2, FIRST + 1, FIRST + 3))]},
            UsageError,
            "in a row",
        ),
        (
            {"embeddings": [IMAGES[0], embedding_of(3, content="x").with_token_ids(IMAGES[0].token_ids)]},
            UsageError,
            "embedding 1 has the token ids of another",
        ),
        (
            {"embeddings": [embedding_of(2).with_token_ids((5, 6))]},
            UsageError,
            "below 1000000000: pass base=space.base",
        ),
        (
            {"embeddings": [IMAGES[0], embedding_of(2).with_token_ids((FIRST + 2, FIRST + 3))]},
            UsageError,
            f"two embeddings have token id {FIRST + 2}",
        ),
        (
            {"embeddings": [IMAGES[0], embedding_of(2).with_token_ids((FIRST, FIRST + 1))]},
            UsageError,
            "embedding 1 has the token ids of another",
        ),
        ({"out": torch.zeros(3, 9)}, UsageError, r"out is torch.float32 \[3, 9\]"),
        ({"out": torch.zeros(3, 8).half()}, UsageError, r"out is torch.float16"),
        ({"out": torch.zeros(8, 3).t()}, UsageError, "and contiguous"),
        ({"out": torch.zeros(3, 8, device="meta")}, UsageError, "on meta; it has to be .* on cpu"),
        ({"text_embeddings": torch.zeros(3, WIDTH).double()}, UsageError, "text is torch.float64"),
    ],
)
def test_merging_refuses_what_it_would_have_to_guess(changes, error, message):
    arguments = {"text_embeddings": torch.zeros(3, WIDTH), "input_ids": [1, FIRST, 2], "embeddings": IMAGES}
    with pytest.raises(error, match=message):
        merge_embeddings(**(arguments | changes))


def test_an_image_may_be_listed_twice_and_one_without_rows_once():
    again = [*IMAGES, IMAGES[0].with_alias("again"), embedding_of(0)]
    assert torch.equal(merge_embeddings(text_rows(), PROMPT, again), merge_embeddings(text_rows(), PROMPT, IMAGES))


def test_the_last_ids_of_64_bits_are_ids_as_well():
    image = TokenSpace(2**63 - 3, int32=False).assign(embedding_of(3))
    ids = [1, *image.token_ids]
    merged = merge_embeddings(torch.zeros(4, WIDTH), ids, [replace(image, token_ids=list(image.token_ids))])
    assert torch.equal(merged[1:], image.embeddings)
    for unknown in (2**63 - 4, -(2**63)):
        with pytest.raises(PromptError, match=f"such as {unknown}"):
            merge_embeddings(torch.zeros(2, WIDTH), [1, unknown], [image], base=2**63 - 5)


def test_transposed_matrices_are_merged_as_well(device):
    text = text_rows(device=device)
    across = replace(IMAGES[1], embeddings=IMAGES[1].embeddings.t().contiguous().t())
    high = replace(IMAGES[0], embeddings=IMAGES[0].embeddings.t().contiguous().t())
    ids = [1, *IMAGES[0].token_ids, 2]
    want = one_by_one(text.cpu()[:5], ids, IMAGES)
    slanted = text[:5].t().contiguous().t()
    assert slanted.stride() == (1, 5)
    assert torch.equal(merge_embeddings(slanted, ids, [high]).cpu(), want)
    assert torch.equal(merge_embeddings(slanted, ids, [high, across]).cpu(), want)


def test_a_deepstack_level_has_the_rows_of_its_image():
    short = replace(IMAGES[0], deepstack=(IMAGES[0].deepstack[0][1:],))
    with pytest.raises(UsageError, match="embedding 0 has 3 rows, and 2 of this deepstack level"):
        add_deepstack(text_rows(), PROMPT, [short], 0)


def test_ids_below_the_base_are_not_taken_for_text():
    """Even where no id of the piece is an image's, as far as the base says."""
    space = TokenSpace(5000)
    prompt = encode("a x b", [embedding_of(3, alias="x")], space=space)
    text = torch.zeros(len(prompt), WIDTH)
    for work in (merge_embeddings, lambda *arguments: add_deepstack(*arguments, 0)):
        with pytest.raises(UsageError, match="embedding 0 has token ids from 5000 on, below 1000000000"):
            work(text, prompt.input_ids, [replace(prompt.embeddings[0], deepstack=(prompt.embeddings[0].embeddings,))])
    merged = merge_embeddings(text, prompt.input_ids, prompt.embeddings, base=space.base)
    start, end = prompt.spans[0]
    assert torch.equal(merged[start:end], prompt.embeddings[0].embeddings)


def test_merging_is_for_inference():
    text = text_rows().requires_grad_()
    assert not merge_embeddings(text, PROMPT, IMAGES).requires_grad


@pytest.mark.parametrize("level", [-1, 2])
def test_levels_that_do_not_exist(level):
    with pytest.raises(UsageError, match=f"level is {level}; embedding 0 has 2 deepstack levels"):
        add_deepstack(text_rows(), PROMPT, IMAGES, level)


def test_ids_for_those_who_know_the_vocabulary_only():
    ids = [3, 10**9, 2**40, 0, -1, 99]
    assert sanitize_ids(ids, 99, 7) == [3, 7, 7, 0, 7, 7]
    tensor = torch.tensor([ids, ids])
    assert sanitize_ids(tensor, 99, 7).tolist() == [[3, 7, 7, 0, 7, 7]] * 2
    assert sanitize_ids(tensor[:, :1].int(), 99, 7).dtype == torch.int32
    for wrong in (-1, 99):
        with pytest.raises(UsageError, match=f"replacement is {wrong}; allowed: 0 to 98"):
            sanitize_ids(ids, 99, wrong)
