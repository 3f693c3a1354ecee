"""Is it the same tower?  The graph beside transformers' own implementation, on the same checkpoint and images.

In fp32 the two must agree to :data:`FLOAT32_TOLERANCE`.  In bf16 and fp16 two correct implementations differ more from
each other than from the truth, so each is held against transformers in fp32, and the tower's error may be at most
:data:`HALF_TOLERANCE` times transformers' own error in that dtype.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.checkpoint.checkpoint import Checkpoint
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.engine.executor import Observer
from tritontower.errors import ReferenceModelError
from tritontower.graph.ir import Node
from tritontower.models.common.hf_reference import ModuleValue, ReferenceModel
from tritontower.tower import VisionTower

__all__ = [
    "FLOAT32_TOLERANCE",
    "HALF_TOLERANCE",
    "NodeParity",
    "OutputParity",
    "Parity",
    "Reference",
    "compare",
    "compare_nodes",
    "relative_error",
]

FLOAT32_TOLERANCE = 1e-5
"""Relative L2 distance of an fp32 tower from transformers in fp32, end to end."""
HALF_TOLERANCE = 1.10
"""Error of a 16-bit tower over transformers' own error in that dtype, both against transformers in fp32."""


@dataclass(frozen=True)
class OutputParity:
    """How close one output of a tower comes to transformers'.

    Attributes:
        error: relative L2 distance of the tower's rows from transformers' in fp32.
        reference_error: the same distance of transformers in the tower's dtype; ``None`` for fp32, where it is zero.
    """

    error: float
    reference_error: float | None

    @property
    def limit(self) -> float:
        """The largest error that passes."""
        return FLOAT32_TOLERANCE if self.reference_error is None else HALF_TOLERANCE * self.reference_error

    @property
    def passed(self) -> bool:
        """Whether the output is as close as it must be."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Parity:
    """How close a tower comes to transformers, over a whole batch.

    Attributes:
        dtype: the tower's.
        outputs: per output (``embeddings``, and whatever else the tower has), how close it is.
        worst_image: the largest distance of one image's embeddings.
        seconds: wall time of the tower's pass.
        reference_seconds: wall time of transformers' pass in the tower's dtype.
    """

    dtype: torch.dtype
    outputs: Mapping[str, OutputParity]
    worst_image: float
    seconds: float
    reference_seconds: float

    @property
    def error(self) -> float:
        """Distance of the embeddings."""
        return self.outputs["embeddings"].error

    @property
    def reference_error(self) -> float | None:
        """Distance of transformers' embeddings in the tower's dtype; ``None`` for fp32."""
        return self.outputs["embeddings"].reference_error

    @property
    def limit(self) -> float:
        """The largest error of the embeddings that passes."""
        return self.outputs["embeddings"].limit

    @property
    def passed(self) -> bool:
        """Whether every output is as close as it must be."""
        return all(output.passed for output in self.outputs.values())


@dataclass(frozen=True)
class NodeParity:
    """How far one value of the graph is from the same value inside transformers."""

    node: str
    value: str
    reference: str
    """Module of transformers, and whether its input or its output is meant."""
    error: float


class Reference:
    """transformers' implementation of a tower, read by transformers itself from the same checkpoint.

    Of a quantized checkpoint it is given the weights as the tower's own reader dequantizes them: transformers would
    compute with the quantized ones, in another precision and by other libraries.

    Args:
        tower: whose checkpoint and images it shall share.
        dtype: in which it computes.

    Raises:
        ReferenceModelError: transformers has no such model, cannot load it, or finds tensors missing.
    """

    def __init__(self, tower: VisionTower, dtype: torch.dtype) -> None:
        implementation = tower.family.reference
        if implementation is None:
            raise ReferenceModelError(
                f"transformers reads no checkpoint in the format of {tower.folder}; compare the same model's checkpoint in "
                "transformers' format"
            )
        self.implementation: ReferenceModel = implementation
        self.model: Any = implementation.load(tower.folder, dtype, _dequantized(tower)).to(tower.device)
        self.tower = tower
        self.dtype = dtype

    def inputs(self, batch: PackedBatch) -> Any:
        """The batch in the form that transformers takes: what it costs is not transformers' time."""
        batch = self.tower.preprocessor.normalize(batch).to(self.tower.device)
        return self.implementation.inputs(self.model, batch, self.tower.config)

    @torch.inference_mode()
    def outputs(self, inputs: Any) -> Mapping[str, torch.Tensor]:
        """The tower's outputs by name, for :meth:`inputs`."""
        return self.implementation.outputs(self.model, inputs, self.tower.config)

    def run(self, batch: PackedBatch) -> Mapping[str, torch.Tensor]:
        """The tower's outputs by name, as :meth:`VisionTower.run` gives them."""
        return self.outputs(self.inputs(batch))

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """``[tokens, hidden_size]``, as :meth:`VisionTower.forward`."""
        return self.run(batch)["embeddings"]

    @contextmanager
    def recorded(self, names: Mapping[str, ModuleValue]) -> Iterator[Callable[[str], torch.Tensor | None]]:
        """Collects, while the model runs, what goes into and comes out of the modules that ``names`` points to.

        Yields:
            Value of the graph → its rows inside transformers; ``None`` if the model did not run through the modules.
        """
        found: dict[tuple[str, str], torch.Tensor] = {}

        def value(name: str) -> torch.Tensor | None:
            if name not in names:
                return None
            parts = [found[key] for path in names[name].paths if (key := (path, names[name].side)) in found]
            return torch.cat(parts, dim=1) if len(parts) == len(names[name].paths) else None

        with ExitStack() as hooks:
            for path, side in sorted({(path, value.side) for value in names.values() for path in value.paths}):
                module = self.model.get_submodule(path)

                def keep_input(_module: Any, inputs: Any, key: tuple[str, str] = (path, side)) -> None:
                    found[key] = _rows(inputs[0])

                def keep_output(_module: Any, _inputs: Any, output: Any, key: tuple[str, str] = (path, side)) -> None:
                    found[key] = _rows(output[0] if isinstance(output, tuple) else output)

                hook = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
                hooks.callback(hook(keep_input if side == "input" else keep_output).remove)
            yield value


def compare(tower: VisionTower, batch: PackedBatch) -> Parity:
    """Runs ``tower`` and transformers over ``batch`` and holds them against each other."""
    ours, seconds = _timed(tower.run, batch, tower.device)
    exact, reference_seconds = _reference_timed(tower, torch.float32, batch)
    gc.collect()
    theirs: Mapping[str, torch.Tensor] | None = None
    if tower.dtype != torch.float32:
        theirs, reference_seconds = _reference_timed(tower, tower.dtype, batch)
    if absent := sorted(ours.keys() ^ exact.keys()):
        raise ReferenceModelError(f"only one of the tower and transformers has the outputs {', '.join(absent)}")
    outputs = {
        name: OutputParity(
            relative_error(rows, exact[name]),
            None if theirs is None else relative_error(theirs[name], exact[name]),
        )
        for name, rows in ours.items()
    }
    parts = zip(*(rows["embeddings"].split(batch.images.token_counts) for rows in (ours, exact)), strict=True)
    return Parity(
        dtype=tower.dtype,
        outputs=outputs,
        worst_image=max((relative_error(mine, true) for mine, true in parts), default=0.0),
        seconds=seconds,
        reference_seconds=reference_seconds,
    )


def compare_nodes(tower: VisionTower, batch: PackedBatch) -> list[NodeParity]:
    """The distance of every value that the graph and transformers (in the tower's dtype) have in common, in order.

    What kernels rotate as they write it, pad or put in another order is nowhere in transformers and has no line, and
    neither has what never is in memory for all rows at once.

    The first line whose error jumps is where the two part; everything behind it carries that error on.
    """
    reference = Reference(tower, tower.dtype)
    names = reference.implementation.values(tower.config)
    raster = _raster_order(batch) if reference.implementation.row_order == "raster" else None
    executor = tower.executor_for(batch)
    with reference.recorded(names) as value:
        reference.run(batch)
    found: list[NodeParity] = []

    def observe(node: Node, tensors: Mapping[str, torch.Tensor]) -> None:
        for name in (*node.scratch, *node.outputs):
            theirs, held = value(name), executor.graph.values[name]
            # Scratch that served one run of rows after the other holds the last of them only.
            if theirs is None or held.held_rows(batch.workload) < batch.workload.rows(held.rows):
                continue
            ours, rows = tensors[name], held.rows
            theirs = theirs.reshape(len(ours), -1)
            if raster is not None and len(ours) == len(raster):
                ours = ours[raster]
            elif batch.attention.windows is not None and batch.tokens.selection is not None and rows != "patches":
                # transformers projects in window order, and puts only the result in order.
                theirs = theirs[_image_order(batch, len(ours))]
            # A padded MLP is wider; what is beyond is zero.
            error = relative_error(ours[:, : theirs.shape[1]], theirs)
            found.append(NodeParity(node.name, name, str(names[name]), error))

    watch: Observer = observe
    executor.run(batch.to(tower.device), watch)
    return found


def _dequantized(tower: VisionTower) -> dict[str, torch.Tensor] | None:
    """Stored name → vision weight in fp32, of a checkpoint with anything quantized in it; ``None`` for all others."""
    config = ConfigReader.from_file(tower.folder / "config.json")
    declared = config.has("quantization_config") or config.has("text_config.quantization_config")
    with Checkpoint.open(tower.folder, prefixes=tower.family.prefixes, layout=tower.family.layout) as checkpoint:
        headers = checkpoint.tensors
        if not declared and all(header.scheme is None for header in headers.values()):
            return None
        names = [name for name in headers if checkpoint.can_read(name)]
        return {headers[name].name: tensor for name, tensor in checkpoint.iterate(torch.float32, names=names)}


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().flatten(0, -2)


def _image_order(batch: PackedBatch, rows: int) -> torch.Tensor:
    """Where each patch, or each token if there are only as many ``rows``, stands in window order."""
    selection = batch.tokens.selection
    if selection is None or rows == len(selection):
        return torch.arange(rows) if selection is None else selection.squeeze(1).long()
    per_token = len(selection) // rows
    return selection.view(rows, per_token)[:, 0].long() // per_token


def _raster_order(batch: PackedBatch) -> torch.Tensor:
    """The rows of each tile by their row and column in it."""
    tile = torch.arange(batch.attention.tiles.count).repeat_interleave(torch.tensor(batch.attention.tiles.lengths))
    row, column = batch.attention.positions.long().unbind(1)
    return ((tile * batch.attention.side + row) * batch.attention.side + column).argsort(stable=True)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``‖actual − expected‖ / ‖expected‖`` over all elements, in fp64; 0 where both are empty or zero."""
    difference = (actual.double() - expected.double()).norm().item()
    scale = expected.double().norm().item()
    return float(difference / scale if scale else difference)


def _reference_timed(
    tower: VisionTower, dtype: torch.dtype, batch: PackedBatch
) -> tuple[Mapping[str, torch.Tensor], float]:
    reference = Reference(tower, dtype)
    return _timed(reference.outputs, reference.inputs(batch), tower.device)


def _timed(
    function: Callable[[Any], Mapping[str, torch.Tensor]], argument: Any, device: torch.device
) -> tuple[Mapping[str, torch.Tensor], float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = function(argument)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start
