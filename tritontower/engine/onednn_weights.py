"""Prepacks a tower's weights for oneDNN, which then multiplies faster on a CPU.

oneDNN keeps the rows of a weight in its own block layout and converts a plain weight in every matmul.  Prepacking converts
each weight once, when the tower is loaded; the results are the same.  See :class:`tritontower.kernels.gemm.cpu.PrepackedWeight`.
"""

from collections.abc import Iterable

import torch

from tritontower.graph.ir import Graph, Node
from tritontower.kernels.gemm import cpu
from tritontower.kernels.runtime._triton import INTERPRETED
from tritontower.kernels.runtime.dispatch import backend_on

_MATMULS = {"linear": ("weight",), "mlp": ("weight_1", "weight_2"), "projector": ("weight_1", "weight_2")}


def prepack_weights(graphs: Iterable[Graph], sources: dict[str, torch.Tensor]) -> None:
    """Replaces weights that only matmuls of ``graphs`` read by their prepacked form, one after the other.

    Nothing changes for tensors on a GPU, with Triton's interpreter, or if torch cannot prepack.  The caller should hold no
    other references to ``sources``: a plain tensor that stays alive is a second copy.
    """
    for name, is_gated in _find_matmul_weights(graphs).items():
        tensor = sources.get(name)
        if tensor is not None and not INTERPRETED and backend_on(tensor.device) == "reference":
            sources[name] = cpu.prepack(tensor, gated=is_gated)
            del tensor


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Returns the memory of prepacked or plain tensors; shared storage counts once."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        if isinstance(tensor, cpu.PrepackedWeight):
            # Blocks are padded: oneDNN may use more memory than the plain tensor.
            sizes |= {id(part): torch.ops.mkldnn._nbytes(part) for part in tensor.parts}
        else:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _find_matmul_weights(graphs: Iterable[Graph]) -> dict[str, bool]:
    """Returns name → whether the two halves are multiplied separately, of tensors that only matmuls read."""
    uses: dict[str, set[bool | None]] = {}
    for graph in graphs:
        for node in graph.nodes:
            for role, name in node.weights.items():
                weight = graph.weights[name]
                use = _is_gated(node, role) if weight.transform == "as_is" else None
                uses.setdefault(weight.held_name, set()).add(use)
    return {name: True in kinds for name, kinds in uses.items() if kinds in ({True}, {False})}


def _is_gated(node: Node, role: str) -> bool | None:
    """Returns whether a matmul multiplies the halves separately; ``None`` if this is no matmul's weight."""
    roles = _MATMULS.get(node.kind, ())
    if role not in roles:
        return None
    return role == roles[0] and node.attributes["activation"] == "silu_gated"
