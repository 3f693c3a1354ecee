"""Rows of images put in place of rows of a prompt, or added to them.

    out[n] = rows[index[n]]              where index[n] ≥ 0        (add: text[n] + rows[index[n]])
    out[n] = text[n]                     where index[n] is −1

A copy is exact where the dtypes agree, and otherwise rounded once; a sum is one of fp32, rounded once.  This puts a
image's embeddings where a prompt has its tokens, and adds deepstack levels to a language model's hidden states
(``masked_scatter`` and the masked sum of transformers' ``Qwen3VLTextModel._deepstack_process``).

Shapes: text and out ``[N, D]``, rows ``[P, D]``, index ``[N]``; rows any distance apart, elements of a row adjacent.  One
program owns a tile of ``rows × columns`` of out.  Bound by memory: reads and writes ``N·D`` elements; written into text
itself, only the rows that change are touched at all.
"""

from dataclasses import dataclass

import torch

from ..runtime import config as configs
from ..runtime._triton import tl, triton
from ..runtime.config import TRITON_TYPES, CompileSpec
from ..runtime.dispatch import on_device_of_first, runs_kernel

__all__ = ["SpliceConfig", "compile_specs", "default_config", "launch_splice", "splice_rows", "splice_rows_reference"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def splice_rows_reference(
    text: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, add: bool, out: torch.Tensor
) -> torch.Tensor:
    """The spliced rows, written to ``out``, which may be ``text``."""
    places = (index >= 0).nonzero().view(-1)
    taken = rows.index_select(0, index[places])
    if add:
        taken = taken + text.index_select(0, places)
    if not _in_place(text, out):
        out.copy_(text)
    out.index_copy_(0, places, taken.to(out.dtype))
    return out


@triton.jit
def _splice_kernel(
    TEXT, ROWS, INDEX, OUT, rows, width, text_stride, rows_stride, out_stride,
    ADD: tl.constexpr, IN_PLACE: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Owns a tile of TILE × COLUMNS of OUT; neighboring programs write neighboring columns of the same rows.
    column_tiles = tl.cdiv(width, COLUMNS)
    program = tl.program_id(0)
    row_tile = program // column_tiles
    row = row_tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    column = (program - row_tile * column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    valid = row < rows
    chosen = tl.load(INDEX + row, mask=valid, other=-1)
    within = (column < width)[None, :]
    replaced = (chosen >= 0)[:, None]
    image = ROWS + chosen.to(tl.int64)[:, None] * rows_stride + column[None, :]
    values = tl.load(image, mask=replaced & within, other=0.0)
    # Nobody reads text where it is neither kept nor added to.
    wanted = replaced if IN_PLACE else valid[:, None]
    needed = wanted if ADD else wanted & (chosen < 0)[:, None]
    if ADD or not IN_PLACE:
        kept = tl.load(TEXT + row[:, None] * text_stride + column[None, :], mask=needed & within, other=0.0)
        if ADD:
            total = (kept.to(tl.float32) + values.to(tl.float32)).to(OUT.dtype.element_ty)
            result = tl.where(replaced, total, kept)
        else:
            result = tl.where(replaced, values.to(OUT.dtype.element_ty), kept)
    else:
        result = values.to(OUT.dtype.element_ty)
    tl.store(OUT + row[:, None] * out_stride + column[None, :], result, mask=wanted & within)


@dataclass(frozen=True)
class SpliceConfig:
    """The tile of one program, powers of two, and its warps; none of it changes a bit of the result."""

    rows: int
    columns: int
    num_warps: int


def default_config(architecture: str) -> SpliceConfig:
    """16 bytes per thread and load (16-bit elements), 256 bytes of each row; few and large programs interpreted."""
    if architecture == "interpreter":
        return SpliceConfig(rows=64, columns=2048, num_warps=4)
    return SpliceConfig(rows=16 if architecture.startswith("gfx") else 8, columns=128, num_warps=4)


def _in_place(text: torch.Tensor, out: torch.Tensor) -> bool:
    return out.data_ptr() == text.data_ptr() and out.stride() == text.stride()


@on_device_of_first
def launch_splice(
    text: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, add: bool, out: torch.Tensor, config: SpliceConfig
) -> None:
    """The spliced rows of validated, non-empty tensors, as :func:`splice_rows_reference`."""
    count, width = out.shape
    grid = (triton.cdiv(count, config.rows) * triton.cdiv(width, config.columns),)
    _splice_kernel[grid](
        text,
        rows,
        index,
        out,
        count,
        width,
        text.stride(0),
        rows.stride(0),
        out.stride(0),
        ADD=add,
        IN_PLACE=_in_place(text, out),
        TILE=config.rows,
        COLUMNS=config.columns,
        num_warps=config.num_warps,
    )


def _validate_rows(name: str, tensor: torch.Tensor, text: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} is {tensor.dtype}; splice_rows takes float32, float16 and bfloat16")
    if tensor.device != text.device:
        raise TypeError(f"{name} is on {tensor.device} and text on {text.device}; they have to be on one device")
    if tensor.dim() != 2 or tensor.shape[1] != text.shape[-1]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and text {tuple(text.shape)}; they have to be [rows, width] of one width"
        )
    if tensor.numel() and tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; the elements of a row have to be "
            "adjacent (last stride 1): pass a contiguous tensor"
        )


def _validate_index(index: torch.Tensor, text: torch.Tensor, rows: torch.Tensor) -> None:
    """The index's type and shape, and its range where looking at it does not wait for a device."""
    if index.dtype != torch.int32 or index.device != text.device:
        raise TypeError(f"index is {index.dtype} on {index.device}; it has to be int32 on {text.device}")
    if index.shape != text.shape[:1] or not index.is_contiguous():
        raise ValueError(
            f"index has shape {tuple(index.shape)} and strides {index.stride()}; every row of text {tuple(text.shape)} "
            "has one, so it has to be contiguous and as long"
        )
    if index.device.type != "cpu" or not len(index):
        return
    lowest, highest = (int(bound) for bound in index.aminmax())
    if lowest < -1 or highest >= len(rows):
        wrong = lowest if lowest < -1 else highest
        raise ValueError(
            f"index holds {wrong}, but rows {tuple(rows.shape)} has {len(rows)} of them, numbered from 0 (and -1 is text)"
        )


def splice_rows(
    text: torch.Tensor,
    rows: torch.Tensor,
    index: torch.Tensor,
    *,
    add: bool = False,
    out: torch.Tensor | None = None,
    config: SpliceConfig | None = None,
) -> torch.Tensor:
    """Puts ``rows[index[n]]`` in the place of ``text[n]``, or adds it; see the module's description.

    Args:
        text: ``[N, D]`` float32, float16 or bfloat16, last stride 1.
        rows: ``[P, D]``, of any of the three dtypes, last stride 1.
        index: ``[N]`` int32, contiguous: a row of ``rows``, or −1 where ``text`` stays.  The range is checked on the CPU
            only: on a GPU a number beyond it reads foreign memory.
        add: add the row to the text's instead of replacing it.
        out: ``[N, D]`` of ``text``'s dtype, last stride 1, where to write; may be ``text`` itself, and must not
            otherwise overlap the inputs.
        config: how to launch the kernel; the default is chosen for the device.

    Returns:
        ``out``, or a new contiguous tensor ``[N, D]`` of ``text``'s dtype.

    Raises:
        ValueError: shapes that do not fit, rows with gaps, out being rows; on the CPU row numbers out of range.
        TypeError: dtypes or devices that do not fit.
    """
    _validate_rows("text", text, text)
    _validate_rows("rows", rows, text)
    if out is None:
        out = text.new_empty(text.shape)
    _validate_rows("out", out, text)
    if out.dtype != text.dtype:
        raise TypeError(f"out is {out.dtype}; text is {text.dtype}, they have to agree")
    if len(out) != len(text):
        raise ValueError(f"out has shape {tuple(out.shape)}; it has to be {tuple(text.shape)}")
    _validate_index(index, text, rows)
    if not out.numel():
        return out
    if out.data_ptr() == rows.data_ptr() != 0:  # 0 is the address of tensors without memory
        raise ValueError("out is rows: a row would be overwritten before it is read")
    if not runs_kernel(text):
        return splice_rows_reference(text, rows, index, add, out)
    launch_splice(text, rows, index, add, out, config or default_config(configs.architecture(text.device)))
    return out


def compile_specs(architecture: str) -> list[CompileSpec]:
    """The shipped configuration: replaced and added, in place and not, of one dtype and of two.

    The width is no constant of the kernel: every multiple of 16 columns shares its code.
    """
    variants = [
        ("bf16", "bf16", False, False),
        ("bf16", "bf16", False, True),
        ("bf16", "bf16", True, False),
        ("bf16", "bf16", True, True),
        ("fp16", "fp16", False, True),
        ("fp32", "fp32", False, False),
        ("bf16", "fp32", True, True),
        ("fp16", "bf16", False, True),
    ]
    return [_compile_spec(*variant, default_config(architecture)) for variant in variants]


def _compile_spec(text: str, rows: str, add: bool, in_place: bool, config: SpliceConfig) -> CompileSpec:
    sizes = ("width", "text_stride", "rows_stride", "out_stride")
    words = ["splice", text, *([f"of {rows}"] if rows != text else []), *(["add"] if add else [])]
    words += ["in place"] if in_place else []
    return CompileSpec(
        name=" ".join([*words, f"{config.rows}x{config.columns}"]),
        kernel=_splice_kernel,
        signature={
            **dict.fromkeys(("TEXT", "OUT"), f"*{text}"),
            "ROWS": f"*{rows}",
            "INDEX": f"*{TRITON_TYPES[torch.int32]}",
            **dict.fromkeys(("rows", *sizes), "i32"),
        },
        constants={"ADD": add, "IN_PLACE": in_place, "TILE": config.rows, "COLUMNS": config.columns},
        divisible_by_16=sizes,
        num_warps=config.num_warps,
        num_stages=1,
        tensor_core=False,
        elements=config.rows * config.columns,
    )
