"""Dequantizes weights to fp32: the stored tensors of each weight, its shape, and the arithmetic.

The headers of the weight files decide: a tensor's dtype, and its *companions*, stored with it.  The quantization section
of ``config.json`` is not used: lists of excluded modules have several formats, and some towers were quantized although
they are on such a list.

=====================  =====================================================  =========================================
scheme                 stored with ``x.weight``                               the weight is
=====================  =====================================================  =========================================
bitsandbytes NF4, FP4  ``x.weight.absmax``, ``.quant_map``, ``.quant_state``  ``quant_map[code] · absmax[block]``
\\                      and ``.nested_absmax``, ``.nested_quant_map``          ``absmax = map[code] · nested + offset``
bitsandbytes int8      ``x.SCB``                                              ``weight · SCB[row] / 127``
FP8                    ``x.weight_scale``: one number, or one per row         ``weight · scale``
block FP8              ``x.weight_scale_inv``: one number per 128 × 128       ``weight · scale[block]``
=====================  =====================================================  =========================================

Sources: bitsandbytes (``functional.py``: ``QuantState``, ``dequantize_4bit``, ``int8_vectorwise_dequant``; Dettmers et
al., QLoRA, 2023), compressed-tensors (``float-quantized``, whose ``weight_scale`` may also be one per block), and the
block scales of DeepSeek-V3, which transformers calls fine-grained FP8.  All arithmetic is fp32, in their order of
operations, so it gives the same bits.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from tritontower.config import DTYPE_NAMES
from tritontower.errors import CheckpointCorruptError, ConfigError, UnsupportedDtypeError, shorten

from .config_reader import ConfigReader, parse_json

FLOAT_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float32,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Stored dtypes without scales → the dtype to load."""

NF4, FP4, INT8 = "bitsandbytes NF4", "bitsandbytes FP4", "bitsandbytes int8"
FP8, BLOCK_FP8 = "FP8", "block FP8"

SUPPORTED_SCHEMES = (NF4, FP4, INT8, FP8, BLOCK_FP8)
"""Quantizations that :func:`make_decoder` supports."""

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1, "I8": 1}
_FOUR_BIT = {"quant_state.bitsandbytes__nf4": NF4, "quant_state.bitsandbytes__fp4": FP4}
_NESTED_ROLES = {"nested_absmax", "nested_quant_map"}
_FOUR_BIT_ROLES = ("absmax", "quant_map", *sorted(_NESTED_ROLES), *_FOUR_BIT)
_ROLES_OF = {FP8: ("weight_scale",), BLOCK_FP8: ("weight_scale_inv",), INT8: ("SCB", "weight_format")}
"""Companions that a decoder reads; for a scheme without a decoder, all companions belong to the weight."""

_RULES: tuple[tuple[str, tuple[str, ...], set[str], str], ...] = (
    ("qweight", (), set(), "AWQ/GPTQ int4"),
    ("weight_packed", (), {"weight_global_scale"}, "NVFP4"),
    ("weight_packed", ("U8",), set(), "MXFP4"),
    ("weight_packed", (), set(), "compressed-tensors pack-quantized"),
    ("weight", ("F8_E4M3",), {"weight_zero_point"}, "FP8 with a zero point"),
    ("weight", ("F8_E4M3",), {"qscale_weight"}, "Mistral's own FP8"),
    ("weight", ("F8_E4M3",), {"weight_scale", "weight_scale_inv"}, "FP8 with both weight_scale and weight_scale_inv"),
    ("weight", ("F8_E4M3",), {"weight_scale_2"}, "FP8 with two levels of scales"),
    ("weight", ("F8_E4M3",), {"weight_global_scale"}, "FP8 with two levels of scales"),
    ("weight", ("F8_E4M3",), {"weight_scale_inv"}, BLOCK_FP8),
    ("weight", ("F8_E4M3",), {"weight_scale"}, FP8),
    ("weight", ("I8",), {"SCB"}, INT8),
    ("weight", ("I8",), {"weight_scale"}, "compressed-tensors int-quantized"),
    ("weight", (), {"weight_scale_2"}, "NVFP4"),
    ("weight", (), {"weight_global_scale"}, "NVFP4"),
    ("weight", ("U8", "F4"), {"weight_scale"}, "MXFP4"),
)
"""Last part of the name, dtypes (any if empty), companions that exist → scheme; the first match applies."""

_OTHER_ROLES = {"input_global_scale", "weight_shape", "weight_g_idx", "weight_format", "qscale_act", "qzeros", "scales"}
_MODULE_ROLES = _OTHER_ROLES.union({"g_idx"}, *(required for _, _, required, _ in _RULES))

_CACHE_SCALES = ("k_scale", "v_scale")
_ACTIVATION_SCALES = ("input_scale", "activation_scale", *_CACHE_SCALES)
"""Scales of quantized activations, which dequantized weights do not need; never read."""

_BLOCK = 128
_MAX_STATE_BYTES = 65_536
_MAX_SIZE = 2**40
_BLOCK_SIZES = tuple(2**power for power in range(5, 13))
_STORED_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


@dataclass(frozen=True)
class StoredTensor:
    """Header of one stored tensor: its name with prefix, shape, dtype in the format's terms, and base name of its file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def nbytes(self) -> int:
        """Size in bytes; only for dtypes that some scheme reads."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


Read = Callable[[StoredTensor], torch.Tensor]
"""Reads a stored tensor to the CPU without conversion."""


@dataclass(frozen=True)
class Weight:
    """One weight: a stored tensor, alone or with its companions.

    ``scheme`` is its quantization, ``None`` for plain values and for an unknown dtype; ``companions`` are its scales and
    tables by role (``"weight_scale"``, ``"absmax"`` …).
    """

    main: StoredTensor
    scheme: str | None = None
    companions: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def is_supported(self) -> bool:
        """Tells if there is a decoder for it; its companions may still be invalid."""
        if self.scheme is None:
            return self.main.dtype in FLOAT_DTYPES
        return self.scheme in SUPPORTED_SCHEMES

    @property
    def nbytes(self) -> int:
        """Stored bytes of all parts with a dtype that some scheme reads."""
        return sum(part.nbytes for part in (self.main, *self.companions.values()) if part.dtype in _ITEM_BYTES)


def group_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Weight]:
    """Groups stored tensors (name without prefix → header) by weight, in stored order.

    A weight with another stored name (``x.qweight``, ``x.weight_packed``) is called ``x.weight``.
    """
    quantized: dict[str, Weight] = {}
    claimed: set[str] = set()
    for name, main in stored.items():
        scheme, companions = _recognize(name, main, stored)
        if scheme is not None:
            quantized[name] = Weight(main, scheme, {role: stored[other] for role, other in companions.items()})
            claimed.update(companions.values())
    claimed.update(_activation_scales(stored, quantized))
    return {
        _weight_name(name, stored): quantized.get(name, Weight(main))
        for name, main in stored.items()
        if name in quantized or name not in claimed
    }


def _weight_name(name: str, stored: Mapping[str, StoredTensor]) -> str:
    module, dot, leaf = name.rpartition(".")
    if leaf not in ("qweight", "weight_packed") or f"{module}{dot}weight" in stored:
        return name
    return f"{module}{dot}weight"


def _recognize(
    name: str, main: StoredTensor, stored: Mapping[str, StoredTensor]
) -> tuple[str | None, Mapping[str, str]]:
    """Scheme of ``name`` if it is the main tensor of a quantized weight, and its companions by role."""
    own = {role: f"{name}.{role}" for role in _FOUR_BIT_ROLES if f"{name}.{role}" in stored}
    if own:
        states = [scheme for role, scheme in _FOUR_BIT.items() if role in own]
        return states[0] if len(states) == 1 else "bitsandbytes 4-bit without one packed quant_state", own
    module, dot, leaf = name.rpartition(".")
    if leaf == "weight" and main.dtype in FLOAT_DTYPES:
        return None, {}
    beside = {role: f"{module}{dot}{role}" for role in _MODULE_ROLES if f"{module}{dot}{role}" in stored}
    for last, dtypes, required, scheme in _RULES:
        if leaf == last and (not dtypes or main.dtype in dtypes) and required <= beside.keys():
            roles = _ROLES_OF.get(scheme, _MODULE_ROLES)
            return scheme, {role: other for role, other in beside.items() if role in roles}
    return None, {}


def _activation_scales(stored: Mapping[str, StoredTensor], quantized: Mapping[str, Weight]) -> set[str]:
    """Scales of the activations of modules with a quantized weight, or of the attention around them."""
    modules = {name.rpartition(".")[0] for name in quantized}
    above = {module.rpartition(".")[0] for module in modules}
    names = {f"{module}.{scale}" for module in modules for scale in _ACTIVATION_SCALES}
    names |= {f"{module}.{scale}" for module in above for scale in _CACHE_SCALES}
    return names & stored.keys()


@dataclass(frozen=True)
class Decoder:
    """Shape of a weight, its computation on the CPU (in fp32 unless it is plain), and its recorded dtype."""

    shape: tuple[int, ...]
    decode: Callable[[Read], torch.Tensor]
    original: torch.dtype | None = None


def make_decoder(weight: Weight, read: Read) -> Decoder:
    """Makes the decoder of a supported weight after checking that its parts agree.

    Reads only the description of a bitsandbytes weight, some hundred bytes.
    """
    if weight.scheme in (NF4, FP4):
        try:
            return _four_bit_decoder(weight, read)
        except ConfigError as error:
            raise CheckpointCorruptError(str(error)) from error
    if weight.scheme == INT8:
        return _int8_decoder(weight, read)
    if weight.scheme in (FP8, BLOCK_FP8):
        return _float8_decoder(weight)
    return Decoder(weight.main.shape, lambda read: read(weight.main))


def _float8_decoder(weight: Weight) -> Decoder:
    main = weight.main
    ((role, scale),) = weight.companions.items()
    if scale.dtype not in FLOAT_DTYPES:
        raise _unsupported(scale, f"{role} of one of the types {', '.join(FLOAT_DTYPES)}")
    by_row = len(main.shape) > 1 and scale.shape == (main.shape[0], *(1 for _ in main.shape[1:]))

    def decode(read: Read) -> torch.Tensor:
        return read(main).to(torch.float32).mul_(read(scale).to(torch.float32))

    def decode_blocks(read: Read) -> torch.Tensor:
        values = read(main).to(torch.float32)
        columns = read(scale).to(torch.float32).repeat_interleave(_BLOCK, dim=1)[:, : main.shape[1]]
        # Band by band: scales expanded for the whole weight would be as large as it is.
        for band, factor in zip(values.split(_BLOCK), columns, strict=True):
            band.mul_(factor)
        return values

    if scale.shape in ((), (1,)) or (role == "weight_scale" and by_row):
        return Decoder(main.shape, decode)
    if len(main.shape) == 2 and scale.shape == tuple(-(-size // _BLOCK) for size in main.shape):
        return Decoder(main.shape, decode_blocks)
    shared = "one per row, of shape [rows, 1], or " if role == "weight_scale" else ""
    raise _unsupported(
        scale,
        f"{role} with one number, {shared}one per block of {_BLOCK} x {_BLOCK}, here for a weight of shape "
        f"{list(main.shape)}",
    )


def _int8_decoder(weight: Weight, read: Read) -> Decoder:
    """bitsandbytes int8: rows scaled so that their maximum is 127."""
    main, row_maxima = weight.main, weight.companions["SCB"]
    if len(main.shape) != 2 or row_maxima.shape != main.shape[:1] or row_maxima.dtype != "F32":
        raise _contradictory(row_maxima, f"F32 of shape [rows], for a weight of shape {list(main.shape)}")
    order = weight.companions.get("weight_format")
    if order is not None and (order.dtype != "U8" or math.prod(order.shape) != 1):
        raise _contradictory(order, "one number of type U8")
    if order is not None and read(order).item() != 0:
        raise _unsupported(order, "weight_format 0, which is row by row")
    # Two multiplications, by the reciprocal as in bitsandbytes: a division would differ in the last bit.
    return Decoder(
        main.shape,
        lambda read: read(main).to(torch.float32).mul_(read(row_maxima).unsqueeze(1)).mul_(1.0 / 127.0),
    )


def _four_bit_decoder(weight: Weight, read: Read) -> Decoder:
    """bitsandbytes NF4 and FP4: 4-bit codes, the high half of a byte first, and the maximum of every block."""
    main, parts = weight.main, weight.companions
    role = next(role for role in _FOUR_BIT if role in parts)
    reader = _state_reader(parts[role], read)
    shape = reader.get_list(int, "shape", minimum=1, maximum=_MAX_SIZE)
    block = reader.get(int, "blocksize", choices=_BLOCK_SIZES)
    reader.get(str, "quant_type", choices=[role.rpartition("_")[2]])
    original = _STORED_DTYPES[reader.get(str, "dtype", choices=list(_STORED_DTYPES))]
    count = math.prod(shape)
    # Any dtype may store the bytes: training with sharded parameters needs that of the other weights.
    size = -(-count // 2)
    if main.shape[1:] not in ((), (1,)) or main.dtype not in _ITEM_BYTES or main.nbytes != size:
        raise _contradictory(main, f"{size} bytes in one column, for a weight of shape {list(shape)}")
    blocks = -(-count // block)
    read_maxima = _maxima_reader(weight, reader, blocks)
    table = _part(weight, "quant_map", "F32", (16,))

    def decode(read: Read) -> torch.Tensor:
        values = read(table)
        # Both values of a byte at once: row b has those of its high and its low half.
        pairs = torch.cartesian_prod(values, values)
        codes = read(main).reshape(-1).view(torch.uint8)
        numbers = pairs.index_select(0, codes.to(torch.int32)).view(-1)[:count]
        return _times_blocks(numbers, read_maxima(read), block).view(shape)

    return Decoder(shape, decode, original)


def _maxima_reader(weight: Weight, reader: ConfigReader, blocks: int) -> Callable[[Read], torch.Tensor]:
    """Checks and reads the maxima of the blocks, which may themselves be quantized to 8 bits."""
    if not _NESTED_ROLES & weight.companions.keys():
        maxima = _part(weight, "absmax", "F32", (blocks,))
        return lambda read: read(maxima)
    block = reader.get(int, "nested_blocksize", choices=_BLOCK_SIZES)
    offset = reader.get(float, "nested_offset")
    reader.get(str, "nested_dtype", choices=["float32"])
    codes = _part(weight, "absmax", "U8", (blocks,))
    outer = _part(weight, "nested_absmax", "F32", (-(-blocks // block),))
    table = _part(weight, "nested_quant_map", "F32", (256,))

    def decode(read: Read) -> torch.Tensor:
        numbers = read(table).index_select(0, read(codes).to(torch.int32))
        return _times_blocks(numbers, read(outer), block).add_(offset)

    return decode


def _state_reader(state: StoredTensor, read: Read) -> ConfigReader:
    """Opens the description that bitsandbytes stores with a weight: JSON, as a tensor of bytes."""
    if state.dtype != "U8" or len(state.shape) != 1 or state.nbytes > _MAX_STATE_BYTES:
        raise _contradictory(state, f"U8, at most {_MAX_STATE_BYTES} bytes")
    source = f"{state.file}: {shorten(state.name)}"
    return ConfigReader(parse_json(read(state).numpy().tobytes(), source=source), source)


def _part(weight: Weight, role: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    """Returns the companion ``role`` after checking its dtype and shape."""
    part = weight.companions.get(role)
    if part is None:
        raise CheckpointCorruptError(
            f"tensor {shorten(weight.main.name)} in {weight.main.file} is stored as {weight.scheme}, but its {role} is "
            "missing; download the files again"
        )
    if part.dtype != dtype or part.shape != shape:
        raise _contradictory(part, f"{dtype} of shape {list(shape)}")
    return part


def _times_blocks(numbers: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """Multiplies each block of the vector ``numbers`` in place by its scale."""
    whole = numbers.numel() // block * block
    numbers[:whole].view(-1, block).mul_(scales[: whole // block].unsqueeze(1))
    numbers[whole:].mul_(scales[whole // block :])
    return numbers


def _contradictory(part: StoredTensor, allowed: str) -> CheckpointCorruptError:
    return CheckpointCorruptError(f"{_describe(part, allowed)}; download the files again")


def _unsupported(part: StoredTensor, allowed: str) -> UnsupportedDtypeError:
    return UnsupportedDtypeError(f"{_describe(part, allowed)}; use a checkpoint whose vision tower is not quantized")


def _describe(part: StoredTensor, allowed: str) -> str:
    found = f"{part.dtype} of shape {list(part.shape)}"
    return f"tensor {shorten(part.name)} in {part.file} must be {allowed}, got {found}"
