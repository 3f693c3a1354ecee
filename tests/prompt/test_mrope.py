"""M-RoPE positions equal those of transformers for text, images, videos and padding, whole and in chunks."""

from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
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

# Model type → prefix of its class names.
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
    """Returns transformers' model without weights: its positions follow from the configuration."""
    prefix, package = MODELS[model_type], f"transformers.models.{model_type}"
    vision = {"depth": 1, "spatial_merge_size": merge, "deepstack_visual_indexes": [0]}
    if model_type == "qwen2_5_vl":
        # The default width of the class is not supported; no checkpoint has it.
        vision |= {"tokens_per_second": 7, "fullatt_block_indexes": [0], "hidden_size": 1280}
    configuration = getattr(import_module(f"{package}.configuration_{model_type}"), f"{prefix}Config")
    config = configuration(vision_config=vision, text_config={"num_hidden_layers": 1})
    with torch.device("meta"):
        return getattr(import_module(f"{package}.modeling_{model_type}"), f"{prefix}Model")(config)


@lru_cache
def read_rule(model_type: str, merge: int = 2) -> MropeRule:
    """Reads the rule from the same configuration."""
    rule = read_family(ConfigReader(reference(model_type, merge).config.to_dict(), "config.json")).mrope
    assert rule is not None
    return rule


@dataclass
class Case:
    """A batch of prompts: kinds of tokens per sequence, and grids in patches."""

    merge: int
    split: bool
    rows: list[list[int]] = field(default_factory=list)
    image_grids: list[tuple[int, int, int]] = field(default_factory=list)
    video_grids: list[tuple[int, int, int]] = field(default_factory=list)
    video_seconds: list[float] = field(default_factory=list)
    # Per image and per video: sequence, and index of its first token in it.
    begins: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: {IMAGE: [], VIDEO: []})
    before: list[int] = field(default_factory=list)
    types: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    mask: torch.Tensor | None = None
    seconds: Any = None

    def add(self, part: int | tuple[int, int, int], *, video: bool = False, seconds: float = 1.0) -> None:
        """Adds text tokens, or an image or video; a split video has a text token before each later temporal patch."""
        row = self.rows[-1]
        if isinstance(part, int):
            row += [TEXT] * part
            return
        kind = VIDEO if video else IMAGE
        self.begins[kind].append((len(self.rows) - 1, len(row)))
        frame = [kind] * (part[1] * part[2] // self.merge**2)
        row += frame + [*[TEXT] * (video and self.split), *frame] * (part[0] - 1)
        (self.video_grids if video else self.image_grids).append(part)
        if video:
            self.video_seconds.append(seconds)

    def pad(self, before: list[int]) -> None:
        """Makes types and mask ``[batch, length]`` with ``before[row]`` tokens of padding on the left."""
        self.before = before
        length = max(len(row) + left for row, left in zip(self.rows, before, strict=True))
        self.types = torch.full((len(self.rows), length), IMAGE)  # the type of padding has no effect
        mask = torch.zeros_like(self.types)
        for index, (row, left) in enumerate(zip(self.rows, before, strict=True)):
            self.types[index, left : left + len(row)] = torch.tensor(row)
            mask[index, left : left + len(row)] = 1
        self.mask = None if mask.all() else mask

    def compute(self, rule: MropeRule) -> MropePositions:
        return mrope_positions(
            rule,
            self.types,
            image_grids=self.image_grids,
            video_grids=self.video_grids,
            seconds_per_grid=self.seconds,
            attention_mask=self.mask,
        )


@st.composite
def cases(draw: st.DrawFn, *, split: bool) -> Case:
    merge = draw(st.integers(1, 3))
    case = Case(merge, split)
    sides = st.integers(1, 4).map(lambda side: side * merge)
    seconds = st.integers(1, 9).map(float) if WHOLE_SECONDS else st.floats(0.0, 9.0, width=32)
    for _ in range(draw(st.integers(1, 3))):
        case.rows.append([])
        for kind in draw(st.lists(st.sampled_from([IMAGE, VIDEO]), max_size=4)):
            case.add(draw(st.integers(1, 5)))
            if kind == IMAGE:
                case.add((1, draw(sides), draw(sides)))
            else:
                case.add((draw(st.integers(1, 4)), draw(sides), draw(sides)), video=True, seconds=draw(seconds))
        case.add(draw(st.integers(0 if case.rows[-1] else 1, 5)))
    case.pad([draw(st.integers(0, 3)) for _ in case.rows])
    dtypes = {"fp32": torch.float32, "fp64": torch.float64}
    chosen = draw(st.sampled_from(["none", "list", *dtypes]))
    if chosen in dtypes:
        case.seconds = torch.tensor(case.video_seconds, dtype=dtypes[chosen])
    elif chosen == "list":
        case.seconds = case.video_seconds
    return case


@pytest.mark.parametrize("model_type", MODELS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_positions_equal_those_of_transformers(model_type: str, data: st.DataObject) -> None:
    case = data.draw(cases(split=read_rule(model_type).split_videos))
    expected, expected_deltas = reference(model_type, case.merge).get_rope_index(
        case.types,
        case.types.int(),
        torch.tensor(case.image_grids) if case.image_grids else None,
        torch.tensor(case.video_grids) if case.video_grids else None,
        second_per_grid_ts=case.seconds,
        attention_mask=case.mask,
    )
    found = case.compute(read_rule(model_type, case.merge))
    assert found.positions.dtype == found.deltas.dtype == torch.int64
    assert torch.equal(found.positions, expected)
    assert torch.equal(found.deltas, expected_deltas)


def compute_chunks(rule: MropeRule, case: Case, cuts: list[int]) -> list[MropePositions]:
    """Computes the columns between each two cuts, with the grids of the images that begin there."""
    chunks: list[MropePositions] = []
    for start, end in pairwise([0, *sorted(cuts), case.types.shape[1]]):
        begun = {
            kind: [index for index, (row, token) in enumerate(begins) if start <= case.before[row] + token < end]
            for kind, begins in case.begins.items()
        }
        chunk = mrope_positions(
            rule,
            case.types[:, start:end],
            image_grids=[case.image_grids[index] for index in begun[IMAGE]],
            video_grids=[case.video_grids[index] for index in begun[VIDEO]],
            seconds_per_grid=None if case.seconds is None else [case.seconds[index] for index in begun[VIDEO]],
            attention_mask=None if case.mask is None else case.mask[:, start:end],
            states=chunks[-1].states if chunks else None,
            partial=end < case.types.shape[1],
        )
        chunks.append(chunk)
    return chunks


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_chunks_equal_the_whole(model_type: str, data: st.DataObject) -> None:
    case = data.draw(cases(split=read_rule(model_type).split_videos))
    rule = read_rule(model_type, case.merge)
    cuts = data.draw(st.lists(st.integers(0, case.types.shape[1]), max_size=6))
    whole, chunks = case.compute(rule), compute_chunks(rule, case, cuts)
    assert torch.equal(torch.cat([chunk.positions for chunk in chunks], -1), whole.positions)
    assert torch.equal(chunks[-1].deltas, whole.deltas)
    assert chunks[-1].states == whole.states


def one_prompt(*parts: Any) -> Case:
    """Makes one sequence: a number is text, a grid is an image."""
    case = Case(2, split=False, rows=[[]])
    for part in parts:
        case.add(part)
    case.pad([0])
    return case


def test_state_continues_twice_and_in_another_batch() -> None:
    first, second = one_prompt(3, (1, 4, 4), 3), one_prompt(1, (1, 2, 8), 5)
    rule = MropeRule(2)
    # Both are cut within their image; then they change places.
    start = [
        mrope_positions(rule, case.types[:, :4], image_grids=case.image_grids, partial=True) for case in (first, second)
    ]
    states = (start[1].states[0], start[0].states[0])
    for _ in range(2):
        rest = mrope_positions(rule, torch.cat([second.types[:, 4:], first.types[:, 4:]]), states=states)
        for row, case in enumerate((second, first)):
            whole = case.compute(rule)
            assert torch.equal(rest.positions[:, row], whole.positions[:, 0, 4:])
            assert rest.states[row] == whole.states[0]


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_encoded_prompts_in_chunks(model_type: str) -> None:
    """The aliases are in another order in the text than in the list; a split video has its timestamps as text."""
    config = reference(model_type, 2).config.to_dict()
    layout = read_family(ConfigReader(config, "config.json")).prompt

    def embedding(alias: str, *grid: int, **fields: Any) -> ImageEmbedding:
        rows, (temporal, lines, columns) = torch.zeros(grid[0] * grid[1] * grid[2] // 4, 8), grid
        size = (columns * 14, lines * 14)
        return ImageEmbedding(rows, (temporal, lines, columns), size, size, alias, text_alias=alias, **fields)

    images = [
        embedding("<b>", 1, 6, 4),
        embedding("<c>", 3, 4, 4, seconds_per_grid=2.0, timestamps=(1.0, 3.0, 5.0), is_video=True),
        embedding("<a>", 1, 2, 8),
    ]
    text = "look: <a><b> and <c>, then?"
    prompt = encode_prompt(lambda text: [*map(ord, text)], text, images, layout=layout, space=TokenSpace())
    expected, delta = reference(model_type, 2).get_rope_index(
        prompt.placeholder_ids[None],
        prompt.token_types[None],
        torch.tensor([(1, 2, 8), (1, 6, 4)]),
        torch.tensor([(3, 4, 4)]),
        second_per_grid_ts=[2.0],
    )
    rule = read_rule(model_type)
    whole = prompt_positions(rule, prompt)
    assert prompt.token_types.max() == VIDEO
    assert torch.equal(whole.positions, expected)
    assert torch.equal(whole.deltas, delta)
    for size in (1, 4, 7):
        state, found = None, []
        for part in prompt.token_types.split(size):
            chunk = prompt_positions(rule, prompt, tokens=len(part), state=state)
            (state,) = chunk.states
            found.append(chunk.positions)
        assert torch.equal(torch.cat(found, -1), expected)
        assert state == whole.states[0]
    with pytest.raises(UsageError, match="tokens must be 0 to 1, the rest of the prompt, got 3"):
        prompt_positions(rule, prompt, tokens=3, state=MropeState(tokens=len(prompt) - 1))


def test_empty_sequences_have_no_positions() -> None:
    empty = mrope_positions(MropeRule(2), torch.zeros(2, 0, dtype=torch.int64))
    assert (empty.positions.shape, empty.deltas.tolist()) == ((3, 2, 0), [[0], [0]])
    padding = mrope_positions(MropeRule(2), torch.zeros(1, 4), attention_mask=torch.zeros(1, 4))
    assert (padding.positions.sum(), padding.states) == (0, (MropeState(),))


def test_rules_of_published_checkpoints() -> None:
    rules = {summary.title: read_family(summary.reader).mrope for summary in list_summaries()}
    assert {title: rule for title, rule in rules.items() if rule is not None} == {
        "Qwen2-VL": MropeRule(merge=2),
        "Qwen2.5-VL": MropeRule(merge=2, positions_per_second=2),
        "Qwen3-VL": MropeRule(merge=2, split_videos=True),
        "Qwen3.5": MropeRule(merge=2, split_videos=True),
    }


IMAGE_OF_TWO = [TEXT, IMAGE, IMAGE, TEXT]
SPLIT = MropeRule(2, split_videos=True)


@pytest.mark.parametrize(
    ("types", "options", "message"),
    [
        (IMAGE_OF_TWO, {}, "token 1 of sequence 0 belongs to an image, but image_grids has no grid for it"),
        ([TEXT, VIDEO], {"image_grids": [(1, 2, 2)]}, "belongs to a video, but video_grids"),
        ([TEXT], {"image_grids": [(1, 2, 2)] * 3}, "image_grids has 3 more grids"),
        ([TEXT], {"video_grids": torch.tensor([[1, 2, 2]])}, "video_grids has 1 more grids"),
        (IMAGE_OF_TWO, {"image_grids": [(1, 2, 6)]}, "token 3 of sequence 0 interrupts an image after 2 of its 3"),
        ([VIDEO, IMAGE], {"video_grids": [(2, 2, 2)]}, "token 1 of sequence 0 interrupts a video"),
        (IMAGE_OF_TWO[:2], {"image_grids": [(1, 2, 4)]}, "must not end within an image .* pass partial=True"),
        ([TEXT], {"image_grids": [(1, 3, 2)]}, r"image_grids\[0\] must be .* multiples of 2, got '\[1, 3, 2\]'"),
        ([TEXT], {"image_grids": [(0, 2, 2)]}, r"image_grids\[0\]"),
        ([TEXT], {"video_grids": [(2, 2)]}, r"video_grids\[0\]"),
        ([VIDEO], {"video_grids": [(1, 2, 2)], "seconds_per_grid": [1.0, 2.0]}, "each of 1 videos, got 2"),
        ([VIDEO], {"video_grids": [(1, 2, 2)], "seconds_per_grid": [float("nan")]}, "at least 0 .* got nan"),
        ([VIDEO], {"video_grids": [(1, 2, 2)], "seconds_per_grid": [-1.0]}, "got -1.0"),
        ([VIDEO], {"video_grids": [(1, 2, 2)], "seconds_per_grid": [1e30]}, r"below position .* got 1e\+30"),
        ([TEXT, 3], {}, r"token_types must be .* got 3"),
        ([TEXT], {"attention_mask": torch.ones(1, 2)}, "attention_mask must have the shape"),
        ([TEXT], {"states": ()}, "each of 1 sequences, got 0"),
        ([], {"token_types": torch.zeros(4)}, r"token_types must be \[batch, length\], got shape \[4\]"),
        ([TEXT, VIDEO, TEXT], {"video_grids": [(3, 2, 2)], "rule": SPLIT}, "not end within a video of 2 more parts"),
    ],
)
def test_mismatched_arguments_are_rejected(types: list[int], options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"rule": MropeRule(2, positions_per_second=2), "token_types": torch.tensor([types])}
    with pytest.raises(UsageError, match=message):
        mrope_positions(**arguments | options)
