"""Gathers rows of a table by number: copied, or weighted and summed, or added to other rows.

    out[n] = residual[n] + Σ_k weights[n, k] · source[index[n, k]]        index −1 stands for the row ``fill``

Computed in fp32 and rounded once; the taps ``k`` are summed in order, and the residual is added last.  With one tap, no
weights and no residual this copies rows, bit for bit.  It adds learned positions to patches (one tap, or the four of a
bilinear interpolation), drops or reorders rows, joins tiles with a newline row after each line (``fill``), and shrinks a
grid of features.

Shapes: source ``[P, D]``, index and weights ``[N]`` or ``[N, K]``, residual and out ``[N, D]``; any row stride, last
stride 1.  One program owns a tile of ``rows × columns`` of out and reads the taps of its rows itself.  Memory bound: reads
``K·N·D`` elements (``(K+1)·N·D`` with a residual) and writes ``N·D``; 2 FLOPs per element read.
"""

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.checks import check_float, check_not_overwritten, check_rows, check_tensor, checked_output
from ..runtime.dispatch import runs_kernel
from ..runtime.launch import launch
from .common import TileConfig, check_index_range, default_config, locate_tile, row_chunks

MAX_TAPS = 16
"""Largest number of taps per row (those of a bicubic interpolation): the kernel is unrolled over them."""
CHUNK = 131072
"""Elements per thread and chunk of the reference."""


def _take(source: torch.Tensor, chosen: torch.Tensor, fill: torch.Tensor | None, out: torch.Tensor) -> None:
    """Writes ``source[chosen[n]]``, or ``fill`` for negative numbers; ``source`` may then be empty."""
    if fill is None:
        torch.index_select(source, 0, chosen, out=out)
        return
    if len(source):
        torch.index_select(source, 0, chosen.clamp(min=0), out=out)
    out[chosen < 0] = fill


def gather_rows_reference(
    source: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor | None,
    fill: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Writes the sums to ``out``: plain copies at once, all else one cache-sized chunk of rows at a time.

    A row's bits do not depend on the other rows: every multiplication and every addition is rounded by itself.
    """
    rows, width = out.shape
    if weights is None and residual is None:
        _take(source, index.view(-1), fill, out)
        return out
    index = index.view(rows, -1)
    for chunk in row_chunks(rows, width, CHUNK):
        if weights is None:
            total = source.new_empty(chunk.stop - chunk.start, width)
            _take(source, index[chunk, 0], fill, total)
        else:
            total = _weighted_sum(source, index[chunk], weights.view(rows, -1)[chunk], fill)
        if residual is None:
            out[chunk].copy_(total)
        else:
            torch.add(total, residual[chunk], out=out[chunk])
    return out


def _weighted_sum(
    source: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, fill: torch.Tensor | None
) -> torch.Tensor:
    """Computes ``Σ_k weights[:, k] · source[index[:, k]]`` in fp32.

    Not ``addcmul``: a compiler may fuse its multiplication and addition for all but the last few elements of a row.
    """
    shape = (len(index), source.shape[1])
    taken = source.new_empty(shape)
    total = source.new_empty(shape, dtype=torch.float32)
    weighted = torch.empty_like(total)
    for tap in range(index.shape[1]):
        term = weighted if tap else total
        _take(source, index[:, tap], fill, taken)
        term.copy_(taken).mul_(weights[:, tap, None])
        if tap:
            total.add_(weighted)
    return total


@triton.jit
def _load_chosen(source_ptr, fill_ptr, chosen, stride_sm, column, inside, width):
    # Loads the columns `column` of the rows `chosen`, and of `fill` for negative numbers.
    ptrs = source_ptr + chosen.to(tl.int64)[:, None] * stride_sm + column[None, :]
    if fill_ptr is None:
        values = tl.load(ptrs, mask=inside, other=0.0)
    else:
        present = (chosen >= 0)[:, None]
        fill = tl.load(fill_ptr + column, mask=column < width, other=0.0)
        values = tl.where(present, tl.load(ptrs, mask=inside & present, other=0.0), fill[None, :])
    return values


@triton.jit(do_not_specialize=["rows"])
def _gather_kernel(
    source_ptr, index_ptr, weights_ptr, fill_ptr, residual_ptr, out_ptr,
    rows, width, stride_sm, stride_rm, stride_om,
    TAPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # One program owns a tile of ROWS × COLUMNS of the output.
    row, column = locate_tile(width, ROWS, COLUMNS)
    valid = row < rows
    inside = valid[:, None] & (column < width)[None, :]
    if weights_ptr is None:
        chosen = tl.load(index_ptr + row, mask=valid, other=0)
        total = _load_chosen(source_ptr, fill_ptr, chosen, stride_sm, column, inside, width)
    else:
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for tap in tl.static_range(TAPS):
            chosen = tl.load(index_ptr + row * TAPS + tap, mask=valid, other=0)
            weight = tl.load(weights_ptr + row * TAPS + tap, mask=valid, other=0.0)
            values = _load_chosen(source_ptr, fill_ptr, chosen, stride_sm, column, inside, width)
            total += weight[:, None] * values.to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row[:, None] * stride_rm + column[None, :], mask=inside, other=0.0)
        total = total.to(tl.float32) + residual.to(tl.float32)
    tl.store(out_ptr + row[:, None] * stride_om + column[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


def launch_gather(
    source: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor | None,
    fill: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    config: TileConfig,
) -> None:
    """Launches one program per tile of ``out``, for valid, non-empty tensors."""
    rows, width = out.shape
    tensors = (source, index, weights, fill, residual, out)
    strides = (0 if tensor is None else tensor.stride(0) for tensor in (source, residual, out))
    options = {"TAPS": index.numel() // rows, **config.constants, "num_warps": config.num_warps}
    launch(_gather_kernel, config.grid(rows, width), *tensors, rows, width, *strides, **options)


def _check_taps(index: torch.Tensor, weights: torch.Tensor | None, source: torch.Tensor) -> None:
    check_tensor("index", index, tuple(index.shape), torch.int32, source.device, contiguous=True)
    if index.dim() not in (1, 2):
        raise ValueError(f"index must be [N] or [N, K], got shape {tuple(index.shape)}")
    taps = index.shape[1] if index.dim() == 2 else 1
    if not 1 <= taps <= MAX_TAPS:
        raise ValueError(f"index must have 1 to {MAX_TAPS} taps per row, got shape {tuple(index.shape)}")
    if weights is not None:
        check_tensor("weights", weights, tuple(index.shape), torch.float32, source.device, contiguous=True)
    elif taps > 1:
        raise ValueError(f"weights must be given for several taps per row, got an index of shape {tuple(index.shape)}")


def gather_rows(
    source: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    fill: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """Sums the rows that ``index`` names, times ``weights``, and a residual.

    Args:
        source: ``[P, D]`` float32, float16 or bfloat16, last stride 1.  With weights, every row that is named must be
            finite: a weight of 0 does not remove a NaN.
        index: ``[N]`` or ``[N, K]`` int32, contiguous, each −1 (``fill``) or in ``[0, P)``; K at most :data:`MAX_TAPS`.
            The range is checked on the CPU only: on a GPU a number out of range, or −1 without ``fill``, reads foreign
            memory.
        weights: float32, shaped like ``index``, contiguous; may be left out if K is 1.
        fill: ``[D]``, the row for −1.
        residual: ``[N, D]``, added last; last stride 1.
        out: output ``[N, D]``, last stride 1 (for example some columns of a wider matrix); a new tensor by default.  It
            may be ``residual`` itself, and must not otherwise overlap the inputs.
        config: launch configuration.

    Raises:
        ValueError: a shape, stride or (on the CPU) row number does not fit, weights are missing, or ``out`` is ``source``.
        TypeError: a dtype or device does not fit.
    """
    check_float("source", source)
    if source.dim() != 2:
        raise ValueError(f"source must be [P, D], got shape {tuple(source.shape)}")
    check_rows("source", source, tuple(source.shape), source)
    _check_taps(index, weights, source)
    shape = (len(index), source.shape[1])
    check_rows("fill", fill, shape[1:], source)
    check_rows("residual", residual, shape, source)
    out = checked_output(out, shape, source)
    if not out.numel():
        return out
    check_not_overwritten("source", source, out)
    if not len(source) and fill is None:
        raise ValueError(f"source must have rows for the {len(index)} of index, got shape {tuple(source.shape)}")
    check_index_range(index, 0 if fill is None else -1, len(source), "-1 needs a fill of [D]")
    if not runs_kernel(source):
        return gather_rows_reference(source, index, weights, fill, residual, out)
    config = config or default_config(configs.architecture(source.device))
    launch_gather(source, index, weights, fill, residual, out, config)
    return out
