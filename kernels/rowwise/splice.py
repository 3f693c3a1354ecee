"""Replaces rows of a prompt by rows of images, or adds them.

    out[n] = rows[index[n]]              if index[n] ≥ 0        (add: text[n] + rows[index[n]])
    out[n] = text[n]                     if index[n] is −1

A copy is exact if the dtypes are equal and otherwise rounded once; a sum is computed in fp32 and rounded once.  This puts
image embeddings in the place of a prompt's image tokens, and adds deepstack levels to a language model's hidden states
(``masked_scatter`` and the masked sum of transformers' ``Qwen3VLTextModel._deepstack_process``).

Shapes: text and out ``[N, D]``, rows ``[P, D]``, index ``[N]``; any row stride, last stride 1.  One program owns a tile
of ``rows × columns`` of out.  Memory bound: reads and writes ``N·D`` elements; in place, only the rows that change.
"""

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.checks import check_float, check_not_overwritten, check_tensor, checked_output
from ..runtime.dispatch import runs_kernel
from ..runtime.launch import launch
from .common import TileConfig, check_index_range, default_config, locate_tile


def splice_rows_reference(
    text: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, add: bool, out: torch.Tensor
) -> torch.Tensor:
    """Writes the spliced rows to ``out``, which may be ``text``."""
    places = (index >= 0).nonzero().view(-1)
    taken = rows.index_select(0, index[places])
    if add:
        taken = taken + text.index_select(0, places)
    if not _is_in_place(text, out):
        out.copy_(text)
    out.index_copy_(0, places, taken.to(out.dtype))
    return out


@triton.jit(do_not_specialize=["row_count"])
def _splice_kernel(
    text_ptr, rows_ptr, index_ptr, out_ptr, row_count, width, stride_tm, stride_rm, stride_om,
    ADD: tl.constexpr, IN_PLACE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # One program owns a tile of ROWS × COLUMNS of the output.
    row, column = locate_tile(width, ROWS, COLUMNS)
    valid = row < row_count
    chosen = tl.load(index_ptr + row, mask=valid, other=-1)
    within = (column < width)[None, :]
    replaced = (chosen >= 0)[:, None]
    image_ptrs = rows_ptr + chosen.to(tl.int64)[:, None] * stride_rm + column[None, :]
    values = tl.load(image_ptrs, mask=replaced & within, other=0.0)
    # Text is read only where it is kept or added to.
    wanted = replaced if IN_PLACE else valid[:, None]
    needed = wanted if ADD else wanted & (chosen < 0)[:, None]
    if ADD or not IN_PLACE:
        kept = tl.load(text_ptr + row[:, None] * stride_tm + column[None, :], mask=needed & within, other=0.0)
        if ADD:
            total = (kept.to(tl.float32) + values.to(tl.float32)).to(out_ptr.dtype.element_ty)
            result = tl.where(replaced, total, kept)
        else:
            result = tl.where(replaced, values.to(out_ptr.dtype.element_ty), kept)
    else:
        result = values.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * stride_om + column[None, :], result, mask=wanted & within)


def _is_in_place(text: torch.Tensor, out: torch.Tensor) -> bool:
    return out.data_ptr() == text.data_ptr() and out.stride() == text.stride()


def launch_splice(
    text: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, add: bool, out: torch.Tensor, config: TileConfig
) -> None:
    """Launches one program per tile of ``out``, for valid, non-empty tensors."""
    count, width = out.shape
    strides = (text.stride(0), rows.stride(0), out.stride(0))
    options = {"ADD": add, "IN_PLACE": _is_in_place(text, out), **config.constants, "num_warps": config.num_warps}
    launch(_splice_kernel, config.grid(count, width), text, rows, index, out, count, width, *strides, **options)


def splice_rows(
    text: torch.Tensor,
    rows: torch.Tensor,
    index: torch.Tensor,
    *,
    add: bool = False,
    out: torch.Tensor | None = None,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """Replaces ``text[n]`` by ``rows[index[n]]``, or adds it.

    Args:
        text: ``[N, D]`` float32, float16 or bfloat16, last stride 1.
        rows: ``[P, D]``, of any of the three dtypes, last stride 1.
        index: ``[N]`` int32, contiguous: a row of ``rows``, or −1 to keep ``text``.  The range is checked on the CPU
            only: on a GPU a number out of range reads foreign memory.
        add: add the row to the text's instead of replacing it.
        out: output ``[N, D]`` of ``text``'s dtype, last stride 1; a new tensor by default.  It may be ``text`` itself, and
            must not otherwise overlap the inputs.
        config: launch configuration.

    Raises:
        ValueError: a shape, stride or (on the CPU) row number does not fit, or ``out`` is ``rows``.
        TypeError: a dtype or device does not fit.
    """
    for name, tensor in (("text", text), ("rows", rows)):
        check_float(name, tensor)
        if tensor.dim() != 2 or tensor.shape[1] != text.shape[1]:
            raise ValueError(
                f"text and rows must be [rows, width] with equal widths, got {tuple(text.shape)} and {tuple(rows.shape)}"
            )
        check_tensor(name, tensor, tuple(tensor.shape), tensor.dtype, text.device)
    out = checked_output(out, tuple(text.shape), text)
    check_tensor("index", index, (len(text),), torch.int32, text.device, contiguous=True)
    check_index_range(index, -1, len(rows), "-1 keeps the text's row")
    if not out.numel():
        return out
    check_not_overwritten("rows", rows, out)
    if not runs_kernel(text):
        return splice_rows_reference(text, rows, index, add, out)
    launch_splice(text, rows, index, add, out, config or default_config(configs.architecture(text.device)))
    return out
