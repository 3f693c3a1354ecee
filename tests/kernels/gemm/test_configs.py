"""Default and tuned configurations of the matmuls."""

from dataclasses import asdict
from functools import partial

import pytest
import torch

from tritontower.kernels.gemm import linear, patch_projection, projector, qkv_projection
from tritontower.kernels.gemm.linear_config import GATED, LinearConfig, default_config
from tritontower.kernels.runtime import registry
from tritontower.kernels.runtime.config import ARCHITECTURES, SHARED_MEMORY_LIMIT

BF16 = torch.bfloat16
TUNED = LinearConfig(64, 64, 32, group_rows=4, num_warps=4, num_stages=2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("module", [linear, qkv_projection, patch_projection])
def test_default_tiles_fit_shared_memory(module, architecture):
    for spec in module.compile_specs(architecture):
        constants = spec.constants
        if "BLOCK_INNER" in constants:
            columns = constants["BLOCK_COLUMNS"] * (2 if constants.get("ACTIVATION") in GATED else 1)
            size = 4 if "fp32" in spec.signature["x_ptr"] else 2
            used = (constants["BLOCK_ROWS"] + columns) * constants["BLOCK_INNER"] * size * spec.num_stages
            assert used <= SHARED_MEMORY_LIMIT[architecture], spec.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_few_rows_split_k(architecture):
    def split(rows):
        return default_config(rows, 3584, 5120, dtype=BF16, activation=None, architecture=architecture).split

    assert split(1) == split(64) > 1
    assert split(65) == split(256) > 1
    assert split(257) == 1
    few, many = (
        qkv_projection.default_config(rows, 3840, 5120, dtype=BF16, architecture=architecture) for rows in (64, 16384)
    )
    assert few.split > 1 == many.split
    assert many.block_columns <= 128
    config = projector.default_config(
        64, 1280, 5120, 5120, 3584, dtype=BF16, activation="gelu", architecture=architecture
    )
    assert min(config.first.split, config.second.split) > 1


@pytest.mark.parametrize(
    ("kernel", "constants", "choose"),
    [
        (
            "gemm.linear",
            {"columns": 64, "inner": 32, "activation": "gelu", "residual": True},
            partial(linear.choose_config, 7, 64, 32, activation="gelu", residual=True),
        ),
        (
            "gemm.patch_projection",
            {"columns": 64, "inner": 32, "pixels": "uint8"},
            partial(patch_projection.choose_config, 7, 64, 32, pixels=torch.uint8),
        ),
        (
            "gemm.qkv_projection",
            {"columns": 120, "inner": 64, "head_dim": 20},
            partial(qkv_projection.choose_config, 7, 120, 64, head_dim=20),
        ),
    ],
)
def test_tuned_configuration_applies_to_its_constants(request, kernel, constants, choose):
    request.addfinalizer(registry.clear)
    device = torch.device("cpu")
    default = choose(dtype=BF16, device=device)
    entry = {"kernel": kernel, "dtype": "bfloat16", "constants": constants, "sizes": {"rows": 7}}

    def fill(**changes):
        table = registry.TunedTable([entry | {"config": asdict(TUNED)} | changes])
        registry.fill(device, [table])

    fill()
    assert choose(dtype=BF16, device=device) == TUNED != default
    fill(constants=constants | {"inner": 33})
    assert choose(dtype=BF16, device=device) == default
    fill(config=asdict(TUNED) | {"block_rows": 48})
    assert choose(dtype=BF16, device=device) == default


def test_projector_looks_up_both_matmuls(request):
    request.addfinalizer(registry.clear)
    device = torch.device("cpu")
    shapes = [(40, 80, "gelu"), (24, 40, None)]
    entries = [
        {
            "kernel": "gemm.linear",
            "dtype": "float32",
            "constants": {"columns": columns, "inner": inner, "activation": activation, "residual": False},
            "sizes": {"rows": 7},
            "config": asdict(TUNED),
        }
        for columns, inner, activation in shapes
    ]
    registry.fill(device, [registry.TunedTable(entries)])
    config = projector.choose_config(7, 20, 80, 40, 24, dtype=torch.float32, activation="gelu", device=device)
    assert config.first == config.second == TUNED
