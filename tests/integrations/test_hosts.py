"""Handoff to vLLM, SGLang and ExLlama: the forms are those of the recorded releases, the values are the tower's.

``tests/data/hosts.json`` records the forms and the release in which they were read. If an engine is installed, its own
code reads the data as well; otherwise those tests are skipped.
"""

import importlib.util
import inspect
import json
import re
import runpy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import noise
from support.mistral_format import to_mistral_format
from support.towers import TowerCase, all_cases

from tritontower import VisionTower
from tritontower.embedding import ImageEmbedding
from tritontower.errors import HostRefusalError, UsageError
from tritontower.integrations import sglang, vllm
from tritontower.integrations.checks import find_form
from tritontower.integrations.exllama import ExLlamaV2Vision, ExLlamaV3Vision, to_exllama
from tritontower.integrations.sglang import SGLANG_READ, to_sglang
from tritontower.integrations.vllm import VLLM_READ, to_vllm
from tritontower.models.common.registry import model_types
from tritontower.prompt import TokenSpace, encode_prompt

HOSTS = json.loads((Path(__file__).parents[1] / "data" / "hosts.json").read_text())
VLLM, SGLANG = HOSTS["vllm"], HOSTS["sglang"]
CASES = all_cases()
BY_NAME = {case.name: case for case in CASES}
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
QWEN = [case for case in CASES if case.video]
each_qwen = pytest.mark.parametrize("case", QWEN, ids=lambda case: case.name)

Load = Callable[[TowerCase | str], VisionTower]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Loads a small fp32 tower of a case, once."""
    towers: dict[str, VisionTower] = {}

    def get(case: TowerCase | str) -> VisionTower:
        case = BY_NAME[case] if isinstance(case, str) else case
        if case.name not in towers:
            folder = case.save(tmp_path_factory.mktemp("hosts") / case.name)
            towers[case.name] = VisionTower.from_pretrained(folder, device="cpu")
        return towers[case.name]

    return get


def two(case: TowerCase) -> list[np.ndarray]:
    return [noise(width, height, seed) for seed, (width, height) in enumerate(case.sizes[1:3])]


def side_by_side(*embeddings: ImageEmbedding) -> torch.Tensor:
    return torch.cat([torch.cat((embedding.embeddings, *embedding.deepstack), dim=1) for embedding in embeddings])


def record_key(model_type: str) -> str:
    """Returns the key of a record: the whole name, or the part before the tower's type."""
    known = {*VLLM["matrices"], *VLLM["dictionaries"], *VLLM["refused"]}
    return model_type if model_type in known else model_type.partition("/")[0]


@each_case
def test_vllm_form_is_the_recorded_one(case: TowerCase, load: Load) -> None:
    tower = load(case)
    key = record_key(tower.family.model_type)
    embeddings = tower.encode(two(case))
    if key in VLLM["refused"]:
        with pytest.raises(HostRefusalError, match=re.escape(f"vLLM {VLLM['version']}")) as refusal:
            to_vllm(tower, embeddings)
        assert refusal.value.reason in str(refusal.value)
        assert refusal.value.instead in str(refusal.value)
    elif key in VLLM["dictionaries"]:
        data = to_vllm(tower, embeddings)
        assert list(data) == ["image"]
        assert list(data["image"]) == VLLM["dictionaries"][key]["image"]
        rows, grids = data["image"]["image_embeds"], data["image"]["image_grid_thw"]
        assert torch.equal(rows, side_by_side(*embeddings))
        assert grids.dtype == torch.int64
        assert grids.tolist() == [list(embedding.grid_thw) for embedding in embeddings]
        assert (grids.prod(-1) // tower.config.merge**2).tolist() == [embedding.num_tokens for embedding in embeddings]
    else:
        counts = {embedding.num_tokens for embedding in embeddings}
        one_count = VLLM["matrices"][key]["one_count"]
        assert one_count == (len(counts) > 1), "the case must show if counts may differ"
        if one_count:
            with pytest.raises(HostRefusalError, match=f"got {min(counts)}, {max(counts)}"):
                to_vllm(tower, embeddings)
        for given in (embeddings[:1], embeddings[1:] * 2, *[embeddings] * (not one_count)):
            data = to_vllm(tower, given)
            assert list(data) == ["image"]
            assert all(torch.equal(found, e.embeddings) for found, e in zip(data["image"], given, strict=True))


@each_qwen
def test_videos_are_separate_from_images(case: TowerCase, load: Load) -> None:
    """A video of one frame is a video, although its grid is that of an image."""
    tower = load(case)
    record = VLLM["dictionaries"][tower.family.model_type]
    video = tower.encode_video([noise(120, 80, seed) for seed in range(5)], fps=2.0)
    (image,) = tower.encode([noise(60, 40, 9)])
    assert list(to_vllm(tower, replace(image, is_video=True, timestamps=(0.5,), seconds_per_grid=1.0))) == ["video"]
    data = to_vllm(tower, [video, image])
    assert list(data) == ["image", "video"]
    assert list(data["video"]) == record["video"]
    assert torch.equal(data["video"]["video_embeds"], side_by_side(video))
    assert data["video"]["video_grid_thw"].tolist() == [list(video.grid_thw)]
    assert torch.equal(data["image"]["image_embeds"], side_by_side(image))
    if "timestamps" in record["video"]:
        assert data["video"]["timestamps"] == [[0.25, 1.25, 2.0]]
    if "second_per_grid_ts" in record["video"]:
        assert data["video"]["second_per_grid_ts"].tolist() == [1.0]
    item = to_sglang(tower, video)
    assert (item["format"], item["modality"]) == ("processor_output", "video")
    assert torch.equal(item["precomputed_embeddings"], side_by_side(video))
    assert item["video_grid_thw"].tolist() == [list(video.grid_thw)]
    timed = tower.family.model_type == "qwen2_5_vl"
    assert item.get("second_per_grid_ts", torch.tensor([])).tolist() == [1.0] * timed
    with pytest.raises(UsageError, match="all images or all videos"):
        to_sglang(tower, [image, video])


@pytest.mark.parametrize(
    ("name", "host", "needed"),
    [
        ("qwen2_5_vl", to_vllm, True),
        ("qwen2_5_vl", to_sglang, True),
        ("qwen3_vl", to_vllm, True),
        ("qwen3_vl", to_sglang, False),
        ("qwen2_vl", to_vllm, False),
    ],
)
def test_videos_need_times_if_positions_depend_on_them(name: str, host: Any, needed: bool, load: Load) -> None:
    tower = load(name)
    video = tower.encode_video([noise(120, 80, seed) for seed in range(4)])
    with pytest.raises(UsageError, match="pass fps=") if needed else nullcontext():
        host(tower, video)


@pytest.mark.parametrize("model_type", [*model_types(), "next_years_model"])
@pytest.mark.parametrize(("host", "read", "record"), [(vllm, VLLM_READ, VLLM), (sglang, SGLANG_READ, SGLANG)])
def test_every_model_type_has_been_checked(host: ModuleType, read: str, record: Any, model_type: str) -> None:
    assert read.endswith(f" {record['version']}")
    known = model_type != "next_years_model"
    if host is vllm:
        taken = record_key(model_type) in {*VLLM["matrices"], *VLLM["dictionaries"]}
        assert taken != (record_key(model_type) in VLLM["refused"] or not known)
    else:
        taken = model_type in SGLANG["taken"]
    if taken:
        find_form(read, model_type, host.TAKEN, host.REFUSED, otherwise="")
        return
    with pytest.raises(HostRefusalError) as refusal:
        find_form(read, model_type, host.TAKEN, host.REFUSED, otherwise="nothing")
    assert refusal.value.host == read
    assert ("has not been checked" in refusal.value.reason) != known


def test_mistral_format_is_refused_by_vllm_only(load: Load, tmp_path: Path) -> None:
    folder = to_mistral_format(load("pixtral").folder, tmp_path / "native")
    tower = VisionTower.from_pretrained(folder, device="cpu")
    embeddings = tower.encode(two(BY_NAME["pixtral"]))
    with pytest.raises(HostRefusalError, match=r"takes pixels only.*merge_embeddings.*prompt_embeds"):
        to_vllm(tower, embeddings)
    assert to_sglang(tower, embeddings)["format"] == "processor_output"


@each_case
def test_sglang_form_is_the_recorded_one(case: TowerCase, load: Load) -> None:
    tower = load(case)
    embeddings = tower.encode(two(case))
    record = SGLANG["taken"].get(tower.family.model_type)
    if record is None:
        with pytest.raises(HostRefusalError, match=re.escape(SGLANG_READ)):
            to_sglang(tower, embeddings)
        return
    for item, form in (
        (to_sglang(tower, embeddings), record["form"]),
        (to_sglang(tower, embeddings, form="processor_output"), "processor_output"),
    ):
        assert item["format"] == form
        assert item.get("modality", "image") == "image"
        assert torch.equal(item[SGLANG["rows_under"][form]], side_by_side(*embeddings))
        assert ("image_grid_thw" in item) == record["grids"]
        if record["grids"]:
            assert item["image_grid_thw"].tolist() == [list(embedding.grid_thw) for embedding in embeddings]
    if record["form"] == "processor_output":
        with pytest.raises(HostRefusalError, match="for pixels"):
            to_sglang(tower, embeddings, form="precomputed_embedding")
    with pytest.raises(UsageError, match=r"form must be 'precomputed_embedding', 'processor_output' .*, got 'pixels'"):
        to_sglang(tower, embeddings, form="pixels")  # type: ignore[arg-type]


def drop_rows(embedding: ImageEmbedding, count: int) -> ImageEmbedding:
    return replace(embedding, embeddings=embedding.embeddings[count:], tile_tokens=())


# What no engine checks: tower, change of its embedding, message.
DAMAGES: list[tuple[str, Callable[[ImageEmbedding], Any], str]] = [
    ("qwen2_vl", lambda e: drop_rows(e, 1), "with grid"),
    ("qwen2_vl", lambda e: replace(e, grid_thw=(1, e.grid_thw[1] // 2, e.grid_thw[2] // 2)), "with grid"),
    ("llava", lambda e: drop_rows(e, 3), "a multiple of"),
    ("llava_next", lambda e: drop_rows(e, -4), "more than"),
    ("llava", lambda e: replace(e, tile_tokens=(1,)), "its tiles have 1"),
    ("qwen2_vl", lambda e: replace(e, embeddings=e.embeddings[:, 1:]), "from this tower"),
    ("qwen3_vl", lambda e: replace(e, deepstack=()), "deepstack levels, .* got 0"),
    ("qwen3_vl", lambda e: replace(e, deepstack=(e.deepstack[0], e.deepstack[1][1:])), "the shape"),
    ("qwen3_vl", lambda e: replace(e, deepstack=(e.deepstack[0], e.deepstack[1].half())), "and dtype"),
    ("qwen2_vl", lambda e: replace(e, grid_thw=(2, 2, 2)), "is_video is False"),
    ("qwen3_vl", lambda e: replace(e, timestamps=(0.0, 1.0)), "timestamps or none, got 2"),
    ("qwen2_vl", lambda e: replace(e, embeddings=e.embeddings.long()), "floating dtype"),
    ("qwen2_vl", lambda e: e.embeddings, "ImageEmbedding, got Tensor"),
]


@pytest.mark.parametrize(("name", "change", "message"), DAMAGES)
def test_embeddings_of_another_tower_are_rejected(name: str, change: Any, message: str, load: Load) -> None:
    tower = load(name)
    embeddings = tower.encode([noise(120, 90, 1)])
    to_vllm(tower, embeddings)
    for convert in (to_vllm, to_exllama):
        with pytest.raises(UsageError, match=message):
            convert(tower, [*embeddings, change(embeddings[0])])


def test_empty_lists_and_mixed_dtypes_are_rejected(load: Load) -> None:
    tower = load("qwen2_vl")
    (embedding,) = tower.encode([noise(60, 40, 0)])
    half = replace(embedding, embeddings=embedding.embeddings.half())
    for convert in (to_vllm, to_sglang):
        with pytest.raises(UsageError, match="at least one entry"):
            convert(tower, [])
        with pytest.raises(UsageError, match=r"must have one dtype, got torch.float16, torch.float32"):
            convert(tower, [embedding, half])
        assert convert(tower, embedding).keys() == convert(tower, [embedding]).keys()


class WordTokenizer:
    """A tokenizer with ExLlama's interface: single tokens by name, text by its characters."""

    def __init__(self, tokens: dict[str, int]) -> None:
        self.tokens = tokens
        self.pattern = re.compile("(" + "|".join(map(re.escape, tokens)) + ")")

    def single_id(self, token: str) -> int:
        return self.tokens[token]

    def encode(self, text: str, *, encode_special_tokens: bool = True, embeddings: Any = ()) -> torch.Tensor:
        assert encode_special_tokens
        aliases = {embedding.text_alias: embedding for embedding in embeddings}
        ids: list[int] = []
        parts = re.split("(" + "|".join(map(re.escape, aliases)) + ")", text) if aliases else [text]
        for part in parts:
            if part in aliases:
                ids += aliases[part].get_ids()
                continue
            for piece in self.pattern.split(part):
                ids += [self.tokens[piece]] if piece in self.tokens else [200 + ord(c) % 50 for c in piece]
        return torch.tensor([ids])


@pytest.mark.parametrize("engine", ["exllamav2", "exllamav3"])
def test_views_have_the_attributes_that_exllama_reads(engine: str, load: Load) -> None:
    record = HOSTS[engine]
    tower = load("qwen3_vl")
    view = to_exllama(tower, tower.encode([noise(90, 60, 2)])[0], space=TokenSpace())
    assert [name for name in (*record["attributes"], *record["methods"]) if not hasattr(view, name)] == []
    adapter = {"exllamav2": ExLlamaV2Vision, "exllamav3": ExLlamaV3Vision}[engine]
    for method, parameters in record["signatures"].items():
        assert list(inspect.signature(getattr(adapter, method)).parameters)[1:] == parameters


@each_case
def test_views_hold_the_embedding_and_its_ids(case: TowerCase, load: Load) -> None:
    tower = load(case)
    space = TokenSpace()
    embeddings = tower.encode(two(case))
    views = to_exllama(tower, embeddings, space=space, dtype=None)
    for view, embedding in zip(views, embeddings, strict=True):
        assert torch.equal(view.embeddings, embedding.embeddings)
        assert view.length == view.mm_length == view.full_length == embedding.num_tokens
        assert view.get_ids() == view.token_list == list(range(view.first_index, view.last_index))
        assert view.get_vision_token_range() == (view.first_index, view.first_index + view.length)
        assert torch.equal(view.get_ids_tensor(), torch.arange(view.first_index, view.last_index)[None])
        assert view.first_index >= 1_000_000_000
        assert view.text_alias == f"<$EMB_{view.first_index}$>"
        assert view.grid_thw == view.thw_grid == embedding.grid_thw
        assert view.model.config.vision_spatial_merge_size == view.mrope_merge_size == tower.config.merge
        levels = view.deepstack_embeddings or []
        assert all(map(torch.equal, levels, embedding.deepstack))
        assert (view.deepstack_embeddings is None) == (not embedding.deepstack)
        assert view.get_size_in_bytes() == embedding.embeddings.nbytes * (1 + len(levels))
    assert views[0].last_index <= views[1].first_index or views[1].last_index <= views[0].first_index
    # ExLlama itself gives the same image new ids each time, so that its cache cannot find it.
    assert to_exllama(tower, embeddings[0], space=space).first_index == views[0].first_index


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "pixtral", "mistral3", "gemma3", "llava", "llava_next"])
def test_exllama_makes_the_tokens_of_encoded_prompts(name: str, load: Load) -> None:
    tower = load(name)
    layout = tower.prompt_layout
    assert layout is not None
    pieces = (*layout.before, *layout.after, *layout.tile_before, *layout.tile_after, layout.row_break, layout.row_end)
    names = sorted({piece for piece in pieces if isinstance(piece, str)})
    tokenizer = WordTokenizer({"<t>": 1} | {name: 60 + number for number, name in enumerate(names)})
    space = TokenSpace()
    embeddings = tower.encode(two(BY_NAME[name]))
    views = to_exllama(tower, embeddings, tokenizer=tokenizer, space=space)
    text = f"Look: {views[0].text_alias} and {views[1].text_alias}."
    theirs = tokenizer.encode(text, embeddings=views)
    aliased = [e.with_alias(v.text_alias) for e, v in zip(embeddings, views, strict=True)]
    ours = encode_prompt(lambda piece: tokenizer.encode(piece)[0].tolist(), text, aliased, layout=layout, space=space)
    assert theirs[0].tolist() == ours.input_ids.tolist()
    assert len(views[0].token_list) > views[0].length or name.startswith("llava")


def test_views_have_no_tokens_that_end_a_prompt(load: Load) -> None:
    tower = load("paligemma")
    assert tower.prompt_layout.after_images
    assert tower.prompt_layout.ending
    (embedding,) = tower.encode([noise(64, 96, 0)])
    view = to_exllama(tower, embedding, tokenizer=WordTokenizer({"<t>": 1}), space=TokenSpace())
    assert view.token_list == list(range(view.first_index, view.last_index))


def test_exllamav2_vision_has_its_interface(load: Load) -> None:
    tower = load("qwen2_vl")
    vision = ExLlamaV2Vision(tower)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=tower.hidden_size, vision_spatial_merge_size=2))
    tokenizer = WordTokenizer({"<t>": 1})
    image = noise(120, 80, 3)
    positional = vision.get_image_embeddings(model, tokenizer, image, "{{image}}", True)
    named = vision.get_image_embeddings(model=model, tokenizer=tokenizer, image=image)
    assert positional.text_alias == "{{image}}"
    assert positional.first_index == named.first_index
    assert positional.model is model
    assert positional.embeddings.dtype == torch.float16
    assert positional.metadata["original_size"] == (80, 120)
    assert len(positional.get_ids()) == positional.length + 2
    video = vision.get_video_embeddings(model, tokenizer, [noise(60, 40, seed) for seed in range(4)])
    assert video.thw_grid[0] == 2
    narrow = SimpleNamespace(config=SimpleNamespace(hidden_size=tower.hidden_size + 1))
    with pytest.raises(UsageError, match="model must have hidden_size"):
        vision.get_image_embeddings(narrow, tokenizer, image)


def test_exllamav3_vision_has_its_interface_and_releases_ids(load: Load) -> None:
    tower = load("qwen3_vl")
    vision = ExLlamaV3Vision(tower)
    tokenizer = WordTokenizer({"<t>": 1})
    images = [noise(120, 80, 3), noise(64, 200, 4)]
    # ExLlamaV3 itself takes lists of images of one size only.
    several = vision.get_image_embeddings(tokenizer, images)
    one = vision.get_image_embeddings(tokenizer=tokenizer, image=images[1], text_alias="{{image}}")
    assert [view.metadata["original_size"] for view in several] == [(120, 80), (64, 200)]
    assert one.text_alias == "{{image}}"
    assert one.token_list == several[1].token_list
    assert torch.equal(one.embeddings, several[1].embeddings)
    assert one.token_list_at(7) == one.token_list == one.token_string[0].tolist()
    assert vision.get_image_embeddings(tokenizer, []) == []
    with pytest.raises(UsageError, match="None for a list of images"):
        vision.get_image_embeddings(tokenizer, images, "{{image}}")  # type: ignore[call-overload]
    for view in several:
        view.release(vision.space)
    assert vision.space.ids_in_use == one.length
    assert one.source.embeddings is one.embeddings
    one.release(vision.space)
    assert vision.space.ids_in_use == 0
    with pytest.raises(UsageError, match="not in use for this image"):
        one.release(vision.space)


def test_failed_views_leave_no_ids_assigned(load: Load) -> None:
    """The second image of a call fails, because ExLlama would misread its ids or values."""
    tower = load("qwen2_vl")
    images = tower.encode([noise(60, 40, 0), noise(90, 60, 1)])
    large = replace(images[1], embeddings=images[1].embeddings * 1e6)
    scattered = images[1].with_token_ids([2_000_000_000 - 2 * row for row in range(images[1].num_tokens)])
    for embeddings, space, options, message in (
        ([images[0], large], TokenSpace(), {}, "pass dtype=None"),
        (images, TokenSpace(), {"tokenizer": 5}, r"tokenizer must be .*, got 5"),
        (images, TokenSpace(200_000), {}, "at least 1000000000"),
        (images, None, {}, "pass space="),
        ([scattered], None, {}, "consecutive ids"),
    ):
        with pytest.raises(UsageError, match=message):
            to_exllama(tower, embeddings, space=space, **options)
        assert space is None or space.ids_in_use == 0
    assert torch.equal(to_exllama(tower, large, space=TokenSpace(), dtype=None).embeddings, large.embeddings)


# The engines' own code, if installed.


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_vllm_parser_reads_matrices_as_embeddings(name: str, load: Load) -> None:
    parse = pytest.importorskip("vllm.multimodal.parse")
    tower = load(name)
    embeddings = tower.encode([noise(120, 90, 1), noise(120, 90, 2)])
    parser = parse.MultiModalDataParser(expected_hidden_size=tower.hidden_size)
    items = parser.parse_mm_data(to_vllm(tower, embeddings))["image"]
    assert isinstance(items, parse.ImageEmbeddingItems)
    assert [items.get_feature_size(index) for index in range(2)] == [e.num_tokens for e in embeddings]
    assert all(torch.equal(items.get(index), e.embeddings) for index, e in enumerate(embeddings))


def test_exllamav3_sends_and_receives_views(load: Load) -> None:
    spec = importlib.util.find_spec("exllamav3")
    if spec is None or spec.origin is None:
        pytest.skip("exllamav3 is not installed")
    # One file, without the package, which would build its kernels.
    theirs = SimpleNamespace(**runpy.run_path(str(Path(spec.origin).parent / "tokenizer" / "mm_embedding.py")))
    tower = load("qwen3_vl")
    view = to_exllama(tower, tower.encode([noise(90, 60, 2)])[0], space=TokenSpace())
    channel = SimpleNamespace(send=lambda tensor, cache_id: tensor, recv=lambda tensor: tensor)
    (received,) = theirs.recv_embeddings(channel, theirs.send_embeddings(channel, [view]))
    assert received.first_index == view.first_index
    assert received.last_index == view.last_index
    assert torch.equal(received.embeddings, view.embeddings)
    assert len(received.deepstack_embeddings) == len(view.deepstack_embeddings or [])
    original = theirs.MMEmbedding(embeddings=view.embeddings, token_string=torch.full((1, view.length), -1))
    public = [name for name in dir(original) if not name.startswith("_")]
    assert [name for name in public if not hasattr(view, name)] == []
    assert (original.full_length, original.mm_length) == (view.full_length, view.mm_length)
