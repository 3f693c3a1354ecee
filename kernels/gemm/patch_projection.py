"""Patch projection: ``y = cast(pixels) Wᵀ + b (+ position table row)``.

The first convolution of a vision tower has stride = kernel size, so it is a matmul: ``pixels [N, K]`` (one flattened patch
per row, channel-major: K = channels × frames × height × width), ``W [D, K]``, ``b [D]``, y ``[N, D]`` in W's dtype.

* Float pixels (float32, float16, bfloat16) are cast to W's dtype first, as in transformers.
* uint8 pixels are raw 0…255.  :func:`fold_normalization` moves rescaling, mean and standard deviation into W and b; the
  kernel multiplies ``pixel − 128``, an integer that bf16 and fp16 represent exactly.  This moves a quarter of the bytes of
  fp32 pixels to the device, and normalized pixels are never rounded to 16 bits.
* A learned position table ``[P, D]`` is added in fp32, before the one rounding, at the row given by ``position_index``
  (without it, row r for patch r).  transformers rounds the projection first and then the sum.

One program owns one ``block_rows × block_columns`` tile of y, as in :mod:`.linear`.  2·N·D·K FLOPs; moves N·K pixels,
D·K weights and N·D results (and as many position values).  K is rarely a multiple of a block (588, 1176): only the last
block is masked.  Rows that start at multiples of 16 elements (padded strides) load faster, for pixels and weights alike.
"""

from collections.abc import Sequence

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.checks import check_float, check_matrix, check_rows, check_tensor, checked_output
from ..runtime.dispatch import runs_kernel
from ..runtime.launch import launch
from ..runtime.registry import lookup
from ..runtime.valid_rows import ValidRows, get_valid_count, planned_rows
from .linear import loop_options, make_operands, tile_grid
from .linear_config import LinearConfig
from .tiles import accumulate, first_row_and_column, store_zeros
from .torch_reference import linear_reference, linear_workspace_bytes

PIXEL_CENTER = 128
"""Zero point of uint8 pixels: −128…127 needs 8 significant bits, as many as bf16 has."""

CHUNK_ROWS = 2048  # patches that the reference casts at a time: they stay in cache until they are multiplied


def fold_normalization(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    rescale_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Folds ``(pixel × rescale_factor − mean) / std``, one value per channel, into a projection of ``pixel − 128``.

    With ``a = rescale_factor / std`` and ``c = (128 × rescale_factor − mean) / std`` per channel, ``W' = a W`` and
    ``b' = b + Σ c W``; computed in fp64, rounded once to the dtype of ``weight``, whose rows are channel-major.
    """
    channels = len(mean)
    if weight.dim() != 2 or not channels or len(std) != channels or weight.shape[1] % channels:
        raise ValueError(
            "weight must be [D, K] with K a multiple of the number of channels, and mean and std must have one value per "
            f"channel, got shape {tuple(weight.shape)}, {channels} and {len(std)} values"
        )
    if not all(deviation > 0 for deviation in std):
        raise ValueError(f"std must be positive for every channel, got {tuple(std)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    means, deviations = torch.tensor([list(mean), list(std)], dtype=torch.float64, device=weight.device)
    center = (PIXEL_CENTER * rescale_factor - means) / deviations
    planes = weight.double().view(weight.shape[0], channels, -1)
    folded = planes * (rescale_factor / deviations)[None, :, None]
    constant = planes.sum(2) @ center
    if bias is not None:
        constant += bias.double()
    return folded.view(weight.shape).to(weight.dtype), constant.to(weight.dtype)


def fold_temporal(weight: torch.Tensor) -> torch.Tensor:
    """Folds ``[D, C, T, P, P]`` to ``[D, C·P·P]``, the projection of a still image with T equal frames.

    The sum over T is fp32, rounded once to ``weight``'s dtype.
    """
    if weight.dim() != 5:
        raise ValueError(f"weight must be [D, channels, frames, height, width], got shape {tuple(weight.shape)}")
    return weight.sum(2, dtype=torch.float32).to(weight.dtype).flatten(1)


def _cast_pixels(patches: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if patches.dtype == torch.uint8:
        # Flipping the highest bit subtracts 128 in two's complement: one byte pass, then one conversion.
        return patches.bitwise_xor(PIXEL_CENTER).view(torch.int8).to(dtype)
    return patches.to(dtype)


def patch_projection_reference(
    patches: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    position_table: torch.Tensor | None = None,
    position_index: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``cast(pixels) Wᵀ + b (+ position)``; on the CPU a row's bits do not depend on the other rows."""
    rows = patches.shape[0]
    out = weight.new_empty(rows, weight.shape[0]) if out is None else out
    for start in range(0, rows, CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        positions = position_table
        if positions is not None:
            positions = positions[chunk] if position_index is None else positions.index_select(0, position_index[chunk])
        linear_reference(_cast_pixels(patches[chunk], weight.dtype), weight, bias, None, positions, out[chunk])
    return out


@triton.jit(do_not_specialize=["rows"])
def _patch_projection_kernel(
    x_ptr, weight_ptr, bias_ptr, position_ptr, position_index_ptr, out_ptr, valid_count_ptr, rows, columns, inner,
    stride_xm, stride_wn, stride_pm, stride_om,
    IS_EVEN_K: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    # Owns one BLOCK_ROWS × BLOCK_COLUMNS tile of out.
    first_row, first_column = first_row_and_column(
        tl.program_id(0), rows, columns, BLOCK_ROWS, BLOCK_COLUMNS, GROUP_ROWS
    )
    if valid_count_ptr is not None and first_row >= tl.load(valid_count_ptr):
        store_zeros(out_ptr, first_row, first_column, rows, columns, stride_om, BLOCK_ROWS, BLOCK_COLUMNS)
        return
    total = accumulate(
        x_ptr, weight_ptr, first_row, first_column, 0, inner, rows, columns, stride_xm, stride_wn,
        IS_EVEN_K, HAS_DESCRIPTORS, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER,
    )  # fmt: skip
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if position_ptr is not None:
        position = tl.minimum(row, rows - 1).to(tl.int64)
        if position_index_ptr is not None:
            position = tl.load(position_index_ptr + position).to(tl.int64)
        positions = position_ptr + position[:, None] * stride_pm + column[None, :]
        total += tl.load(positions, mask=inside, other=0.0).to(tl.float32)
    pointers = out_ptr + row.to(tl.int64)[:, None] * stride_om + column[None, :]
    tl.store(pointers, total.to(out_ptr.dtype.element_ty), mask=inside)


def default_config(*, dtype: torch.dtype, architecture: str) -> LinearConfig:
    """A safe configuration, the same for every number of patches: an image's rows have the same bits in any batch."""
    if architecture == "interpreter":
        return LinearConfig(128, 128, 128, group_rows=8, num_warps=4, num_stages=1)
    stages = 3 if architecture.startswith("sm_") else 2
    if dtype == torch.float32:
        return LinearConfig(64, 64, 32, group_rows=8, num_warps=4, num_stages=stages)
    if architecture == "sm_120":
        # A tile of 128 × 128 spills.
        return LinearConfig(64, 128, 32, group_rows=8, num_warps=4, num_stages=stages)
    inner = 64 if architecture in ("sm_90", "sm_100") else 32
    return LinearConfig(128, 128, inner, group_rows=8, num_warps=8, num_stages=stages)


def choose_config(
    rows: int, columns: int, inner: int, *, pixels: torch.dtype, dtype: torch.dtype, device: torch.device
) -> LinearConfig:
    """The tuned configuration of the projection on ``device``, or the default one."""
    constants = {"columns": columns, "inner": inner, "pixels": str(pixels).removeprefix("torch.")}
    found = lookup(LinearConfig, "gemm.patch_projection", device, dtype, constants, {"rows": rows})
    return found or default_config(dtype=dtype, architecture=configs.architecture(device))


def launch_patch_projection(
    patches: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    position_table: torch.Tensor | None,
    position_index: torch.Tensor | None,
    out: torch.Tensor,
    config: LinearConfig,
    valid_count: torch.Tensor | None = None,
) -> None:
    """``out = cast(pixels) Wᵀ + b (+ position)`` for validated, non-empty tensors; ignores ``split`` and ``vendor``."""
    (rows, inner), columns = patches.shape, weight.shape[0]
    left, right, described = make_operands(patches, weight, config)
    launch(_patch_projection_kernel, tile_grid(rows, columns, config),
        left, right, bias, position_table, position_index, out, valid_count, rows, columns, inner,
        patches.stride(0), weight.stride(0), 0 if position_table is None else position_table.stride(0), out.stride(0),
        HAS_DESCRIPTORS=described, **loop_options(config, inner),
    )  # fmt: skip


def patch_projection(
    patches: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    position_table: torch.Tensor | None = None,
    position_index: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: LinearConfig | None = None,
    valid_rows: ValidRows | None = None,
) -> torch.Tensor:
    """Projects flattened patches, and adds learned positions (transformers: ``Conv3d``/``Conv2d`` of stride = kernel).

    Args:
        patches: ``[N, K]`` float32, float16, bfloat16 (normalized) or uint8 (raw); any row stride.
        weight: ``[D, K]`` float32, float16 or bfloat16; any row stride.  For uint8 patches ``weight`` and ``bias`` come
            from :func:`fold_normalization`.
        bias: ``[D]``.
        position_table: ``[P, D]``, added in fp32 before the rounding; any row stride.
        position_index: ``[N]`` int32, each in ``[0, P)`` (not checked on a GPU); without it patch r uses row r, and P must
            be at least N.
        out: output ``[N, D]`` of ``weight``'s dtype; any row stride.
        config: launch configuration; by default the tuned one for the dtypes and the device, or a safe one.
        valid_rows: planned patches, for which the configuration is selected, and valid ones.  The kernel writes zeros in
            tiles without valid rows; the CPU reference computes them.

    Returns:
        ``out``, or a new contiguous tensor ``[N, D]``.

    Raises:
        ValueError: wrong shapes; elements of a row that are not adjacent; positions without their table.
        TypeError: wrong dtypes or devices.
    """
    check_float("weight", weight)
    if patches.dtype != torch.uint8:
        check_float("patches, unless uint8,", patches)
    check_matrix("patches", patches)
    (rows, inner), device = patches.shape, patches.device
    check_tensor("weight", weight, (*weight.shape[:1], inner), weight.dtype, device)
    columns = weight.shape[0]
    check_rows("bias", bias, (columns,), weight)
    if position_index is not None:
        if position_table is None:
            raise ValueError("position_table must be given with position_index, got None")
        check_tensor("position_index", position_index, (rows,), torch.int32, device)
    if position_table is not None:
        check_rows("position_table", position_table, (*position_table.shape[:1], columns), weight)
        if position_index is None and position_table.shape[0] < rows:
            raise ValueError(
                f"position_table must have at least {rows} rows, one per patch, got {position_table.shape[0]}; "
                "pass position_index to select rows"
            )
    valid_count = get_valid_count(valid_rows, device)
    out = checked_output(out, (rows, columns), weight)
    if not out.numel():
        return out
    if not runs_kernel(patches):
        return patch_projection_reference(patches, weight, bias, position_table, position_index, out)
    config = config or choose_config(
        planned_rows(valid_rows, rows), columns, inner, pixels=patches.dtype, dtype=weight.dtype, device=device
    )
    launch_patch_projection(patches, weight, bias, position_table, position_index, out, config, valid_count)
    return out


def patch_projection_workspace_bytes(rows: int, width: int, inner: int, dtype: torch.dtype, *, placed: bool) -> int:
    """Upper bound of the memory that the reference allocates on a CPU, in bytes; ``placed``: it also adds positions."""
    rows = min(rows, CHUNK_ROWS)
    pixels = 0 if dtype == torch.float32 else rows * inner * dtype.itemsize
    positions = rows * width * dtype.itemsize if placed else 0
    return pixels + positions + linear_workspace_bytes(rows, width, inner, None, dtype)
