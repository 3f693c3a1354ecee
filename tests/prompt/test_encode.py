"""Prompts with images: the tokens of transformers' processors, ids per image row, spans, and errors."""

from collections.abc import Callable
from dataclasses import replace
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
from support.prompts import KINDS, load_processor, make_embedding, make_tokenizer, write_token_ids
from support.towers import all_cases

from tritontower import VisionTower
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.embedding import ImageEmbedding
from tritontower.errors import PromptError, TokenSpaceExhaustedError, UsageError
from tritontower.models.common.family import read_summary
from tritontower.models.common.registry import list_summaries, read_family
from tritontower.prompt import DEFAULT_BASE, EncodedPrompt, PromptLayout, TokenSpace, VideoLayout, encode_prompt

CASES = {case.name: case for case in all_cases() if case.name in KINDS}
Opened = tuple[VisionTower, Any, Any]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Opened]:
    """Opens a small tower, a tokenizer with its tokens, and transformers' processor."""
    made: dict[tuple[str, str], tuple[VisionTower, Any, Path]] = {}

    def open_case(name: str, style: str = "bytes", videos: Any = ()) -> Opened:
        if (name, style) not in made:
            folder = CASES[name].save(tmp_path_factory.mktemp("prompts") / name)
            tokenizer = make_tokenizer(KINDS[name], style)
            write_token_ids(folder, tokenizer, KINDS[name])
            made[name, style] = VisionTower.from_pretrained(folder, device="cpu"), tokenizer, folder
        tower, tokenizer, folder = made[name, style]
        return tower, tokenizer, load_processor(name, folder, tokenizer, videos)

    return open_case


def transformers_ids(processor: Any, text: str, images: list[np.ndarray], videos: int = 0) -> list[int]:
    arguments: dict[str, Any] = {"images": [Image.fromarray(image) for image in images]} if images else {}
    if videos:
        arguments["videos"] = [np.zeros((2, 8, 8, 3), np.uint8)] * videos
    return [int(token) for token in processor(text=text, **arguments)["input_ids"][0]]


TEXTS = [
    "{}",
    "{} What is in the image?",
    "What is in the image? {}",
    "User: a cat\n{}\n\nand a dog",
    "{}{}",
    "compare {} and\n\n\n {}, twice\n",
    " a {} b {}\n{}c é 猫",
]


@pytest.mark.parametrize("style", ["bytes", "metaspace", "runs"])
@pytest.mark.parametrize("name", CASES)
def test_tokens_equal_those_of_transformers(name: str, style: str, opened: Callable[..., Opened]) -> None:
    tower, tokenizer, processor = opened(name, style)
    layout = tower.prompt_layout
    assert layout is not None
    marker = tokenizer.convert_ids_to_tokens(layout.placeholder if layout.marker is None else layout.marker)
    before, after = ("".join(map(tokenizer.convert_ids_to_tokens, side)) for side in (layout.before, layout.after))
    images = [noise(width, height, seed) for seed, (width, height) in enumerate(CASES[name].sizes[:3])]
    embeddings = tower.encode(images)
    space = TokenSpace()
    named = [embedding.with_alias(f"<pic{n}>") for n, embedding in enumerate(embeddings)]
    for text in TEXTS:
        count = text.count("{}")
        # An alias adds the tokens that a chat template writes around an image.
        for ours, theirs, rows in (
            ([marker] * count, marker, embeddings),
            ([each.text_alias for each in named[:count]], before + marker + after, named),
        ):
            prompt = encode_prompt(tokenizer, text.format(*ours), rows[:count], tower=tower, space=space)
            expected = transformers_ids(processor, text.format(*[theirs] * count), images[:count])
            assert prompt.placeholder_ids.tolist() == expected, text


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_video_tokens_equal_those_of_transformers(name: str, opened: Callable[..., Opened]) -> None:
    tower, tokenizer, _ = opened(name)
    lengths = (5, 2)
    videos = [tower.encode_video([noise(64, 96, n + k) for k in range(n)], fps=1.7) for n in lengths]
    described = [(video.grid_thw, length, 1.7) for video, length in zip(videos, lengths, strict=True)]
    tower, tokenizer, processor = opened(name, "bytes", described)
    image = noise(90, 60, 3)
    (embedding,) = tower.encode([image])
    space = TokenSpace()
    text = "a <|video_pad|> b\n<|vision_start|><|image_pad|><|vision_end|>, <|video_pad|>"
    prompt = encode_prompt(tokenizer, text, [embedding, *videos], tower=tower, space=space)
    assert prompt.placeholder_ids.tolist() == transformers_ids(processor, text, [image], videos=2)
    assert prompt.token_types.tolist() == processor.create_mm_token_type_ids([prompt.placeholder_ids.tolist()])[0]
    if not name.startswith("qwen3"):
        text = text.replace("<|video_pad|>", "<|vision_start|><|video_pad|><|vision_end|>")
    named = [video.with_alias(alias) for video, alias in zip(videos, ("{c}", "{cc}"), strict=True)]
    aliased = "a {c} b\n{p}, {cc}"
    prompt = encode_prompt(tokenizer, aliased, [embedding.with_alias("{p}"), *named], tower=tower, space=space)
    assert prompt.placeholder_ids.tolist() == transformers_ids(processor, text, [image], videos=2)


@pytest.mark.parametrize("name", CASES)
def test_ids_spans_and_types_locate_images(name: str, opened: Callable[..., Opened]) -> None:
    tower, tokenizer, processor = opened(name)
    embeddings = tower.encode([noise(width, height, 7) for width, height in CASES[name].sizes[:3]])
    named = [embedding.with_alias(f"@{n}@") for n, embedding in enumerate(embeddings)]
    prompt = encode_prompt(tokenizer, "a @2@ b @0@\n@1@", named, tower=tower, space=TokenSpace())
    for embedding, (start, end) in zip(prompt.embeddings, prompt.spans, strict=True):
        within = prompt.input_ids[start:end]
        assert within[within >= DEFAULT_BASE].tolist() == list(embedding.token_ids)
        assert {int(within[0]), int(within[-1])} == {embedding.token_ids[0], embedding.token_ids[-1]}
    assert prompt.spans[2] < prompt.spans[0] < prompt.spans[1]
    rows = prompt.input_ids >= DEFAULT_BASE
    assert int(rows.sum()) == sum(embedding.num_tokens for embedding in embeddings)
    assert torch.equal(prompt.placeholder_ids[~rows], prompt.input_ids[~rows])
    types = getattr(processor, "func", processor).create_mm_token_type_ids([prompt.placeholder_ids.tolist()])[0]
    assert prompt.token_types.tolist() == types
    assert len(prompt) == len(types)


def test_bidirectional_spans_cover_tiles(opened: Callable[..., Opened]) -> None:
    tower, tokenizer, _ = opened("gemma3-pan-and-scan", "runs")
    embeddings = tower.encode([noise(300, 64, 1), noise(90, 90, 2)])
    assert [len(embedding.bidirectional_spans) for embedding in embeddings] == [4, 1]
    text = "one <start_of_image> two <start_of_image>"
    prompt = encode_prompt(tokenizer, text, embeddings, tower=tower, space=TokenSpace())
    assert len(prompt.bidirectional_spans) == 5
    seen = torch.zeros(len(prompt), dtype=torch.bool)
    for start, end in prompt.bidirectional_spans:
        assert prompt.token_types[start - 1] == prompt.token_types[end] == 0
        seen[start:end] = True
    assert torch.equal(seen, prompt.token_types == 1)


def test_mistral_format_has_the_tokens_of_pixtral(opened: Callable[..., Opened]) -> None:
    _, tokenizer, processor = opened("pixtral")
    config = {**read_summary("pixtral_mistral_format").example}
    names = {"image_token_id": "[IMG]", "image_break_token_id": "[IMG_BREAK]", "image_end_token_id": "[IMG_END]"}
    vision = {key: tokenizer.convert_tokens_to_ids(name) for key, name in names.items()}
    config["vision_encoder"] = {**config["vision_encoder"], **vision}
    layout = read_family(ConfigReader(config, source="params.json")).prompt
    image = noise(48, 80, 0)
    height, width = processor(text="[IMG]", images=[Image.fromarray(image)])["image_sizes"][0].tolist()
    patch = processor.patch_size
    rows = make_embedding(width * height // patch**2, grid=(1, height // patch, width // patch), alias="{}")
    expected = transformers_ids(processor, "a [IMG] b", [image])
    # A function gets pieces of text, as Mistral's own tokenizer.
    for reader in (tokenizer, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]):
        prompt = encode_prompt(reader, "a {} b", [rows], layout=layout, space=TokenSpace())
        assert prompt.placeholder_ids.tolist() == expected


def test_layouts_of_published_checkpoints() -> None:
    """The ids are those of the published tokenizers."""
    found: dict[str, set[Any]] = {}
    breaks = set()
    for summary in list_summaries():
        family = read_family(summary.reader)
        layout = family.prompt
        tokens = layout and (layout.placeholder, layout.before, layout.after, layout.video and layout.video.placeholder)
        found.setdefault(family.config.family, set()).add(tokens)
        if layout and layout.row_break:
            breaks.add((layout.row_break, layout.row_end))
        if layout and family.config.family == "gemma3":
            around = (layout.marker, layout.tile_before, layout.tile_after)
            assert around == (255999, ("\n\n", 255999), (256000, "\n\n"))
    qwen2 = (151655, (151652,), (151653,), 151656)
    assert found["clip"] == found["siglip"] == {None}
    assert found["qwen2_vl"] == found["qwen2_5_vl"] == {qwen2}
    assert found["qwen3_vl"] == {qwen2, (248056, (248053,), (248054,), 248057)}
    plain = {"gemma3": 262144, "paligemma": 257152, "pixtral": 10, "mistral3": 10, "mistral_format": 10, "llava": 32000}
    assert all(found[name] == {(placeholder, (), (), None)} for name, placeholder in plain.items())
    assert breaks == {("[IMG_BREAK]", "[IMG_END]"), (12, 13)}


def test_tokenizers_library_and_special_tokens(opened: Callable[..., Opened]) -> None:
    tower, tokenizer, _ = opened("llava", "metaspace")
    embeddings = tower.encode([noise(64, 64, 1)])

    def read(reader: Any, special: bool | None = None) -> list[int]:
        options = {"tower": tower, "space": TokenSpace(), "add_special_tokens": special}
        return encode_prompt(reader, "a\n\n<image>\nb", embeddings, **options).input_ids.tolist()

    assert read(tokenizer) == read(tokenizer.backend_tokenizer) == read(tokenizer, True)
    assert read(tokenizer) == [tokenizer.bos_token_id, *read(tokenizer, False)]


# Hand-made embeddings, one token per character.
LAYOUT = PromptLayout(placeholder=5, before=(6,), after=(7,))


def letters(text: str) -> list[int]:
    return [100 + ord(character) for character in text]


def encode(text: str, embeddings: list[ImageEmbedding], **options: Any) -> EncodedPrompt:
    arguments: dict[str, Any] = {"layout": LAYOUT, "space": TokenSpace(), **options}
    return encode_prompt(arguments.pop("tokenizer", letters), text, embeddings, **arguments)


@settings(deadline=None, max_examples=150)
@given(aliases=st.lists(st.text("ab<", min_size=1, max_size=5), min_size=1, max_size=6, unique=True), data=st.data())
def test_longest_alias_matches(aliases: list[str], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(aliases))))
    gaps = data.draw(st.lists(st.text("xyz \n", min_size=1, max_size=4), min_size=len(aliases) + 1))
    counts = data.draw(st.lists(st.integers(1, 4), min_size=len(aliases), max_size=len(aliases)))
    embeddings = [
        make_embedding(count, alias=alias, content=alias) for alias, count in zip(aliases, counts, strict=True)
    ]
    placed = list(zip(order, gaps[1:], strict=False))
    prompt = encode(gaps[0] + "".join(aliases[number] + gap for number, gap in placed), embeddings)
    want = letters(gaps[0])
    for number, gap in placed:
        want += [6, *prompt.embeddings[number].token_ids, 7, *letters(gap)]
    assert prompt.input_ids.tolist() == want


def test_prompt_without_images_is_text() -> None:
    prompt = encode("abc", [])
    assert prompt.input_ids.tolist() == prompt.placeholder_ids.tolist() == letters("abc")
    assert (prompt.spans, prompt.embeddings, prompt.token_types.tolist()) == ((), (), [0, 0, 0])
    assert encode("", []).input_ids.tolist() == []
    started = encode("abc", [], layout=replace(LAYOUT, after_images=(9,), ending="\n"))
    assert started.input_ids.tolist() == [9, *letters("abc\n")]


@pytest.mark.parametrize(("is_video", "placeholder", "kind"), [(False, 5, 1), (True, 8, 2)])
def test_one_frame_keeps_its_kind(is_video: bool, placeholder: int, kind: int) -> None:
    layout = replace(LAYOUT, video=VideoLayout(placeholder=8, before=(6,), after=(7,)))
    prompt = encode("x", [make_embedding(2, alias="x", is_video=is_video)], layout=layout)
    assert prompt.placeholder_ids.tolist() == [6, placeholder, placeholder, 7]
    assert prompt.token_types.tolist() == [0, kind, kind, 0]


X = make_embedding(2, alias="x")
VIDEO = make_embedding(4, grid=(2, 2, 4), alias="x", is_video=True)
TIMED = PromptLayout(placeholder=5, video=VideoLayout(placeholder=8, timestamp="<{:.1f} seconds>"))
LINES = PromptLayout(placeholder=5, row_break=3, row_end=4)


@pytest.mark.parametrize(
    ("text", "embeddings", "options", "error", "message"),
    [
        ("a <$EMB_7$> b", [], {}, PromptError, "EMB_7.* no embedding has it"),
        ("a x", [X, make_embedding(2, alias="yy")], {}, PromptError, "missing: yy"),
        ("a x x", [X], {}, PromptError, "the text has more 'x' than"),
        ("x", [X, make_embedding(3, alias="x")], {}, PromptError, "embeddings 0 and 1 have the same alias"),
        ("x", [make_embedding(2, alias="")], {}, PromptError, "embedding 0 has an empty alias"),
        ("x", [make_embedding(2)], {}, PromptError, "embedding 0 has no alias"),
        ("x", [make_embedding(0, alias="x")], {}, PromptError, "embedding 0 has no rows"),
        ("x", [make_embedding(3, alias="x", tile_tokens=(2,))], {}, PromptError, "has 3 rows, but its tiles have 2"),
        ("x", [make_embedding(3, alias="x", bidirectional_spans=((0, 4),))], {}, PromptError, "spans end at 4"),
        ("x", [X], {"space": None}, UsageError, r"pass space=TokenSpace\(\)"),
        ("x", [], {"layout": None}, UsageError, "exactly one of layout and tower"),
        ("x", [], {"tower": SimpleNamespace(prompt_layout=LAYOUT)}, UsageError, "exactly one of layout and tower"),
        ("x", [], {"layout": None, "tower": SimpleNamespace(prompt_layout=None)}, UsageError, "an encoder alone"),
        ("xé", [X], {"space": TokenSpace(333)}, PromptError, "below 333, where .* begin, got 333"),
        ("x", [], {"tokenizer": 3}, UsageError, "tokenizer must be .*, got 3"),
        ("x", [VIDEO], {}, PromptError, "embedding 0 is a video"),
        ("x", [replace(VIDEO, is_video=False)], {}, PromptError, "2 temporal patches but is_video is False"),
        ("x", [VIDEO], {"layout": TIMED}, PromptError, "2 temporal patches and 4 rows with 0 timestamps"),
        ("x", [make_embedding(5, grid=(1, 2, 2), alias="x")], {"layout": LINES}, PromptError, "5 rows, .* makes 2 × 2"),
        ("x", [X], {"layout": replace(LINES, row_break="[IMG_BREAK]")}, PromptError, "BREAK.* is not one token"),
        ("x", [X], {"space": TokenSpace(2**31 - 1)}, TokenSpaceExhaustedError, "no 2 consecutive token"),
    ],
)
def test_invalid_prompts_are_rejected(
    text: str, embeddings: list[ImageEmbedding], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        encode(text, embeddings, **options)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("llava", "<image> and <image>", "the text has more '<image>' than"),
        ("llava", "no image", "embedding 0 has no alias, and the text has no '<image>' left"),
        ("gemma3", "<start_of_image> <image_soft_token>", "must not contain '<image_soft_token>'"),
        ("qwen2_vl", "<|image_pad|> <|video_pad|>", r"the text has more '<\|video_pad\|>' than"),
    ],
)
def test_markers_must_match_embeddings(name: str, text: str, message: str, opened: Callable[..., Opened]) -> None:
    tower, tokenizer, _ = opened(name)
    with pytest.raises(PromptError, match=message):
        encode_prompt(tokenizer, text, tower.encode([noise(64, 64, 1)]), tower=tower, space=TokenSpace())


@pytest.mark.parametrize(
    ("style", "find_layout", "message"),
    [
        ("bytes", lambda ids: PromptLayout(5000), "the tokenizer has no token 5000"),
        ("bytes", lambda ids: replace(LINES, row_break="[IMG_BREAK]"), r"'\[IMG_BREAK\]' is not one token"),
        # Not read from text by its name.
        ("bytes", lambda ids: PromptLayout(ids["Ġimage"]), "found 0 of 1 image placeholders"),
        # Added before every text.
        ("metaspace", lambda ids: PromptLayout(ids["<s>"]), "made an extra token"),
    ],
)
def test_unsuitable_tokenizers_are_rejected(style: str, find_layout: Any, message: str) -> None:
    tokenizer = make_tokenizer("llava", style)
    with pytest.raises(PromptError, match=message):
        encode("a x", [X], tokenizer=tokenizer, layout=find_layout(tokenizer.get_vocab()))


def test_failed_prompts_leave_no_ids_assigned() -> None:
    space = TokenSpace(2**31 - 5)
    images = [make_embedding(3, alias="x", content="a"), make_embedding(3, alias="y", content="b")]
    for text, error in (("x y", TokenSpaceExhaustedError), ("x", PromptError)):
        with pytest.raises(error):
            encode(text, images, space=space)
        assert space.ids_in_use == 0


def test_images_of_two_spaces_are_told_apart() -> None:
    """Towers whose images all have the same number of rows give the first image of every space the same ids."""
    space = TokenSpace()
    first = space.assign(make_embedding(3, alias="x", content="a"))
    second = TokenSpace().assign(make_embedding(3, alias="y", content="b"))
    assert first.token_ids == second.token_ids
    with pytest.raises(UsageError, match="embedding 1 has the token ids of another one"):
        encode("x y", [first, second], space=None)
    with pytest.raises(UsageError, match="two embeddings have token id"):
        encode("x y", [TokenSpace(DEFAULT_BASE - 1).assign(first), second], space=None)
    # A space ignores ids of another one.
    prompt = encode("x y", [first, second], space=space)
    assert [each.token_ids[0] for each in prompt.embeddings] == [DEFAULT_BASE, DEFAULT_BASE + 3]
    prompt.release(space)
    assert space.ids_in_use == 3
    # The same image under two aliases keeps its ids.
    prompt = encode("x y", [first, first.with_alias("y")], space=None)
    assert prompt.input_ids.tolist() == [6, *first.token_ids, 7, *letters(" "), 6, *first.token_ids, 7]


@pytest.mark.parametrize("content", ["a", ""], ids=["with a content hash", "without a content hash"])
def test_each_prompt_of_a_chat_holds_its_images(content: str) -> None:
    space = TokenSpace()
    first = encode("tell me x", [make_embedding(3, alias="x", content=content)], space=space)
    second = encode("tell me x and y", [*first.embeddings, make_embedding(2, alias="y", content="b")], space=space)
    assert torch.equal(first.input_ids, second.input_ids[: len(first)])
    first.release(space)
    assert space.ids_in_use == 5
    with pytest.raises(UsageError, match="not in use for this image"):
        space.release(second.embeddings[1], first.embeddings[0].with_token_ids((7, 8, 9)))
    assert space.ids_in_use == 5, "all or nothing is released"
    second.release(space)
    assert space.ids_in_use == 0
    for prompt in (first, second):
        with pytest.raises(UsageError, match="not in use for this image"):
            prompt.release(space)
