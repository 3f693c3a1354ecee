"""A tower's weights in the order in which a CPU multiplies them fastest, in place of the plain ones.

oneDNN keeps the rows of a weight in blocks of its own making and brings a plain weight into them in every product; see
:class:`tritontower.kernels.gemm.cpu.PrepackedWeight`.  Packed once, when the tower is loaded, the same numbers come out sooner.
"""

from collections.abc import Iterable

import torch

from tritontower.graph.ir import Graph, Node
from tritontower.kernels.gemm import cpu
from tritontower.kernels.runtime._triton import INTERPRETED
from tritontower.kernels.runtime.dispatch import backend_on

__all__ = ["held_bytes", "prepack_weights"]

_PRODUCTS = {"linear": ("weight",), "mlp": ("weight_1", "weight_2"), "projector": ("weight_1", "weight_2")}


def prepack_weights(graphs: Iterable[Graph], sources: dict[str, torch.Tensor]) -> None:
    """Replaces in ``sources`` what linear products alone read by its packed form; one plain tensor goes after the other.

    Nothing happens to tensors that are not on a CPU, where Triton's interpreter is to run the kernels, or where torch
    cannot pack.

    Args:
        graphs: all that are going to run on these tensors.
        sources: name → tensor as :func:`tritontower.engine.weight_loader.read_weights` holds it.  Nobody else should hold them: a
            plain tensor that lives on is a second copy.
    """
    gated = _gated(graphs)
    for name, halves in gated.items():
        tensor = sources.get(name)
        if tensor is not None and not INTERPRETED and backend_on(tensor.device) == "reference":
            sources[name] = cpu.prepack(tensor, gated=halves)
            del tensor


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of memory that ``tensors``, packed or plain, hold together: what several are views of counts once, and whole."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        if isinstance(tensor, cpu.PrepackedWeight):
            # Blocks are full: oneDNN may take more than the plain tensor did.
            sizes |= {id(part): torch.ops.mkldnn._nbytes(part) for part in tensor.parts}
        else:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _gated(graphs: Iterable[Graph]) -> dict[str, bool]:
    """Name of every tensor that linear products alone read, as it is → whether they want its two halves."""
    uses: dict[str, set[bool | None]] = {}
    for graph in graphs:
        for node in graph.nodes:
            for role, name in node.weights.items():
                weight = graph.weights[name]
                uses.setdefault(weight.held_name, set()).add(_use(node, role) if weight.transform == "as_is" else None)
    return {name: True in kinds for name, kinds in uses.items() if kinds in ({True}, {False})}


def _use(node: Node, role: str) -> bool | None:
    """Whether a product takes the halves of this weight one by one; ``None`` for what is no product's weight."""
    products = _PRODUCTS.get(node.kind, ())
    if role not in products:
        return None
    return role == products[0] and node.attributes["activation"] == "silu_gated"
