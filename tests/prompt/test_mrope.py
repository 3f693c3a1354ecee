"""M-RoPE positions: those of transformers for any layout of text, images, videos and padding, whole or in chunks."""

from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.embedding import ImageEmbedding
from tritontower.errors import UsageError
from tritontower.models.common.registry import list_summaries, read_family
from tritontower.prompt import (
    MropePositions,
    MropeRule,
    MropeState,
    TokenSpace,
    encode_prompt,
    mrope_positions,
    prompt_positions,
)

TEXT, IMAGE, VIDEO = 0, 1, 2
# Before 5.18 transformers rounded the seconds between two temporal patches down to whole ones.
WHOLE_SECONDS = Version(transformers.__version__) < Version("5.18")

# Model type → what its classes' names begin with.
MODELS = {
    "qwen2_vl": "Qwen2VL",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "qwen3_vl_moe": "Qwen3VLMoe",
    "qwen3_5": "Qwen3_5",
    "qwen3_5_moe": "Qwen3_5Moe",
}


@lru_cache
def reference(model_type: str, merge: int) -> Any:
    """transformers' model without weights: its positions follow from the configuration."""
    prefix, package = MODELS[model_type], f"transformers.models.{model_type}"
    vision = {"depth": 1, "spatial_merge_size": merge, "deepstack_visual_indexes": [0]}
    if model_type == "qwen2_5_vl":
        # The width of the class is one that no checkpoint has, and no tower.
        vision |= {"tokens_per_second": 7, "fullatt_block_indexes": [0], "hidden_size": 1280}
    configuration = getattr(import_module(f"{package}.configuration_{model_type}"), f"{prefix}Config")
    config = configuration(vision_config=vision, text_config={"num_hidden_layers": 1})
    with torch.device("meta"):
        return getattr(import_module(f"{package}.modeling_{model_type}"), f"{prefix}Model")(config)


@lru_cache
def rule_of(model_type: str, merge: int = 2) -> MropeRule:
    """What the family file makes of the same configuration."""
    rule = read_family(ConfigReader(reference(model_type, merge).config.to_dict(), "config.json")).mrope
    assert rule is not None
    return rule


@dataclass
class Prompts:
    """A batch of prompts under construction; grids in patches."""

    merge: int
    split: bool
    rows: list[list[int]] = field(default_factory=list)
    image_grids: list[tuple[int, int, int]] = field(default_factory=list)
    video_grids: list[tuple[int, int, int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    # Per image and per video: sequence, and number of its first token in it.
    begins: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: {IMAGE: [], VIDEO: []})

    def new(self) -> None:
        self.rows.append([])

    def text(self, tokens: int) -> None:
        self.rows[-1] += [TEXT] * tokens

    def image(self, grid: tuple[int, int, int]) -> None:
        self._begin(IMAGE, self.image_grids, grid)
        self.rows[-1] += [IMAGE] * self._tokens(grid)

    def video(self, grid: tuple[int, int, int], seconds: float = 1.0) -> None:
        """Where videos are split, a text token stands before every temporal patch but the first."""
        self._begin(VIDEO, self.video_grids, grid)
        self.seconds.append(seconds)
        if self.split:
            frame = [VIDEO] * self._tokens((1, *grid[1:]))
            self.rows[-1] += frame + [TEXT, *frame] * (grid[0] - 1)
        else:
            self.rows[-1] += [VIDEO] * self._tokens(grid)

    def _begin(self, kind: int, grids: list[tuple[int, int, int]], grid: tuple[int, int, int]) -> None:
        self.begins[kind].append((len(self.rows) - 1, len(self.rows[-1])))
        grids.append(grid)

    def _tokens(self, grid: tuple[int, int, int]) -> int:
        return grid[0] * grid[1] * grid[2] // self.merge**2

    def padded(self, before: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Types and mask ``[batch, length]``, ``before[row]`` tokens of padding on the left and the others on the right."""
        length = max(len(row) + left for row, left in zip(self.rows, before, strict=True))
        types = torch.full((len(self.rows), length), TEXT)
        mask = torch.zeros_like(types)
        for index, (row, left) in enumerate(zip(self.rows, before, strict=True)):
            types[index, left : left + len(row)] = torch.tensor(row)
            mask[index, left : left + len(row)] = 1
        return types, mask


@dataclass
class Case:
    prompts: Prompts
    types: torch.Tensor
    mask: torch.Tensor | None
    before: list[int]
    seconds: Any

    @property
    def grids(self) -> dict[str, Any]:
        return {"image_grids": self.prompts.image_grids, "video_grids": self.prompts.video_grids}


@st.composite
def cases(draw: st.DrawFn, *, split: bool, most_rows: int = 3) -> Case:
    merge = draw(st.integers(1, 3))
    prompts = Prompts(merge, split)
    sides = st.integers(1, 4).map(lambda side: side * merge)
    seconds = st.integers(1, 9).map(float) if WHOLE_SECONDS else st.floats(0.0, 9.0, width=32)
    for _ in range(draw(st.integers(1, most_rows))):
        prompts.new()
        for kind in draw(st.lists(st.sampled_from([IMAGE, VIDEO]), max_size=4)):
            prompts.text(draw(st.integers(1, 5)))
            if kind == IMAGE:
                prompts.image((1, draw(sides), draw(sides)))
            else:
                prompts.video((draw(st.integers(1, 4)), draw(sides), draw(sides)), draw(seconds))
        prompts.text(draw(st.integers(0 if prompts.rows[-1] else 1, 5)))
    before = [draw(st.integers(0, 3)) for _ in prompts.rows]
    types, mask = prompts.padded(before)
    given_seconds = {
        "none": None,
        "list": prompts.seconds,
        "fp32": torch.tensor(prompts.seconds, dtype=torch.float32),
        "fp64": torch.tensor(prompts.seconds, dtype=torch.float64),
    }
    chosen = draw(st.sampled_from(list(given_seconds)))
    return Case(prompts, types, None if mask.all() else mask, before, given_seconds[chosen])


def by_transformers(model_type: str, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    prompts = case.prompts
    return reference(model_type, prompts.merge).get_rope_index(
        case.types,
        case.types.int(),
        torch.tensor(prompts.image_grids) if prompts.image_grids else None,
        torch.tensor(prompts.video_grids) if prompts.video_grids else None,
        second_per_grid_ts=case.seconds,
        attention_mask=case.mask,
    )


@pytest.mark.parametrize("model_type", MODELS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_positions_and_deltas_are_those_of_transformers(model_type: str, data: st.DataObject) -> None:
    case = data.draw(cases(split=rule_of(model_type).split_videos))
    expected, expected_deltas = by_transformers(model_type, case)
    rule = rule_of(model_type, case.prompts.merge)
    found = mrope_positions(rule, case.types, **case.grids, seconds_per_grid=case.seconds, attention_mask=case.mask)
    assert found.positions.dtype == found.deltas.dtype == torch.int64
    assert torch.equal(found.positions, expected)
    assert torch.equal(found.deltas, expected_deltas)


def in_chunks(rule: MropeRule, case: Case, cuts: list[int]) -> list[MropePositions]:
    """The columns between each two cuts, chunk by chunk, each with the grids of what begins in it."""
    edges = [0, *sorted(cuts), case.types.shape[1]]
    chunks: list[MropePositions] = []
    for start, end in pairwise(edges):
        begun = {
            kind: [index for index, (row, token) in enumerate(begins) if start <= case.before[row] + token < end]
            for kind, begins in case.prompts.begins.items()
        }
        chunks.append(
            mrope_positions(
                rule,
                case.types[:, start:end],
                image_grids=[case.prompts.image_grids[index] for index in begun[IMAGE]],
                video_grids=[case.prompts.video_grids[index] for index in begun[VIDEO]],
                seconds_per_grid=None if case.seconds is None else [case.seconds[index] for index in begun[VIDEO]],
                attention_mask=None if case.mask is None else case.mask[:, start:end],
                states=chunks[-1].states if chunks else None,
                partial=end < case.types.shape[1],
            )
        )
    return chunks


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_chunks_cut_anywhere_are_the_whole(model_type: str, data: st.DataObject) -> None:
    case = data.draw(cases(split=rule_of(model_type).split_videos))
    rule = rule_of(model_type, case.prompts.merge)
    cuts = data.draw(st.lists(st.integers(0, case.types.shape[1]), max_size=6))
    whole = mrope_positions(rule, case.types, **case.grids, seconds_per_grid=case.seconds, attention_mask=case.mask)
    chunks = in_chunks(rule, case, cuts)
    assert torch.equal(torch.cat([chunk.positions for chunk in chunks], -1), whole.positions)
    assert torch.equal(chunks[-1].deltas, whole.deltas)
    assert chunks[-1].states == whole.states


def prompt(*parts: Any, merge: int = 2, split: bool = False) -> Case:
    """One sequence: a number is text, a grid with one temporal patch an image, any other grid a video."""
    prompts = Prompts(merge, split)
    prompts.new()
    for part in parts:
        if isinstance(part, int):
            prompts.text(part)
        elif part[0] == 1:
            prompts.image(part)
        else:
            prompts.video(part)
    types, _ = prompts.padded([0])
    return Case(prompts, types, None, [0], None)


def test_an_image_between_texts_by_hand() -> None:
    case = prompt(2, (1, 4, 6), 2)
    found = mrope_positions(MropeRule(2), case.types, **case.grids)
    assert found.positions[:, 0].tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert found.deltas.tolist() == [[-3]]


def test_seconds_are_scaled_and_then_rounded_down() -> None:
    case = prompt(1, (4, 2, 2), 1)
    found = mrope_positions(MropeRule(2, positions_per_second=2), case.types, **case.grids, seconds_per_grid=[0.75])
    assert found.positions[0, 0].tolist() == [0, 1, 2, 4, 5, 2]
    # Text goes on at the video's side, generated tokens behind the largest position.
    assert found.deltas.tolist() == [[0]]


def test_images_without_text_between_them_are_told_apart_by_their_grids() -> None:
    together = prompt(1, (1, 2, 4), (1, 4, 2), 1)
    found = mrope_positions(MropeRule(2), together.types, **together.grids)
    assert found.positions[:, 0].tolist() == [[0, 1, 1, 3, 3, 5], [0, 1, 1, 3, 4, 5], [0, 1, 2, 3, 3, 5]]


def test_every_side_of_padding_leaves_the_positions_alone() -> None:
    alone = prompt(2, (1, 4, 4), 3)
    expected = mrope_positions(MropeRule(2), alone.types, **alone.grids)
    length = alone.types.shape[1]
    for left, right in ((3, 0), (0, 3), (2, 1)):
        types = torch.nn.functional.pad(alone.types, (left, right), value=IMAGE)
        mask = torch.nn.functional.pad(torch.ones_like(alone.types), (left, right)).bool()
        found = mrope_positions(MropeRule(2), types, **alone.grids, attention_mask=mask)
        assert torch.equal(found.positions[:, :, left : left + length], expected.positions)
        assert not found.positions[:, ~mask].any()
        assert torch.equal(found.deltas, expected.deltas)


def test_a_state_can_be_gone_on_from_twice_and_in_another_batch() -> None:
    first, second = prompt(3, (1, 4, 4), 3), prompt(1, (1, 2, 8), 5)
    rule = MropeRule(2)
    # Both are cut within their image; then they change places.
    start = [
        mrope_positions(rule, case.types[:, :4], image_grids=case.prompts.image_grids, partial=True)
        for case in (first, second)
    ]
    states = (start[1].states[0], start[0].states[0])
    for _ in range(2):
        rest = mrope_positions(rule, torch.cat([second.types[:, 4:], first.types[:, 4:]]), states=states)
        for row, case in enumerate((second, first)):
            whole = mrope_positions(rule, case.types, **case.grids)
            assert torch.equal(rest.positions[:, row], whole.positions[:, 0, 4:])
            assert rest.states[row] == whole.states[0]


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_generated_tokens_go_on_where_transformers_goes_on(model_type: str) -> None:
    case = prompt(2, (1, 4, 4), 1, (4, 2, 2), 1, split=rule_of(model_type).split_videos)
    found = mrope_positions(rule_of(model_type), case.types, **case.grids)
    model, length = reference(model_type, 2), case.types.shape[1]
    model.rope_deltas = by_transformers(model_type, case)[1]
    try:
        expected = model.compute_3d_position_ids(
            input_ids=None,
            inputs_embeds=torch.zeros(1, 3, 4),
            image_grid_thw=None,
            video_grid_thw=None,
            attention_mask=None,
            past_key_values=SimpleNamespace(get_seq_length=lambda: length),
        )
    finally:
        model.rope_deltas = None
    assert torch.equal(torch.arange(length, length + 3).expand(3, 1, 3) + found.deltas, expected)


@pytest.mark.parametrize("split", [False, True])
def test_pieces_of_an_encoded_prompt_are_those_of_the_whole(split: bool) -> None:
    case = prompt(3, (1, 4, 4), 2, (3, 2, 4), 2, (1, 2, 2), 1, split=split)
    begins = [(IMAGE, 0), (VIDEO, 0), (IMAGE, 1)]
    grids = {IMAGE: case.prompts.image_grids, VIDEO: case.prompts.video_grids}
    starts = [case.prompts.begins[kind][index][1] for kind, index in begins]
    images = [SimpleNamespace(grid_thw=grids[kind][index], seconds_per_grid=0.5) for kind, index in begins]
    # Aliases may stand in the text in another order than that of the list.
    order = [2, 0, 1]
    encoded = SimpleNamespace(
        token_types=case.types[0],
        embeddings=[images[index] for index in order],
        spans=[(starts[index], starts[index] + 1) for index in order],
    )
    rule = MropeRule(2, positions_per_second=4, split_videos=split)
    whole = mrope_positions(rule, case.types, **case.grids, seconds_per_grid=[0.5])
    assert torch.equal(prompt_positions(rule, encoded).positions, whole.positions)
    for size in (1, 4, 7):
        state, found = None, []
        for part in case.types[0].split(size):
            piece = prompt_positions(rule, encoded, tokens=len(part), state=state)
            (state,) = piece.states
            found.append(piece.positions)
        assert torch.equal(torch.cat(found, -1), whole.positions)
        assert state == whole.states[0]


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_encoded_prompts_have_the_positions_of_transformers(model_type: str) -> None:
    """Images and a video by their aliases, the video's time stamps in the text where the model wants them."""
    config = reference(model_type, 2).config.to_dict()
    layout = read_family(ConfigReader(config, "config.json")).prompt
    assert layout is not None

    def embedding(alias: str, *grid: int, **facts: Any) -> ImageEmbedding:
        rows, (temporal, lines, columns) = torch.zeros(grid[0] * grid[1] * grid[2] // 4, 8), grid
        size = (columns * 14, lines * 14)
        return ImageEmbedding(rows, (temporal, lines, columns), size, size, alias, text_alias=alias, **facts)

    images = [
        embedding("<b>", 1, 6, 4),
        embedding("<c>", 3, 4, 4, seconds_per_grid=2.0, timestamps=(1.0, 3.0, 5.0), is_video=True),
        embedding("<a>", 1, 2, 8),
    ]
    prompt = encode_prompt(
        lambda text: [ord(letter) for letter in text],
        "look: <a><b> and <c>, then?",
        images,
        layout=layout,
        space=TokenSpace(),
    )
    types = prompt.token_types[None]
    expected, delta = reference(model_type, 2).get_rope_index(
        prompt.placeholder_ids[None],
        types,
        torch.tensor([(1, 2, 8), (1, 6, 4)]),
        torch.tensor([(3, 4, 4)]),
        second_per_grid_ts=[2.0],
    )
    found = prompt_positions(rule_of(model_type), prompt)
    assert types.max() == VIDEO
    assert torch.equal(found.positions, expected)
    assert torch.equal(found.deltas, delta)


def test_a_prompt_has_no_more_pieces_than_tokens() -> None:
    encoded = SimpleNamespace(token_types=torch.zeros(5, dtype=torch.int64), embeddings=[], spans=[])
    with pytest.raises(UsageError, match="a piece of 3 tokens behind the first 4 of a prompt of 5"):
        prompt_positions(MropeRule(2), encoded, tokens=3, state=MropeState(tokens=4))


def test_nothing_has_no_positions() -> None:
    empty = mrope_positions(MropeRule(2), torch.zeros(2, 0, dtype=torch.int64))
    assert (empty.positions.shape, empty.deltas.tolist()) == ((3, 2, 0), [[0], [0]])
    padding = mrope_positions(MropeRule(2), torch.zeros(1, 4), attention_mask=torch.zeros(1, 4))
    assert (padding.positions.sum(), padding.states) == (0, (MropeState(),))


def test_family_files_know_the_rules_of_published_checkpoints() -> None:
    rules = {summary.title: read_family(summary.reader).mrope for summary in list_summaries()}
    assert {title: rule for title, rule in rules.items() if rule is not None} == {
        "Qwen2-VL": MropeRule(merge=2),
        "Qwen2.5-VL": MropeRule(merge=2, positions_per_second=2),
        "Qwen3-VL": MropeRule(merge=2, split_videos=True),
        "Qwen3.5": MropeRule(merge=2, split_videos=True),
    }


IMAGE_OF_TWO = [TEXT, IMAGE, IMAGE, TEXT]


@pytest.mark.parametrize(
    ("types", "options", "message"),
    [
        (IMAGE_OF_TWO, {}, "token 1 of sequence 0 belongs to an image that image_grids has no grid for"),
        ([TEXT, VIDEO], {"image_grids": [(1, 2, 2)]}, "a video that video_grids has no grid for"),
        ([TEXT], {"image_grids": [(1, 2, 2)] * 3}, "image_grids has 3 more grids than images begin"),
        ([TEXT], {"video_grids": torch.tensor([[1, 2, 2]])}, "video_grids has 1 more grids than videos begin"),
        (IMAGE_OF_TWO, {"image_grids": [(1, 2, 6)]}, "token 3 of sequence 0 interrupts an image .* 2 of 3 tokens"),
        ([VIDEO, IMAGE], {"video_grids": [(2, 2, 2)]}, "token 1 of sequence 0 interrupts a clip"),
        (IMAGE_OF_TWO[:2], {"image_grids": [(1, 2, 4)]}, "ends within an image .* needs partial=True"),
        ([TEXT], {"image_grids": [(1, 3, 2)]}, r"image_grids\[0\] is '\[1, 3, 2\]'; allowed: .* multiples of 2"),
        ([TEXT], {"image_grids": [(0, 2, 2)]}, r"image_grids\[0\]"),
        ([TEXT], {"video_grids": [(2, 2)]}, r"video_grids\[0\]"),
        ([VIDEO], {"video_grids": [(1, 2, 2)], "seconds_per_grid": [1.0, 2.0]}, "2 entries for 1 clips"),
        ([VIDEO], {"video_grids": [(1, 2, 2)], "seconds_per_grid": [float("nan")]}, "holds nan; allowed: at least 0"),
        ([VIDEO], {"video_grids": [(1, 2, 2)], "seconds_per_grid": [-1.0]}, "holds -1.0; allowed: at least 0"),
        ([VIDEO], {"video_grids": [(1, 2, 2)], "seconds_per_grid": [1e30]}, r"holds 1e\+30; .* before position"),
        ([TEXT, 3], {}, r"token_types holds 3; allowed: 0 \(text\)"),
        ([TEXT], {"attention_mask": torch.ones(1, 2)}, "attention_mask has the shape"),
        ([TEXT], {"states": ()}, "states has 0 entries for 1 sequences"),
    ],
)
def test_what_does_not_fit_is_an_error(types: list[int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mrope_positions(MropeRule(2, positions_per_second=2), torch.tensor([types]), **options)


def test_types_have_two_dimensions() -> None:
    with pytest.raises(UsageError, match=r"token_types has the shape \[4\]"):
        mrope_positions(MropeRule(2), torch.zeros(4))


def test_a_split_video_has_to_come_to_its_end() -> None:
    rule = MropeRule(2, split_videos=True)
    with pytest.raises(UsageError, match="sequence 0 ends within a video of 2 more parts"):
        mrope_positions(rule, torch.tensor([[TEXT, VIDEO, TEXT]]), video_grids=[(3, 2, 2)])
