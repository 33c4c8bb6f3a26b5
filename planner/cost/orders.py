"""In which order of dims a kernel finds its operands, and what another order costs.

A kernel that walks along the innermost dim of what it reads and of what it writes streams. One
that has to exchange that dim for another moves single elements. GPUs exchange tiles in shared
memory at the speed of streams; XLA's CPU backend has loops of scalar loads (a device's
`transpose_bandwidth`), and two more habits that compiled programs of the zoo show (jax 0.10.2):

    batched products    read [batch, rows, terms] x [batch, terms, columns]; an operand in another
                        order is written again first
    weight gradients    [tokens.., rows] x [tokens.., columns] run in a slower kernel (`gradient_share`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...ir.graph import Op, TensorType


def moves_innermost(shape: Sequence[int], order: Sequence[int]) -> bool:
    """Whether the innermost dim is another one once the dims stand in this order; dims of size 1 do not count."""
    long = [dim for dim in range(len(shape)) if shape[dim] > 1]
    placed = [dim for dim in order if shape[dim] > 1]
    return bool(long) and long[-1] != placed[-1]


def transposes(op: Op, types: Mapping[int, TensorType]) -> bool:
    """Whether the op is a transpose that moves the innermost dim."""
    return op.kind == "transpose" and moves_innermost(types[op.inputs[0]].shape, op.attr("permutation"))  # type: ignore[arg-type]


def rewritten(op: Op, types: Mapping[int, TensorType]) -> list[int]:
    """Operands of a batched product that are written again with another innermost dim."""
    (terms, batch), found = _dims(op), []
    if not batch[0]:
        return found
    for k, value in enumerate(op.inputs):
        shape = types[value].shape
        free = [dim for dim in range(len(shape)) if dim not in terms[k] and dim not in batch[k]]
        order = (*batch[k], *free, *terms[k]) if k == 0 else (*batch[k], *terms[k], *free)
        if moves_innermost(shape, order):
            found.append(k)
    return found


def is_weight_gradient(op: Op) -> bool:
    """Whether a product sums over the leading dims of both operands: tokens, as gradients of weights do."""
    terms, batch = _dims(op)
    return not batch[0] and all(sorted(side) == list(range(len(side))) for side in terms)


def _dims(op: Op) -> tuple[tuple[Sequence[int], ...], tuple[Sequence[int], ...]]:
    """(summed dims, batch dims) of a product, each of the left and the right operand."""
    return op.attr("dimension_numbers")  # type: ignore[return-value]
