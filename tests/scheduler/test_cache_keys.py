"""Cache keys: everything that an embedding depends on makes another key."""

import json
import os
from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from tritontower import VisionTower
from tritontower.errors import Limits
from tritontower.models.common.assembly import files_identity
from tritontower.preprocessing import Preprocessor, ProcessorSource, SmartResize
from tritontower.scheduler.cache_keys import framed_digest, preprocessing_identity


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_parts_of_a_key_do_not_run_into_each_other(first, second):
    assert (framed_digest(first) == framed_digest(second)) == (first == second)
    assert len(framed_digest(first)) == 64
    assert framed_digest(["ä"]) == framed_digest(["ä".encode()])


def test_changed_weight_files_have_another_identity(qwen2_vl, tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((qwen2_vl / "model.safetensors").read_bytes())
    first = files_identity(tmp_path)
    assert files_identity(tmp_path) == first
    assert files_identity(qwen2_vl) != first
    # The same size and the same header: a fine-tune of the same model.
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    os.utime(weights, ns=(1, 2))
    second = files_identity(tmp_path)
    assert second != first
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert files_identity(tmp_path) != second


def test_changed_preprocessing_has_another_identity(qwen2_vl, tmp_path):
    config = VisionTower.from_pretrained(qwen2_vl, device="cpu", delay_load=True).config

    def make(folder=qwen2_vl, frame_budget="per_frame", **arguments):
        rule = partial(SmartResize, frame_budget=frame_budget)
        return Preprocessor(ProcessorSource(config, folder, **arguments), rule)

    plain, same = make(), make(limits=Limits(max_image_pixels=5))
    assert preprocessing_identity(plain) == preprocessing_identity(same)
    others = [
        make(frame_budget="per_video"),
        make(options={"resample": 2}),
        make(options={"image_mean": [0.0, 0.0, 0.0]}),
        make(given=plain.processor),
        make(options={"resample": object()}),
        make(tmp_path),
    ]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 3136}))
    digests = [preprocessing_identity(other) for other in others]
    assert len({*digests, preprocessing_identity(plain)}) == len(others) + 1
