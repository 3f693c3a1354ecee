"""Registry of tuned configurations: which entry applies to a launch."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.tuning import CONFIG, LINEAR, make_entry

from tritontower.kernels.attention.common import FlashAttentionConfig
from tritontower.kernels.gemm.linear_config import LinearConfig
from tritontower.kernels.runtime import registry
from tritontower.kernels.runtime.registry import SAME_FOR_ALL_SIZES, TunedTable, lookup, make_config

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    registry.clear()
    yield
    registry.clear()


def warps(rows: int = 4096, dtype: torch.dtype = torch.bfloat16, **constants: Any) -> int | None:
    """Looks a launch up and returns the number of warps, which tells entries apart."""
    found = lookup(LinearConfig, "gemm.linear", DEVICE, dtype, {**LINEAR, **constants}, {"rows": rows})
    return None if found is None else found.num_warps


def fill(*tables: list[dict[str, Any]]) -> None:
    registry.fill(DEVICE, [TunedTable(entries) for entries in tables])


@pytest.mark.parametrize(
    ("rows", "found"), [(4096, 4), (3900, 4), (5000, 4), (16, 1), (90, 1), (16384, 4), (500, 2), (1024, 2)]
)
def test_the_nearest_bucket_applies(rows, found):
    fill([make_entry(64, warps=1), make_entry(512, warps=2), make_entry(4096, warps=4)])
    assert warps(rows) == found


@pytest.mark.parametrize(("rows", "there"), [(1, False), (13, False), (14, True), (19000, True), (20000, False)])
def test_an_entry_applies_up_to_a_factor_of_four(rows, there):
    fill([make_entry(64), make_entry(4096)])
    assert (warps(rows) is not None) == there


def test_split_k_applies_to_few_rows_only():
    """The next entry without a split applies to more rows, or else the default."""
    split = make_entry(1024, config={**CONFIG, "split": 6, "num_warps": 8})
    fill([split, make_entry(4096, warps=2)])
    assert [warps(rows) for rows in (1217, 1218, 1448, 2048)] == [8, 2, 2, 2]
    fill([split])
    assert [warps(1217), warps(1218)] == [8, None]


@pytest.mark.parametrize("kernel", SAME_FOR_ALL_SIZES)
def test_one_table_applies_to_all_sizes_if_they_share_fields(kernel):
    fill([make_entry(64, kernel=kernel, warps=2)], [make_entry(16384, kernel=kernel, warps=8)])
    for rows in (1, 64, 16384, 2**20):
        found = lookup(LinearConfig, kernel, DEVICE, torch.bfloat16, LINEAR, {"rows": rows})
        assert found is not None
        assert found.num_warps == 2


def test_the_larger_of_two_equally_near_entries_applies():
    fill([make_entry(1024, warps=1), make_entry(4096, warps=2)])
    assert warps(2048) == 2


def test_dtype_and_constants_must_be_equal():
    fill([make_entry()])
    assert warps() == 4
    assert warps(dtype=torch.float16) is None
    assert [warps(**change) for change in ({"columns": 1280}, {"activation": "gelu"}, {"residual": True})] == [None] * 3


def test_the_first_table_with_an_entry_applies():
    other = make_entry(constants={**LINEAR, "columns": 7}, warps=8)
    fill([other], [make_entry(warps=2)], [make_entry(warps=4)])
    assert (warps(), warps(columns=7)) == (2, 8)


def test_other_devices_use_the_defaults():
    fill([make_entry()])
    question = LinearConfig, "gemm.linear", torch.device("cuda", 1), torch.bfloat16, LINEAR, {"rows": 4096}
    assert lookup(*question) is None
    registry.clear()
    assert warps() is None


def test_values_become_a_frozen_configuration():
    assert make_config(LinearConfig, CONFIG) == LinearConfig(128, 128, 64, 8, 4, 3)
    values = {"block_queries": 64, "block_keys": 64, "num_warps": 4, "num_stages": 2, "variant": "fixed"}
    assert make_config(FlashAttentionConfig, values) == FlashAttentionConfig(64, 64, 4, 2, "fixed")
    assert make_config(FlashAttentionConfig, {**values, "variant": "nonsense"}) is None
    assert make_config(LinearConfig, {"num_warps": 4}) is None


@pytest.mark.parametrize(
    "change",
    [{"unknown": 1}, {"num_warps": "4"}, {"num_warps": True}, {"operands": "magic"}, {"vendor": 1}, {"split": 0}],
)
def test_values_of_another_release_give_no_configuration(change):
    assert make_config(LinearConfig, {**CONFIG, **change}) is None
