"""Towers in models of transformers: the same tokens as without one, vision weights in memory once, and restoring."""

import copy
import gc
import inspect
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from support.checkpoints import noise
from support.mistral_format import to_mistral_format
from support.processes import run_python
from support.towers import TowerCase, all_cases, qwen
from support.vlms import VOCABULARY, WORDS, save_tokenizer, save_wide, update_json, word_tokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tritontower import VisionTower, errors
from tritontower.embedding import ImageEmbedding
from tritontower.integrations import transformers as integration
from tritontower.integrations.transformers import attention, loading
from tritontower.kernels.runtime.segments import Segments
from tritontower.parity.parity import relative_error
from tritontower.prompt import TokenSpace, encode_prompt, merge_embeddings, prompt_positions, sanitize_ids

NAMES = ["gemma3", "gemma3-pan-and-scan", "llava", "llava-siglip", "llava_next", "llava_onevision", "mistral3"]
NAMES += ["paligemma", "pixtral", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]
CASES = {case.name: case for case in all_cases()}
each_case = pytest.mark.parametrize("name", NAMES)

START, STOP, IMAGE, VIDEO, END = 58, 59, 60, 61, 63
NEW_TOKENS = 4
# transformers 5.17 takes image embeddings only as part of `inputs_embeds`.
TAKES_OUTPUTS = "mm_encoder_outputs" in inspect.signature(transformers.LlavaForConditionalGeneration.forward).parameters
# Their `generate` takes no `inputs_embeds`; calling them does.
NO_GENERATE_FROM_EMBEDDINGS = ("gemma3", "paligemma")


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logits: torch.Tensor


@dataclass(frozen=True)
class Question:
    """A model, a prompt with images as its inputs, and the answer of transformers alone."""

    model: Any
    folder: Path
    images: list[np.ndarray]
    embeddings: list[ImageEmbedding]
    input_ids: torch.Tensor
    text_inputs: dict[str, Any]
    pixel_inputs: dict[str, Any]
    answer: Answer

    @property
    def inputs_without_pixels(self) -> dict[str, Any]:
        return self.text_inputs | {name: value for name, value in self.pixel_inputs.items() if "pixel" not in name}

    @property
    def inputs(self) -> dict[str, Any]:
        return {"input_ids": self.input_ids, **self.text_inputs, **self.pixel_inputs}

    def ask(self, **inputs: Any) -> Answer:
        """Asks with the images, or with other inputs than the prompt's tokens."""
        return generate(self.model, {"input_ids": self.input_ids, **inputs} if inputs else self.inputs)


def generate(model: Any, inputs: Mapping[str, Any]) -> Answer:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": END}
    output = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return Answer(output.sequences[0, -len(output.logits) :].tolist(), torch.stack(output.logits))


def assert_same(one: Answer, other: Answer) -> None:
    assert one.tokens == other.tokens
    assert (one.logits - other.logits).abs().max() <= 1e-4


def load_model(folder: Path, **options: Any) -> Any:
    attention = {"": "sdpa", "vision_config": "sdpa", "text_config": "eager"}
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, **{"attn_implementation": attention, **options}
    )
    config = model.config
    # Placeholders within the small vocabulary.
    config.image_token_id = IMAGE
    if hasattr(config, "vision_start_token_id"):
        config.vision_start_token_id, config.vision_end_token_id = START, STOP
    if hasattr(config, "boi_token_index"):
        config.boi_token_index, config.eoi_token_index = START, STOP
    if hasattr(config, "video_token_id"):
        config.video_token_id = VIDEO
    return model.eval()


def process(folder: Path, config: Any, images: list[np.ndarray]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if config.vision_config.model_type == "pixtral":
        side = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
        options["patch_size"] = {"height": side, "width": side}
    if config.model_type == "gemma3":
        options["do_convert_rgb"] = False
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    inputs = dict(processor([Image.fromarray(image) for image in images], return_tensors="pt", **options))
    inputs.pop("num_crops", None)
    return inputs


def make_prompt(model: Any, embeddings: list[ImageEmbedding], pixels: Mapping[str, Any]) -> dict[str, Any]:
    ids = [1, 2]
    for embedding in embeddings:
        ids += [IMAGE] * embedding.num_tokens + [3, 4]
    input_ids = torch.tensor([ids])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    kinds = (input_ids == IMAGE).int()
    if "image_grid_thw" in pixels:
        inputs["mm_token_type_ids"] = kinds
    if model.config.model_type in NO_GENERATE_FROM_EMBEDDINGS:
        inputs["token_type_ids"] = kinds
    return inputs


Ask = Callable[[str], Question]


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """Makes a model and a prompt once; tests must leave the model unchanged."""
    made: dict[str, Question] = {}

    def make(name: str) -> Question:
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                # As many layers as deepstack levels, so that all levels are used.
                patch.setitem(qwen.TEXT, "num_hidden_layers", 2)
                patch.setitem(qwen.HYBRID, "layer_types", ["full_attention", "full_attention"])
                folder = CASES[name].save(tmp_path_factory.mktemp("models") / name)
            made[name] = make_question(CASES[name], folder)
        return made[name]

    return make


def make_question(case: TowerCase, folder: Path) -> Question:
    model = load_model(folder)
    # transformers' processor crops only a single image.
    images = [noise(57, 43, 1), noise(90, 60, 2)][: 1 if "pan" in case.name else 2]
    embeddings = VisionTower.from_pretrained(folder, device="cpu").encode(images)
    pixels = process(folder, model.config, images)
    text = make_prompt(model, embeddings, pixels)
    input_ids = text.pop("input_ids")
    answer = generate(model, {"input_ids": input_ids, **text, **pixels})
    return Question(model, folder, images, embeddings, input_ids, text, pixels, answer)


def vision_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    parts = {"visual", "vision_tower", "multi_modal_projector"}
    return {name: parameter for name, parameter in model.named_parameters() if parts & set(name.split("."))}


Swap = Callable[..., tuple[Question, Any, integration.AcceleratedVision]]


@pytest.fixture
def swap(question: Ask) -> Swap:
    """Loads a new model of a question and puts a tower in place of its vision modules."""

    def make(name: str, *, dtype: Any = "auto", **options: Any) -> tuple[Question, Any, integration.AcceleratedVision]:
        model = load_model(question(name).folder, dtype=dtype)
        return question(name), model, integration.accelerate_vision(model, **options)

    return make


@contextmanager
def swapped(model: Any, **options: Any) -> Iterator[integration.AcceleratedVision]:
    state = integration.accelerate_vision(model, **options)
    try:
        yield state
    finally:
        integration.restore(model)


@each_case
def test_swap_keeps_answers_and_restores_everything(question: Ask, name: str) -> None:
    asked = question(name)
    before = {key: value.clone() for key, value in asked.model.state_dict().items()}
    parameters = dict(asked.model.named_parameters())
    with swapped(asked.model) as state:
        state.tower.run = run = Mock(wraps=state.tower.run)  # type: ignore[method-assign]
        assert integration.accelerated(asked.model) is state
        assert_same(asked.ask(), asked.answer)
        assert run.call_count == 1
        during = asked.model.state_dict()
        assert all(torch.equal(during[key], value) for key, value in before.items())
    assert integration.accelerated(asked.model) is None
    assert dict(asked.model.named_parameters()) == parameters
    after = asked.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) and after[key].is_contiguous() for key, value in before.items())
    again = asked.ask()
    assert torch.equal(again.logits, asked.answer.logits)
    assert run.call_count == 1
    # The answer depends on the images.
    others = process(asked.folder, asked.model.config, [255 - image for image in asked.images])
    other = asked.ask(**asked.text_inputs, **others)
    assert (other.logits[0] - asked.answer.logits[0]).abs().max() > 1e-3


@each_case
def test_weights_are_shared_and_saved_unchanged(question: Ask, name: str, tmp_path: Path) -> None:
    asked = question(name)
    with swapped(asked.model) as state:
        vision = vision_parameters(asked.model)
        assert state.shared_bytes + state.kept_bytes == sum(parameter.nbytes for parameter in vision.values())
        assert state.released_bytes == 0
        blocks = {parameter.untyped_storage().data_ptr() for parameter in state.shared_parameters.values()}
        assert len(blocks) == 1
        apart = {key for key, weight in vision.items() if weight.untyped_storage().data_ptr() not in blocks}
        # The others are stored in another order, or not needed by the tower.
        words = ("merging_layer", "position_embedding", "class_embedding", "layers.2.", "post_layernorm", "head.")
        assert [key for key in apart if not any(word in key for word in words)] == []
        asked.model.save_pretrained(tmp_path)
    own = {parameter.untyped_storage().data_ptr() for parameter in vision_parameters(asked.model).values()}
    assert len(own) == len(vision)
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path, asked.folder))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], value) for key, value in original.items())


@each_case
def test_text_and_padded_batches(question: Ask, name: str) -> None:
    asked = question(name)
    model = asked.model
    ids = torch.tensor([[1, 2, 3, 4]])
    longest = max(one.num_tokens for one in asked.embeddings) + 2
    rows = [[1] + [IMAGE] * one.num_tokens + [2] for one in asked.embeddings]
    input_ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    kinds = dict.fromkeys(
        {"mm_token_type_ids", "token_type_ids"} & asked.text_inputs.keys(), (input_ids == IMAGE).int()
    )
    padded = {"input_ids": input_ids, "attention_mask": (input_ids != 0).int(), **kinds}
    with torch.no_grad():
        # Text first: Qwen models keep the position offsets of the last batch.
        text = model(input_ids=ids).logits
        assert (model(inputs_embeds=integration.inputs_embeds(model, ids, [])).logits - text).abs().max() <= 1e-5
        with swapped(model):
            assert torch.equal(model(input_ids=ids).logits, text)
        batch = model(**padded, **asked.pixel_inputs).logits
        with swapped(model):
            assert relative_error(model(**padded, **asked.pixel_inputs).logits, batch) <= 1e-5
        if "image_grid_thw" not in asked.pixel_inputs:
            embeds = integration.inputs_embeds(model, padded.pop("input_ids"), asked.embeddings)
            assert relative_error(model(inputs_embeds=embeds, **padded).logits, batch) <= 1e-5


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_videos(question: Ask, name: str) -> None:
    asked = question(name)
    model, tower = asked.model, VisionTower.from_pretrained(asked.folder, device="cpu")
    video = [noise(80, 60, seed) for seed in range(4)]
    batch = tower.preprocess_video(video)
    pixels, grids = tower.family.reference.inputs(model.model, batch, tower.config)
    temporal = int(grids[0, 0])
    each = batch.images.token_counts[0] // temporal
    # Qwen3-VL has text between the temporal patches of a video.
    pieces = [[VIDEO] * each + [5] for _ in range(temporal)] if name == "qwen3_vl" else [[VIDEO] * each * temporal]
    input_ids = torch.tensor([[1, *(token for piece in pieces for token in piece), 3]])
    inputs = {"input_ids": input_ids, "mm_token_type_ids": (input_ids == VIDEO).int() * 2, "video_grid_thw": grids}
    expected = generate(model, {**inputs, "pixel_values_videos": pixels})
    with swapped(model):
        assert_same(generate(model, {**inputs, "pixel_values_videos": pixels}), expected)
    embedding = tower.encode_video(video)
    with integration.added_deepstack(model, input_ids, (), videos=embedding):
        rows = integration.inputs_embeds(model, input_ids, (), videos=[embedding])
        assert_same(generate(model, {**inputs, "inputs_embeds": rows}), expected)
    if TAKES_OUTPUTS:
        outputs = integration.encoder_outputs(model, (), videos=embedding)
        assert list(outputs) == ["video"]
        assert_same(generate(model, {**inputs, "mm_encoder_outputs": outputs}), expected)


def test_onevision_frames_and_images_without_tiles(question: Ask) -> None:
    """Several images of one prompt have no tiles."""
    model = question("llava_onevision").model
    side = model.config.vision_config.image_size
    pixels = torch.randn(2, 3, 3, side, side, generator=torch.Generator().manual_seed(0))
    images = {"image_sizes": torch.tensor([[40, 70], [33, 21]]), "batch_num_images": torch.tensor([2])}

    def encode() -> list[torch.Tensor]:
        with torch.no_grad():
            found = model.get_video_features(pixels), model.get_image_features(pixels[:, :1], **images)
        return [rows for output in found for rows in output.pooler_output]

    expected = encode()
    with swapped(model):
        assert [relative_error(ours, rows) <= 1e-5 for ours, rows in zip(encode(), expected, strict=True)] == [True] * 4


@pytest.mark.parametrize(("name", "given"), [("qwen2_5_vl", True), ("mistral3", False)])
def test_vision_weights_can_be_released(question: Ask, name: str, given: bool) -> None:
    asked = question(name)
    model = load_model(asked.folder)
    alive = [weakref.ref(parameter) for parameter in vision_parameters(model).values()]
    total = sum(parameter.nbytes for parameter in vision_parameters(model).values())
    tower = VisionTower.from_pretrained(asked.folder, device="cpu") if given else None
    state = integration.accelerate_vision(model, tower=tower, release=True)
    assert (state.shared_bytes, state.kept_bytes, state.released_bytes) == (0, 0, total)
    assert vision_parameters(model) == {}
    assert state.tower.graph.parameters * 4 == total
    assert total <= state.tower.weights_bytes < 1.5 * total, "weights are padded, but exist once"
    gc.collect()
    assert [reference() for reference in alive if reference() is not None] == []
    assert_same(generate(model, asked.inputs), asked.answer)
    with pytest.raises(errors.UsageError, match=r"were released \(release=True"):
        integration.restore(model)
    if given:
        with pytest.raises(errors.UsageError, match="since a tower replaced it"):
            model.model.visual(torch.zeros(1))


def test_classifier_that_contains_a_vlm(tmp_path: Path) -> None:
    folder = CASES["shieldgemma2"].save(tmp_path / "model")
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    holder = model.model.model
    pixels = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = holder.get_image_features(pixels).pooler_output
        integration.accelerate_vision(model)
        assert relative_error(holder.get_image_features(pixels).pooler_output, expected) <= 1e-5


@pytest.mark.parametrize(("name", "given"), [("gemma3", True), ("llava", False)])
def test_tower_may_have_another_dtype(question: Ask, name: str, given: bool) -> None:
    asked = question(name)
    tower = VisionTower.from_pretrained(asked.folder, device="cpu", dtype="bfloat16") if given else None
    with swapped(asked.model, tower=tower, dtype=torch.bfloat16) as state:
        assert state.tower.dtype == torch.bfloat16
        assert state.shared_bytes == 0
        assert state.kept_bytes == sum(weight.nbytes for weight in vision_parameters(asked.model).values())
        answer = asked.ask()
        assert 1e-6 < relative_error(answer.logits[0], asked.answer.logits[0]) < 0.05
    assert torch.equal(asked.ask().logits, asked.answer.logits)


@pytest.mark.parametrize("source", ["folder", "processor", "nothing", "hub"])
def test_tower_of_a_model_finds_its_image_processor(
    question: Ask, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory the current folder is not used; a repository's files come from the cache."""
    asked, processor = question("gemma3"), None
    model, name = load_model(asked.folder), str(asked.folder)
    if source == "processor":
        processor = AutoImageProcessor.from_pretrained(asked.folder, backend="pil", trust_remote_code=False)
    if source in ("processor", "nothing"):
        name = ""
        monkeypatch.chdir(asked.folder)
    if source == "hub":
        name, model.config._commit_hash = "somebody/model", "0123456789" * 4
        snapshot = tmp_path / "models--somebody--model" / "snapshots" / model.config._commit_hash
        shutil.copytree(asked.folder, snapshot)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model.name_or_path = model.config.name_or_path = name
    tower = integration.accelerate_vision(model, processor=processor).tower
    if source == "nothing":
        with pytest.raises(errors.ProcessorError, match=r"Gemma3ForConditionalGeneration in memory>"):
            tower.encode(asked.images)
        return
    assert source != "hub" or tower.folder == snapshot
    assert torch.equal(tower.encode(asked.images)[0].embeddings, asked.embeddings[0].embeddings)


@pytest.mark.parametrize("name", ["gemma3", "llava", "mistral3", "qwen2_5_vl"])
def test_half_precision_is_as_exact_as_transformers(swap: Swap, name: str) -> None:
    asked, model, state = swap(name, dtype=torch.bfloat16)
    with torch.no_grad():
        ours, exact = model(**asked.inputs).logits, asked.model(**asked.inputs).logits
        theirs = load_model(asked.folder, dtype=torch.bfloat16)(**asked.inputs).logits
    assert state.tower.dtype == ours.dtype == theirs.dtype == torch.bfloat16
    assert state.shared_bytes > 0
    assert 0 < relative_error(ours, exact) <= 1.5 * relative_error(theirs, exact)


def test_tower_does_not_depend_on_its_model(swap: Swap) -> None:
    asked, model, state = swap("qwen2_5_vl")
    with pytest.raises(TypeError, match="pickle"):
        copy.deepcopy(model)
    model.to(torch.bfloat16)
    (embedding, _) = state.tower.encode(asked.images)
    assert torch.equal(embedding.embeddings, asked.embeddings[0].embeddings)
    answer = generate(model, asked.inputs)
    assert relative_error(answer.logits[0], asked.answer.logits[0]) < 0.1
    integration.restore(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    tower, alive = state.tower, [weakref.ref(parameter) for parameter in model.parameters()]
    del model, state
    gc.collect()
    assert tower.is_loaded
    assert [reference() for reference in alive if reference() is not None] == []


def gradients(model: Any, asked: Question) -> dict[str, torch.Tensor]:
    """Returns the gradients of the prompt's loss by parameter."""
    model.train()
    model.zero_grad()
    model(**asked.inputs, labels=asked.input_ids.masked_fill(asked.input_ids == IMAGE, -100)).loss.backward()
    model.eval()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen2_5_vl"])
def test_models_are_trainable_with_and_after_a_tower(question: Ask, name: str) -> None:
    asked = question(name)
    model = load_model(asked.folder)
    expected = gradients(model, asked)
    vision = vision_parameters(model)
    assert vision.keys() & expected.keys()
    with torch.inference_mode():
        integration.accelerate_vision(model)
        integration.restore(model)
    found = gradients(model, asked)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    for parameter in vision.values():
        parameter.requires_grad_(False)
    integration.accelerate_vision(model)
    found = gradients(model, asked)
    assert found.keys() == expected.keys() - vision.keys()
    assert all(relative_error(value, expected[key]) <= 1e-4 for key, value in found.items())


@pytest.mark.filterwarnings("error")
def test_saving_without_vision_weights_warns(swap: Swap, tmp_path: Path) -> None:
    _, model, _ = swap("llava", release=True)
    with pytest.warns(UserWarning, match="weights of vision_tower, multi_modal_projector were released"):
        model.save_pretrained(tmp_path)


def test_invalid_swaps_are_rejected(question: Ask) -> None:
    model = question("llava").model
    other = VisionTower.from_pretrained(question("llava-siglip").folder, device="cpu")
    own = VisionTower.from_pretrained(question("llava").folder, device="cpu", delay_load=True)
    for tower, dtype, message in (
        (other, None, r"differ in patch,.*class_token"),
        (own, None, r"call its load\(\)"),
        (own, torch.float16, "pass only one of them"),
    ):
        with pytest.raises(errors.UsageError, match=message):
            integration.accelerate_vision(model, tower=tower, dtype=dtype)
    assert integration.accelerated(model) is None
    with swapped(model), pytest.raises(errors.UsageError, match="already"):
        integration.accelerate_vision(model)
    with pytest.raises(errors.UsageError, match="model must have a tower"):
        integration.restore(model)


def test_fixed_arguments_and_training_are_checked(question: Ask) -> None:
    model, pixels = question("llava").model, question("llava").pixel_inputs["pixel_values"]
    with swapped(model):
        with pytest.raises(errors.UsageError, match=r"vision_feature_layer must be -2, .* got -1"):
            model.get_image_features(pixels, vision_feature_layer=-1)
        configured = model.get_image_features(pixels, vision_feature_layer=model.config.vision_feature_layer)
        in_order = model.get_image_features(pixels, return_dict=False)
        assert isinstance(in_order, tuple)
        assert all(map(torch.equal, in_order[-1], configured.pooler_output))
        model.train()
        try:
            with pytest.raises(errors.UsageError, match=r"freeze them \(requires_grad_\(False\)\)"):
                model.get_image_features(pixels)
        finally:
            model.eval()


def test_unusable_models_are_rejected(question: Ask, tmp_path: Path) -> None:
    model = load_model(question("llava").folder)
    next(iter(vision_parameters(model).values())).data.fill_(float("nan"))
    with pytest.raises(errors.NonFiniteWeightsError, match="vision_tower"):
        integration.accelerate_vision(model)
    assert integration.accelerated(model) is None
    with torch.device("meta"):
        model = type(model)(model.config)
    with pytest.raises(errors.CheckpointIncompleteError, match="meta device"):
        integration.accelerate_vision(model)
    model = transformers.AutoModel.from_pretrained(CASES["siglip"].save(tmp_path / "model"))
    with pytest.raises(errors.UnsupportedArchitectureError, match="feed a language model"):
        integration.accelerate_vision(model)


@each_case
def test_embeddings_give_the_same_answer(question: Ask, name: str) -> None:
    asked = question(name)
    if TAKES_OUTPUTS:
        assert integration.encoder_outputs(asked.model, []) == {}
        outputs = integration.encoder_outputs(asked.model, asked.embeddings)
        assert list(outputs) == ["image"]
        assert_same(asked.ask(**asked.inputs_without_pixels, mm_encoder_outputs=outputs), asked.answer)
    else:
        with pytest.raises(errors.UsageError, match=r"5\.18.*pass inputs_embeds instead"):
            integration.encoder_outputs(asked.model, asked.embeddings)
    rows = integration.inputs_embeds(asked.model, asked.input_ids, asked.embeddings)
    text = {key: value for key, value in asked.inputs_without_pixels.items() if key != "image_sizes"}
    with integration.added_deepstack(asked.model, asked.input_ids, asked.embeddings), torch.no_grad():
        if asked.model.config.model_type in NO_GENERATE_FROM_EMBEDDINGS:
            logits = asked.model(inputs_embeds=rows, **text).logits[:, -1]
            assert (logits - asked.answer.logits[0]).abs().max() <= 1e-4
        else:
            assert_same(asked.ask(**text, inputs_embeds=rows), asked.answer)


@each_case
def test_encoded_prompts_give_the_same_answer(question: Ask, name: str) -> None:
    asked = question(name)
    with swapped(asked.model) as state:
        tower = state.tower
    embeddings = [one.with_alias(f"<{number}>") for number, one in enumerate(asked.embeddings)]
    text = "".join(f"what is {one.text_alias} this " for one in embeddings)
    prompt = encode_prompt(word_tokenizer(), text, embeddings, tower=tower, space=TokenSpace())
    ids = prompt.placeholder_ids[None]
    kinds = dict.fromkeys({"mm_token_type_ids", "token_type_ids"} & asked.text_inputs.keys(), prompt.token_types[None])
    with torch.no_grad():
        expected = asked.model(input_ids=ids, **kinds, **asked.pixel_inputs).logits
        table = asked.model.get_input_embeddings()
        rows = table(sanitize_ids(prompt.input_ids, table.num_embeddings, 0))
        rows = merge_embeddings(rows, prompt.input_ids, prompt.embeddings)[None]
        if tower.mrope is not None:
            kinds = {"position_ids": prompt_positions(tower.mrope, prompt).positions}
        with integration.added_deepstack(asked.model, ids, prompt.embeddings):
            actual = asked.model(inputs_embeds=rows, **kinds).logits
    assert expected.argmax(-1).tolist() == actual.argmax(-1).tolist()
    assert (actual - expected).abs().max() <= 1e-4


def test_deepstack_rows_matter(question: Ask) -> None:
    asked = question("qwen3_vl")
    rows = integration.inputs_embeds(asked.model, asked.input_ids, asked.embeddings)
    context = integration.added_deepstack(asked.model, asked.input_ids, asked.embeddings)
    with pytest.raises(errors.UsageError, match=r"within added_deepstack, got \[1, 3\]"), context:
        asked.model(input_ids=torch.tensor([[1, 2, 3]]))
    # After the context, even after an error in it, they are missing.
    without = asked.ask(**asked.inputs_without_pixels, inputs_embeds=rows)
    assert relative_error(without.logits[0], asked.answer.logits[0]) > 1e-2


def test_mismatched_embeddings_are_rejected(question: Ask) -> None:
    asked, deep = question("pixtral"), question("qwen3_vl")
    ids, images = asked.input_ids, asked.embeddings
    wide = ImageEmbedding(torch.zeros(3, 5), (1, 2, 6), (1, 1), (1, 1), "")
    for model, given, message in (
        (asked.model, {"embeddings": images[:1]}, r"placeholders for image rows \(token 60\), got"),
        (asked.model, {"embeddings": images, "videos": images}, r"placeholders for video rows \(token None\), got 0"),
        (asked.model, {"embeddings": [images[0], "image"]}, "embedding 1 must be an ImageEmbedding, got str"),
        (deep.model, {"embeddings": question("qwen3_5").embeddings}, "and 2 deepstack levels, .* and 0"),
        (deep.model, {"embeddings": [wide]}, "of width 48 .* got 5 and"),
    ):
        with pytest.raises(errors.UsageError, match=message):
            integration.inputs_embeds(model, ids, **given)


@pytest.fixture(scope="module", params=["llava", "gemma3", "qwen2_5_vl"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return save_wide(request.param, tmp_path_factory.mktemp("wide") / "model")


def ask_wide(model: Any, processor: Any, image: str) -> tuple[dict[str, Any], Answer]:
    inputs = processor(text=f"what is {image} this", images=[Image.fromarray(noise(60, 40))], return_tensors="pt")
    return inputs, generate(model, inputs)


def test_loaded_model_answers_as_transformers(wide: tuple[Path, str]) -> None:
    folder, image = wide
    model, processor = integration.load_vlm(folder, device="cpu")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    inputs, answer = ask_wide(model, processor, image)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() > 1
    assert type(model) is type(theirs)
    assert not model.training
    assert vision_parameters(model) == {}
    assert_same(answer, generate(theirs, inputs))
    model, _ = integration.load_vlm(folder, dtype="bfloat16", device="cpu")
    tower = integration.accelerated(model).tower
    assert tower.dtype == model.dtype == torch.bfloat16
    assert 2 <= tower.weights_bytes / tower.graph.parameters < 3


def test_four_bits_are_for_the_language_model_only(wide: tuple[Path, str]) -> None:
    pytest.importorskip("bitsandbytes")
    folder, image = wide
    model, processor = integration.load_vlm(folder, load_in_4bit=True, device="cpu")
    state = integration.accelerated(model)
    assert (state.shared_bytes, state.kept_bytes, state.tower.dtype) == (0, 0, torch.float32)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["model.visual", "model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config).eval()
    assert list_quantized(theirs) == list_quantized(model)
    inputs, answer = ask_wide(model, processor, image)
    # Some CPUs round the input of a linear to bfloat16 in bitsandbytes, which amplifies the last bit of an embedding.
    assert relative_error(answer.logits[0], generate(theirs, inputs).logits[0]) <= 1e-2
    with pytest.raises(errors.UsageError, match="were released"):
        integration.restore(model)


def list_quantized(model: torch.nn.Module) -> list[str]:
    """Lists the linears in 4 bits, all of which must be in the language model."""
    import bitsandbytes

    found = [name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert found
    assert all("language_model" in name for name in found)
    return found


@each_case
def test_no_family_quantizes_its_vision_modules(name: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = CASES[name].save(tmp_path / "model")
    save_tokenizer(folder)
    model, _ = integration.load_vlm(folder, load_in_4bit=True, device="cpu")
    list_quantized(model)
    assert [key for key, module in model.named_modules() if type(module) is torch.nn.Linear] == ["lm_head"]
    assert vision_parameters(model) == {}
    images = [noise(57, 43, 1)]
    own = VisionTower.from_pretrained(folder, device="cpu").encode(images)[0]
    assert torch.equal(integration.accelerated(model).tower.encode(images)[0].embeddings, own.embeddings)


def test_quantized_checkpoints_load_with_a_tower(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder, image = save_wide("qwen2_5_vl", tmp_path / "model")
    quantized = tmp_path / "quantized"
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    whole = transformers.AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config).eval()
    with pytest.raises(errors.UnsupportedDtypeError, match=r"visual.*load_vlm"):
        integration.accelerate_vision(whole)
    shutil.copytree(folder, quantized)
    whole.save_pretrained(quantized)
    stored = load_file(quantized / "model.safetensors")
    assert any("visual." in name and "quant_map" in name for name in stored)
    model, processor = integration.load_vlm(quantized, device="cpu")
    list_quantized(model)
    inputs, answer = ask_wide(model, processor, image)
    assert relative_error(answer.logits[0], generate(whole, inputs).logits[0]) <= 5e-2


@pytest.mark.slow
def test_loading_holds_vision_weights_once(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # Large against the noise of a process's memory.
    sizes = {"hidden_size": 640, "num_heads": 8, "intermediate_size": 1728, "depth": 5}
    folder = qwen.save_qwen2_5_vl(tmp_path / "model", **sizes)
    save_tokenizer(folder)
    vision = sum(weight.nbytes for name, weight in load_file(folder / "model.safetensors").items() if "visual" in name)
    assert vision > 100e6
    code = (
        "from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration\n"
        "import bitsandbytes, accelerate\n"
        "from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil\n"
        "from tritontower.integrations.transformers import load_vlm\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
        "before = peak()\n"
        f"model, _ = load_vlm({str(folder)!r}, load_in_4bit=True, device='cpu')\n"
        "print(peak() - before)"
    )
    run = run_python("-c", code, environment={}, check=True)
    assert vision <= int(run.stdout.splitlines()[-1]) < 1.5 * vision


def test_quantization_needs_a_working_bitsandbytes(question: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = question("llava").folder

    bitsandbytes = pytest.importorskip("bitsandbytes")
    broken = Mock(side_effect=OSError("libcudart.so.99: no such file"))
    for message, target, name, value in (
        ("pip install bitsandbytes accelerate", loading, "find_spec", lambda name: None),
        (r"supports cuda, xpu here, not 'cpu'", bitsandbytes, "supported_torch_devices", {"cuda", "xpu"}),
        (r"cannot be imported: libcudart", loading, "import_module", broken),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            with pytest.raises(errors.BackendUnavailableError, match=message):
                integration.load_vlm(folder, load_in_4bit=True, device="cpu")


def test_unusable_checkpoints_are_rejected(question: Ask, tmp_path: Path) -> None:
    with pytest.raises(errors.UnsupportedArchitectureError, match=r"language model that generates text, got siglip"):
        integration.load_vlm(CASES["siglip"].save(tmp_path / "siglip"), device="cpu")
    native = to_mistral_format(CASES["pixtral"].save(tmp_path / "pixtral"), tmp_path / "native")
    with pytest.raises(errors.UnsupportedArchitectureError, match="a format that transformers reads"):
        integration.load_vlm(native, device="cpu")
    with pytest.raises(errors.ProcessorError, match="must contain a tokenizer"):
        integration.load_vlm(question("qwen2_5_vl").folder, device="cpu")
    llava = question("llava").folder
    with pytest.raises(errors.UsageError, match="must not both be given"):
        integration.load_vlm(llava, load_in_4bit=True, quantization_config=transformers.BitsAndBytesConfig())
    shutil.copytree(llava, tmp_path, dirs_exist_ok=True)
    tensors = load_file(llava / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("mlp.up_proj.weight"))]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(tmp_path)
    with pytest.raises(errors.CheckpointIncompleteError, match=r"mlp\.up_proj\.weight"):
        integration.load_vlm(tmp_path, device="cpu")
    # transformers would download a kernel from this repository.
    update_json(tmp_path / "config.json", _attn_implementation="somebody/kernel")
    with pytest.raises(errors.ConfigError, match="somebody/kernel"):
        integration.load_vlm(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["pixtral", "mistral3"])
def test_processor_ends_rows_of_tokens(name: str, tmp_path: Path) -> None:
    folder = CASES[name].save(tmp_path / "model", text_vocab_size=64)
    template = "{% for message in messages %}what [IMG] is [IMG] {{ message['content'] }}{% endfor %}"
    save_tokenizer(folder, template)
    token = WORDS.index("[IMG]")
    update_json(folder / "config.json", image_token_id=token, image_token_index=token)
    model, processor = integration.load_vlm(folder, device="cpu")
    assert isinstance(processor, integration.ImageTextProcessor)
    tower = integration.accelerated(model).tower
    images = [noise(57, 43, 1), noise(90, 60, 2)]
    conversation = [{"role": "user", "content": "this"}]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    inputs = processor(images=[Image.fromarray(one) for one in images], text=text)
    words = [VOCABULARY[token] for token in inputs["input_ids"][0].tolist()]
    expected = ["what"]
    for word, embedding in zip(("is", "this"), tower.encode(images), strict=True):
        rows, columns = (side // tower.config.merge for side in embedding.grid_thw[1:])
        expected += [*([*["[IMG]"] * columns, "[IMG_BREAK]"] * rows)[:-1], "[IMG_END]", word]
    assert words == expected
    assert len(generate(model, inputs).tokens) == NEW_TOKENS
    assert processor.batch_decode(inputs["input_ids"], skip_special_tokens=True) == ["what is this"]
    assert processor.decode(inputs["input_ids"][0], skip_special_tokens=True) == "what is this"
    both = processor(text=["what is this", "what"], padding=True)
    assert both["input_ids"].shape == (2, 3)
    assert "pixel_values" not in both
    image = Image.fromarray(images[0])
    with pytest.raises(errors.UsageError, match="tokenize must be False"):
        processor.apply_chat_template(conversation, tokenize=True)
    with pytest.raises(errors.UsageError, match="for each of 1 images, got 2"):
        processor(images=[image], text=["[IMG] what", "[IMG] is"], padding=True)
    with pytest.raises(errors.UsageError, match="text must be given"):
        processor(images=[image])


@pytest.mark.parametrize("name", ["llava", "llava-siglip", "pixtral", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_encoders_call_the_kernel_once_per_layer(question: Ask, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = question(name)
    kernel = Mock(wraps=attention.flash_attention_varlen)
    monkeypatch.setattr(attention, "flash_attention_varlen", kernel)
    config = asked.model.config.vision_config
    with integration.vision_attention(asked.model) as changed:
        assert set(changed) == {config.model_type}
        answer = asked.ask()
    assert_same(answer, asked.answer)
    assert kernel.call_count == (getattr(config, "depth", None) or config.num_hidden_layers)
    assert len(kernel.call_args.args[3].lengths) >= 2
    with (
        pytest.raises(errors.UsageError, match="must have a vision encoder"),
        integration.vision_attention(asked.model.model.language_model),
    ):
        pass
    kernel.reset_mock()
    assert torch.equal(asked.ask().logits, asked.answer.logits)
    assert not kernel.called, "the former implementation is restored"
    if name == "pixtral":
        # The implementation that is called once per image takes a mask.
        model = load_model(asked.folder, attn_implementation={"": "sdpa", "vision_config": integration.ATTENTION})
        assert_same(generate(model, asked.inputs), asked.answer)


@pytest.fixture
def attend() -> Callable[..., Any]:
    """Returns the implementation as transformers calls it, for a layer that is not causal."""
    integration.register_attention()
    implementation = transformers.AttentionInterface()[integration.VARLEN_ATTENTION]
    return lambda *tensors, **options: implementation(torch.nn.Module(), *tensors, **options)


BOUNDARIES = torch.tensor([0, 2, 6], dtype=torch.int32)
BLOCKS = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool()[None, None]


@pytest.mark.parametrize(
    "description",
    [
        {"attention_mask": None, "cu_seq_lens_q": BOUNDARIES, "cu_seq_lens_k": BOUNDARIES.clone()},
        {"attention_mask": BLOCKS},
        {"attention_mask": torch.where(BLOCKS, 0.0, torch.finfo(torch.float32).min)},
        {"attention_mask": None, "position_ids": torch.tensor([[0, 0], [0, 1], [0, 0], [0, 1], [1, 0], [1, 1]])},
    ],
    ids=["boundaries", "boolean mask", "additive mask", "positions"],
)
def test_images_do_not_attend_to_each_other(attend: Callable[..., Any], description: dict[str, Any]) -> None:
    rows = torch.randn(1, 2, 6, 16)
    parts = [torch.nn.functional.scaled_dot_product_attention(*[part] * 3) for part in rows.split([2, 4], dim=2)]
    attended, weights = attend(rows, rows, rows, **description)
    assert weights is None
    assert torch.allclose(attended, torch.cat(parts, dim=2).transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_causal": True}, "not causal"),
        ({"dropout": 0.1}, "without dropout"),
        ({"key": torch.randn(1, 1, 6, 16)}, "as many keys and heads"),
        ({"query": torch.randn(1, 2, 6, 16, requires_grad=True)}, "no gradients"),
        ({"cu_seq_lens_q": BOUNDARIES, "cu_seq_lens_k": torch.tensor([0, 5])}, "must be equal"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 5])}, "must have 1 × 6 rows in total, as the queries, got 5"),
        ({"attention_mask": torch.ones(6, 6, dtype=torch.bool).tril()[None, None]}, "must divide the rows"),
    ],
)
def test_other_attention_is_rejected(attend: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    arguments = dict.fromkeys(("query", "key", "value"), torch.randn(1, 2, 6, 16)) | {"attention_mask": None} | options
    with pytest.raises(errors.UsageError, match=message):
        attend(**arguments)


def test_segments_are_cached_until_boundaries_change(
    attend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Mock(wraps=Segments.from_lengths)
    monkeypatch.setattr(Segments, "from_lengths", read)
    rows = torch.randn(1, 2, 6, 16)

    def read_by(boundaries: torch.Tensor) -> list[list[int]]:
        read.reset_mock()
        for _ in range(2):
            attend(rows, rows, rows, None, cu_seq_lens_q=boundaries)
        return [call.args[0] for call in read.call_args_list]

    boundaries = torch.tensor([0, 2, 6])
    assert read_by(boundaries) == [[2, 4]]
    boundaries[1] = 3
    assert read_by(boundaries) == [[3, 3]]
    with torch.inference_mode():
        assert read_by(torch.tensor([0, 1, 6])) == [[1, 5], [1, 5]], "inference tensors have no version"
