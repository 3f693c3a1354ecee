"""Comparison of a tower with transformers, on the same checkpoint and images.

In fp32 the two must agree to :data:`FLOAT32_TOLERANCE`.  In bf16 and fp16 two correct implementations differ more from each
other than from the exact result.  So each is compared with transformers in fp32, and the tower's error may be at most
:data:`HALF_TOLERANCE` times transformers' own error in that dtype.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tritontower.batch.packed_batch import PackedBatch
from tritontower.checkpoint.checkpoint import Checkpoint
from tritontower.checkpoint.config_reader import ConfigReader
from tritontower.devices import synchronize
from tritontower.errors import ReferenceModelError
from tritontower.graph.ir import Node
from tritontower.models.common.hf_reference import ModuleValue, ReferenceModel
from tritontower.tower import VisionTower

FLOAT32_TOLERANCE = 1e-5
"""Largest relative L2 distance of an fp32 tower from transformers in fp32, end to end."""
HALF_TOLERANCE = 1.10
"""Largest error of a 16-bit tower over transformers' error in that dtype, both against transformers in fp32."""


@dataclass(frozen=True)
class OutputParity:
    """Error of one output of a tower: relative L2 distances from transformers in fp32."""

    error: float
    reference_error: float | None
    """Error of transformers in the tower's dtype; ``None`` for fp32, where it is zero."""

    @property
    def limit(self) -> float:
        """The largest error that passes."""
        return FLOAT32_TOLERANCE if self.reference_error is None else HALF_TOLERANCE * self.reference_error

    @property
    def passed(self) -> bool:
        """True if the error is within :attr:`limit`."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Parity:
    """Errors of a tower over a batch, and the wall time of the tower and of transformers in its dtype."""

    dtype: torch.dtype
    outputs: Mapping[str, OutputParity]
    worst_image: float
    """The largest error of one image's embeddings."""
    seconds: float
    reference_seconds: float

    @property
    def embeddings(self) -> OutputParity:
        """Error of the embeddings."""
        return self.outputs["embeddings"]

    @property
    def passed(self) -> bool:
        """True if the error of every output is within its limit."""
        return all(output.passed for output in self.outputs.values())


@dataclass(frozen=True)
class NodeParity:
    """Error of one value of the graph against the same value inside transformers."""

    node: str
    value: str
    reference: str
    """Module of transformers, and its side: input or output."""
    error: float


class Reference:
    """transformers' implementation of a tower, on the same checkpoint.

    transformers loads the checkpoint itself.  Only the weights of a quantized checkpoint come from the tower's own reader:
    transformers would compute with the quantized ones, in another precision and with other libraries.
    """

    def __init__(self, tower: VisionTower, dtype: torch.dtype) -> None:
        implementation = tower.family.reference
        if implementation is None:
            raise ReferenceModelError(
                f"transformers cannot read the format of {tower.folder}; compare the same model's checkpoint in transformers' "
                "format"
            )
        self.implementation: ReferenceModel = implementation
        self.model: Any = implementation.load(tower.folder, dtype, _dequantized(tower)).to(tower.device)
        self.tower = tower
        self.dtype = dtype

    def inputs(self, batch: PackedBatch) -> Any:
        """Converts a batch to transformers' inputs; not part of the measured time."""
        batch = self.tower.preprocessor.normalize(batch).to(self.tower.device)
        return self.implementation.inputs(self.model, batch, self.tower.config)

    @torch.inference_mode()
    def outputs(self, inputs: Any) -> Mapping[str, torch.Tensor]:
        """Returns the outputs by name, for :meth:`inputs`."""
        return self.implementation.outputs(self.model, inputs, self.tower.config)

    def run(self, batch: PackedBatch) -> Mapping[str, torch.Tensor]:
        """Returns the outputs by name, as :meth:`VisionTower.run`."""
        return self.outputs(self.inputs(batch))

    @contextmanager
    def recorded(self, names: Mapping[str, ModuleValue]) -> Iterator[Callable[[str], torch.Tensor | None]]:
        """Records modules while the model runs; yields the lookup of a value's rows, ``None`` if its modules did not run."""
        found: dict[tuple[str, str], torch.Tensor] = {}

        def value(name: str) -> torch.Tensor | None:
            if name not in names:
                return None
            parts = [found[key] for path in names[name].paths if (key := (path, names[name].side)) in found]
            return torch.cat(parts, dim=1) if len(parts) == len(names[name].paths) else None

        def keep(key: tuple[str, str], _module: Any, inputs: Any, output: Any = None) -> None:
            rows = inputs if key[1] == "input" else output
            found[key] = (rows[0] if isinstance(rows, tuple) else rows).detach().flatten(0, -2)

        with ExitStack() as hooks:
            for path, side in sorted({(path, value.side) for value in names.values() for path in value.paths}):
                module = self.model.get_submodule(path)
                hook = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
                hooks.callback(hook(partial(keep, (path, side))).remove)
            yield value


def compare(tower: VisionTower, batch: PackedBatch) -> Parity:
    """Runs ``tower`` and transformers on ``batch`` and returns the errors."""
    ours, seconds = _timed(tower.run, batch, tower.device)
    exact, reference_seconds = _reference_timed(tower, torch.float32, batch)
    gc.collect()
    theirs: Mapping[str, torch.Tensor] | None = None
    if tower.dtype != torch.float32:
        theirs, reference_seconds = _reference_timed(tower, tower.dtype, batch)
    parts = zip(*(rows["embeddings"].split(batch.images.token_counts) for rows in (ours, exact)), strict=True)
    return Parity(
        dtype=tower.dtype,
        outputs=compare_outputs(ours, theirs, exact),
        worst_image=max((relative_error(mine, true) for mine, true in parts), default=0.0),
        seconds=seconds,
        reference_seconds=reference_seconds,
    )


def compare_outputs(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor] | None, exact: Mapping[str, torch.Tensor]
) -> dict[str, OutputParity]:
    """Returns the error of every output against ``exact``; ``theirs`` is transformers in the tower's dtype, if not fp32."""
    if absent := sorted(ours.keys() ^ exact.keys()):
        raise ReferenceModelError(f"only one of the tower and transformers has the outputs {', '.join(absent)}")
    return {
        name: OutputParity(
            relative_error(rows, exact[name]),
            None if theirs is None else relative_error(theirs[name], exact[name]),
        )
        for name, rows in ours.items()
    }


def compare_nodes(tower: VisionTower, batch: PackedBatch) -> list[NodeParity]:
    """Returns the error of every value that the graph and transformers (in the tower's dtype) have in common, in order.

    Values that kernels rotate, pad or reorder have no counterpart in transformers and are left out, as are values that are
    never in memory for all rows at once.  The two differ first at the line whose error jumps; all later values inherit it.
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
            # Scratch that is reused for chunks of rows holds the last chunk only.
            if theirs is None or held.held_rows(batch.workload) < batch.workload.rows(held.rows):
                continue
            ours, rows = tensors[name], held.rows
            theirs = theirs.reshape(len(ours), -1)
            if raster is not None and len(ours) == len(raster):
                ours = ours[raster]
            elif batch.attention.windows is not None and batch.tokens.selection is not None and rows != "patches":
                # transformers projects in window order, and reorders the result.
                theirs = theirs[_window_places(batch, len(ours))]
            # A padded MLP is wider; the padding is zero.
            error = relative_error(ours[:, : theirs.shape[1]], theirs)
            found.append(NodeParity(node.name, name, str(names[name]), error))

    executor.run(batch.to(tower.device), observe)
    return found


def _dequantized(tower: VisionTower) -> dict[str, torch.Tensor] | None:
    """Returns the vision weights of a quantized checkpoint in fp32, by stored name; ``None`` for other checkpoints."""
    config = ConfigReader.from_file(tower.folder / "config.json")
    declared = config.has("quantization_config") or config.has("text_config.quantization_config")
    with Checkpoint.open(tower.folder, prefixes=tower.family.prefixes, layout=tower.family.layout) as checkpoint:
        weights = checkpoint.weights
        if not declared and all(weight.scheme is None for weight in weights.values()):
            return None
        names = [name for name, weight in weights.items() if weight.is_supported]
        return {weights[name].main.name: tensor for name, tensor in checkpoint.iterate(torch.float32, names=names)}


def _window_places(batch: PackedBatch, rows: int) -> torch.Tensor:
    """Returns the place in window order of each patch, or of each token if there are only as many ``rows``."""
    selection = batch.tokens.selection
    if selection is None or rows == len(selection):
        return torch.arange(rows) if selection is None else selection.squeeze(1).long()
    per_token = len(selection) // rows
    return selection.view(rows, per_token)[:, 0].long() // per_token


def _raster_order(batch: PackedBatch) -> torch.Tensor:
    """Returns the order of the rows by tile, then in raster order."""
    tile = torch.arange(batch.attention.tiles.count).repeat_interleave(torch.tensor(batch.attention.tiles.lengths))
    row, column = batch.attention.positions.long().unbind(1)
    return ((tile * batch.attention.side + row) * batch.attention.side + column).argsort(stable=True)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns ``‖actual − expected‖ / ‖expected‖`` in fp64; 0 if both are empty or zero."""
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
    synchronize(device)
    start = time.perf_counter()
    result = function(argument)
    synchronize(device)
    return result, time.perf_counter() - start
