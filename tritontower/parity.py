"""Is it the same tower?  The graph beside transformers' own implementation, on the same checkpoint and pictures.

In fp32 the two must agree to :data:`FLOAT32_TOLERANCE`.  In bf16 and fp16 two correct implementations differ more from
each other than from the truth, so each is held against transformers in fp32, and the tower's error may be at most
:data:`HALF_TOLERANCE` times transformers' own error in that dtype.
"""

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .batch import PackedBatch
from .errors import ProcessorError
from .executor import Observer
from .graph import Node
from .tower import VisionTower

__all__ = [
    "FLOAT32_TOLERANCE",
    "HALF_TOLERANCE",
    "NodeParity",
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
class Parity:
    """How close a tower comes to transformers, over a whole batch.

    Attributes:
        dtype: the tower's.
        error: relative L2 distance of the tower's embeddings from transformers' in fp32.
        worst_picture: the largest such distance of one picture.
        reference_error: the same distance of transformers in the tower's dtype; ``None`` for fp32, where it is zero.
        seconds: wall time of the tower's pass.
        reference_seconds: wall time of transformers' pass in the tower's dtype.
    """

    dtype: torch.dtype
    error: float
    worst_picture: float
    reference_error: float | None
    seconds: float
    reference_seconds: float

    @property
    def limit(self) -> float:
        """The largest error that passes."""
        if self.reference_error is None:
            return FLOAT32_TOLERANCE
        return HALF_TOLERANCE * self.reference_error

    @property
    def passed(self) -> bool:
        """Whether the tower is as close as it must be."""
        return self.error <= self.limit


@dataclass(frozen=True)
class NodeParity:
    """How far one value of the graph is from the same value inside transformers."""

    node: str
    value: str
    reference: str
    """Module of transformers, and whether its input or its output is meant."""
    error: float


class Reference:
    """transformers' vision tower of a checkpoint, read by transformers itself.

    Args:
        tower: whose checkpoint and pictures it shall share.
        dtype: in which it computes.

    Raises:
        ProcessorError: transformers finds tensors missing, which it would otherwise fill with random numbers.
    """

    def __init__(self, tower: VisionTower, dtype: torch.dtype) -> None:
        import transformers

        with _quiet(transformers.utils.logging):
            config = transformers.AutoConfig.from_pretrained(
                str(tower.folder), local_files_only=True, trust_remote_code=False
            )
            model_class = tower.family.reference_class()
            # `from_pretrained(dtype=…)`, not `.to(dtype)`: the latter would round the rotary frequencies as well.
            self.model, report = model_class.from_pretrained(
                str(tower.folder),
                config=config.vision_config,
                key_mapping={rf"^{prefix.replace('.', '[.]')}": "" for prefix in tower.family.PREFIXES},
                dtype=dtype,
                attn_implementation="sdpa",
                local_files_only=True,
                output_loading_info=True,
            )
        if report["missing_keys"]:
            raise ProcessorError(f"transformers misses {sorted(report['missing_keys'])[:10]} in {tower.folder}")
        self.model.to(tower.device).eval()
        self.tower = tower
        self.dtype = dtype

    def inputs(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch as transformers takes it: pixels of all the frames that a patch spans, and the grids."""
        patch = self.tower.config.patch
        pixels = batch.pixels
        if pixels.shape[1] == patch.still_inner:
            pixels = pixels.unflatten(1, (patch.channels, 1, -1)).expand(-1, -1, patch.temporal, -1).flatten(1)
        return pixels.to(self.tower.device), torch.tensor(batch.grids, device=self.tower.device)

    @torch.inference_mode()
    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """``[tokens, hidden_size]``, as :meth:`VisionTower.forward`."""
        return self.tower.family.reference_embeddings(self.model(*self.inputs(batch)))

    @contextmanager
    def recorded(self, names: Mapping[str, tuple[str, str]]) -> Iterator[dict[str, torch.Tensor]]:
        """Collects, while the model runs, the inputs and outputs of the modules that ``names`` points to."""
        found: dict[str, torch.Tensor] = {}
        handles = []
        for value, (path, side) in names.items():
            module = self.model.get_submodule(path)

            def keep_input(_module: Any, inputs: Any, value: str = value) -> None:
                found[value] = inputs[0].detach().flatten(0, -2)

            def keep_output(_module: Any, _inputs: Any, output: Any, value: str = value) -> None:
                found[value] = output.detach().flatten(0, -2)

            hook = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
            handles.append(hook(keep_input if side == "input" else keep_output))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def compare(tower: VisionTower, batch: PackedBatch) -> Parity:
    """Runs ``tower`` and transformers over ``batch`` and holds them against each other."""
    ours, seconds = _timed(tower.forward, batch, tower.device)
    reference_error: float | None = None
    exact, reference_seconds = _timed(Reference(tower, torch.float32).forward, batch, tower.device)
    gc.collect()
    if tower.dtype != torch.float32:
        theirs, reference_seconds = _timed(Reference(tower, tower.dtype).forward, batch, tower.device)
        reference_error = relative_error(theirs, exact)
    parts = zip(ours.split(batch.token_counts), exact.split(batch.token_counts), strict=True)
    return Parity(
        dtype=tower.dtype,
        error=relative_error(ours, exact),
        worst_picture=max((relative_error(mine, true) for mine, true in parts), default=0.0),
        reference_error=reference_error,
        seconds=seconds,
        reference_seconds=reference_seconds,
    )


def compare_nodes(tower: VisionTower, batch: PackedBatch) -> list[NodeParity]:
    """The distance of every value that the graph and transformers (in the tower's dtype) have in common, in order.

    The first line whose error jumps is where the two part; everything behind it carries that error on.
    """
    names = tower.family.reference_values(tower.config)
    reference = Reference(tower, tower.dtype)
    with reference.recorded(names) as theirs:
        reference.forward(batch)
    found: list[NodeParity] = []

    def observe(node: Node, tensors: Mapping[str, torch.Tensor]) -> None:
        for value in (*node.scratch, *node.outputs):
            if value in theirs:
                path, side = names[value]
                error = relative_error(tensors[value], theirs[value].reshape(tensors[value].shape))
                found.append(NodeParity(node.name, value, f"{path} ({side})", error))

    watch: Observer = observe
    tower.executor_for(batch).run(batch.to(tower.device), watch)
    return found


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``‖actual − expected‖ / ‖expected‖`` over all elements, in fp64; 0 where both are empty or zero."""
    difference = (actual.double() - expected.double()).norm().item()
    scale = expected.double().norm().item()
    return float(difference / scale if scale else difference)


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Silences transformers while it reads a tower out of a whole model: it reports every tensor that it leaves out."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _timed(function: Any, batch: PackedBatch, device: torch.device) -> tuple[torch.Tensor, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result: torch.Tensor = function(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start
