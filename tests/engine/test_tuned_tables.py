"""Tables of tuned configurations: which one counts, what may stand in them, and that nothing in them can do harm."""

import copy
import json
import logging
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tritontower.demo.checkpoint import demonstration_checkpoint
from tritontower.errors import UsageError
from tritontower.kernels.attention.common import FlashAttentionConfig
from tritontower.kernels.gemm import linear as linear_module
from tritontower.kernels.gemm.linear_config import LinearConfig
from tritontower.kernels.runtime import source_digest as source_digest_module
from tritontower.kernels.runtime import tables, tables_schema
from tritontower.kernels.runtime.tables import Identity, check_table, read_table, tuned
from tritontower.tuning.operations import CONFIGS
from tritontower.tuning.search_space import uniform
from tritontower.tuning.table_writer import merge, read_checked, static_identity, table_key, table_text

GPU = Identity("NVIDIA Test 1", "sm_90", "9.0", 132)
DEVICE = torch.device("cuda", 0)
LINEAR = {"columns": 5120, "inner": 1280, "activation": None, "residual": False}
CONFIG = {"block_rows": 128, "block_columns": 128, "block_inner": 64, "group_rows": 8, "num_warps": 4, "num_stages": 3}


def entry(rows: int = 4096, *, warps: int = 4, **changes: Any) -> dict[str, Any]:
    return {
        "kernel": "linear",
        "source": tables.source_digest("linear"),
        "triton": str(tables.triton.__version__),
        "dtype": "bfloat16",
        "constants": LINEAR,
        "sizes": {"rows": rows},
        "config": {**CONFIG, "num_warps": warps},
        "microseconds": None,
        "tflops": 500.0,
        "predicted": {"microseconds": 10.0, "tflops": 500.0},
        "static": {"registers": 128, "spills": 0, "shared_memory": 98304},
        "runner_up": {"config": CONFIG, "microseconds": None},
        "verified": None,
        "date": "2026-11-21",
        **changes,
    }


def measured(rows: int = 4096, **changes: Any) -> dict[str, Any]:
    return entry(rows, **{"microseconds": 12.5, "verified": 0.002, **changes})


def table(*entries: dict[str, Any], gpu: bool = True) -> dict[str, Any]:
    key = table_key(GPU if gpu else static_identity("sm_90"))
    return {"schema": 1, "key": key, "entries": list(entries)}


def put(folder: Path, content: object, name: str = "NVIDIA_Test_1.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def ask(rows: int = 4096, **constants: Any) -> dict[str, Any] | None:
    return tuned("linear", DEVICE, torch.bfloat16, {**LINEAR, **constants}, {"rows": rows})


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch) -> dict[str, Path]:
    """A GPU that is not there, and empty folders in every place where tables are looked for."""
    places = {name: tmp_path / name for name in ("chosen", "cache", "packaged")}
    monkeypatch.setattr(tables, "identity", lambda device: GPU)
    monkeypatch.setenv(tables.FOLDER_VARIABLE, str(places["chosen"]))
    monkeypatch.setenv("TRITONTOWER_CACHE", str(places["cache"]))
    monkeypatch.setattr(tables, "packaged_folder", lambda: places["packaged"])
    monkeypatch.setattr(tables, "_warned", set())
    places["chosen"].mkdir()
    tables.forget()
    yield {"chosen": places["chosen"], "user": places["cache"] / "tuned", "packaged": places["packaged"]}
    tables.forget()


class TestLookUp:
    def test_order_of_the_places(self, folders):
        """Every table but the last is put in front of those that are there, and wins."""
        places = [
            ("packaged", "sm_90.json", False),
            ("user", "sm_90.json", False),
            ("packaged", "NVIDIA_Test_1.json", True),
            ("user", "NVIDIA_Test_1.json", True),
            ("chosen", "sm_90.json", False),
            ("chosen", "NVIDIA_Test_1.json", True),
        ]
        assert ask() is None
        for number, (place, name, gpu) in enumerate(places):
            warps = 2**number
            put(folders[place], table(entry(warps=warps), gpu=gpu), name)
            tables.forget()
            assert ask() == {**CONFIG, "num_warps": warps}, (place, name)

    @pytest.mark.parametrize(
        ("rows", "found"), [(4096, 4), (3900, 4), (5000, 4), (16, 1), (90, 1), (16384, 4), (500, 2), (1024, 2)]
    )
    def test_nearest_bucket(self, folders, rows, found):
        put(folders["user"], table(entry(64, warps=1), entry(512, warps=2), entry(4096, warps=4)))
        assert ask(rows) == {**CONFIG, "num_warps": found}

    @pytest.mark.parametrize(("rows", "there"), [(1, False), (13, False), (14, True), (19000, True), (20000, False)])
    def test_an_entry_answers_for_a_factor_of_four(self, folders, rows, there):
        put(folders["user"], table(entry(64), entry(4096)))
        assert (ask(rows) is not None) == there

    @pytest.mark.parametrize("rows", [4096, 16384, 35344])
    def test_what_was_measured_for_few_rows_says_nothing_of_many(self, folders, rows):
        """The packaged prediction for that very size answers, not a measured configuration for another one."""
        split = {**CONFIG, "split": 6}
        put(folders["user"], table(measured(64, config=split), measured(256, config=split)))
        put(folders["packaged"], table(entry(16384, warps=8), entry(4096, warps=8), gpu=False), "sm_90.json")
        assert ask(256) == ask(1024) == split
        assert ask(rows) == {**CONFIG, "num_warps": 8}

    def test_k_is_cut_for_few_rows_only(self, folders, monkeypatch):
        """The next entry without parts answers for more rows, or else the default."""
        split = {**CONFIG, "split": 6}
        put(folders["user"], table(entry(1024, config=split), entry(4096, warps=2)))
        assert ask(1217) == split
        assert ask(1218) == ask(1448) == ask(2048) == {**CONFIG, "num_warps": 2}
        put(folders["user"], table(entry(1024, config=split)))
        tables.forget()
        assert ask(1218) is None
        monkeypatch.setattr(linear_module.configs, "architecture", lambda device: "sm_90")
        how = {"dtype": torch.bfloat16, "activation": None, "residual": False, "device": DEVICE}
        assert linear_module.choose_config(1217, 5120, 1280, **how).split == 6
        assert linear_module.choose_config(1218, 5120, 1280, **how).split == 1

    @pytest.mark.parametrize("kernel", tables.SAME_FOR_ALL_SIZES)
    def test_one_table_answers_for_all_sizes_where_they_agree(self, folders, kernel):
        """Two tables would not agree, and a row's bits would depend on what it is packed with."""
        mine, other = {"num_warps": 2}, {"num_warps": 8}
        source = tables.source_digest(kernel)
        put(folders["user"], table(entry(64, kernel=kernel, source=source, config=mine)))
        put(folders["packaged"], table(entry(16384, kernel=kernel, source=source, config=other)))
        for rows in (1, 64, 1024, 16384, 2**20):
            assert tuned(kernel, DEVICE, torch.bfloat16, LINEAR, {"rows": rows}) == mine

    def test_of_two_as_near_the_larger(self, folders):
        put(folders["user"], table(entry(1024, warps=1), entry(4096, warps=2)))
        assert ask(2048) == {**CONFIG, "num_warps": 2}

    def test_buckets_are_half_powers_of_two(self):
        assert [tables.bucket(size) for size in (0, 1, 4096, 5793, 8192, 2**30)] == [0, 0, 24, 25, 26, 60]
        assert tables.bucket(4096) == tables.bucket(4300) != tables.bucket(5200)

    @pytest.mark.parametrize("change", [{"columns": 1280}, {"activation": "gelu"}, {"residual": True}])
    def test_constants_have_to_be_the_same(self, folders, change):
        put(folders["user"], table(entry()))
        assert ask() is not None
        assert ask(**change) is None

    def test_dtype_has_to_be_the_same(self, folders):
        put(folders["user"], table(entry()))
        assert tuned("linear", DEVICE, torch.float16, LINEAR, {"rows": 4096}) is None

    def test_the_next_table_answers_what_the_first_lacks(self, folders):
        put(folders["chosen"], table(entry(constants={**LINEAR, "columns": 7})))
        put(folders["packaged"], table(entry(warps=2)))
        assert ask() == {**CONFIG, "num_warps": 2}

    def test_not_on_a_cpu(self, folders):
        put(folders["user"], table(entry()))
        assert tuned("linear", torch.device("cpu"), torch.bfloat16, LINEAR, {"rows": 4096}) is None

    def test_reads_no_file_twice(self, folders, monkeypatch):
        put(folders["user"], table(entry()))
        assert ask() is not None
        monkeypatch.setattr(tables, "read_table", lambda path: pytest.fail(f"read {path} again"))
        assert ask() is not None
        assert ask(2048) is not None
        assert ask(columns=3) is None

    def test_the_answer_is_the_callers(self, folders):
        put(folders["user"], table(entry()))
        answer = ask()
        answer["num_warps"] = 77
        assert ask()["num_warps"] == 4

    def test_no_home(self, monkeypatch):
        monkeypatch.delenv("TRITONTOWER_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
        assert tables.cache_folder() is None
        assert tables.user_folder() is None
        assert ask() is None
        with pytest.raises(UsageError, match=r"no home folder .* set TRITONTOWER_CACHE"):
            demonstration_checkpoint()


class TestStale:
    def test_other_source(self, folders):
        put(folders["user"], table(entry(source="0" * 12)))
        assert ask() is None

    def test_other_triton(self, folders):
        """Times are those of one compiler; predictions survive another."""
        put(folders["user"], table(measured(triton="1.0.0")))
        assert ask() is None
        put(folders["user"], table(entry(triton="1.0.0")))
        tables.forget()
        assert ask() is not None

    def test_patch_releases_are_one(self, folders):
        minor = tables.triton_minor(str(tables.triton.__version__))
        put(folders["user"], table(measured(triton=f"{minor}.99")))
        assert ask() is not None

    def test_digest_covers_all_that_decides_a_launch(self, tmp_path, monkeypatch):
        source = '''
"""Docstring."""
from . import other
__all__ = ["LIMIT"]
LIMIT = 3
"""Of what."""
TYPED: int = 3
@triton.jit
def _kernel(x):
    """What it does."""
    # why
    return x  + 1
def launch_it(x):
    raise ValueError(f"no {x}")
class ItConfig:
    rows: int = 1
def helper():
    return 5
def _validate_it(x):
    return 5
def default_config(x):
    return 5
def it_reference(x):
    return 5
def compile_specs():
    return 5
'''
        other = "@triton.jit\ndef device_function(x):\n    return x\n"

        def digest(text: str, second: str = other) -> str:
            (tmp_path / "runtime").mkdir(exist_ok=True)
            (tmp_path / "runtime" / "it.py").write_text(text)
            (tmp_path / "runtime" / "other.py").write_text(second)
            tables.source_digest.cache_clear()
            return tables.source_digest("it")

        monkeypatch.setattr(source_digest_module, "__file__", str(tmp_path / "runtime" / "source_digest.py"))
        first = digest(source)
        same = [
            source.replace("# why", "# for another reason"),
            source.replace("What it does", "What it really does"),
            source.replace("x  + 1", "x + 1"),
            source.replace("from . import other", "import math\nfrom . import other"),
            source.replace('["LIMIT"]', '["LIMIT", "TYPED"]'),
            source.replace("Of what", "Of something else"),
            source.replace('f"no {x}"', 'f"not {x}"'),
            *(
                source.replace(f"def {name}:\n    return 5", f"def {name}:\n    return 6")
                for name in ("_validate_it(x)", "default_config(x)", "it_reference(x)", "compile_specs()")
            ),
        ]
        assert all(text != source for text in same)
        assert {digest(text) for text in same} == {first}
        others = [
            digest(source.replace("+ 1", "+ 2")),
            digest(source.replace("int = 1", "int = 2")),
            digest(source.replace("raise ValueError", "raise TypeError")),
            digest(source.replace("LIMIT = 3", "LIMIT = 4")),
            digest(source.replace("TYPED: int = 3", "TYPED: int = 4")),
            digest(source.replace("helper():\n    return 5", "helper():\n    return 6")),
            digest(source, other.replace("return x", "return -x")),
        ]
        assert len({first, *others}) == 8
        tables.source_digest.cache_clear()

    @pytest.mark.parametrize(
        ("kernel", "file", "old", "new"),
        [
            ("linear", "linear", "REDUCE_ROWS, REDUCE_COLUMNS = 4, 256", "REDUCE_ROWS, REDUCE_COLUMNS = 8, 256"),
            ("linear", "linear_config", "block_columns >= 128 else 1", "block_columns >= 256 else 1"),
            ("qkv_projection", "linear", "tiles, parts)](", "parts, tiles)]("),
            ("attention", "fixed_max", "REDO_KEYS = 32", "REDO_KEYS = 64"),
            ("attention", "fixed_max", "GROUPS = 8", "GROUPS = 4"),
        ],
    )
    def test_digest_covers_what_a_launch_is_made_of(self, tmp_path, monkeypatch, kernel, file, old, new):
        before = tables.source_digest(kernel)
        for path in Path(tables.__file__).parents[1].glob("*/*.py"):
            text = path.read_text(encoding="utf-8")
            if path.stem == file:
                assert text.count(old) == 1
                text = text.replace(old, new)
            (tmp_path / path.parent.name).mkdir(exist_ok=True)
            (tmp_path / path.parent.name / path.name).write_text(text, encoding="utf-8")
        monkeypatch.setattr(source_digest_module, "__file__", str(tmp_path / "runtime" / "source_digest.py"))
        tables.source_digest.cache_clear()
        assert tables.source_digest(kernel) not in (None, before)
        monkeypatch.undo()
        tables.source_digest.cache_clear()
        assert tables.source_digest(kernel) == before

    @pytest.mark.parametrize("name", ["nonsense", "../tables", "", "Linear", "a" * 99, "tables", "linear_reference"])
    def test_digest_of_no_kernel(self, name):
        assert tables.source_digest(name) is None


class TestWarning:
    def test_once_for_a_kernel(self, folders, caplog):
        with caplog.at_level(logging.WARNING, "tritontower"):
            ask()
            ask(64)
            ask(columns=5)
            tuned("norm", DEVICE, torch.bfloat16, {}, {"rows": 1})
        assert [record.args[0] for record in caplog.records] == ["linear", "norm"]
        assert "tritontower tune" in caplog.text

    def test_none_where_there_are_times(self, folders, caplog):
        put(folders["user"], table(measured()))
        with caplog.at_level(logging.WARNING, "tritontower"):
            assert ask() is not None
        assert caplog.text == ""

    def test_predictions_are_no_times(self, folders, caplog):
        put(folders["packaged"], table(entry(), gpu=False), "sm_90.json")
        with caplog.at_level(logging.WARNING, "tritontower"):
            assert ask() is not None
        assert "none was measured" in caplog.text

    def test_says_when_times_are_stale(self, folders, caplog):
        put(folders["user"], table(measured(source="0" * 12)))
        with caplog.at_level(logging.WARNING, "tritontower"):
            ask()
        assert "1 were found for another release" in caplog.text


class TestNamedFolder:
    def test_that_is_not_there(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setenv(tables.FOLDER_VARIABLE, str(tmp_path / "absent"))
        with caplog.at_level(logging.WARNING, "tritontower"):
            ask()
            tables.forget()
            ask(64)
        said = [record.getMessage() for record in caplog.records if tables.FOLDER_VARIABLE in record.getMessage()]
        assert said == [
            f"{tables.FOLDER_VARIABLE} names '{tmp_path / 'absent'}', which is no folder: no tables are read from there"
        ]

    def test_that_is_there(self, caplog):
        with caplog.at_level(logging.WARNING, "tritontower"):
            ask()
        assert tables.FOLDER_VARIABLE not in caplog.text


class TestNames:
    def test_of_files(self):
        assert tables.table_name("NVIDIA H200") == "NVIDIA_H200.json"
        assert tables.table_name("日本 7") == "7.json"

    @pytest.mark.parametrize("gpu", ["///", "日本", "..", "_"])
    def test_that_name_no_file(self, gpu, folders):
        with pytest.raises(ValueError, match="to name a table by"):
            tables.table_name(gpu)
        with pytest.raises(ValueError, match=r"key\.gpu has no letter or digit"):
            check_table({**table(), "key": {**table_key(GPU), "gpu": gpu}})
        assert tables.table_paths(gpu, "sm_90") == [
            folders[place] / "sm_90.json" for place in ("chosen", "user", "packaged")
        ]


ATTENTION = {"block_queries": 128, "block_keys": 128, "num_warps": 4, "num_stages": 3, "variant": "fixed"}

BROKEN = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "no object": [1],
    "no schema": {"key": {}, "entries": []},
    "schema of the future": {**table(), "schema": 2},
    "schema that is no number": {**table(), "schema": True},
    "another program's": {"E=8,N=14336": {"BLOCK_SIZE_M": 64}},
    "entries that are none": {**table(), "entries": {"a": 1}},
    "an entry that is none": table({"kernel": "linear"}),
    "too many names": table(entry(constants={f"n{i}": i for i in range(40)})),
    "a path": table(entry(kernel="../../etc/passwd")),
    "a digest that is none": table(entry(source="xyz")),
    "negative time": table(measured(microseconds=-1)),
    "time that is no number": table(measured(microseconds=float("nan"))),
    "endless time": table(measured(microseconds=float("inf"))),
    "time on no GPU": table(measured(), gpu=False),
    "size of nothing": table(entry(0)),
    "size that is a text": table(entry(sizes={"rows": "4096"})),
    "block that is no power of two": table(entry(config={**CONFIG, "block_rows": 96})),
    "block that no tensor core takes": table(entry(config={**CONFIG, "block_inner": 8})),
    "warps that are no power of two": table(entry(config={**CONFIG, "num_warps": 5})),
    "rows that are no power of two": table(entry(kernel="norm", config={"rows": 3, "num_warps": 4})),
    "block of two million": table(entry(config={**CONFIG, "block_rows": 2**21})),
    "tile that no chip holds": table(entry(config={**CONFIG, "block_rows": 4096, "block_columns": 4096})),
    "gated tile that no chip holds": table(
        entry(
            constants={**LINEAR, "activation": "silu_gated"}, config={**CONFIG, "block_rows": 256, "block_columns": 256}
        )
    ),
    "more shared memory than there is": table(entry(config={**CONFIG, "num_stages": 8})),
    "more shared memory than there is for the runner-up": table(
        entry(runner_up={"config": {**CONFIG, "num_stages": 8}, "microseconds": None})
    ),
    "attention with more shared memory than there is": table(
        entry(kernel="attention", constants={"head_dim": 256}, config=ATTENTION)
    ),
    "scores that no chip holds": table(
        entry(kernel="attention", constants={"head_dim": 64}, config={**ATTENTION, "block_keys": 1024})
    ),
    "norm of more rows than a chip holds": table(
        entry(kernel="norm", constants={"width": 1280}, config={"rows": 1024, "num_warps": 4})
    ),
    "architecture that is none": {**table(), "key": {**table_key(GPU), "architecture": "sm_1"}},
    "no warps": table(entry(config={**CONFIG, "num_warps": 0})),
    "switch for a number": table(entry(config={**CONFIG, "num_warps": True})),
    "text of two lines": table(entry(config={**CONFIG, "operands": "a\nb"})),
    "list in a configuration": table(entry(config={**CONFIG, "operands": ["pointers"]})),
    "unproven vendor": table(entry(config={**CONFIG, "vendor": True})),
    "unproven variant": table(entry(config={**CONFIG, "variant": "specialized"})),
    "unchecked vendor": table(measured(config={**CONFIG, "vendor": True}, verified=None)),
    "dtype of no tower": table(entry(dtype="int8")),
    "dtype that cannot be looked up": table(entry(dtype=["float32"])),
    "date": table(entry(date="yesterday")),
}


class TestBrokenFiles:
    @pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
    def test_are_ignored_with_one_warning(self, folders, caplog, content):
        path = put(folders["user"], content)
        put(folders["packaged"], table(entry(warps=2), gpu=False), "sm_90.json")
        with caplog.at_level(logging.WARNING, "tritontower"):
            assert ask() == {**CONFIG, "num_warps": 2}
            assert ask(1024) == {**CONFIG, "num_warps": 2}
        assert [str(path) in record.getMessage() for record in caplog.records].count(True) == 1
        with pytest.raises(UsageError, match="is no table of tuned configurations: "):
            read_checked(path)

    def test_bytes_and_folders(self, folders):
        put(folders["user"], "").write_bytes(b"\xff\xfe\x00")
        (folders["packaged"] / "NVIDIA_Test_1.json").mkdir(parents=True)
        assert ask() is None

    def test_too_large(self, folders, monkeypatch):
        monkeypatch.setattr(tables_schema, "LARGEST_FILE", 1000)
        path = put(folders["user"], table(entry(), entry(64)))
        with pytest.raises(ValueError, match="more than 1000 bytes"):
            read_table(path)

    def test_vendor_and_specialized_with_a_time_and_a_check(self):
        check_table(table(measured(config={**CONFIG, "vendor": True})))
        check_table(table(measured(config={"variant": "specialized", "num_warps": 4})))

    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def test_anything_in_any_place(self, data):
        """Either it is refused, in words, or what is read can be asked without harm."""
        content = copy.deepcopy(table(entry(), measured(64)))
        place: Any = content
        while isinstance(place, (dict, list)) and place:
            names = sorted(place) if isinstance(place, dict) else range(len(place))
            name = data.draw(st.sampled_from(list(names)))
            if not isinstance(place[name], (dict, list)) or not place[name] or data.draw(st.booleans()):
                place[name] = data.draw(self.values)
                break
            place = place[name]
        try:
            check_table(content)
        except ValueError:
            return
        entries = tables._Entries(tables.Table(Path("x"), content["key"], content["entries"]))
        key = tables._key("linear", "bfloat16", LINEAR, {"rows": 1})
        found = entries.nearest(key, {"rows": 1})
        if found is not None:
            assert isinstance(found["config"], dict)


class TestConfiguration:
    def test_fits(self):
        assert tables.configuration(LinearConfig, CONFIG) == LinearConfig(128, 128, 64, 8, 4, 3)
        assert tables.configuration(LinearConfig, None) is None

    @pytest.mark.parametrize(
        "change",
        [{"unknown": 1}, {"num_warps": "4"}, {"num_warps": True}, {"operands": "magic"}, {"vendor": 1}, {"split": 0}],
    )
    def test_does_not_fit(self, change):
        assert tables.configuration(LinearConfig, {**CONFIG, **change}) is None

    def test_missing_fields(self):
        assert tables.configuration(LinearConfig, {"num_warps": 4}) is None

    def test_texts(self):
        fields = {"block_queries": 64, "block_keys": 64, "num_warps": 4, "num_stages": 2, "variant": "fixed"}
        assert tables.configuration(FlashAttentionConfig, fields) == FlashAttentionConfig(64, 64, 4, 2, "fixed")
        assert tables.configuration(FlashAttentionConfig, {**fields, "variant": "nonsense"}) is None


def _merge_many(path: str, first: int, start: Any) -> None:
    start.wait()
    for step in range(10):
        merge(Path(path), table_key(GPU), [entry(constants={**LINEAR, "columns": first + step})])


class TestWriting:
    def test_text_reads_back(self, tmp_path):
        path = tmp_path / "t.json"
        path.write_text(table_text(table_key(GPU), [entry(), measured(64)]), encoding="utf-8")
        assert sorted(each["sizes"]["rows"] for each in read_table(path).entries) == [64, 4096]
        assert len(path.read_text(encoding="utf-8").splitlines()) == 4

    def test_merges_by_bucket(self, tmp_path):
        path = tmp_path / "new" / "t.json"
        key = table_key(GPU)
        assert merge(path, key, [entry(4096, warps=1), entry(64, warps=2)]) == (2, 2, 0)
        assert merge(path, key, [entry(4300, warps=4)]) == (2, 1, 0)
        assert {(each["sizes"]["rows"], each["config"]["num_warps"]) for each in read_table(path).entries} == {
            (64, 2),
            (4300, 4),
        }

    def test_a_prediction_does_not_replace_a_time(self, tmp_path):
        path, key = tmp_path / "t.json", table_key(GPU)
        merge(path, key, [measured(warps=4)])
        merge(path, key, [entry(warps=1)])
        assert read_table(path).entries[0]["config"]["num_warps"] == 4
        merge(path, key, [measured(warps=2)])
        assert read_table(path).entries[0]["config"]["num_warps"] == 2

    @pytest.mark.parametrize("change", [{"source": "0" * 12}, {"triton": "1.0.0"}])
    def test_what_counts_for_nothing_replaces_no_time(self, tmp_path, change):
        path, key = tmp_path / "t.json", table_key(GPU)
        merge(path, key, [measured(warps=4)])
        assert merge(path, key, [measured(warps=1, **change)]) == (1, 0, 0)
        assert read_table(path).entries[0]["config"]["num_warps"] == 4

    @pytest.mark.parametrize("change", [{"source": "0" * 12}, {"triton": "1.0.0"}])
    def test_a_prediction_replaces_a_time_that_counts_no_more(self, tmp_path, change):
        path, key = tmp_path / "t.json", table_key(GPU)
        merge(path, key, [measured(warps=4, **change)])
        assert merge(path, key, [entry(warps=1)]) == (1, 1, 0)
        assert read_table(path).entries[0]["config"]["num_warps"] == 1

    @staticmethod
    def attention(longest: int, *, keys: int, variant: str = "online", make: Any = measured) -> dict[str, Any]:
        config = {"block_queries": 64, "block_keys": keys, "num_warps": 4, "num_stages": 2, "variant": variant}
        changes = {"kernel": "attention", "source": tables.source_digest("attention"), "config": config}
        constants = {"head_dim": 80, "padded": False, "bounded": 0}
        made: dict[str, Any] = make(**changes, constants=constants, sizes={"longest": longest})
        return made

    @staticmethod
    def held(path: Path) -> set[tuple[int, int]]:
        return {(each["sizes"]["longest"], each["config"]["block_keys"]) for each in read_table(path).entries}

    def test_sizes_agree_after_a_second_run(self, tmp_path):
        """A run for small images, then one for large ones: the fields that sums depend on are those of the second."""
        path, key = tmp_path / "t.json", table_key(GPU)
        merge(path, key, [self.attention(256, keys=64), self.attention(1024, keys=64)])
        assert merge(path, key, [self.attention(16384, keys=128, variant="fixed")]) == (1, 1, 2)
        assert self.held(path) == {(16384, 128)}
        assert merge(path, key, [self.attention(256, keys=128, variant="fixed")]) == (2, 1, 0)

    def test_sizes_agree_within_an_import(self, tmp_path):
        path = tmp_path / "t.json"
        disagreeing = [self.attention(16384, keys=128), self.attention(256, keys=64), self.attention(64, keys=128)]
        assert merge(path, table_key(GPU), disagreeing).added == 2
        assert self.held(path) == {(64, 128), (16384, 128)}

    def test_a_prediction_drives_no_time_out(self, tmp_path):
        path, key = tmp_path / "t.json", table_key(GPU)
        merge(path, key, [self.attention(256, keys=64)])
        assert merge(path, key, [self.attention(16384, keys=128, make=entry)]) == (1, 0, 0)
        assert self.held(path) == {(256, 64)}

    def test_other_launches_need_not_agree(self, tmp_path):
        path, key = tmp_path / "t.json", table_key(GPU)
        other = {**self.attention(256, keys=64), "constants": {"head_dim": 64, "padded": False, "bounded": 0}}
        assert merge(path, key, [other, self.attention(256, keys=128)]).held == 2

    def test_what_is_no_table_is_kept_aside(self, tmp_path):
        path = put(tmp_path, "mine", "t.json")
        assert merge(path, table_key(GPU), [entry()]).held == 1
        assert (tmp_path / "t.json.broken").read_text() == "mine"

    def test_refuses_to_write_what_it_would_not_read(self, tmp_path):
        with pytest.raises(ValueError, match="the vendor's own product"):
            merge(tmp_path / "new" / "t.json", table_key(GPU), [entry(config={**CONFIG, "vendor": True})])
        assert [each.name for each in (tmp_path / "new").iterdir() if each.suffix != ".lock"] == []

    def test_two_writers_lose_nothing(self, tmp_path):
        context = multiprocessing.get_context("fork")
        start = context.Event()
        path = tmp_path / "t.json"
        writers = [context.Process(target=_merge_many, args=(str(path), first, start)) for first in (100, 200)]
        for writer in writers:
            writer.start()
        start.set()
        for writer in writers:
            writer.join(60)
            assert writer.exitcode == 0
        columns = {each["constants"]["columns"] for each in read_table(path).entries}
        assert columns == {*range(100, 110), *range(200, 210)}
        assert not list(tmp_path.glob("*.tmp"))


SHIPPED = sorted((Path(tables.__file__).parents[1] / "tuned").glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
class TestShippedTables:
    def test_reads_and_names_what_exists(self, path):
        found = read_table(path)
        assert found.entries
        for each in found.entries:
            assert tables.configuration(CONFIGS[each["kernel"]], each["config"]) is not None, each
            assert each["static"] is None or each["static"]["spills"] == 0

    def test_is_of_this_source(self, path):
        stale = {
            each["kernel"]
            for each in read_table(path).entries
            if each["source"] != tables.source_digest(each["kernel"])
        }
        assert not stale, "regenerate with: python -m tritontower.tuning.build_tables"

    def test_k_is_cut_for_few_rows_only(self, path):
        cut = [each for each in read_table(path).entries if each["config"].get("split", 1) > 1]
        assert all(each["sizes"]["rows"] <= tables.SPLIT_ROWS for each in cut)
        assert {each["kernel"] for each in cut} <= {"linear", "qkv_projection"}

    def test_k_is_whole_from_1218_rows(self, path, monkeypatch):
        """As the README says of every table; up to 1,217, the bucket of 1,024, these do cut it."""
        monkeypatch.setattr(tables, "is_current", lambda entry: True)
        entries = tables._Entries(read_table(path))
        cut = {1217: 0, 1218: 0, 1448: 0, 4096: 0}
        for rows in cut:
            for key in entries.by_key:
                found = entries.nearest(key, {"rows": rows}) if key[3] == ("rows",) else None
                cut[rows] += found is not None and found["config"].get("split", 1) > 1
        assert cut.pop(1217) > 0
        assert set(cut.values()) == {0}

    def test_sizes_agree_where_a_rows_bits_must_not_depend_on_the_pack(self, path):
        found = read_table(path)
        common: dict[Any, set[tuple[Any, ...]]] = {}
        for each in found.entries:
            names = uniform(each["kernel"], found.key["architecture"])
            launch = (each["kernel"], each["dtype"], *sorted(each["constants"].items()))
            common.setdefault(launch, set()).add(tuple(each["config"].get(name) for name in names))
        assert {kernel for kernel, *_ in common} & set(tables.SAME_FOR_ALL_SIZES)
        assert all(len(values) == 1 for values in common.values())

    def test_holds_no_time_unless_it_is_a_gpus(self, path):
        found = read_table(path)
        if found.key["gpu"] is None:
            assert path.name == tables.table_name(found.key["architecture"])
            assert all(each["microseconds"] is None for each in found.entries)
        else:
            assert path.name == tables.table_name(found.key["gpu"])
