"""Decompositions, solves and Fourier transforms: leading dims are a batch, each of its own; the rest is whole."""

from __future__ import annotations

from .factors import Factors, OpCall, integers, require, rule_for
from .rule import Rule

# Trailing dims of the first operand that one decomposition works on; of those before them all have the same.
_OF_MATRICES = (
    "cholesky", "eig", "eigh", "geqp3", "geqrf", "hessenberg", "householder_product", "lu", "qr",
    "schur", "svd", "symmetric_product", "tridiagonal",
)  # fmt: skip
_OF_VECTORS = ("lu_pivots_to_permutation", "tridiagonal_solve")


@rule_for(*_OF_MATRICES)
def of_matrices(call: OpCall) -> Rule:
    return batched(call, 2)


@rule_for(*_OF_VECTORS)
def of_vectors(call: OpCall) -> Rule:
    return batched(call, 1)


@rule_for("fft")
def fft(call: OpCall) -> Rule:
    return batched(call, len(integers(call.attrs["fft_lengths"])))


@rule_for("triangular_solve")
def triangular_solve(call: OpCall) -> Rule:
    """a x = b, or x a = b: each column, or row, of b is solved alone. Linear in b."""
    matrix, given = call.operands[0].shape, call.operands[1].shape
    require(len(matrix) == len(given) and matrix[:-2] == given[:-2])
    factors = Factors()
    batch = factors.like(matrix[:-2])
    whole = factors.wholes(matrix[-2:])
    solved = factors.whole(matrix[-1])
    rows, columns = given[-2:]
    left = call.attrs["left_side"] is True
    tail = (solved, factors.new(columns)) if left else (factors.new(rows), solved)
    side = (*batch, *tail)
    return factors.rule([(*batch, *whole), side], [side], call.linear)


def batched(call: OpCall, trailing: int) -> Rule:
    """What comes before the first operand's last `trailing` dims stands first in every shape."""
    many = call.operands[0].rank - trailing
    require(many >= 0)
    batch = call.operands[0].shape[:many]
    require(all(kind.shape[:many] == batch for kind in (*call.operands, *call.results)))
    factors = Factors()
    shared = factors.like(batch)
    operands, results = (
        [(*shared, *factors.wholes(kind.shape[many:])) for kind in side]
        for side in (call.operands, call.results)
    )
    return factors.rule(operands, results, call.linear)
