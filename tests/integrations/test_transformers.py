"""A tower inside transformers' own models: the same tokens as from transformers alone, and the vision weights once."""

import copy
import gc
import inspect
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from support.checkpoints import noise
from support.mistral_format import to_mistral_format
from support.towers import TowerCase, all_cases, qwen2_5_vl, qwen3_vl
from support.towers.gemma3 import save_gemma3
from support.towers.llava import save_llava
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tritontower import VisionTower
from tritontower.embedding import ImageEmbedding
from tritontower.errors import (
    BackendUnavailableError,
    CheckpointIncompleteError,
    ConfigError,
    NonFiniteWeightsError,
    ProcessorError,
    UnsupportedArchitectureError,
    UnsupportedDtypeError,
    UsageError,
)
from tritontower.integrations import transformers as integration
from tritontower.integrations.transformers import attention as _attention
from tritontower.parity.parity import relative_error
from tritontower.prompt import TokenSpace, encode_prompt, merge_embeddings, prompt_positions, sanitize_ids

NAMES = (
    "gemma3",
    "gemma3-pan-and-scan",
    "llava",
    "llava-siglip",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "paligemma",
    "pixtral",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_vl",
)
CASES = {case.name: case for case in all_cases() if case.name in NAMES}
each_case = pytest.mark.parametrize("name", NAMES)

START, STOP, IMAGE, VIDEO, END = 58, 59, 60, 61, 63
NEW_TOKENS = 4
# transformers 5.17 takes finished embeddings only in place of a prompt's.
TAKES_OUTPUTS = "mm_encoder_outputs" in inspect.signature(transformers.LlavaForConditionalGeneration.forward).parameters
# These refuse `inputs_embeds` in `generate`, though not when they are called.
NO_GENERATE_FROM_EMBEDDINGS = ("gemma3", "paligemma")


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logits: torch.Tensor


@dataclass(frozen=True)
class Question:
    """A prompt with images, and everything that a model of transformers is given for it."""

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

    def ask(self, **inputs: Any) -> Answer:
        return greedy(self.model, {"input_ids": self.input_ids, **inputs})


def greedy(model: Any, inputs: Mapping[str, Any]) -> Answer:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": END}
    output = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return Answer(output.sequences[0, -len(output.logits) :].tolist(), torch.stack(output.logits))


def assert_same(one: Answer, other: Answer) -> None:
    assert one.tokens == other.tokens
    assert (one.logits - other.logits).abs().max() <= 1e-4


def by_transformers(folder: Path, **options: Any) -> Any:
    attention = {"": "sdpa", "vision_config": "sdpa", "text_config": "eager"}
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, **{"attn_implementation": attention, **options}
    )
    with_tokens(model.config)
    return model.eval()


def with_tokens(config: Any) -> None:
    """Placeholders within the small vocabulary."""
    config.image_token_id = IMAGE
    if hasattr(config, "vision_start_token_id"):
        config.vision_start_token_id, config.vision_end_token_id = START, STOP
    if hasattr(config, "boi_token_index"):
        config.boi_token_index, config.eoi_token_index = START, STOP
    if hasattr(config, "video_token_id"):
        config.video_token_id = VIDEO


def processed(folder: Path, config: Any, images: list[np.ndarray]) -> dict[str, Any]:
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


def prompt_of(model: Any, embeddings: list[ImageEmbedding], pixels: Mapping[str, Any]) -> dict[str, Any]:
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
    """A model of a family with a prompt, answered by transformers alone; made once, and left as it was."""
    made: dict[str, Question] = {}

    def make(name: str) -> Question:
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                # As many layers as deepstack levels, so that all of them count.
                patch.setitem(qwen3_vl.TINY_TEXT, "num_hidden_layers", 2)
                patch.setitem(qwen3_vl.HYBRID, "layer_types", ["full_attention", "full_attention"])
                folder = CASES[name].save(tmp_path_factory.mktemp("models") / name)
            made[name] = question_of(CASES[name], folder)
        return made[name]

    return make


def question_of(case: TowerCase, folder: Path) -> Question:
    model = by_transformers(folder)
    # Only by itself has an image crops of its own in transformers' processor.
    images = [noise(57, 43, 1), noise(90, 60, 2)][: 1 if "pan" in case.name else 2]
    embeddings = VisionTower.from_pretrained(folder, device="cpu").encode(images)
    pixels = processed(folder, model.config, images)
    text = prompt_of(model, embeddings, pixels)
    input_ids = text.pop("input_ids")
    answer = greedy(model, {"input_ids": input_ids, **text, **pixels})
    return Question(model, folder, images, embeddings, input_ids, text, pixels, answer)


def vision_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    parts = ("visual", "vision_tower", "multi_modal_projector")
    return {
        name: parameter for name, parameter in model.named_parameters() if not set(parts).isdisjoint(name.split("."))
    }


class TestInPlaceOfTheVisionPart:
    @each_case
    def test_generates_the_same_tokens_and_back_again(self, question: Ask, name: str) -> None:
        asked = question(name)
        before = {key: value.clone() for key, value in asked.model.state_dict().items()}
        parameters = dict(asked.model.named_parameters())
        facts = integration.accelerate_vision(asked.model)
        ran = 0
        forward = facts.tower.run

        def counted(batch: Any) -> Any:
            nonlocal ran
            ran += 1
            return forward(batch)

        facts.tower.run = counted  # type: ignore[method-assign]
        try:
            assert integration.accelerated(asked.model) is facts
            assert_same(asked.ask(**asked.text_inputs, **asked.pixel_inputs), asked.answer)
            assert ran == 1
            during = asked.model.state_dict()
            assert all(torch.equal(during[key], value) for key, value in before.items())
        finally:
            integration.restore(asked.model)
        assert integration.accelerated(asked.model) is None
        assert dict(asked.model.named_parameters()) == parameters
        after = asked.model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], value) and after[key].is_contiguous() for key, value in before.items())
        again = asked.ask(**asked.text_inputs, **asked.pixel_inputs)
        assert torch.equal(again.logits, asked.answer.logits)
        assert ran == 1

    @each_case
    def test_images_matter_to_the_answer(self, question: Ask, name: str) -> None:
        asked = question(name)
        others = processed(asked.folder, asked.model.config, [255 - image for image in asked.images])
        other = asked.ask(**asked.text_inputs, **others)
        assert (other.logits[0] - asked.answer.logits[0]).abs().max() > 1e-3

    @each_case
    def test_weights_have_one_memory(self, question: Ask, name: str) -> None:
        model = question(name).model
        facts = integration.accelerate_vision(model)
        try:
            total = sum(parameter.nbytes for parameter in vision_parameters(model).values())
            assert facts.shared_bytes + facts.kept_bytes == total
            assert facts.released_bytes == 0
            blocks = {parameter.untyped_storage().data_ptr() for parameter in facts.lent.values()}
            assert len(blocks) == 1
            # What is not shared is in another order, or not needed by the tower.
            apart = {
                key
                for key, parameter in vision_parameters(model).items()
                if parameter.untyped_storage().data_ptr() not in blocks
            }
            words = ("merging_layer", "position_embedding", "class_embedding", "layers.2.", "post_layernorm", "head.")
            assert [key for key in apart if not any(word in key for word in words)] == []
        finally:
            integration.restore(model)
        own = {parameter.untyped_storage().data_ptr() for parameter in vision_parameters(model).values()}
        assert len(own) == len(vision_parameters(model))

    @each_case
    def test_saves_what_it_was_loaded_from(self, question: Ask, name: str, tmp_path: Path) -> None:
        asked = question(name)
        integration.accelerate_vision(asked.model)
        try:
            asked.model.save_pretrained(tmp_path)
        finally:
            integration.restore(asked.model)
        saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path, asked.folder))
        assert saved.keys() == original.keys()
        assert all(torch.equal(saved[key], value) for key, value in original.items())

    @pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
    def test_videos_are_encoded_too(self, question: Ask, name: str) -> None:
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
        expected = greedy(model, {**inputs, "pixel_values_videos": pixels})
        integration.accelerate_vision(model)
        try:
            assert_same(greedy(model, {**inputs, "pixel_values_videos": pixels}), expected)
        finally:
            integration.restore(model)
        embedding = tower.encode_video(video)
        with integration.added_deepstack(model, input_ids, (), videos=embedding):
            rows = integration.inputs_embeds(model, input_ids, (), videos=[embedding])
            assert_same(greedy(model, {**inputs, "inputs_embeds": rows}), expected)
        if TAKES_OUTPUTS:
            outputs = integration.encoder_outputs(model, (), videos=embedding)
            assert list(outputs) == ["video"]
            assert_same(greedy(model, {**inputs, "mm_encoder_outputs": outputs}), expected)

    def test_frames_of_a_onevision_video(self, question: Ask) -> None:
        model = question("llava_onevision").model
        side = model.config.vision_config.image_size
        frames = torch.randn(2, 3, 3, side, side, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model.get_video_features(frames).pooler_output
            integration.accelerate_vision(model)
            try:
                actual = model.get_video_features(frames).pooler_output
            finally:
                integration.restore(model)
        assert relative_error(actual, expected) <= 1e-5

    def test_several_images_of_one_onevision_prompt_come_without_tiles(self, question: Ask) -> None:
        model = question("llava_onevision").model
        side = model.config.vision_config.image_size
        pixels = torch.randn(2, 1, 3, side, side, generator=torch.Generator().manual_seed(0))
        options = {"image_sizes": torch.tensor([[40, 70], [33, 21]]), "batch_num_images": torch.tensor([2])}
        with torch.no_grad():
            expected = model.get_image_features(pixels, **options).pooler_output
            integration.accelerate_vision(model)
            try:
                actual = model.get_image_features(pixels, **options).pooler_output
            finally:
                integration.restore(model)
        assert [relative_error(a, b) <= 1e-5 for a, b in zip(actual, expected, strict=True)] == [True, True]

    def test_a_given_tower_may_take_the_place_of_weights_that_are_given_up(self, question: Ask) -> None:
        asked = question("qwen2_5_vl")
        model = by_transformers(asked.folder)
        total = sum(parameter.nbytes for parameter in vision_parameters(model).values())
        tower = VisionTower.from_pretrained(asked.folder, device="cpu")
        facts = integration.accelerate_vision(model, tower=tower, release=True)
        assert (facts.shared_bytes, facts.kept_bytes, facts.released_bytes) == (0, 0, total)
        assert vision_parameters(model) == {}
        answer = greedy(model, {"input_ids": asked.input_ids, **asked.text_inputs, **asked.pixel_inputs})
        assert_same(answer, asked.answer)
        with pytest.raises(UsageError, match=r"weights of visual were given away"):
            integration.restore(model)
        with pytest.raises(UsageError, match="a tower has taken its place"):
            model.model.visual(torch.zeros(1))

    def test_the_models_own_weights_may_be_given_up(self, question: Ask) -> None:
        asked = question("mistral3")
        model = by_transformers(asked.folder)
        alive = [weakref.ref(parameter) for parameter in vision_parameters(model).values()]
        total = sum(parameter.nbytes for parameter in vision_parameters(model).values())
        facts = integration.accelerate_vision(model, release=True)
        assert (facts.shared_bytes, facts.kept_bytes, facts.released_bytes) == (0, 0, total)
        assert vision_parameters(model) == {}
        assert facts.tower.graph.parameters * 4 == total
        # Padded, but there once.
        assert total <= facts.tower.weights_bytes < 1.5 * total
        gc.collect()
        assert [reference() for reference in alive if reference() is not None] == []
        answer = greedy(model, {"input_ids": asked.input_ids, **asked.text_inputs, **asked.pixel_inputs})
        assert_same(answer, asked.answer)

    def test_a_model_inside_another_one(self, tmp_path: Path) -> None:
        case = next(case for case in all_cases() if case.name == "shieldgemma2")
        model = transformers.AutoModelForImageClassification.from_pretrained(case.save(tmp_path / "model")).eval()
        holder = model.model.model
        pixels = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = holder.get_image_features(pixels).pooler_output
            integration.accelerate_vision(model)
            assert relative_error(holder.get_image_features(pixels).pooler_output, expected) <= 1e-5

    def test_a_given_tower_leaves_the_models_weights_alone(self, question: Ask) -> None:
        asked = question("gemma3")
        tower = VisionTower.from_pretrained(asked.folder, device="cpu", dtype="bfloat16")
        facts = integration.accelerate_vision(asked.model, tower=tower)
        try:
            assert facts.shared_bytes == 0
            assert facts.kept_bytes == sum(weight.nbytes for weight in vision_parameters(asked.model).values())
            answer = asked.ask(**asked.text_inputs, **asked.pixel_inputs)
            assert 1e-6 < relative_error(answer.logits[0], asked.answer.logits[0]) < 0.05
        finally:
            integration.restore(asked.model)

    def test_the_dtype_of_the_tower_may_be_another(self, question: Ask) -> None:
        asked = question("llava")
        facts = integration.accelerate_vision(asked.model, dtype=torch.bfloat16)
        try:
            assert facts.tower.dtype == torch.bfloat16
            assert facts.shared_bytes == 0
            answer = asked.ask(**asked.text_inputs, **asked.pixel_inputs)
            assert 1e-6 < relative_error(answer.logits[0], asked.answer.logits[0]) < 0.05
        finally:
            integration.restore(asked.model)
        assert torch.equal(asked.ask(**asked.text_inputs, **asked.pixel_inputs).logits, asked.answer.logits)

    def test_the_tower_encodes_images_by_itself(self, question: Ask) -> None:
        asked = question("qwen2_5_vl")
        facts = integration.accelerate_vision(asked.model)
        try:
            embeddings = facts.tower.encode(asked.images)
        finally:
            integration.restore(asked.model)
        pairs = zip(embeddings, asked.embeddings, strict=True)
        assert all(torch.equal(one.embeddings, other.embeddings) for one, other in pairs)

    def test_a_model_made_in_memory_takes_a_processor_for_that(self, question: Ask) -> None:
        asked = question("gemma3")
        model = type(asked.model)(asked.model.config).eval()
        model.name_or_path = model.config.name_or_path = ""
        model.load_state_dict(asked.model.state_dict())
        tower = integration.accelerate_vision(model).tower
        with pytest.raises(ProcessorError):
            tower.encode(asked.images)
        integration.restore(model)
        processor = AutoImageProcessor.from_pretrained(asked.folder, backend="pil", trust_remote_code=False)
        tower = integration.accelerate_vision(model, processor=processor).tower
        assert torch.equal(tower.encode(asked.images)[0].embeddings, asked.embeddings[0].embeddings)

    @each_case
    def test_a_prompt_without_images(self, question: Ask, name: str) -> None:
        model = question(name).model
        input_ids = torch.tensor([[1, 2, 3, 4]])
        with torch.no_grad():
            expected = model(input_ids=input_ids).logits
            integration.accelerate_vision(model)
            try:
                assert torch.equal(model(input_ids=input_ids).logits, expected)
            finally:
                integration.restore(model)
            rows = integration.inputs_embeds(model, input_ids, [])
            assert (model(inputs_embeds=rows).logits - expected).abs().max() <= 1e-5
        if TAKES_OUTPUTS:
            assert integration.encoder_outputs(model, []) == {}

    @each_case
    def test_several_prompts_at_once(self, question: Ask, name: str) -> None:
        asked = question(name)
        inputs = batch_of(asked)
        with torch.no_grad():
            expected = asked.model(**inputs, **asked.pixel_inputs).logits
            integration.accelerate_vision(asked.model)
            try:
                actual = asked.model(**inputs, **asked.pixel_inputs).logits
            finally:
                integration.restore(asked.model)
            assert relative_error(actual, expected) <= 1e-5
            if TAKES_OUTPUTS:
                outputs = integration.encoder_outputs(asked.model, asked.embeddings)
                sizes = {key: value for key, value in asked.pixel_inputs.items() if "pixel" not in key}
                handed = asked.model(**inputs, **sizes, mm_encoder_outputs=outputs).logits
                assert relative_error(handed, expected) <= 1e-5

    @pytest.mark.parametrize("name", ["gemma3", "llava", "mistral3", "qwen2_5_vl"])
    def test_a_model_in_half_precision(self, question: Ask, name: str) -> None:
        asked = question(name)
        model = by_transformers(asked.folder, dtype=torch.bfloat16)
        inputs = {"input_ids": asked.input_ids, **asked.text_inputs, **asked.pixel_inputs}
        with torch.no_grad():
            theirs = model(**inputs).logits
            exact = asked.model(**inputs).logits
            facts = integration.accelerate_vision(model)
            ours = model(**inputs).logits
        assert facts.tower.dtype == torch.bfloat16
        assert facts.shared_bytes > 0
        assert ours.dtype == theirs.dtype
        assert 0 < relative_error(ours, exact) <= 1.5 * relative_error(theirs, exact)

    def test_converting_the_model_leaves_the_tower_what_it_was(self, question: Ask) -> None:
        asked = question("qwen2_5_vl")
        model = by_transformers(asked.folder)
        tower = integration.accelerate_vision(model).tower
        model.to(torch.bfloat16)
        (embedding, _) = tower.encode(asked.images)
        assert torch.equal(embedding.embeddings, asked.embeddings[0].embeddings)
        answer = greedy(model, {"input_ids": asked.input_ids, **asked.text_inputs, **asked.pixel_inputs})
        assert relative_error(answer.logits[0], asked.answer.logits[0]) < 0.1
        integration.restore(model)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize("name", ["gemma3", "llava", "qwen2_5_vl"])
    def test_the_language_model_is_trained_as_before(self, question: Ask, name: str) -> None:
        asked = question(name)
        model = by_transformers(asked.folder)
        for parameter in vision_parameters(model).values():
            parameter.requires_grad_(False)
        expected = gradients(model, asked)
        integration.accelerate_vision(model)
        found = gradients(model, asked)
        assert found.keys() == expected.keys()
        assert all(relative_error(found[key], value) <= 1e-4 for key, value in expected.items())

    def test_in_inference_mode_a_model_stays_one_that_can_be_trained(self, question: Ask) -> None:
        asked = question("qwen2_5_vl")
        model = by_transformers(asked.folder)
        expected = gradients(model, asked)
        with torch.inference_mode():
            integration.accelerate_vision(model)
            integration.restore(model)
        found = gradients(model, asked)
        assert any("visual" in key for key in found)
        assert all(torch.equal(found[key], value) for key, value in expected.items())

    def test_the_processor_of_a_hubs_checkpoint_comes_from_the_cache(
        self, question: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked, commit = question("gemma3"), "0123456789" * 4
        snapshot = tmp_path / "models--somebody--model" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for name in ("config.json", "preprocessor_config.json"):
            (snapshot / name).write_bytes((asked.folder / name).read_bytes())
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        model = by_transformers(asked.folder)
        model.name_or_path = model.config.name_or_path = "somebody/model"
        model.config._commit_hash = commit
        tower = integration.accelerate_vision(model).tower
        assert tower.folder == snapshot
        assert torch.equal(tower.encode(asked.images)[0].embeddings, asked.embeddings[0].embeddings)

    def test_a_processor_in_the_current_folder_is_nobodys(self, question: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = question("gemma3")
        model = type(asked.model)(asked.model.config).eval()
        model.name_or_path = model.config.name_or_path = ""
        monkeypatch.chdir(asked.folder)
        tower = integration.accelerate_vision(model).tower
        with pytest.raises(ProcessorError, match=r"Gemma3ForConditionalGeneration in memory> holds no image processor"):
            tower.encode(asked.images)

    def test_a_tower_that_outlives_its_model_holds_nothing_of_it(self, question: Ask) -> None:
        model = by_transformers(question("llava").folder)
        tower = integration.accelerate_vision(model).tower
        with pytest.raises(TypeError, match="pickle"):
            copy.deepcopy(model)
        integration.restore(model)
        alive = [weakref.ref(parameter) for parameter in model.parameters()]
        del model
        gc.collect()
        assert tower.is_loaded
        assert [reference() for reference in alive if reference() is not None] == []

    @pytest.mark.filterwarnings("error")
    def test_what_is_saved_without_vision_weights_warns(self, question: Ask, tmp_path: Path) -> None:
        model = by_transformers(question("llava").folder)
        integration.accelerate_vision(model)
        model.state_dict()
        integration.restore(model)
        integration.accelerate_vision(model, release=True)
        with pytest.warns(UserWarning, match="weights of vision_tower, multi_modal_projector were given away"):
            model.save_pretrained(tmp_path)


def batch_of(asked: Question) -> dict[str, torch.Tensor]:
    """A prompt for each image, padded on the left."""
    longest = max(one.num_tokens for one in asked.embeddings) + 2
    rows = [[1] + [IMAGE] * one.num_tokens + [2] for one in asked.embeddings]
    input_ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    kinds = (input_ids == IMAGE).int()
    names = {"mm_token_type_ids", "token_type_ids"} & asked.text_inputs.keys()
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).int(), **dict.fromkeys(names, kinds)}


def gradients(model: Any, asked: Question) -> dict[str, torch.Tensor]:
    """Of the prompt's loss in training, by parameter."""
    model.train()
    model.zero_grad()
    labels = asked.input_ids.masked_fill(asked.input_ids == IMAGE, -100)
    model(input_ids=asked.input_ids, **asked.text_inputs, **asked.pixel_inputs, labels=labels).loss.backward()
    model.eval()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


class TestWhatIsRefused:
    @pytest.fixture
    def llava(self, question: Ask) -> Iterator[Any]:
        model = question("llava").model
        yield model
        if integration.accelerated(model) is not None:
            integration.restore(model)

    def test_a_second_tower(self, llava: Any) -> None:
        integration.accelerate_vision(llava)
        with pytest.raises(UsageError, match="already"):
            integration.accelerate_vision(llava)

    def test_nothing_to_undo(self, llava: Any) -> None:
        with pytest.raises(UsageError, match="no tower"):
            integration.restore(llava)

    def test_another_models_tower(self, llava: Any, question: Ask) -> None:
        tower = VisionTower.from_pretrained(question("llava-siglip").folder, device="cpu")
        with pytest.raises(UsageError, match=r"differ in patch,.*class_token"):
            integration.accelerate_vision(llava, tower=tower)
        own = VisionTower.from_pretrained(question("llava").folder, device="cpu", delay_load=True)
        with pytest.raises(UsageError, match=r"call its load\(\)"):
            integration.accelerate_vision(llava, tower=own)
        with pytest.raises(UsageError, match="leave one of them out"):
            integration.accelerate_vision(llava, tower=own, dtype=torch.float16)
        assert integration.accelerated(llava) is None

    def test_other_features_than_the_towers(self, llava: Any, question: Ask) -> None:
        pixels = question("llava").pixel_inputs["pixel_values"]
        integration.accelerate_vision(llava)
        with pytest.raises(UsageError, match="vision_feature_layer is -1"):
            llava.get_image_features(pixels, vision_feature_layer=-1)
        configured = llava.get_image_features(pixels, vision_feature_layer=llava.config.vision_feature_layer)
        in_order = llava.get_image_features(pixels, return_dict=False)
        assert isinstance(in_order, tuple)
        assert all(map(torch.equal, in_order[-1], configured.pooler_output))

    def test_training_a_vision_part_that_would_not_change(self, llava: Any, question: Ask) -> None:
        pixels = question("llava").pixel_inputs["pixel_values"]
        integration.accelerate_vision(llava)
        llava.train()
        try:
            with pytest.raises(UsageError, match=r"freeze them \(requires_grad_\(False\)\)"):
                llava.get_image_features(pixels)
            with torch.no_grad():
                assert not llava.get_image_features(pixels).pooler_output[0].requires_grad
        finally:
            llava.eval()

    def test_weights_that_are_not_numbers(self, question: Ask) -> None:
        model = by_transformers(question("llava").folder)
        weight = next(iter(vision_parameters(model).values()))
        weight.data.fill_(float("nan"))
        with pytest.raises(NonFiniteWeightsError, match="vision_tower"):
            integration.accelerate_vision(model)
        assert integration.accelerated(model) is None

    def test_weights_without_memory(self, question: Ask) -> None:
        asked = question("llava")
        with torch.device("meta"):
            model = type(asked.model)(asked.model.config)
        with pytest.raises(CheckpointIncompleteError, match="meta device"):
            integration.accelerate_vision(model)

    def test_models_without_a_language_model(self, tmp_path: Path) -> None:
        case = next(case for case in all_cases() if case.name == "siglip")
        model = transformers.AutoModel.from_pretrained(case.save(tmp_path / "model"))
        with pytest.raises(UnsupportedArchitectureError, match="feeds a language model"):
            integration.accelerate_vision(model)


class TestHandingOver:
    @each_case
    def test_encoder_outputs(self, question: Ask, name: str) -> None:
        asked = question(name)
        if not TAKES_OUTPUTS:
            with pytest.raises(UsageError, match=r"5\.18; pass inputs_embeds instead"):
                integration.encoder_outputs(asked.model, asked.embeddings)
            return
        outputs = integration.encoder_outputs(asked.model, asked.embeddings)
        assert list(outputs) == ["image"]
        assert_same(asked.ask(**asked.inputs_without_pixels, mm_encoder_outputs=outputs), asked.answer)

    @each_case
    def test_inputs_embeds(self, question: Ask, name: str) -> None:
        asked = question(name)
        rows = integration.inputs_embeds(asked.model, asked.input_ids, asked.embeddings)
        text = {key: value for key, value in asked.inputs_without_pixels.items() if key != "image_sizes"}
        with integration.added_deepstack(asked.model, asked.input_ids, asked.embeddings):
            if asked.model.config.model_type in NO_GENERATE_FROM_EMBEDDINGS:
                answer = step_by_step(asked.model, rows, text)
            else:
                answer = asked.ask(**text, inputs_embeds=rows)
        assert_same(answer, asked.answer)

    def test_deepstack_rows_count(self, question: Ask) -> None:
        asked = question("qwen3_vl")
        rows = integration.inputs_embeds(asked.model, asked.input_ids, asked.embeddings)
        without = asked.ask(**asked.inputs_without_pixels, inputs_embeds=rows)
        assert relative_error(without.logits[0], asked.answer.logits[0]) > 1e-2
        with (
            pytest.raises(UsageError, match=r"a prompt of shape \[1, 3\] begins"),
            integration.added_deepstack(asked.model, asked.input_ids, asked.embeddings),
        ):
            asked.model(input_ids=torch.tensor([[1, 2, 3]]))
        assert not asked.model.model.language_model._forward_pre_hooks

    def test_two_prompts_with_padding(self, question: Ask) -> None:
        asked = question("pixtral")
        first, second = asked.embeddings
        longest = max(first.num_tokens, second.num_tokens)
        rows = [[0] * (longest - one.num_tokens) + [1] + [IMAGE] * one.num_tokens + [2] for one in (first, second)]
        input_ids = torch.tensor(rows)
        inputs = {"input_ids": input_ids, "attention_mask": (input_ids != 0).int()}
        with torch.no_grad():
            expected = asked.model(**inputs, **asked.pixel_inputs).logits
            embeds = integration.inputs_embeds(asked.model, input_ids, asked.embeddings)
            actual = asked.model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
        assert (actual - expected).abs().max() <= 1e-4

    def test_rows_and_placeholders_have_to_be_as_many(self, question: Ask) -> None:
        asked = question("pixtral")
        with pytest.raises(UsageError, match=r"placeholders for image rows \(token 60\), but the embeddings have"):
            integration.inputs_embeds(asked.model, asked.input_ids, asked.embeddings[:1])
        with pytest.raises(UsageError, match=r"0 placeholders for video rows \(token None\)"):
            integration.inputs_embeds(asked.model, asked.input_ids, asked.embeddings, videos=asked.embeddings)

    def test_what_is_no_embedding(self, question: Ask) -> None:
        asked = question("pixtral")
        with pytest.raises(UsageError, match="embedding 1 is a str; allowed: ImageEmbedding"):
            integration.inputs_embeds(asked.model, asked.input_ids, [asked.embeddings[0], "image"])  # type: ignore[list-item]

    def test_rows_of_another_models_tower(self, question: Ask) -> None:
        asked, plain = question("qwen3_vl"), question("qwen3_5").embeddings
        with pytest.raises(UsageError, match="0 deepstack levels, but the model adds 2"):
            integration.inputs_embeds(asked.model, asked.input_ids, plain)
        wide = [ImageEmbedding(torch.zeros(3, 5), (1, 2, 6), (1, 1), (1, 1), "")]
        with pytest.raises(UsageError, match="rows of 5 numbers, but the language model's have 48"):
            integration.inputs_embeds(asked.model, asked.input_ids, wide)


class TestPromptsOfOurOwn:
    @each_case
    def test_rows_and_positions_make_the_same_answer(self, question: Ask, name: str) -> None:
        asked = question(name)
        tower = integration.accelerate_vision(asked.model).tower
        integration.restore(asked.model)
        embeddings = [one.with_alias(f"<{number}>") for number, one in enumerate(asked.embeddings)]
        prompt = encode_prompt(
            word_tokenizer(),
            "".join(f"what is {one.text_alias} this " for one in embeddings),
            embeddings,
            tower=tower,
            space=TokenSpace(),
        )
        ids = prompt.placeholder_ids[None]
        names = {"mm_token_type_ids", "token_type_ids"} & asked.text_inputs.keys()
        text = dict.fromkeys(names, prompt.token_types[None])
        with torch.no_grad():
            expected = asked.model(input_ids=ids, **text, **asked.pixel_inputs).logits
            table = asked.model.get_input_embeddings()
            rows = table(sanitize_ids(prompt.input_ids, table.num_embeddings, 0))
            rows = merge_embeddings(rows, prompt.input_ids, prompt.embeddings)[None]
            if tower.family.mrope is not None:
                text = {"position_ids": prompt_positions(tower.family.mrope, prompt).positions}
            with integration.added_deepstack(asked.model, ids, prompt.embeddings):
                actual = asked.model(inputs_embeds=rows, **text).logits
        assert expected.argmax(-1).tolist() == actual.argmax(-1).tolist()
        assert (actual - expected).abs().max() <= 1e-4


def step_by_step(model: Any, rows: torch.Tensor, text: Mapping[str, Any]) -> Answer:
    """Greedy decoding by calling the model."""
    logits, tokens = [], []
    mask = text["attention_mask"]
    with torch.no_grad():
        output = model(inputs_embeds=rows, use_cache=True, **text)
        while True:
            logits.append(output.logits[:, -1])
            tokens.append(int(logits[-1].argmax()))
            if len(tokens) == NEW_TOKENS or tokens[-1] == END:
                return Answer(tokens, torch.stack(logits))
            mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
            cache = {"past_key_values": output.past_key_values, "attention_mask": mask}
            output = model(input_ids=torch.tensor([tokens[-1:]]), use_cache=True, **cache)


# -- loading ----------------------------------------------------------------------------------------------------------

SPECIAL = (
    *("<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>"),
    *(
        "<|vision_end|>",
        "[IMG]",
        "[IMG_BREAK]",
        "[IMG_END]",
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
    ),
)
WORDS = (*SPECIAL, "what", "is", "this")
VOCABULARY = (*WORDS, *(f"word{number}" for number in range(len(WORDS), 64)))
GEMMA = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
WIDE_TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}


def word_tokenizer() -> Tokenizer:
    """A tokenizer of words that has every family's tokens."""
    words = models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([word for word in VOCABULARY if word not in ("what", "is", "this")])
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """:func:`word_tokenizer` as the checkpoint's."""
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    named = GEMMA if json.loads((folder / "config.json").read_text())["model_type"] == "gemma3" else {}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(),
        additional_special_tokens=list(SPECIAL[4:]),
        extra_special_tokens=named,
        **names,
    ).save_pretrained(folder)


def set_in(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def save_wide(name: str, folder: Path, patch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A model that 4 bits fit on a CPU, with its tokenizer and placeholders; and the text that stands for an image."""
    if name == "llava":
        save_llava(folder, text=WIDE_TEXT)
        image, token = "<image>", "<image>"
        settings = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    elif name == "gemma3":
        save_gemma3(folder, text={**WIDE_TEXT, "head_dim": 16})
        image, token = "<start_of_image>", "<image_soft_token>"
        set_in(folder / "preprocessor_config.json", do_convert_rgb=False)
        settings = {"image_seq_length": 16}
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        for key, value in {**WIDE_TEXT, "rope_parameters": rope}.items():
            patch.setitem(qwen2_5_vl.TINY_TEXT, key, value)
        qwen2_5_vl.save_qwen2_5_vl(folder, out_hidden_size=64, intermediate_size=128)
        image, token = "<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>"
        settings = {}
    set_in(folder / "config.json", image_token_id=WORDS.index(token), image_token_index=WORDS.index(token))
    if settings:
        (folder / "processor_config.json").write_text(json.dumps(settings))
    save_tokenizer(folder)
    return folder, image


WIDE = ("llava", "gemma3", "qwen2_5_vl")


@pytest.fixture(params=WIDE)
def wide(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    return save_wide(request.param, tmp_path / "model", monkeypatch)


class TestLoading:
    def test_answers_as_transformers_does(self, wide: tuple[Path, str]) -> None:
        folder, image = wide
        model, processor = integration.load_vlm(folder, device="cpu")
        theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
        inputs = processor(text=f"what is {image} this", images=[Image.fromarray(noise(60, 40))], return_tensors="pt")
        assert (inputs["input_ids"] == model.config.image_token_id).sum() > 1
        assert type(model) is type(theirs)
        assert not model.training
        assert vision_parameters(model) == {}
        assert_same(greedy(model, inputs), greedy(theirs, inputs))

    def test_four_bits_for_the_language_model_alone(self, wide: tuple[Path, str]) -> None:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        folder, image = wide
        model, processor = integration.load_vlm(folder, load_in_4bit=True, device="cpu")
        linears = {name: type(module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        assert {kind for name, kind in linears.items() if name != "lm_head"} == {bitsandbytes.nn.Linear4bit}
        assert all("language_model" in name for name in linears if name != "lm_head")
        assert vision_parameters(model) == {}
        facts = integration.accelerated(model)
        assert facts is not None
        assert (facts.shared_bytes, facts.kept_bytes) == (0, 0)
        assert facts.tower.dtype == torch.float32

        skipped = ["model.visual", "model.vision_tower", "model.multi_modal_projector", "lm_head"]
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=skipped,
        )
        theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config).eval()
        assert not any(
            isinstance(module, bitsandbytes.nn.Linear4bit) and "language_model" not in name
            for name, module in theirs.named_modules()
        )
        inputs = processor(text=f"what is {image} this", images=[Image.fromarray(noise(60, 40))], return_tensors="pt")
        # On some CPUs bitsandbytes rounds what enters a linear to bfloat16, so the last bit of an embedding may weigh more.
        ours, expected = greedy(model, inputs).logits[0], greedy(theirs, inputs).logits[0]
        assert relative_error(ours, expected) <= 1e-2
        with pytest.raises(UsageError, match="given away"):
            integration.restore(model)

    @each_case
    def test_in_every_family_four_bits_stay_out_of_the_vision_part(self, name: str, tmp_path: Path) -> None:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        folder = CASES[name].save(tmp_path / "model")
        save_tokenizer(folder)
        model, _ = integration.load_vlm(folder, load_in_4bit=True, device="cpu")
        quantized = [key for key, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
        plain = [key for key, module in model.named_modules() if type(module) is torch.nn.Linear]
        assert quantized
        assert all("language_model" in key for key in quantized)
        assert plain == ["lm_head"]
        assert vision_parameters(model) == {}
        images = [noise(57, 43, 1)]
        own = VisionTower.from_pretrained(folder, device="cpu").encode(images)[0]
        tower = integration.accelerated(model).tower
        assert torch.equal(tower.encode(images)[0].embeddings, own.embeddings)

    def test_the_tower_has_the_dtype_that_was_asked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder, _ = save_wide("qwen2_5_vl", tmp_path / "model", monkeypatch)
        model, _ = integration.load_vlm(folder, dtype="bfloat16", device="cpu")
        facts = integration.accelerated(model)
        assert facts is not None
        assert facts.tower.dtype == model.dtype == torch.bfloat16
        assert 2 <= facts.tower.weights_bytes / facts.tower.graph.parameters < 3

    def test_a_model_that_was_quantized_whole_takes_no_tower_of_its_weights(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("bitsandbytes")
        folder, _ = save_wide("qwen2_5_vl", tmp_path / "model", monkeypatch)
        config = transformers.BitsAndBytesConfig(load_in_4bit=True)
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)
        with pytest.raises(UnsupportedDtypeError, match=r"visual.*load_vlm"):
            integration.accelerate_vision(model)

    def test_a_checkpoint_that_is_quantized_already(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        folder, image = save_wide("qwen2_5_vl", tmp_path / "model", monkeypatch)
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        whole = transformers.AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config).eval()
        whole.save_pretrained(tmp_path / "quantized")
        for file in folder.iterdir():
            if not (tmp_path / "quantized" / file.name).exists():
                (tmp_path / "quantized" / file.name).write_bytes(file.read_bytes())
        stored = load_file(tmp_path / "quantized" / "model.safetensors")
        assert any("visual." in name and "quant_map" in name for name in stored)
        model, processor = integration.load_vlm(tmp_path / "quantized", device="cpu")
        linears = [name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
        assert linears
        assert all("language_model" in name for name in linears)
        inputs = processor(text=f"what is {image} this", images=[Image.fromarray(noise(60, 40))], return_tensors="pt")
        ours, expected = greedy(model, inputs).logits[0], greedy(whole, inputs).logits[0]
        assert relative_error(ours, expected) <= 5e-2

    def test_vision_weights_are_in_memory_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = qwen2_5_vl.save_qwen2_5_vl(
            tmp_path / "model", hidden_size=640, num_heads=8, intermediate_size=1728, depth=5
        )
        save_tokenizer(folder)
        vision = sum(
            weight.nbytes for name, weight in load_file(folder / "model.safetensors").items() if "visual" in name
        )
        assert vision > 100e6
        code = (
            "import json\n"
            "from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration\n"
            "import bitsandbytes, accelerate\n"
            "from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil\n"
            "from tritontower.integrations.transformers import load_vlm\n"
            "status = lambda: dict(line.split(':') for line in open('/proc/self/status'))\n"
            "peak = lambda: int(status()['VmHWM'].split()[0]) * 1024\n"
            "before = peak()\n"
            f"model, _ = load_vlm({str(folder)!r}, load_in_4bit=True, device='cpu')\n"
            "print(json.dumps(peak() - before))"
        )
        pytest.importorskip("bitsandbytes")
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
        grown = json.loads(run.stdout.splitlines()[-1])
        assert vision <= grown < 1.5 * vision

    def test_what_quantizes_has_to_be_there(self, question: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = question("llava").folder
        loading = sys.modules["tritontower.integrations.transformers.loading"]
        with monkeypatch.context() as patch:
            patch.setattr(loading, "find_spec", lambda name: None)
            with pytest.raises(BackendUnavailableError, match="needs the package bitsandbytes"):
                integration.load_vlm(folder, load_in_4bit=True)
        bitsandbytes = pytest.importorskip("bitsandbytes")
        with monkeypatch.context() as patch:
            patch.setattr(bitsandbytes, "supported_torch_devices", {"cuda", "xpu"})
            with pytest.raises(BackendUnavailableError, match=r"supports cuda, xpu here, not 'cpu'"):
                integration.load_vlm(folder, load_in_4bit=True, device="cpu")

        def broken(name: str) -> Any:
            raise OSError("libcudart.so.99: no such file")

        with monkeypatch.context() as patch:
            patch.setattr(loading, "import_module", broken)
            with pytest.raises(BackendUnavailableError, match=r"cannot be imported: libcudart"):
                integration.load_vlm(folder, load_in_4bit=True)

    def test_checkpoints_that_transformers_has_no_language_model_for(self, tmp_path: Path) -> None:
        case = next(case for case in all_cases() if case.name == "siglip")
        with pytest.raises(UnsupportedArchitectureError, match=r"no language model that answers in text \(siglip\)"):
            integration.load_vlm(case.save(tmp_path / "siglip"), device="cpu")
        native = to_mistral_format(CASES["pixtral"].save(tmp_path / "pixtral"), tmp_path / "native")
        with pytest.raises(UnsupportedArchitectureError, match="a format that transformers does not read"):
            integration.load_vlm(native, device="cpu")

    def test_contradictions(self, question: Ask) -> None:
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
        with pytest.raises(UsageError, match="contradict"):
            integration.load_vlm(question("llava").folder, load_in_4bit=True, quantization_config=config)

    def test_missing_language_tensors_are_named(self, question: Ask, tmp_path: Path) -> None:
        source = question("llava").folder
        for file in source.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = load_file(source / "model.safetensors")
        lost = next(name for name in tensors if name.endswith("mlp.up_proj.weight"))
        del tensors[lost]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        save_tokenizer(tmp_path)
        with pytest.raises(CheckpointIncompleteError, match=r"mlp\.up_proj\.weight"):
            integration.load_vlm(tmp_path, device="cpu")

    def test_no_kernel_is_fetched_because_a_configuration_names_it(self, question: Ask, tmp_path: Path) -> None:
        for file in question("llava").folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        set_in(tmp_path / "config.json", _attn_implementation="somebody/kernel")
        with pytest.raises(ConfigError, match="somebody/kernel"):
            integration.load_vlm(tmp_path, device="cpu")

    def test_a_checkpoint_without_a_tokenizer(self, question: Ask) -> None:
        with pytest.raises(ProcessorError, match="holds no tokenizer"):
            integration.load_vlm(question("qwen2_5_vl").folder, device="cpu")


class TestProcessorOfRows:
    @pytest.fixture(params=["pixtral", "mistral3"])
    def loaded(self, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
        folder = CASES[request.param].save(tmp_path / "model", text_vocab_size=64)
        save_tokenizer(folder)
        token = WORDS.index("[IMG]")
        set_in(folder / "config.json", image_token_id=token, image_token_index=token)
        return integration.load_vlm(folder, device="cpu")

    def test_every_row_of_tokens_has_an_end(self, loaded: tuple[Any, Any]) -> None:
        model, processor = loaded
        assert isinstance(processor, integration.ImageTextProcessor)
        tower = integration.accelerated(model).tower
        images = [noise(57, 43, 1), noise(90, 60, 2)]
        inputs = processor(images=[Image.fromarray(one) for one in images], text="what [IMG] is [IMG] this")
        words = [VOCABULARY[token] for token in inputs["input_ids"][0].tolist()]
        expected = ["what"]
        for word, embedding in zip(("is", "this"), tower.encode(images), strict=True):
            merge = tower.config.merge
            rows, columns = (side // merge for side in embedding.grid_thw[1:])
            rows_of_tokens = [*(["[IMG]"] * columns), "[IMG_BREAK]"] * rows
            expected += [*rows_of_tokens[:-1], "[IMG_END]", word]
        assert words == expected
        assert len(greedy(model, inputs).tokens) == NEW_TOKENS
        assert processor.batch_decode(inputs["input_ids"], skip_special_tokens=True) == ["what is this"]

    def test_a_chat_template_makes_the_text_for_a_call(self, loaded: tuple[Any, Any]) -> None:
        _, processor = loaded
        processor.tokenizer.chat_template = "{% for message in messages %}[IMG]{{ message['content'] }}{% endfor %}"
        conversation = [{"role": "user", "content": "what is this"}]
        text = processor.apply_chat_template(conversation, add_generation_prompt=True)
        assert text == "[IMG]what is this"
        inputs = processor(images=[Image.fromarray(noise(57, 43))], text=[text])
        assert (inputs["input_ids"] == WORDS.index("[IMG]")).sum() > 1
        with pytest.raises(UsageError, match="pass the text and the images to the processor"):
            processor.apply_chat_template(conversation, tokenize=True)

    def test_images_and_their_places_are_as_many(self, loaded: tuple[Any, Any]) -> None:
        _, processor = loaded
        with pytest.raises(UsageError, match="2 places for images"):
            processor(images=[Image.fromarray(noise(57, 43))], text=["[IMG] what", "[IMG] is"], padding=True)
        with pytest.raises(UsageError, match="text is missing"):
            processor(images=[Image.fromarray(noise(57, 43))])
        both = processor(text=["what is this", "what"], padding=True)
        assert both["input_ids"].shape == (2, 3)
        assert "pixel_values" not in both


# -- attention --------------------------------------------------------------------------------------------------------


class TestAttention:
    @pytest.mark.parametrize("name", ["llava", "llava-siglip", "pixtral", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
    def test_encoders_attend_through_the_kernel_once_a_layer(
        self, question: Ask, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = question(name)
        calls = []
        attend = _attention.flash_attention_varlen

        def counted(*arguments: Any, **named: Any) -> torch.Tensor:
            calls.append(arguments[3].lengths)
            return attend(*arguments, **named)

        monkeypatch.setattr(_attention, "flash_attention_varlen", counted)
        layers = getattr(asked.model.config.vision_config, "depth", None)
        layers = layers or asked.model.config.vision_config.num_hidden_layers
        before = asked.model.config.vision_config._attn_implementation
        with integration.vision_attention(asked.model) as changed:
            assert set(changed) == {asked.model.config.vision_config.model_type}
            answer = asked.ask(**asked.text_inputs, **asked.pixel_inputs)
        assert_same(answer, asked.answer)
        assert len(calls) == layers
        assert len(calls[0]) >= 2
        assert asked.model.config.vision_config._attn_implementation == before

    def test_the_other_name_takes_a_mask_of_images(self, question: Ask) -> None:
        asked = question("pixtral")
        integration.register_attention()
        model = by_transformers(asked.folder, attn_implementation={"": "sdpa", "vision_config": integration.ATTENTION})
        answer = greedy(model, {"input_ids": asked.input_ids, **asked.text_inputs, **asked.pixel_inputs})
        assert_same(answer, asked.answer)

    def test_what_is_no_attention_of_an_encoder(self) -> None:
        rows = torch.randn(1, 2, 6, 16)
        attend = _attention._attend
        layer = torch.nn.Module()
        with pytest.raises(UsageError, match="not causal"):
            attend(layer, rows, rows, rows, None, is_causal=True)
        with pytest.raises(UsageError, match="without dropout"):
            attend(layer, rows, rows, rows, None, dropout=0.1)
        with pytest.raises(UsageError, match="as many keys and heads"):
            attend(layer, rows, rows[:, :1], rows[:, :1], None)
        with pytest.raises(UsageError, match="no gradients"):
            attend(layer, rows.clone().requires_grad_(), rows, rows, None)
        with pytest.raises(UsageError, match="have to be the same"):
            attend(
                layer, rows, rows, rows, None, cu_seq_lens_q=torch.tensor([0, 6]), cu_seq_lens_k=torch.tensor([0, 5])
            )
        with pytest.raises(UsageError, match="said to have 6 rows, but there are 2 × 6 queries"):
            attend(layer, *[rows.expand(2, -1, -1, -1)] * 3, None, cu_seq_lens_q=torch.tensor([0, 2, 6]))
        triangle = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
        with pytest.raises(UsageError, match="divide the rows"):
            attend(layer, rows, rows, rows, triangle)

    def test_a_model_without_an_encoder(self) -> None:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, vocab_size=8))
        with pytest.raises(UsageError, match="no vision_config"), integration.vision_attention(model):
            pass

    def test_images_are_told_apart_however_they_are_described(self) -> None:
        rows = torch.randn(1, 2, 6, 16)
        layer = torch.nn.Module()
        boundaries = torch.tensor([0, 2, 6], dtype=torch.int32)
        parts = [torch.nn.functional.scaled_dot_product_attention(*[part] * 3) for part in rows.split([2, 4], dim=2)]
        expected = torch.cat(parts, dim=2).transpose(1, 2)
        mask = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool()[None, None]
        places = torch.tensor([[0, 0], [0, 1], [0, 0], [0, 1], [1, 0], [1, 1]])
        descriptions: list[dict[str, Any]] = [
            {"attention_mask": None, "cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries.clone()},
            {"attention_mask": mask},
            {"attention_mask": torch.where(mask, 0.0, torch.finfo(torch.float32).min)},
            {"attention_mask": None, "position_ids": places},
        ]
        for description in descriptions:
            attended, weights = _attention._attend(layer, rows, rows, rows, **description)
            assert weights is None
            assert torch.allclose(attended, expected, atol=1e-6)

    def test_a_division_is_read_once_and_again_when_it_changed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reads = []
        divide = _attention._between_boundaries

        def counted(boundaries: torch.Tensor) -> Any:
            reads.append(boundaries.tolist())
            return divide(boundaries)

        boundaries = torch.tensor([0, 2, 6])
        for _ in range(3):
            assert _attention._once(boundaries, counted).lengths == (2, 4)
        assert len(reads) == 1
        boundaries[1] = 3
        assert _attention._once(boundaries, counted).lengths == (3, 3)
        with torch.inference_mode():
            inside = torch.tensor([0, 1, 6])
            assert _attention._once(inside, counted).lengths == (1, 5)
            inside[1] = 2
            assert _attention._once(inside, counted).lengths == (2, 4)


def test_transformers_is_imported_when_it_is_needed() -> None:
    code = "import sys, tritontower.integrations.transformers as i\nassert i.load_vlm\nprint('transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == "False"
