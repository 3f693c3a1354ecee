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
from abc import ABC, abstractmethod
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
_MODULE_ROLES = (
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_global_scale",
    "input_global_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "weight_format",
    "SCB",
    "qscale_weight",
    "qscale_act",
    "qzeros",
    "scales",
    "g_idx",
)
_ROLES_OF = {FP8: ("weight_scale",), BLOCK_FP8: ("weight_scale_inv",), INT8: ("SCB", "weight_format")}
"""Companions that a decoder reads; for a scheme without a decoder, all companions belong to the weight."""
_CACHE_SCALES = ("k_scale", "v_scale")
_ACTIVATION_SCALES = ("input_scale", "activation_scale", *_CACHE_SCALES)
"""Scales of quantized activations, which dequantized weights do not need; never read."""

_SCALE_TYPES = tuple(FLOAT_DTYPES)
_BLOCK = 128
_MAX_STATE_BYTES = 65_536
_MAX_SIZE = 2**40
_BLOCK_SIZES = tuple(2**power for power in range(5, 13))
_STORED_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


@dataclass(frozen=True)
class StoredTensor:
    """Header of one stored tensor.

    Attributes:
        name: stored name, with its prefix.
        shape: stored shape.
        dtype: in the format's terms: ``"BF16"``, ``"F32"``, ``"U8"`` …
        file: base name of its file.
    """

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
class Group:
    """One weight: a stored tensor, alone or with its companions.

    Attributes:
        main: the tensor with the weight's values.
        scheme: its quantization; ``None`` for plain values, and for an unknown dtype.
        companions: role (``"weight_scale"``, ``"absmax"`` …) → its tensor.
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


# -- from headers to groups -------------------------------------------------------------------------------------------


def group_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Group]:
    """Groups stored tensors (name without prefix → header) by weight, in stored order.

    A weight with another stored name (``x.qweight``, ``x.weight_packed``) is called ``x.weight``.
    """
    names: dict[str, str] = {}
    groups: dict[str, Group] = {}
    claimed: set[str] = set()
    for name, main in stored.items():
        scheme, companions = _recognize(name, main, stored)
        if scheme is None:
            continue
        groups[name] = Group(main, scheme, {role: stored[other] for role, other in companions.items()})
        names[name] = _weight_name(name, stored)
        claimed.update(companions.values())
    claimed.update(_activation_scales(stored, groups))
    result: dict[str, Group] = {}
    for name, main in stored.items():
        if name in groups:
            result[names[name]] = groups[name]
        elif name not in claimed:
            result[name] = Group(main)
    return result


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
    beside = {role: f"{module}{dot}{role}" for role in _MODULE_ROLES if f"{module}{dot}{role}" in stored}
    scheme = _module_scheme(leaf, main, beside)
    roles = _ROLES_OF.get(scheme, _MODULE_ROLES) if scheme else ()
    return scheme, {role: other for role, other in beside.items() if role in roles}


def _module_scheme(leaf: str, main: StoredTensor, beside: Mapping[str, str]) -> str | None:
    if leaf == "qweight":
        return "AWQ/GPTQ int4"
    if leaf == "weight_packed":
        return _packed_scheme(main, beside)
    if leaf == "weight" and main.dtype not in FLOAT_DTYPES:
        return _scaled_scheme(main, beside)
    return None


def _packed_scheme(main: StoredTensor, beside: Mapping[str, str]) -> str:
    if "weight_global_scale" in beside:
        return "NVFP4"
    return "MXFP4" if main.dtype == "U8" else "compressed-tensors pack-quantized"


def _scaled_scheme(main: StoredTensor, beside: Mapping[str, str]) -> str | None:
    if main.dtype == "F8_E4M3":
        return _float8_scheme(beside)
    if main.dtype == "I8" and "SCB" in beside:
        return INT8
    if main.dtype == "I8" and "weight_scale" in beside:
        return "compressed-tensors int-quantized"
    if {"weight_scale_2", "weight_global_scale"} & beside.keys():
        return "NVFP4"
    if main.dtype in ("U8", "F4") and "weight_scale" in beside:
        return "MXFP4"
    return None


def _float8_scheme(beside: Mapping[str, str]) -> str | None:
    if "weight_zero_point" in beside:
        return "FP8 with a zero point"
    if "qscale_weight" in beside:
        return "Mistral's own FP8"
    if {"weight_scale", "weight_scale_inv"} <= beside.keys():
        return "FP8 with both weight_scale and weight_scale_inv"
    if {"weight_scale_2", "weight_global_scale"} & beside.keys():
        return "FP8 with two levels of scales"
    if "weight_scale_inv" in beside:
        return BLOCK_FP8
    return FP8 if "weight_scale" in beside else None


def _activation_scales(stored: Mapping[str, StoredTensor], quantized: Mapping[str, Group]) -> set[str]:
    """Scales of the activations of modules with a quantized weight, or of the attention around them."""
    modules = {name.rpartition(".")[0] for name in quantized}
    above = {module.rpartition(".")[0] for module in modules}
    names = {f"{module}.{scale}" for module in modules for scale in _ACTIVATION_SCALES}
    names |= {f"{module}.{scale}" for module in above for scale in _CACHE_SCALES}
    return names & stored.keys()


# -- from groups to numbers -------------------------------------------------------------------------------------------


class Decoder(ABC):
    """Computes one weight from its stored parts.

    Attributes:
        shape: of the weight.
        original: dtype before quantization, if it is recorded.
    """

    shape: tuple[int, ...]
    original: torch.dtype | None = None

    @abstractmethod
    def decode(self, read: Read) -> torch.Tensor:
        """Computes the weight on the CPU: fp32, or as stored if it is plain."""


def make_decoder(group: Group, read: Read) -> Decoder:
    """Makes the decoder of ``group`` after checking that its parts agree.

    Reads only the description of a bitsandbytes weight, some hundred bytes.

    Raises:
        UnsupportedDtypeError: there is no decoder for the scheme or this variant of it.
        CheckpointCorruptError: the parts contradict each other, or the description is invalid.
    """
    if not group.is_supported:
        raise _unsupported(group.main, "a plain type, or one of " + ", ".join(SUPPORTED_SCHEMES))
    if group.scheme in (NF4, FP4):
        return _FourBit(group, read)
    if group.scheme == INT8:
        return _Int8(group, read)
    if group.scheme in (FP8, BLOCK_FP8):
        return _float8_decoder(group)
    return _Plain(group.main)


class _Plain(Decoder):
    def __init__(self, main: StoredTensor) -> None:
        self.shape = main.shape
        self._main = main

    def decode(self, read: Read) -> torch.Tensor:
        return read(self._main)


class _Scaled(Decoder):
    """FP8 with one scale, or one per row; ``scale`` broadcasts."""

    def __init__(self, main: StoredTensor, scale: StoredTensor) -> None:
        self.shape = main.shape
        self._main, self._scale = main, scale

    def decode(self, read: Read) -> torch.Tensor:
        return read(self._main).to(torch.float32).mul_(read(self._scale).to(torch.float32))


class _BlockScaled(Decoder):
    """FP8 with one scale per 128 × 128 block; the last block of a row or column may be smaller."""

    def __init__(self, main: StoredTensor, scale: StoredTensor) -> None:
        self.shape = main.shape
        self._main, self._scale = main, scale

    def decode(self, read: Read) -> torch.Tensor:
        weight = read(self._main).to(torch.float32)
        columns = read(self._scale).to(torch.float32).repeat_interleave(_BLOCK, dim=1)[:, : self.shape[1]]
        # Band by band: scales expanded for the whole weight would be as large as it is.
        for band, scale in zip(weight.split(_BLOCK), columns, strict=True):
            band.mul_(scale)
        return weight


def _float8_decoder(group: Group) -> Decoder:
    main = group.main
    ((role, scale),) = [(r, s) for r, s in group.companions.items() if r in ("weight_scale", "weight_scale_inv")]
    if scale.dtype not in _SCALE_TYPES:
        raise _unsupported(scale, f"{role} of one of the types {', '.join(_SCALE_TYPES)}")
    by_row = len(main.shape) > 1 and scale.shape == (main.shape[0], *(1 for _ in main.shape[1:]))
    if scale.shape in ((), (1,)) or (role == "weight_scale" and by_row):
        return _Scaled(main, scale)
    if len(main.shape) == 2 and scale.shape == tuple(-(-size // _BLOCK) for size in main.shape):
        return _BlockScaled(main, scale)
    shared = "one per row, of shape [rows, 1], or " if role == "weight_scale" else ""
    raise _unsupported(
        scale,
        f"{role} with one number, {shared}one per block of {_BLOCK} x {_BLOCK}, here for a weight of shape "
        f"{list(main.shape)}",
    )


class _Int8(Decoder):
    """bitsandbytes int8: rows scaled so that their maximum is 127."""

    def __init__(self, group: Group, read: Read) -> None:
        self.shape = group.main.shape
        self._main, self._row_maxima = group.main, group.companions["SCB"]
        if len(self.shape) != 2 or self._row_maxima.shape != self.shape[:1] or self._row_maxima.dtype != "F32":
            raise _contradictory(self._row_maxima, f"F32 of shape [rows], for a weight of shape {list(self.shape)}")
        order = group.companions.get("weight_format")
        if order is None:
            return
        if order.dtype != "U8" or math.prod(order.shape) != 1:
            raise _contradictory(order, "one number of type U8")
        if read(order).item() != 0:
            raise _unsupported(order, "weight_format 0, which is row by row")

    def decode(self, read: Read) -> torch.Tensor:
        # Two multiplications, by the reciprocal as in bitsandbytes: a division would differ in the last bit.
        return read(self._main).to(torch.float32).mul_(read(self._row_maxima).unsqueeze(1)).mul_(1.0 / 127.0)


@dataclass(frozen=True)
class _Nested:
    """Block maxima of a 4-bit weight that are themselves quantized to 8 bits."""

    maxima: StoredTensor
    table: StoredTensor
    block: int
    offset: float


class _FourBit(Decoder):
    """bitsandbytes NF4 and FP4: 4-bit codes, the high half of a byte first, and the maximum of every block."""

    def __init__(self, group: Group, read: Read) -> None:
        parts = group.companions
        role, state = next((role, parts[role]) for role in _FOUR_BIT if role in parts)
        reader = _state_reader(state, read)
        try:
            self.shape = reader.get_list(int, "shape", minimum=1, maximum=_MAX_SIZE)
            self._block = reader.get(int, "blocksize", choices=_BLOCK_SIZES)
            reader.get(str, "quant_type", choices=[role.rpartition("_")[2]])
            self.original = _STORED_DTYPES[reader.get(str, "dtype", choices=list(_STORED_DTYPES))]
        except ConfigError as error:
            raise CheckpointCorruptError(str(error)) from error
        self._count = math.prod(self.shape)
        self._main = group.main
        self._check_codes()
        blocks = -(-self._count // self._block)
        self._nested = _nested(group, reader, blocks) if _NESTED_ROLES & parts.keys() else None
        self._maxima = _part(group, "absmax", "U8" if self._nested else "F32", (blocks,))
        self._table = _part(group, "quant_map", "F32", (16,))

    def _check_codes(self) -> None:
        # Any dtype may store the bytes: training with sharded parameters needs that of the other weights.
        size = -(-self._count // 2)
        column = self._main.shape[1:] in ((), (1,))
        if not column or self._main.dtype not in _ITEM_BYTES or self._main.nbytes != size:
            raise _contradictory(self._main, f"{size} bytes in one column, for a weight of shape {list(self.shape)}")

    def decode(self, read: Read) -> torch.Tensor:
        table = read(self._table)
        # Both values of a byte at once: row b has those of its high and its low half.
        pairs = torch.cartesian_prod(table, table)
        codes = read(self._main).reshape(-1).view(torch.uint8)
        numbers = pairs.index_select(0, codes.to(torch.int32)).view(-1)[: self._count]
        return _times_blocks(numbers, self._read_maxima(read), self._block).view(self.shape)

    def _read_maxima(self, read: Read) -> torch.Tensor:
        stored = read(self._maxima)
        if self._nested is None:
            return stored
        maxima = read(self._nested.table).index_select(0, stored.to(torch.int32))
        return _times_blocks(maxima, read(self._nested.maxima), self._nested.block).add_(self._nested.offset)


def _state_reader(state: StoredTensor, read: Read) -> ConfigReader:
    """Opens the description that bitsandbytes stores with a weight: JSON, as a tensor of bytes."""
    if state.dtype != "U8" or len(state.shape) != 1 or state.nbytes > _MAX_STATE_BYTES:
        raise _contradictory(state, f"U8, at most {_MAX_STATE_BYTES} bytes")
    source = f"{state.file}: {shorten(state.name)}"
    try:
        return ConfigReader(parse_json(read(state).numpy().tobytes(), source=source), source)
    except ConfigError as error:
        raise CheckpointCorruptError(str(error)) from error


def _nested(group: Group, reader: ConfigReader, blocks: int) -> _Nested:
    try:
        block = reader.get(int, "nested_blocksize", choices=_BLOCK_SIZES)
        offset = reader.get(float, "nested_offset")
        reader.get(str, "nested_dtype", choices=["float32"])
    except ConfigError as error:
        raise CheckpointCorruptError(str(error)) from error
    maxima = _part(group, "nested_absmax", "F32", (-(-blocks // block),))
    return _Nested(maxima, _part(group, "nested_quant_map", "F32", (256,)), block, offset)


def _part(group: Group, role: str, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    """Returns the companion ``role`` after checking its dtype and shape."""
    part = group.companions.get(role)
    if part is None:
        raise CheckpointCorruptError(
            f"tensor {shorten(group.main.name)} in {group.main.file} is stored as {group.scheme}, but its {role} is "
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
    return CheckpointCorruptError(
        f"tensor {shorten(part.name)} in {part.file} must be {allowed}, got {part.dtype} of shape {list(part.shape)}; "
        "download the files again"
    )


def _unsupported(part: StoredTensor, allowed: str) -> UnsupportedDtypeError:
    return UnsupportedDtypeError(
        f"tensor {shorten(part.name)} in {part.file} must be {allowed}, got {part.dtype} of shape {list(part.shape)}; "
        "use a checkpoint whose vision tower is not quantized"
    )
