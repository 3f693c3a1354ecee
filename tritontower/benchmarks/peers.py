"""Inference engines for CPUs that run transformers' model: OpenVINO, ONNX Runtime, and torch.compile with zentorch.

None of them is a dependency.  Pixels are the exported program's inputs; grids and sizes are constants, as in a program that
is compiled for one batch.  OpenVINO and ONNX Runtime get the fp32 model; OpenVINO is told to compute in the tower's dtype.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from tritontower.batch.packed_batch import PackedBatch
from tritontower.errors import BackendUnavailableError, UsageError
from tritontower.parity.parity import Reference

Outputs = Callable[[], Mapping[str, torch.Tensor]]


def check_installed(package: str) -> None:
    """Raises :class:`.BackendUnavailableError` if ``package`` is not installed."""
    if find_spec(package) is None:
        raise BackendUnavailableError(f"against {package} needs the package {package}; run pip install {package}")


class _Embeddings(torch.nn.Module):
    """transformers' model as a function of its floating-point inputs alone."""

    def __init__(self, reference: Reference, inputs: Any) -> None:
        super().__init__()
        self.model, self.reference = reference.model, reference
        self.leaves, self.tree = tree_flatten(inputs)
        self.places = [i for i, leaf in enumerate(self.leaves) if torch.is_tensor(leaf) and leaf.is_floating_point()]

    @property
    def pixels(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.leaves[place] for place in self.places)

    def forward(self, *pixels: torch.Tensor) -> torch.Tensor:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, pixels, strict=True):
            leaves[place] = tensor
        inputs = tree_unflatten(leaves, self.tree)
        reference = self.reference
        return reference.implementation.outputs(reference.model, inputs, reference.tower.config)["embeddings"]


def _in_fp32(reference: Reference, batch: PackedBatch) -> _Embeddings:
    exact = reference if reference.dtype == torch.float32 else Reference(reference.tower, torch.float32)
    return _Embeddings(exact, exact.inputs(batch)).eval()


def openvino(reference: Reference, batch: PackedBatch) -> Outputs:
    """Compiles the model by OpenVINO for latency, with torch's number of threads."""
    import openvino as ov

    module = _in_fp32(reference, batch)
    with torch.no_grad():
        try:
            model = ov.convert_model(torch.export.export(module, module.pixels, strict=False))
        except Exception:  # torch.export rejects lengths that are read from tensors; a trace takes them as constants
            model = ov.convert_model(module, example_input=module.pixels)
    precision = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[reference.dtype]
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = ov.Core().compile_model(model, "CPU", {**options, "INFERENCE_PRECISION_HINT": precision})
    request, arrays = compiled.create_infer_request(), [tensor.numpy() for tensor in module.pixels]
    return lambda: {"embeddings": torch.from_numpy(request.infer(arrays)[0])}


def onnxruntime(reference: Reference, batch: PackedBatch) -> Outputs:
    """Exports the model to ONNX; raises :class:`.UsageError` for 16 bits, which ONNX Runtime lacks on CPUs."""
    import onnxruntime as ort

    if reference.dtype != torch.float32:
        raise UsageError(f"dtype must be float32 for onnxruntime on a CPU, got {reference.dtype}; set --dtype float32")
    module = _in_fp32(reference, batch)
    program = torch.onnx.export(module, module.pixels, dynamo=True, verbose=False)
    assert program is not None
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    model = program.model_proto.SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = {given.name: tensor.numpy() for given, tensor in zip(session.get_inputs(), module.pixels, strict=True)}
    return lambda: {"embeddings": torch.from_numpy(session.run(None, feeds)[0])}


def zentorch(reference: Reference, batch: PackedBatch) -> Outputs:
    """Compiles the model by torch.compile with AMD's zentorch as its backend."""
    import zentorch as _registered  # noqa: F401

    module = _Embeddings(reference, reference.inputs(batch)).eval()
    compiled = torch.compile(module, backend="zentorch", dynamic=False)

    def call() -> Mapping[str, torch.Tensor]:
        with torch.no_grad():
            return {"embeddings": compiled(*module.pixels)}

    return call
