"""Activations at the ends of the range, and on any number of threads; see ``test_promises`` for all else."""

import pytest
import torch
from support.numbers import normal

from tritontower.kernels.rowwise.activations import ACTIVATIONS, activation

# numpy warns of what a GPU does silently, and what the activations rely on.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_are_accurate_far_from_zero(device, kind):
    # Where the exponential overflows the result is zero, not NaN; where it underflows it is x.
    far = torch.tensor([[100.0, 1e4, 1e9, 1e38]], device=device)
    torch.testing.assert_close(activation(far, kind), far, rtol=2e-7, atol=0)
    assert activation(-far, kind).abs().max() <= 1e-30
    assert torch.equal(activation(torch.zeros(1, 3, device=device), kind), torch.zeros(1, 3, device=device))
    largest_half = torch.tensor([[-65504.0, 65504.0]], dtype=torch.float16, device=device)
    assert activation(largest_half, kind).tolist() == [[0.0, 65504.0]]


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_nan_stays_nan(device, kind):
    assert bool(activation(torch.full((1, 3), float("nan"), device=device), kind).isnan().all())


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.usefixtures("restore_threads")
def test_vectors_of_any_thread_give_a_row_the_same_bits(kind, dtype, threads):
    torch.set_num_threads(threads)
    for columns, sizes in ((97, (2, 3, 700)), (1280, (3, 60, 101)), (4304, (40,))):
        row = 3 * normal(1, columns, dtype=dtype, seed=1)
        alone = activation(row, kind)
        for rows in sizes:
            batch = 3 * normal(rows, columns, dtype=dtype, seed=rows)
            places = (0, rows // 2, rows - 1)
            for place in places:
                batch[place] = row
            result = activation(batch, kind)
            assert all(torch.equal(result[place], alone[0]) for place in places), (columns, rows)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="kind must be one of quick_gelu, gelu, gelu_tanh, silu, got 'relu'"):
        activation(torch.zeros(4, 8), "relu")
