"""Integer arithmetic of the kernels' wrappers; the argument checks are tested with each kernel."""

import pytest

from tritontower.kernels.runtime.checks import align_up, ceil_div, next_power_of_two


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 2**40 + 1])
def test_sizes_are_rounded_up_exactly(size):
    assert ceil_div(size, 16) == size // 16 + (size % 16 > 0)
    assert align_up(size, 16) - size == -size % 16


def test_next_power_of_two():
    assert [next_power_of_two(size) for size in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
